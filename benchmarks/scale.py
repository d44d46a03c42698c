"""A store with a million tasks: `python -m benchmarks scale file`."""

import asyncio
import gc
import itertools
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiotracker import BaseTracker, FileTracker, Status

from .machine import fresh
from .memory import peak, resident
from .numbers import milliseconds, percentile, significant
from .process import Gate, run, together
from .report import Figure, figure, say

__all__ = ["compact", "fill", "look", "measure", "tidy"]

RUN = 10  # every tenth task is run
FAILED = 100  # and every hundredth fails
WORKERS = 1000  # coroutines that run them
CLAIMERS = 20  # in each of two processes, during the compaction
BEFORE = 1.0  # seconds of claims before the compaction, and after it
PAGE = 100
CALLS = 5


def measure(folder: Path, *, tasks: int) -> dict[str, Any]:
    """Fills a store, then opens, queries and compacts it.

    Args:
        folder: On a real disk; the store is made in it, and removed at the end.
        tasks: How many.

    Returns:
        All in one object, with `figures`.
    """
    with fresh(folder) as made:
        store = str(made / "store")
        say(f"adding {tasks:,} tasks, running every {RUN}th, failing every {FAILED}th")
        filled = run("benchmarks.scale:fill", store=store, tasks=tasks)
        before = _bytes_on_disk(store)
        say("opening and looking")
        looked = run("benchmarks.scale:look", store=store)
        say("compacting while two processes claim")
        targets = [("benchmarks.scale:compact", {"store": store, "compacts": compacts}) for compacts in (True, False)]
        with together(targets) as (compacting, other):
            compacted = compacting.answer()
            other.wait_ready()
            other.go()
            beside = other.answer()
        say("compacting in peace")
        tidied = run("benchmarks.scale:tidy", store=store)
        after = _bytes_on_disk(store)
    begin, end = compacted.pop("begin"), compacted.pop("end")
    here, there = compacted["claims"], beside["claims"]
    result = {
        "contender": "aiotracker file",
        "tasks": tasks,
        "fill": filled,
        "open": looked,
        "disk": {
            "bytes": before,
            "bytes_a_task": significant(before / tasks),
            "bytes_after_compaction": after,
            "bytes_a_task_after_compaction": significant(after / tidied["tasks"]),
        },
        "compaction": {
            "seconds": significant(end - begin),
            "seconds_in_peace": tidied["seconds"],
            "same_process": _stops(here, begin, end),
            "other_process": _stops(there, begin, end),
        },
    }
    result["figures"] = _figures(result, tasks)
    return result


def _stops(claims: list[tuple[float, float]], begin: float, end: float) -> dict[str, Any]:
    during = [left - asked for asked, left in claims if asked < end and left > begin]
    outside = [left - asked for asked, left in claims if not (asked < end and left > begin)]
    return {
        "claims_during": len(during),
        "longest_ms": milliseconds(max(during, default=None)),
        "p50_ms": milliseconds(percentile(during, 50)),
        "p99_ms": milliseconds(percentile(during, 99)),
        "longest_without_ms": milliseconds(max(outside, default=None)),
    }


def _figures(result: dict[str, Any], tasks: int) -> list[Figure]:
    opened, compaction = result["open"], result["compaction"]
    stops = [compaction[where]["longest_ms"] for where in ("same_process", "other_process")]
    longest = None if None in stops else max(stops)
    return [
        figure(f"opening {tasks:,} tasks", opened["seconds"], "at most", 8, "s"),
        figure("memory", opened["bytes_a_task"], "at most", 1000, "bytes a task"),
        figure("count()", opened["count_ms"], "at most", 50, "ms"),
        figure(f"first {PAGE} of find(status='failed')", opened["find_ms"], "at most", 50, "ms"),
        figure("longest stop of a claim by a compaction", longest, "at most", 1000, "ms"),
    ]


def _bytes_on_disk(store: str) -> int:
    return sum(entry.stat().st_size for entry in os.scandir(store))


async def fill(gate: Gate, store: str, tasks: int) -> dict[str, Any]:
    """Adds all, then runs a share of them."""
    async with FileTracker(store) as tracker:
        gate.ready()
        begin = time.monotonic()
        added = await tracker.add_many(f"page/{number:07}" for number in range(tasks))
        adding = time.monotonic() - begin
        numbers = iter(range(0, tasks, RUN))

        async def one_after_another() -> None:
            for number in numbers:
                try:
                    async with tracker.run(f"page/{number:07}") as task:
                        if number % FAILED == 0:
                            raise ValueError("no such page")
                        task.result = {"bytes": number}
                except ValueError:
                    pass  # recorded

        begin = time.monotonic()
        await asyncio.gather(*(one_after_another() for _ in range(WORKERS)))
        running = time.monotonic() - begin
    ran = len(range(0, tasks, RUN))
    return {
        "added": added,
        "added_per_second": significant(added / adding),
        "ran": ran,
        "ran_per_second": significant(ran / running),
    }


async def look(gate: Gate, store: str) -> dict[str, Any]:
    """Opens a store in a fresh process, and asks it."""
    gate.ready()
    tracker: FileTracker = FileTracker(store)
    await asyncio.to_thread(int)  # the thread that opening uses is not the store's memory
    gc.collect()
    before = resident()
    begin = time.monotonic()
    await tracker.open()
    seconds = time.monotonic() - begin
    gc.collect()
    memory = resident() - before
    counting: list[float] = []
    finding: list[float] = []
    for _ in range(CALLS):
        begin = time.perf_counter()
        counts = await tracker.count()
        counting.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        page = [task async for task in tracker.find(status=Status.FAILED, limit=PAGE)]
        finding.append(time.perf_counter() - begin)
    await tracker.aclose()
    tasks = sum(counts.values())
    return {
        "seconds": significant(seconds),
        "bytes_a_task": significant(memory / tasks),
        "peak_bytes_a_task": significant((peak() - before) / tasks),
        # The first call, as a person's command makes it, not the best of many.
        "count_ms": milliseconds(counting[0]),
        "count_again_ms": milliseconds(percentile(counting[1:], 50)),
        "find_ms": milliseconds(finding[0]),
        "find_again_ms": milliseconds(percentile(finding[1:], 50)),
        "counted": tasks,
        "found": len(page),
    }


async def compact(gate: Gate, store: str, compacts: bool) -> dict[str, Any]:
    """Claims all the time, and compacts, or waits until another process has."""
    tracker: FileTracker = FileTracker(store)
    begin = end = 0.0
    async with tracker, _claiming(tracker) as claims:
        await asyncio.to_thread(gate.ready)
        await asyncio.sleep(BEFORE)
        if compacts:
            begin = time.monotonic()
            done = await tracker.compact()
            end = time.monotonic()
            if not done:
                raise RuntimeError("the store was being compacted already")
            await asyncio.sleep(BEFORE)
        else:
            await asyncio.to_thread(gate.ready)
    return {"begin": begin, "end": end, "claims": claims}


async def tidy(gate: Gate, store: str) -> dict[str, Any]:
    """Compacts while nobody else is there."""
    tracker: FileTracker = FileTracker(store)
    async with tracker:
        gate.ready()
        begin = time.monotonic()
        done = await tracker.compact()
        seconds = time.monotonic() - begin
        tasks = sum((await tracker.count()).values())
    if not done:
        raise RuntimeError("the store was being compacted already")
    return {"seconds": significant(seconds), "tasks": tasks}


@asynccontextmanager
async def _claiming(tracker: BaseTracker) -> AsyncIterator[list[tuple[float, float]]]:
    """New ids, claimed and succeeded one after another by some coroutines: when each was asked for, and when it ran."""
    claims: list[tuple[float, float]] = []
    numbers = itertools.count()
    ended = False

    async def one_after_another() -> None:
        while not ended:
            asked = time.monotonic()
            async with tracker.run(f"{tracker.worker}/{next(numbers)}"):
                claims.append((asked, time.monotonic()))

    claimers = [asyncio.create_task(one_after_another()) for _ in range(CLAIMERS)]
    try:
        yield claims
    finally:
        ended = True
        await asyncio.gather(*claimers)
