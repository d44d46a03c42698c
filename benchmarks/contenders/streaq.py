"""streaQ: a job queue on Redis Streams for asyncio."""

import asyncio
import time

from streaq import Worker

from ..process import Gate
from . import Lifecycles

__all__ = ["BIAS", "run"]

BIAS = (
    "Task.enqueue for all from that many coroutines, then a Worker of that concurrency in burst mode. At least once; "
    "a result is kept for five minutes. Latencies are of the enqueueing alone. Same server, same settings."
)


async def run(gate: Gate, url: str, tasks: int, concurrency: int) -> Lifecycles:
    worker = Worker(redis_url=url, concurrency=concurrency, handle_signals=False)
    ran = 0

    @worker.task
    async def nothing(number: int) -> None:
        nonlocal ran
        ran += 1

    latencies: list[float] = []
    numbers = iter(range(tasks))

    async def enqueue() -> None:
        for number in numbers:
            begin = time.perf_counter()
            await nothing.enqueue(number)
            latencies.append(time.perf_counter() - begin)

    async with worker:
        gate.ready()
        start = time.monotonic()
        await asyncio.gather(*(enqueue() for _ in range(concurrency)))
    worker.burst = True
    await worker.run_async()  # opens the worker by itself
    end = time.monotonic()
    if ran != tasks:
        raise RuntimeError(f"streaQ ran {ran} of {tasks} tasks")
    return {"start": start, "end": end, "latencies": latencies, "bias": BIAS}
