"""aiotracker and its peers in turns: `python -m benchmarks compare file`."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from . import imports, steps
from .contenders import PEERS
from .lifecycle import measure as measure_ours
from .lifecycle import summarised
from .machine import fresh
from .numbers import middle, significant
from .process import MissingPackageError, run
from .report import Figure, figure, say

__all__ = ["PEERS", "Turn", "measure", "medians", "ratio", "run_peer", "take_turns"]

FEWER = 100  # coroutines of the second comparison
PROCESSES = (2, 4)
ONE_AT_A_TIME = 1000  # lifecycles at the most

Turn = Callable[[Path], dict[str, Any]]
"""One run of one contender, in a fresh folder."""


def measure(
    folder: Path, *, tasks: int, concurrency: int, rounds: int, peers: tuple[str, ...] = PEERS
) -> dict[str, Any]:
    """Runs all contenders in turns, for some rounds; medians.

    Args:
        folder: On a real disk; each run has a fresh folder in it.
        tasks: New ids of each run.
        concurrency: Coroutines.
        rounds: How often.
        peers: Modules of `benchmarks.contenders`.

    Returns:
        `ours`, `peers` by name, `ratios` of `per_second` by the peer's name, `sections`, `figures`, and `missing`:
        the peers that are not installed.
    """
    turns: dict[str, Turn] = {
        "ours": partial(_ours, tasks, concurrency, 1),
        f"ours, {FEWER} coroutines": partial(_ours, tasks, FEWER, 1),
    }
    for processes in PROCESSES:
        turns[f"ours, {processes} processes"] = partial(_ours, tasks, concurrency, processes)
    turns |= {name: partial(run_peer, name, tasks, concurrency) for name in peers}
    runs, missing = take_turns(turns, folder, rounds)
    results = {name: medians(of_one) for name, of_one in runs.items()}
    result: dict[str, Any] = {
        "ours": results["ours"],
        "peers": {name: results[name] for name in peers if name in results},
        "ratios": {name: ratio(results["ours"], results[name]) for name in peers if name in results},
        "missing": missing,
        "sections": _sections(folder, results, concurrency, tasks, rounds),
    }
    result["figures"] = _figures(result)
    return result


def take_turns(
    turns: Mapping[str, Turn], folder: Path, rounds: int
) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    """Runs all, one after another, for some rounds.

    Args:
        turns: By contender.
        folder: Each run has a fresh folder in it.
        rounds: How often.

    Returns:
        The results of each contender, and the names of those that are not installed.
    """
    runs: dict[str, list[dict[str, Any]]] = {}
    missing: list[str] = []
    for number, (name, turn) in _in_turns(turns, rounds):
        if name in missing:
            continue
        with fresh(folder) as made:
            try:
                result = turn(made)
            except MissingPackageError as exc:
                say(f"{name}: {exc}")
                missing.append(name)
                continue
        runs.setdefault(name, []).append(result)
        say(f"round {number} of {rounds}: {name}: {result['per_second']:,.0f}/s")
    return runs, missing


def _in_turns(turns: Mapping[str, Turn], rounds: int) -> Iterator[tuple[int, tuple[str, Turn]]]:
    order = list(turns.items())
    for number in range(rounds):
        # Each round begins with somebody else, so that nobody always comes after the same neighbour.
        first = number * len(order) // rounds
        for turn in order[first:] + order[:first]:
            yield number + 1, turn


def _ours(tasks: int, concurrency: int, processes: int, folder: Path) -> dict[str, Any]:
    return measure_ours(f"file:{folder}", tasks, concurrency, processes)


def run_peer(name: str, tasks: int, concurrency: int, folder: Path) -> dict[str, Any]:
    target = f"benchmarks.contenders.{name}:run"
    seen = run(target, folder=str(folder), tasks=tasks, concurrency=concurrency)
    return summarised(name, tasks, concurrency, 1, [seen])


def medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    result = dict(runs[0])
    for name in ("seconds", "per_second", "p50_ms", "p99_ms"):
        result[name] = significant(middle([one[name] for one in runs]))
    for name in ("double_claims", "refused"):
        if name in result:
            result[name] = sum(one[name] for one in runs)
    result["rounds"] = [one["per_second"] for one in runs]
    return result


def ratio(one: dict[str, Any], other: dict[str, Any] | None) -> float | None:
    return None if other is None else significant(one["per_second"] / other["per_second"])


def _sections(
    folder: Path, results: dict[str, dict[str, Any]], concurrency: int, tasks: int, rounds: int
) -> dict[str, dict[str, Any]]:
    fewer = results[f"ours, {FEWER} coroutines"]
    say("one at a time, beside bare commits")
    with fresh(folder) as made:
        one = run("benchmarks.steps:alternate", folder=str(made), tasks=min(tasks, ONE_AT_A_TIME))
    say("the cost of a step")
    with fresh(folder) as made:
        step = steps.step_cost(made, min(concurrency, tasks))
    say("importing")
    sections: dict[str, dict[str, Any]] = {
        "one_at_a_time": one,
        "fewer_coroutines": fewer | {"ratio_abstract_tracker": ratio(fewer, results.get("abstract_tracker"))},
    }
    for processes in PROCESSES:
        several = results[f"ours, {processes} processes"]
        sections[f"processes_{processes}"] = several | {"ratio_one_process": ratio(several, results["ours"])}
    sections["step"] = step
    sections["import"] = imports.measure(max(3, rounds))
    return sections


def _figures(result: dict[str, Any]) -> list[Figure]:
    ratios, sections = result["ratios"], result["sections"]
    mine = result["ours"]
    at = f"{mine['tasks']:,} new ids, {mine['concurrency']:,} coroutines"
    figures = [
        figure(f"times abstract-tracker ({at})", ratios.get("abstract_tracker"), "at least", 15),
        figure(f"times crawlee ({at})", ratios.get("crawlee"), "at least", 45),
        figure(f"of the floor ({at})", ratios.get("floor"), "at least", 0.25),
        figure(
            f"times abstract-tracker ({FEWER} coroutines)",
            sections["fewer_coroutines"]["ratio_abstract_tracker"],
            "at least",
            10,
        ),
        figure("one at a time, times two bare commits (p50)", sections["one_at_a_time"]["ratio"], "at most", 3),
    ]
    for processes in PROCESSES:
        several = sections[f"processes_{processes}"]
        figures += [
            figure(f"{processes} processes, of one process", several["ratio_one_process"], "at least", 0.6),
            figure(f"{processes} processes, double claims", several["double_claims"], "at most", 0),
        ]
    step = sections["step"]
    return [
        *figures,
        figure(f"commits of a step ({step['concurrency']:,} coroutines)", step["commits_more"], "at most", 1),
        figure("import aiotracker", sections["import"]["milliseconds"], "at most", 150, "ms"),
        figure("drivers imported", len(sections["import"]["drivers"]), "at most", 0),
    ]
