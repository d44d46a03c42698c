"""aiotracker and its peers on PostgreSQL, in turns: `python -m benchmarks compare postgres`."""

import asyncio
import secrets
from functools import partial
from pathlib import Path
from typing import Any

from aiotracker.backends.postgres import PostgresTracker
from tests.services.postgres import postgres_server

from .compare import Turn, medians, ratio, take_turns
from .lifecycle import summarised
from .process import run, together
from .report import figure

__all__ = ["PEERS", "measure"]

PEERS = ("procrastinate", "pgqueuer")
PROCESSES = 4


def measure(
    folder: Path, *, tasks: int, concurrency: int, rounds: int, peers: tuple[str, ...] = PEERS
) -> dict[str, Any]:
    """Runs all contenders in turns, for some rounds, each on a server of its own with fsync on; medians.

    Args:
        folder: On a real disk; the servers' files are in it.
        tasks: New ids of each run.
        concurrency: Coroutines.
        rounds: How often.
        peers: Modules of `benchmarks.contenders`.

    Returns:
        As `compare.measure`.
    """
    turns: dict[str, Turn] = {
        "ours": lambda made: _ours(made, tasks, concurrency, 1),
        "processes": lambda made: _ours(made, tasks, concurrency, PROCESSES),
    }
    turns |= {name: partial(_peer, name, tasks, concurrency) for name in peers}
    runs, missing = take_turns(turns, folder, rounds)
    results = {name: medians(of_one) for name, of_one in runs.items()}
    ratios = {name: ratio(results["ours"], results[name]) for name in peers if name in results}
    at = f"{tasks:,} new ids, {concurrency:,} coroutines"
    return {
        "ours": results["ours"],
        "peers": {name: results[name] for name in peers if name in results},
        "ratios": ratios,
        "missing": missing,
        "sections": {f"processes_{PROCESSES}": results["processes"]},
        "figures": [
            figure(f"times procrastinate ({at})", ratios.get("procrastinate"), "at least", 8),
            figure(f"times pgqueuer ({at})", ratios.get("pgqueuer"), "at least", 1.5),
            figure(f"{PROCESSES} processes, double claims", results["processes"]["double_claims"], "at most", 0),
        ],
    }


def _ours(folder: Path, tasks: int, concurrency: int, processes: int) -> dict[str, Any]:
    with postgres_server(folder=str(folder.resolve())) as server:
        asyncio.run(PostgresTracker(server.dsn).init())
        arguments = {"dsn": server.dsn, "prefix": secrets.token_hex(4), "tasks": tasks, "concurrency": concurrency}
        targets = [
            ("benchmarks.contenders.ours_postgres:run", arguments | {"index": index, "processes": processes})
            for index in range(processes)
        ]
        with together(targets) as children:
            seen = [child.answer() for child in children]
    ran = [task_id for one in seen for task_id, _ in one["ran"]]
    result = summarised("aiotracker postgresql", tasks, concurrency, processes, seen)
    return result | {"double_claims": len(ran) - len(set(ran)), "refused": sum(one["refused"] for one in seen)}


def _peer(name: str, tasks: int, concurrency: int, folder: Path) -> dict[str, Any]:
    with postgres_server(folder=str(folder.resolve())) as server:
        seen = run(f"benchmarks.contenders.{name}:run", dsn=server.dsn, tasks=tasks, concurrency=concurrency)
    return summarised(name, tasks, concurrency, 1, [seen])
