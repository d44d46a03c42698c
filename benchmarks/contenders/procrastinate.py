"""procrastinate: a task queue on PostgreSQL."""

import asyncio
import time

from procrastinate import App, PsycopgConnector

from ..process import Gate
from . import Lifecycles

__all__ = ["BIAS", "run"]

BIAS = (
    "defer_async one by one from all coroutines, then a worker of the same concurrency, wait=False, until the queue is "
    "empty: no notification or poll is waited for. Pool of 20 connections. Records how each job ended; no results, no "
    "lease that is renewed per job (a worker's heartbeat instead)."
)
CONNECTIONS = 20


async def run(gate: Gate, dsn: str, tasks: int, concurrency: int) -> Lifecycles:
    app = App(connector=PsycopgConnector(conninfo=dsn, min_size=CONNECTIONS, max_size=CONNECTIONS))
    begun: dict[int, float] = {}
    seconds: list[float] = []

    @app.task(name="nothing")
    async def nothing(number: int) -> None:
        seconds.append(time.perf_counter() - begun[number])

    async with app.open_async():
        await app.schema_manager.apply_schema_async()
        numbers = iter(range(tasks))

        async def defer() -> None:
            for number in numbers:
                begun[number] = time.perf_counter()
                await nothing.defer_async(number=number)

        gate.ready()
        start = time.monotonic()
        await asyncio.gather(*(defer() for _ in range(concurrency)))
        await app.run_worker_async(
            concurrency=concurrency, wait=False, listen_notify=False, install_signal_handlers=False
        )
        end = time.monotonic()
        (left,) = [
            row["count"]
            for row in await app.connector.execute_query_all_async(
                "SELECT count(*) AS count FROM procrastinate_jobs WHERE status <> 'succeeded'"
            )
        ]
    if left or len(seconds) != tasks:
        raise RuntimeError(f"procrastinate left {left} jobs")
    return {"start": start, "end": end, "latencies": seconds, "bias": BIAS}
