"""aiotracker on PostgreSQL, through its public interface."""

import time

from aiotracker import Status
from aiotracker.backends.postgres import PostgresTracker

from ..process import Gate
from . import Lifecycles
from .ours import ids_of, lifecycles

__all__ = ["BIAS", "run"]

BIAS = (
    "`async with tracker.run(id)` for a new id: two acknowledged writes, each committed (synchronous_commit = on) "
    "before its await returns; those that wait share a transaction. One connection for all of it."
)


async def run(
    gate: Gate, dsn: str, prefix: str, tasks: int, concurrency: int, index: int = 0, processes: int = 1
) -> Lifecycles:
    ids = list(ids_of(prefix, tasks, index, processes))
    ran: list[tuple[str, int]] = []
    async with PostgresTracker(dsn) as tracker:
        gate.ready()
        start = time.monotonic()
        latencies, refused = await lifecycles(tracker, ids, concurrency, ran)
        end = time.monotonic()
        counts = await tracker.count(prefix=f"{prefix}/")
    if processes == 1 and counts[Status.SUCCEEDED] != tasks:
        raise RuntimeError(f"not all tasks have succeeded: {counts}")
    seen = {"start": start, "end": end, "latencies": latencies, "bias": BIAS}
    return seen | {"ran": ran, "refused": refused}  # type: ignore[return-value]  # what is more, for several processes
