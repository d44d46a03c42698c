"""aiotracker on DynamoDB, through its public interface."""

import time

from aiotracker.backends.dynamodb import DynamoDBTracker

from ..process import Gate
from .ours import Seen, _disagreeing, ids_of, lifecycles

__all__ = ["BIAS", "run"]

BIAS = (
    "`async with tracker.run(id)` for a new id: two conditional PutItem, one after the other, with the full record, "
    "lease and fence, and an index by status. One client for all coroutines."
)


async def run(
    gate: Gate, url: str, table: str, prefix: str, tasks: int, concurrency: int, index: int = 0, processes: int = 1
) -> Seen:
    ids = list(ids_of(prefix, tasks, index, processes))
    ran: list[tuple[str, int]] = []
    async with DynamoDBTracker(table, endpoint_url=url, connections=max(64, concurrency)) as tracker:
        await tracker.load("nothing")  # the first request makes the first connection
        before = tracker.requests
        gate.ready()
        start = time.monotonic()
        latencies, refused = await lifecycles(tracker, ids, concurrency, ran)
        end = time.monotonic()
        requests = tracker.requests - before
        wrong = await _disagreeing(tracker, ran)
    return {
        "start": start,
        "end": end,
        "latencies": latencies,
        "ran": ran,
        "refused": refused,
        "disagreeing": wrong,
        "bias": BIAS,
        "requests": requests,
    }
