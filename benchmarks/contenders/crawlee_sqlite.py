"""crawlee: its request queue on SQLite."""

import asyncio
import time

from crawlee import Request
from crawlee.configuration import Configuration
from crawlee.storage_clients import SqlStorageClient
from crawlee.storages import RequestQueue

from ..process import Gate
from . import Lifecycles

__all__ = ["BIAS", "run"]

BIAS = (
    "RequestQueue on SqlStorageClient with SQLite: add_request for all, then fetch_next_request and "
    "mark_request_as_handled, from 20 coroutines; more are not faster. Leases by time, no fence. "
    "It opens SQLite with journal_mode WAL and synchronous NORMAL, which syncs at checkpoints only."
)
COROUTINES = 20


async def run(gate: Gate, folder: str, tasks: int, concurrency: int) -> Lifecycles:
    client = SqlStorageClient(connection_string=f"sqlite+aiosqlite:///{folder}/crawlee.db")
    seconds: dict[str, float] = {}
    numbers = iter(range(tasks))
    async with client:
        queue = await RequestQueue.open(storage_client=client, configuration=Configuration(storage_dir=folder))

        async def add() -> None:
            for number in numbers:
                begin = time.perf_counter()
                request = Request.from_url(f"https://example.org/{number}")
                await queue.add_request(request)
                seconds[request.unique_key] = time.perf_counter() - begin

        async def handle() -> None:
            while True:
                begin = time.perf_counter()
                request = await queue.fetch_next_request()
                if request is None:
                    return
                await queue.mark_request_as_handled(request)
                seconds[request.unique_key] += time.perf_counter() - begin

        gate.ready()
        start = time.monotonic()
        await asyncio.gather(*(add() for _ in range(min(concurrency, COROUTINES))))
        await asyncio.gather(*(handle() for _ in range(min(concurrency, COROUTINES))))
        end = time.monotonic()
        if (await queue.get_metadata()).handled_request_count != tasks:
            raise RuntimeError("crawlee did not handle all requests")
    return {"start": start, "end": end, "latencies": list(seconds.values()), "bias": BIAS}
