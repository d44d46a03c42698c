"""aiotracker, through its public interface."""

import asyncio
import time
from collections.abc import Iterable
from typing import NotRequired

from aiotracker import BaseTracker, Status, TaskUnavailableError, open_tracker

from ..process import Gate
from . import Lifecycles

__all__ = ["BIAS", "Seen", "ids_of", "lifecycles", "run"]

BIAS = (
    "`async with tracker.run(id)` for a new id: two acknowledged writes, each on the disk (fdatasync) before its "
    "await returns, with the full record, lease, fence and checksums, safe among processes."
)
SHARED = 50  # every 50th id is tried by all processes, so that a double claim can happen at all
WINDOW = 1000  # records that are read back at once


class Seen(Lifecycles):
    """What one of our processes saw."""

    ran: list[tuple[str, int]]  # id and fence of each body that ran
    refused: int  # claims of ids that another process had
    disagreeing: list[str]  # ids whose record is not what this process did
    requests: NotRequired[int]  # to the store, where that counts them


def ids_of(prefix: str, tasks: int, index: int, processes: int) -> Iterable[str]:
    """The ids that one of several processes tries: its share, and those that all of them try."""
    for number in range(tasks):
        if number % processes == index or number % SHARED == 0:
            yield f"{prefix}/{number}"


async def lifecycles(
    tracker: BaseTracker, ids: Iterable[str], concurrency: int, ran: list[tuple[str, int]], *, step: bool = False
) -> tuple[list[float], int]:
    """Runs each id once, from that many coroutines: seconds of each lifecycle, and how many were refused."""
    latencies: list[float] = []
    refused = 0
    left = iter(ids)

    async def one_after_another() -> None:
        nonlocal refused
        for task_id in left:
            begin = time.perf_counter()
            try:
                async with tracker.run(task_id) as task:
                    ran.append((task_id, task.fence))
                    if step:
                        await task.step("step", _nothing)
            except TaskUnavailableError:
                refused += 1
            else:
                latencies.append(time.perf_counter() - begin)

    await asyncio.gather(*(one_after_another() for _ in range(concurrency)))
    return latencies, refused


async def run(
    gate: Gate,
    store: str,
    prefix: str,
    tasks: int,
    concurrency: int,
    index: int = 0,
    processes: int = 1,
    step: bool = False,
) -> Seen:
    ids = list(ids_of(prefix, tasks, index, processes))
    ran: list[tuple[str, int]] = []
    async with open_tracker(store) as tracker:
        before = _requests(tracker)
        gate.ready()
        start = time.monotonic()
        latencies, refused = await lifecycles(tracker, ids, concurrency, ran, step=step)
        end = time.monotonic()
        seen: Seen = {
            "start": start,
            "end": end,
            "latencies": latencies,
            "ran": ran,
            "refused": refused,
            "disagreeing": [],
            "bias": BIAS,
        }
        after = _requests(tracker)
        if before is not None and after is not None:
            seen["requests"] = after - before
        seen["disagreeing"] = await _disagreeing(tracker, ran)
    return seen


def _requests(tracker: BaseTracker) -> int | None:
    """What a tracker counts whose store is paid by the request; others have no such attribute."""
    requests = getattr(tracker, "requests", None)
    return requests if isinstance(requests, int) else None


async def _disagreeing(tracker: BaseTracker, ran: list[tuple[str, int]]) -> list[str]:
    wrong: list[str] = []
    for first in range(0, len(ran), WINDOW):
        window = ran[first : first + WINDOW]
        for (task_id, fence), task in zip(
            window, await asyncio.gather(*(tracker.load(task_id) for task_id, _ in window)), strict=True
        ):
            if task is None or (task.status, task.attempts, task.fence) != (Status.SUCCEEDED, 1, fence):
                wrong.append(task_id)
    return wrong


async def _nothing() -> None:
    pass
