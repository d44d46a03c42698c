"""The floor: what any log with a group commit has to do, and nothing else.

For each lifecycle two of aiotracker's own records are encoded and appended to one file. All that wait share an append
and an fdatasync, on a thread of their own. There are no rules, no leases that are kept, no index, no other processes,
no checksums, and nobody could read it back safely.
"""

import asyncio
import os
import threading
import time
from collections import deque
from datetime import UTC, datetime, timedelta
from pathlib import Path
from queue import SimpleQueue

import msgspec

from aiotracker import End, Lease, Status, Task

from ..process import Gate
from . import Lifecycles

__all__ = ["BIAS", "Engine", "records", "run"]

BIAS = (
    "The bare engine: encodes two records, group commit on one thread, append, fdatasync at each commit. "
    "No rules, index, checksums or other processes."
)
NOW = datetime.now(UTC)
LATER = NOW + timedelta(seconds=60)


class Engine:
    """Group commit to one file, on one thread."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[tuple[asyncio.Future[None], Task]] = deque()
        self._wake: SimpleQueue[bool] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def commit(self, task: Task) -> "asyncio.Future[None]":
        """Done when the record is on the disk."""
        future = self._loop.create_future()
        self._waiting.append((future, task))
        self._wake.put(True)
        return future

    def close(self) -> None:
        """Ends the thread; nothing may be waiting."""
        self._wake.put(False)
        self._thread.join()
        os.close(self._fd)

    def _run(self) -> None:
        encode = msgspec.json.Encoder().encode
        while self._wake.get():
            batch = [self._waiting.popleft() for _ in range(len(self._waiting))]
            if batch:
                os.write(self._fd, b"".join([encode(task) + b"\n" for _, task in batch]))
                os.fdatasync(self._fd)
                self._loop.call_soon_threadsafe(self._deliver, batch)

    @staticmethod
    def _deliver(batch: "list[tuple[asyncio.Future[None], Task]]") -> None:
        for future, _ in batch:
            future.set_result(None)


def records(task_id: str) -> tuple[Task, Task]:
    """What a claim and a success store."""
    token = f"0123456789ab-{task_id}"
    lease = Lease(token, "host:1234:0123", NOW, LATER, 60.0, "00000000-0000-0000-0000-000000000000", 123456.789)
    claimed = Task(
        id=task_id,
        status=Status.IN_PROGRESS,
        attempts=1,
        fence=1_700_000_000_000,
        create_time=NOW,
        update_time=NOW,
        start_time=NOW,
        lease=lease,
        create_id=token,
        write_id=token,
    )
    succeeded = Task(
        id=task_id,
        status=Status.SUCCEEDED,
        attempts=1,
        fence=1_700_000_000_000,
        create_time=NOW,
        update_time=NOW,
        start_time=NOW,
        finish_time=NOW,
        ends=(End(1_700_000_000_000, token, "succeeded"),),
        create_id=token,
        write_id=token,
    )
    return claimed, succeeded


async def run(gate: Gate, folder: str, tasks: int, concurrency: int) -> Lifecycles:
    engine = Engine(Path(folder, "log.jsonl"))
    latencies: list[float] = []
    numbers = iter(range(tasks))

    async def one_after_another() -> None:
        for number in numbers:
            begin = time.perf_counter()
            claimed, succeeded = records(f"task-{number}")
            await engine.commit(claimed)
            await engine.commit(succeeded)
            latencies.append(time.perf_counter() - begin)

    gate.ready()
    start = time.monotonic()
    await asyncio.gather(*(one_after_another() for _ in range(concurrency)))
    end = time.monotonic()
    engine.close()
    return {"start": start, "end": end, "latencies": latencies, "bias": BIAS}
