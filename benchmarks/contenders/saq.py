"""SAQ: a job queue on Redis for asyncio."""

import asyncio
import time
from typing import Any

from redis.asyncio import Redis
from saq import Worker
from saq.queue.redis import RedisQueue

from ..process import Gate
from . import Lifecycles

__all__ = ["BIAS", "run"]

BIAS = (
    "Queue.enqueue for all from that many coroutines, then a Worker of that concurrency until all have run. "
    "At least once; a job's record is kept for ten minutes. Latencies are of the enqueueing alone. Same server, same "
    "settings."
)


async def run(gate: Gate, url: str, tasks: int, concurrency: int) -> Lifecycles:
    # Its own limit of 20 operations at once is slower.
    queue = RedisQueue(Redis.from_url(url), max_concurrent_ops=concurrency)
    await queue.connect()
    done = asyncio.Event()
    latencies: list[float] = []
    numbers = iter(range(tasks))
    left = tasks

    async def nothing(context: Any, *, number: int) -> None:
        pass

    async def count(context: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            done.set()

    async def enqueue() -> None:
        for number in numbers:
            begin = time.perf_counter()
            await queue.enqueue("nothing", key=f"task-{number}", number=number)
            latencies.append(time.perf_counter() - begin)

    worker: Worker[Any] = Worker(queue, [("nothing", nothing)], concurrency=concurrency, after_process=count)
    worker.SIGNALS = []
    gate.ready()
    start = time.monotonic()
    await asyncio.gather(*(enqueue() for _ in range(concurrency)))
    working = asyncio.create_task(worker.start())
    await done.wait()
    end = time.monotonic()
    await worker.stop()
    await working
    await queue.disconnect()
    return {"start": start, "end": end, "latencies": latencies, "bias": BIAS}
