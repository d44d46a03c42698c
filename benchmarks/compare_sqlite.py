"""aiotracker and its peers on SQLite, in turns: `python -m benchmarks compare sqlite`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from .compare import in_turns, medians, ratio, run_peer
from .lifecycle import measure as measure_ours
from .machine import fresh
from .process import MissingPackageError
from .report import figure, say

__all__ = ["PEERS", "measure"]

PEERS: Final = ("huey", "persist_queue", "crawlee_sqlite")
TARGETS: Final = {"huey": 10, "persist_queue": 10, "crawlee_sqlite": 30}
SLOW: Final = {"crawlee_sqlite": 2_000}  # ids at the most: what is compared is a rate
PROCESSES: Final = 4


def measure(
    folder: Path, *, tasks: int, concurrency: int, rounds: int, peers: tuple[str, ...] = PEERS
) -> dict[str, Any]:
    """Runs all contenders in turns, for some rounds; medians. Ours with `synchronous=full`.

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
    several = f"ours, {PROCESSES} processes"
    turns: dict[str, Callable[[Path], dict[str, Any]]] = {
        "ours": lambda made: measure_ours(f"sqlite:{made}/jobs.db", tasks, concurrency, 1),
        several: lambda made: measure_ours(f"sqlite:{made}/jobs.db", tasks, concurrency, PROCESSES),
    }
    for name in peers:
        number = min(tasks, SLOW.get(name, tasks))
        turns[name] = lambda made, name=name, number=number: run_peer(name, made, number, concurrency)  # type: ignore[misc]  # mypy infers no type for the defaults
    runs: dict[str, list[dict[str, Any]]] = {}
    missing: list[str] = []
    for round_, (name, turn) in in_turns(turns, rounds):
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
        say(f"round {round_} of {rounds}: {name}: {result['per_second']:,.0f}/s")
    results = {name: medians(of_one) for name, of_one in runs.items()}
    ours = results["ours"]
    ratios = {name: ratio(ours, results[name]) for name in peers if name in results}
    at = f"{ours['tasks']:,} new ids, {ours['concurrency']:,} coroutines"
    return {
        "ours": ours,
        "peers": {name: results[name] for name in peers if name in results},
        "ratios": ratios,
        "missing": missing,
        "sections": {f"processes_{PROCESSES}": results[several] | {"ratio_one_process": ratio(results[several], ours)}},
        "figures": [
            *(figure(f"times {name} ({at})", ratios.get(name), "at least", TARGETS[name]) for name in peers),
            figure(f"{PROCESSES} processes, double claims", results[several]["double_claims"], "at most", 0),
        ],
    }
