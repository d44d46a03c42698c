"""aiotracker and its peers on SQLite, in turns: `python -m benchmarks compare sqlite`."""

from functools import partial
from pathlib import Path
from typing import Any, Final

from .compare import Turn, medians, ratio, run_peer, take_turns
from .lifecycle import measure as measure_ours
from .report import figure

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
    turns: dict[str, Turn] = {
        "ours": lambda made: measure_ours(f"sqlite:{made}/jobs.db", tasks, concurrency, 1),
        several: lambda made: measure_ours(f"sqlite:{made}/jobs.db", tasks, concurrency, PROCESSES),
    }
    for name in peers:
        turns[name] = partial(run_peer, name, min(tasks, SLOW.get(name, tasks)), concurrency)
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
