"""The floor on S3: aioboto3's PUTs of two records for each task, and nothing else."""

import asyncio
import os
import time

import aioboto3  # type: ignore[import-untyped]  # ships no types
from botocore.config import Config  # type: ignore[import-untyped]  # ships no types

from ..process import Gate
from .floor import records
from .ours_s3 import SeenOnS3

__all__ = ["BIAS", "run"]

BIAS = (
    "aioboto3 as it is, but for a connection for each coroutine: encodes and PUTs two records for each task, without a "
    "condition. No rules, no leases, nothing is looked at."
)


async def run(gate: Gate, url: str, bucket: str, prefix: str, tasks: int, concurrency: int) -> SeenOnS3:
    latencies: list[float] = []
    config = Config(max_pool_connections=concurrency)
    async with aioboto3.Session().client("s3", endpoint_url=url, config=config) as client:

        async def lifecycle(name: str) -> None:
            for record in records(name):
                await client.put_object(Bucket=bucket, Key=f"{prefix}/{name}.json", Body=record.encode())

        await asyncio.gather(*(lifecycle(f"first-{number}") for number in range(concurrency)))  # connects
        numbers = iter(range(tasks))

        async def one_after_another() -> None:
            for number in numbers:
                begin = time.perf_counter()
                await lifecycle(f"task-{number}")
                latencies.append(time.perf_counter() - begin)

        gate.ready()
        before = os.times()
        start = time.monotonic()
        await asyncio.gather(*(one_after_another() for _ in range(concurrency)))
        end = time.monotonic()
        after = os.times()
    return {
        "start": start,
        "end": end,
        "latencies": latencies,
        "bias": BIAS,
        "requests": {"PutObject": 2 * tasks},
        "cpu_seconds": after.user + after.system - before.user - before.system,
    }
