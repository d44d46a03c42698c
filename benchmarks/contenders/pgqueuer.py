"""pgqueuer: a job queue on PostgreSQL, with asyncpg."""

import asyncio
import time

import asyncpg  # type: ignore[import-untyped]  # ships no types
from pgqueuer import Job, PgQueuer, Queries
from pgqueuer.types import QueueExecutionMode

from ..process import Gate
from . import Lifecycles

__all__ = ["BIAS", "run"]

BIAS = (
    "enqueue one by one from all coroutines, then a queue manager in drain mode that takes 100 jobs at once and logs "
    "their ends together. Pool of 20 connections. Its tables are durable, a job's row is deleted at its end and a line "
    "is logged instead."
)
CONNECTIONS = 20
BATCH = 100


async def run(gate: Gate, dsn: str, tasks: int, concurrency: int) -> Lifecycles:
    async with asyncpg.create_pool(dsn, min_size=CONNECTIONS, max_size=CONNECTIONS) as pool:
        queries = Queries.from_asyncpg_pool(pool)
        await queries.install()
        manager = PgQueuer.from_asyncpg_pool(pool)
        begun: dict[bytes, float] = {}
        seconds: list[float] = []

        @manager.entrypoint("nothing")
        async def nothing(job: Job) -> None:
            assert job.payload is not None
            seconds.append(time.perf_counter() - begun[job.payload])

        numbers = iter(range(tasks))

        async def enqueue() -> None:
            for number in numbers:
                payload = b"%d" % number
                begun[payload] = time.perf_counter()
                await queries.enqueue("nothing", payload)

        gate.ready()
        start = time.monotonic()
        await asyncio.gather(*(enqueue() for _ in range(concurrency)))
        await manager.run(batch_size=BATCH, mode=QueueExecutionMode.drain)
        end = time.monotonic()
        if await queries.queue_size():
            raise RuntimeError("pgqueuer left jobs")
    if len(seconds) != tasks:
        raise RuntimeError(f"pgqueuer ran {len(seconds)} of {tasks} jobs")
    return {"start": start, "end": end, "latencies": seconds, "bias": BIAS}
