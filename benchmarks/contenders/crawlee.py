"""crawlee: its request queue on the file system, one JSON file a request."""

import asyncio
import time

from crawlee import Request
from crawlee.configuration import Configuration
from crawlee.storage_clients import FileSystemStorageClient
from crawlee.storages import RequestQueue

from ..process import Gate
from . import Lifecycles

__all__ = ["BIAS", "run"]

BIAS = (
    "RequestQueue on FileSystemStorageClient: add_request for all, then fetch_next_request and "
    "mark_request_as_handled, from 100 coroutines; they take turns inside, and more are slower. Adding all first is "
    "the faster order for it. Writes a file and renames it, never syncs. One process only."
)
COROUTINES = 100


async def run(gate: Gate, folder: str, tasks: int, concurrency: int) -> Lifecycles:
    queue = await RequestQueue.open(
        storage_client=FileSystemStorageClient(), configuration=Configuration(storage_dir=folder)
    )
    seconds: dict[str, float] = {}
    numbers = iter(range(tasks))

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
