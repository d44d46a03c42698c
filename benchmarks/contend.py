"""Many claimers on few tasks, and a holder that is killed: `python -m benchmarks contend`."""

import asyncio
import random
import secrets
import time
from datetime import UTC, datetime
from statistics import median
from typing import Any

from aiotracker import Retry, TaskLockedError, open_tracker

from .numbers import milliseconds, percentile, significant
from .process import Child, Gate, together
from .report import say

__all__ = ["claim", "hold", "measure", "take_over"]


def measure(
    store: str,
    *,
    claimers: int,
    tasks: int,
    processes: int,
    seconds: float,
    hold_ms: float,
    kills: int,
    kill_lease: float,
) -> dict[str, Any]:
    """Claims a few ids again and again, by force, from many coroutines; then kills holders.

    Args:
        store: URL.
        claimers: Coroutines in each process.
        tasks: Ids that they fight for.
        processes: On one store.
        seconds: How long.
        hold_ms: How long each winner holds its task, in milliseconds.
        kills: Holders that are killed with SIGKILL, one after another; 0 for a store in memory.
        kill_lease: Of these holders, in seconds.

    Returns:
        `double_claims` counts bodies of one id that ran while another one ran, or whose fence was not larger than
        that of the body before. `takeover` counts from the kill, and from the end of the lease.

    Raises:
        ValueError: `memory:` cannot be shared by processes.
    """
    in_memory = store.startswith("memory:")
    if in_memory and processes > 1:
        raise ValueError("memory: is one process's own; use --processes 1")
    prefix = secrets.token_hex(4)
    arguments = {
        "store": store,
        "prefix": prefix,
        "tasks": tasks,
        "claimers": claimers,
        "seconds": seconds,
        "hold": hold_ms / 1000,
    }
    say(f"{processes} x {claimers} claimers on {tasks} tasks for {seconds:g} s")
    with together([("benchmarks.contend:claim", arguments)] * processes) as children:
        seen = [child.answer() for child in children]
    won = [latency for one in seen for latency in one["won"]]
    refused = [latency for one in seen for latency in one["refused"]]
    return {
        "contender": f"aiotracker {store.partition(':')[0]}",
        "claimers": claimers,
        "tasks": tasks,
        "processes": processes,
        "seconds": seconds,
        "hold_ms": hold_ms,
        "won": _percentiles(won, seconds),
        "refused": _percentiles(refused, seconds),
        "double_claims": _double_claims([span for one in seen for span in one["spans"]]),
        "takeover": None if in_memory or not kills else _take_overs(store, f"{prefix}/victim", kills, kill_lease),
    }


def _percentiles(latencies: list[float], seconds: float) -> dict[str, float | int | None]:
    return {
        "claims": len(latencies),
        "per_second": significant(len(latencies) / seconds),
        "p50_ms": milliseconds(percentile(latencies, 50)),
        "p90_ms": milliseconds(percentile(latencies, 90)),
        "p99_ms": milliseconds(percentile(latencies, 99)),
        "max_ms": milliseconds(max(latencies, default=None)),
    }


def _double_claims(spans: list[list[Any]]) -> int:
    double = 0
    last: dict[str, tuple[float, int]] = {}  # by id: when the latest body left, and its fence
    for task_id, fence, entered, left in sorted(spans, key=lambda span: float(span[2])):
        left_before, fence_before = last.get(task_id, (0.0, 0))
        double += entered < left_before or fence <= fence_before
        last[task_id] = max(left, left_before), max(fence, fence_before)
    return double


def _take_overs(store: str, victim: str, kills: int, lease: float) -> dict[str, Any]:
    after_kill: list[float] = []
    after_expiry: list[float] = []
    for number in range(kills):
        arguments = {"store": store, "task_id": f"{victim}-{number}", "lease": lease}
        with (
            Child("benchmarks.contend:hold", **arguments) as holder,
            Child("benchmarks.contend:take_over", **arguments) as follower,
        ):
            holder.wait_ready()
            follower.wait_ready()
            follower.go()  # for a first try, while the holder lives
            follower.wait_ready()
            holder.kill()
            killed = time.monotonic()
            follower.go()
            answer = follower.answer()
        after_kill.append(answer["entered"] - killed)
        after_expiry.append(answer["after_expiry"])
        say(f"killed {number + 1} of {kills}: taken over after {after_kill[-1]:.3f} s")
    return {
        "kills": kills,
        "lease_seconds": lease,
        "seconds": significant(median(after_kill)),
        "seconds_max": significant(max(after_kill)),
        "after_expiry_ms": milliseconds(median(after_expiry)),
        "after_expiry_max_ms": milliseconds(max(after_expiry)),
    }


async def claim(
    gate: Gate, store: str, prefix: str, tasks: int, claimers: int, seconds: float, hold: float
) -> dict[str, Any]:
    """One process of claimers."""
    won: list[float] = []
    refused: list[float] = []
    spans: list[tuple[str, int, float, float]] = []
    async with open_tracker(store) as tracker:

        async def fight() -> None:
            while (begin := time.monotonic()) < deadline:
                task_id = f"{prefix}/{random.randrange(tasks)}"
                try:
                    async with tracker.run(task_id, force=True) as task:
                        entered = time.monotonic()
                        await asyncio.sleep(hold)
                        spans.append((task_id, task.fence, entered, time.monotonic()))
                    won.append(entered - begin)
                except TaskLockedError:
                    refused.append(time.monotonic() - begin)
                    await asyncio.sleep(0)  # a store in memory never waits, and others want their turn

        gate.ready()
        deadline = time.monotonic() + seconds
        await asyncio.gather(*(fight() for _ in range(claimers)))
    return {"won": won, "refused": refused, "spans": spans}


async def hold(gate: Gate, store: str, task_id: str, lease: float) -> dict[str, Any]:
    """Claims a task, says so, and waits to be killed."""
    async with open_tracker(store, lease=lease) as tracker, tracker.run(task_id):
        await asyncio.to_thread(gate.ready)
    return {}


async def take_over(gate: Gate, store: str, task_id: str, lease: float) -> dict[str, Any]:
    """Is refused while the holder lives, then claims as soon as its refusal said that it may."""
    async with open_tracker(store, lease=lease, retry=Retry(max_attempts=10)) as tracker:
        gate.ready()
        expires: datetime | None = None
        while True:
            try:
                async with tracker.run(task_id):
                    entered, entered_at = time.monotonic(), datetime.now(UTC)
                    break
            except TaskLockedError as exc:
                refusal = exc
            if expires is None:
                await asyncio.to_thread(gate.ready)
            else:
                await asyncio.sleep(refusal.retry_after or 0)
            assert refusal.task.lease is not None
            expires = refusal.task.lease.expires_at
    if expires is None:
        raise RuntimeError(f"{task_id} was not held")
    return {"entered": entered, "after_expiry": (entered_at - expires).total_seconds()}
