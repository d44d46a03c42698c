"""aiotracker and its peer on DynamoDB, in turns: `python -m benchmarks compare dynamodb`."""

import asyncio
import secrets
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

from aiotracker.backends.dynamodb import DynamoDBTracker
from tests.services.dynalite import dynalite_server
from tests.services.moto import use_credentials

from .compare import Turn, medians, ratio, take_turns
from .lifecycle import summarised
from .numbers import significant
from .process import run, together
from .report import figure

__all__ = ["PEERS", "measure"]

PEERS: Final = ("pynamodb_mate",)
PROCESSES: Final = 4
TABLE: Final = "tasks"


def measure(
    folder: Path, *, tasks: int, concurrency: int, rounds: int, peers: tuple[str, ...] = PEERS
) -> dict[str, Any]:
    """Runs all contenders in turns, for some rounds, each on a dynalite of its own, which keeps all in memory; medians.

    Args:
        folder: Not needed.
        tasks: New ids of each run.
        concurrency: Coroutines.
        rounds: How often.
        peers: Modules of `benchmarks.contenders`.

    Returns:
        As `compare.measure`.
    """
    use_credentials()
    several = f"ours, {PROCESSES} processes"
    turns: dict[str, Turn] = {
        "ours": _on_server(lambda url: _ours(url, tasks, concurrency, 1)),
        several: _on_server(lambda url: _ours(url, tasks, concurrency, PROCESSES)),
    }
    turns |= {name: _on_server(partial(_peer, name, tasks, concurrency)) for name in peers}
    runs, missing = take_turns(turns, folder, rounds)
    results = {name: medians(of_one) for name, of_one in runs.items()}
    ours = results["ours"]
    ratios = {name: ratio(ours, results[name]) for name in peers if name in results}
    at = f"{tasks:,} new ids, {concurrency:,} coroutines"
    return {
        "ours": ours,
        "peers": {name: results[name] for name in peers if name in results},
        "ratios": ratios,
        "missing": missing,
        "sections": {f"processes_{PROCESSES}": results[several] | {"ratio_one_process": ratio(results[several], ours)}},
        "figures": [
            *(figure(f"times {name} ({at})", ratios.get(name), "at least", 1.5) for name in peers),
            figure("requests of a new lifecycle", ours["requests_a_lifecycle"], "at most", 2),
            figure(f"{PROCESSES} processes, double claims", results[several]["double_claims"], "at most", 0),
        ],
    }


def _on_server(turn: Callable[[str], dict[str, Any]]) -> Turn:
    def served(_: Path) -> dict[str, Any]:
        with dynalite_server() as url:
            return turn(url)

    return served


def _ours(url: str, tasks: int, concurrency: int, processes: int) -> dict[str, Any]:
    asyncio.run(DynamoDBTracker(TABLE, endpoint_url=url).create_table())
    arguments = {
        "url": url,
        "table": TABLE,
        "prefix": secrets.token_hex(4),
        "tasks": tasks,
        "concurrency": concurrency,
        "processes": processes,
    }
    targets = [("benchmarks.contenders.ours_dynamodb:run", arguments | {"index": index}) for index in range(processes)]
    with together(targets) as children:
        seen = [child.answer() for child in children]
    ran = [task_id for one in seen for task_id, _ in one["ran"]]
    wrong = sum(len(one["disagreeing"]) for one in seen)
    return summarised("aiotracker dynamodb", tasks, concurrency, processes, seen) | {
        "double_claims": len(ran) - len(set(ran)) + wrong,
        "refused": sum(one["refused"] for one in seen),
        "requests_a_lifecycle": significant(sum(one["requests"] for one in seen) / len(ran)),
    }


def _peer(name: str, tasks: int, concurrency: int, url: str) -> dict[str, Any]:
    seen = run(
        f"benchmarks.contenders.{name}:run",
        url=url,
        table=f"{TABLE}-{name}",
        prefix=secrets.token_hex(4),
        tasks=tasks,
        concurrency=concurrency,
    )
    return summarised(name, tasks, concurrency, 1, [seen])
