"""aiotracker's log on S3, through its public interface."""

import asyncio
import itertools
import time
from typing import TypedDict

import aioboto3  # type: ignore[import-untyped]  # ships no types

from aiotracker import TaskUnavailableError
from aiotracker.backends.s3_log import S3LogTracker

from ..process import Gate
from .ours import _disagreeing
from .ours_s3 import SeenOnS3, measured

__all__ = ["BIAS", "Share", "run", "share"]

BIAS = (
    "`async with tracker.run(id)` for a new id, with the full record, lease and fence. What waits while a PUT is under "
    "way goes into the next one, so this is as fast as there are coroutines."
)
SHARED = 10  # every 10th id is tried by all processes, so that a double claim can happen at all
PUT_PAUSE = 0.05  # seconds between two bare PUTs beside the log


class Share(TypedDict):
    """What one of several processes on one store saw."""

    start: float
    end: float
    claims: list[float]  # seconds from asking to holding
    first_claims: list[float]  # those of them that were asked for at the start, when all processes begin at once
    ran: list[tuple[str, int]]  # id and fence of each body that ran
    refused: int  # claims of ids that another process had
    disagreeing: list[str]  # ids whose record is not what this process did
    puts: list[float]  # seconds of bare PUTs at the same time
    requests: int


async def run(gate: Gate, url: str, bucket: str, prefix: str, tasks: int, concurrency: int) -> SeenOnS3:
    return await measured(gate, S3LogTracker(bucket, prefix, endpoint_url=url), tasks, concurrency, BIAS)


async def share(gate: Gate, url: str, bucket: str, prefix: str, index: int, concurrency: int, seconds: float) -> Share:
    """One of several processes, which all claim new ids for some seconds, as many as they can."""
    claims: list[float] = []
    first_claims: list[float] = []
    ran: list[tuple[str, int]] = []
    puts: list[float] = []
    refused = 0
    numbers = itertools.count()

    async def claim() -> None:
        nonlocal refused
        while time.monotonic() < until:
            number = next(numbers)
            begin = time.perf_counter()
            try:
                async with tracker.run(f"all-{number}" if number % SHARED == 0 else f"{index}-{number}") as task:
                    claims.append(time.perf_counter() - begin)
                    if number < concurrency:
                        first_claims.append(claims[-1])
                    ran.append((task.id, task.fence))
            except TaskUnavailableError:
                refused += 1

    async def put() -> None:
        while time.monotonic() < until:
            begin = time.perf_counter()
            await client.put_object(Bucket=bucket, Key=f"{prefix}-put/{index}-{len(puts)}", Body=b"{}")
            puts.append(time.perf_counter() - begin)
            await asyncio.sleep(PUT_PAUSE)

    async with (
        aioboto3.Session().client("s3", endpoint_url=url) as client,
        S3LogTracker(bucket, prefix, endpoint_url=url) as tracker,
    ):
        await client.put_object(Bucket=bucket, Key=f"{prefix}-put/first-{index}", Body=b"{}")  # connects
        async with tracker.run(f"first-{index}"):
            pass
        requests = tracker.requests
        gate.ready()
        start = time.monotonic()
        until = start + seconds
        await asyncio.gather(put(), *(claim() for _ in range(concurrency)))
        end = time.monotonic()
        requests = tracker.requests - requests
        disagreeing = await _disagreeing(tracker, ran)
    return {
        "start": start,
        "end": end,
        "claims": claims,
        "first_claims": first_claims,
        "ran": ran,
        "refused": refused,
        "disagreeing": disagreeing,
        "puts": puts,
        "requests": requests,
    }
