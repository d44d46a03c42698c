"""aiotracker and its peers on Redis, in turns: `python -m benchmarks compare redis`."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

from tests.services.redis import RedisServer

from .compare import Turn, medians, ratio, take_turns
from .lifecycle import measure as measure_ours
from .lifecycle import summarised
from .process import run
from .report import figure

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
    turns: dict[str, Turn] = {
        "ours": _on_server(lambda url: measure_ours(url, tasks, concurrency, 1)),
        several: _on_server(lambda url: measure_ours(url, tasks, concurrency, PROCESSES)),
    }
    turns |= {name: _on_server(partial(_run_peer, name, tasks, concurrency)) for name in peers}
    runs, missing = take_turns(turns, folder, rounds)
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


def _on_server(turn: Callable[[str], dict[str, Any]]) -> Turn:
    def served(folder: Path) -> dict[str, Any]:
        server = RedisServer(folder)
        try:
            server.start()
            return turn(server.url)
        finally:
            server.kill()

    return served


def _run_peer(name: str, tasks: int, concurrency: int, url: str) -> dict[str, Any]:
    seen = run(f"benchmarks.contenders.{name}:run", url=url, tasks=tasks, concurrency=concurrency)
    return summarised(name, tasks, concurrency, 1, [seen])
