"""aiotracker and its peers on Redis, in turns: `python -m benchmarks compare redis`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from tests.services.redis import RedisServer

from .compare import in_turns, medians, ratio
from .lifecycle import measure as measure_ours
from .lifecycle import summarised
from .machine import fresh
from .process import MissingPackageError, run
from .report import figure, say

__all__ = ["PEERS", "measure"]

PEERS: Final = ("saq", "arq", "streaq")
TARGETS: Final = {"saq": 4, "arq": 4, "streaq": 3}
PROCESSES: Final = 4


def measure(
    folder: Path, *, tasks: int, concurrency: int, rounds: int, peers: tuple[str, ...] = PEERS
) -> dict[str, Any]:
    """Runs all contenders in turns, for some rounds; medians. Each run has a fresh redis-server with `appendonly yes`
    and `appendfsync always`.

    Args:
        folder: On a real disk; each server has a fresh folder in it.
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
        "ours": lambda made: _on_server(made, lambda url: measure_ours(url, tasks, concurrency, 1)),
        several: lambda made: _on_server(made, lambda url: measure_ours(url, tasks, concurrency, PROCESSES)),
    }
    for name in peers:
        turns[name] = lambda made, name=name: _on_server(made, lambda url: _run_peer(name, url, tasks, concurrency))  # type: ignore[misc]  # mypy infers no type for the default
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


def _on_server(folder: Path, turn: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    server = RedisServer(folder)
    try:
        server.start()
        return turn(server.url)
    finally:
        server.kill()


def _run_peer(name: str, url: str, tasks: int, concurrency: int) -> dict[str, Any]:
    seen = run(f"benchmarks.contenders.{name}:run", url=url, tasks=tasks, concurrency=concurrency)
    return summarised(name, tasks, concurrency, 1, [seen])
