"""arq: a job queue on Redis for asyncio."""

import asyncio
import time
from typing import Any

from arq import create_pool, func
from arq.connections import RedisSettings
from arq.worker import Worker

from ..process import Gate
from . import Lifecycles

__all__ = ["BIAS", "run"]

BIAS = (
    "enqueue_job for all from that many coroutines, then a Worker in burst mode with that many jobs at once, which "
    "does not pause between its looks at the queue. At least once; a result is kept for an hour. Latencies are of the "
    "enqueueing alone. Same server, same settings."
)


async def nothing(ctx: dict[Any, Any], *args: Any, **kwargs: Any) -> None:
    """The body."""


async def run(gate: Gate, url: str, tasks: int, concurrency: int) -> Lifecycles:
    settings = RedisSettings.from_dsn(url)
    pool = await create_pool(settings)
    latencies: list[float] = []
    numbers = iter(range(tasks))

    async def enqueue() -> None:
        for number in numbers:
            begin = time.perf_counter()
            await pool.enqueue_job("nothing", number, _job_id=f"task-{number}")
            latencies.append(time.perf_counter() - begin)

    worker = Worker(
        [func(nothing, name="nothing")],
        redis_pool=pool,
        burst=True,
        max_jobs=concurrency,
        poll_delay=0.0,
        handle_signals=False,
        log_results=False,
    )
    gate.ready()
    start = time.monotonic()
    await asyncio.gather(*(enqueue() for _ in range(concurrency)))
    await worker.main()
    end = time.monotonic()
    if worker.jobs_complete != tasks:
        raise RuntimeError(f"arq completed {worker.jobs_complete} of {tasks} jobs")
    await worker.close()
    return {"start": start, "end": end, "latencies": latencies, "bias": BIAS}
