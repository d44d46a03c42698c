"""aiotracker on S3, one object a task, through its public interface."""

import asyncio
import os
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

from aiotracker import BaseTracker, TaskUnavailableError
from aiotracker.backends.s3 import S3Tracker
from aiotracker.backends.s3_log import S3LogTracker

from ..process import Gate
from . import Lifecycles

__all__ = ["BIAS", "SeenOnS3", "count", "known_ids", "lifecycles", "measured", "run"]

BIAS = (
    "`async with tracker.run(id)` for a new id: two conditional PUTs, one after the other, with the full record, lease "
    "and fence. Requests go through the client's HTTP session, put together without botocore's models."
)


class SeenOnS3(Lifecycles):
    """What a contender saw on S3."""

    requests: dict[str, int]  # by operation
    cpu_seconds: float  # of the contender's process, for all of them


async def lifecycles(tracker: BaseTracker, ids: Iterable[str], concurrency: int) -> list[float]:
    """Runs each id once, from that many coroutines: seconds of each lifecycle."""
    latencies: list[float] = []
    left = iter(ids)

    async def one_after_another() -> None:
        for task_id in left:
            begin = time.perf_counter()
            async with tracker.run(task_id):
                pass
            latencies.append(time.perf_counter() - begin)

    await asyncio.gather(*(one_after_another() for _ in range(concurrency)))
    return latencies


async def run(gate: Gate, url: str, bucket: str, prefix: str, tasks: int, concurrency: int) -> SeenOnS3:
    tracker = S3Tracker(bucket, prefix, endpoint_url=url, connections=concurrency)
    return await measured(gate, tracker, tasks, concurrency, BIAS)


async def measured(gate: Gate, tracker: S3Tracker | S3LogTracker, tasks: int, concurrency: int, bias: str) -> SeenOnS3:
    """New ids, from that many coroutines."""
    async with tracker:
        await lifecycles(tracker, (f"first-{number}" for number in range(concurrency)), concurrency)  # connects
        requests = Counter(tracker.requests_by_operation)
        gate.ready()
        before = os.times()
        start = time.monotonic()
        latencies = await lifecycles(tracker, (f"task-{number}" for number in range(tasks)), concurrency)
        end = time.monotonic()
        after = os.times()
        requests = Counter(tracker.requests_by_operation) - requests
    return {
        "start": start,
        "end": end,
        "latencies": latencies,
        "bias": bias,
        "requests": dict(requests),
        "cpu_seconds": after.user + after.system - before.user - before.system,
    }


async def known_ids(gate: Gate, url: str, bucket: str, prefix: str, tasks: int) -> dict[str, float]:
    """Requests of a lifecycle on ids that this tracker, or another one, has added."""
    found: dict[str, float] = {}
    async with (
        S3Tracker(bucket, prefix, endpoint_url=url) as one,
        S3Tracker(bucket, prefix, endpoint_url=url) as two,
    ):
        gate.ready()
        for name, runner in (("added_here", one), ("added_elsewhere", two)):
            ids = [f"{name}-{number}" for number in range(tasks)]
            await one.add_many(ids)
            if runner is two:
                await one.add("first")
                await lifecycles(two, ["first"], 1)  # the first one tells that ids may be there already
            before = runner.requests
            await lifecycles(runner, ids, 16)
            found[name] = (runner.requests - before) / tasks
        try:
            async with two.run("added_here-0"):
                raise RuntimeError("a succeeded task was run again")
        except TaskUnavailableError:
            pass
    return found


async def count(gate: Gate, url: str, bucket: str, prefix: str, tasks: int, changed: int) -> dict[str, Any]:
    """Requests of a second `count()`, after some tasks were changed elsewhere."""
    async with (
        S3Tracker(bucket, prefix, endpoint_url=url) as one,
        S3Tracker(bucket, prefix, endpoint_url=url) as two,
    ):
        await one.add_many(f"task-{number}" for number in range(tasks))
        gate.ready()
        await two.count()
        await one.ignore(*(f"task-{number}" for number in range(changed)))
        before = dict(two.requests_by_operation)
        begin = time.perf_counter()
        counted = (await two.count()).total()
        seconds = time.perf_counter() - begin
        after = two.requests_by_operation
    if counted != tasks:
        raise RuntimeError(f"{counted} of {tasks} tasks were counted")
    return {
        "tasks": tasks,
        "changed": changed,
        "seconds": seconds,
        "gets": after["GetObject"] - before["GetObject"],
        "lists": after["ListObjectsV2"] - before["ListObjectsV2"],
    }
