"""What a step costs, and what one lifecycle at a time costs, in commits."""

import asyncio
import time
from pathlib import Path
from typing import Any

import msgspec

from aiotracker import open_tracker

from .contenders.floor import Engine, records
from .contenders.ours import lifecycles
from .lifecycle import measure
from .numbers import milliseconds, percentile, significant
from .process import Gate

__all__ = ["alternate", "step_cost"]

BLOCK = 20  # lifecycles, then as many pairs of bare commits, in turns


async def alternate(gate: Gate, folder: str, tasks: int) -> dict[str, Any]:
    """One lifecycle at a time, in turns with two bare commits (thread hop, append, fdatasync) on the same disk."""
    ours: list[float] = []
    bare: list[float] = []
    ran: list[tuple[str, int]] = []
    engine = Engine(Path(folder, "bare.jsonl"))
    async with open_tracker(f"file:{folder}/store") as tracker:
        gate.ready()
        for first in range(0, tasks, BLOCK):
            ids = [f"task-{number}" for number in range(first, min(tasks, first + BLOCK))]
            latencies, _ = await lifecycles(tracker, ids, 1, ran)
            ours += latencies
            for task_id in ids:
                claimed, succeeded = records(task_id)
                begin = time.perf_counter()
                await engine.commit(claimed)
                await engine.commit(succeeded)
                bare.append(time.perf_counter() - begin)
                await asyncio.sleep(0)
    engine.close()
    p50, bare_p50 = percentile(ours, 50), percentile(bare, 50)
    assert p50 is not None
    assert bare_p50 is not None
    return {
        "tasks": tasks,
        "p50_ms": milliseconds(p50),
        "p99_ms": milliseconds(percentile(ours, 99)),
        "two_bare_commits_p50_ms": milliseconds(bare_p50),
        "two_bare_commits_p99_ms": milliseconds(percentile(bare, 99)),
        "ratio": significant(p50 / bare_p50),
    }


def step_cost(folder: Path, concurrency: int) -> dict[str, Any]:
    """As many tasks as coroutines, without and with one step: commits that a task waits for, read from the log."""
    plain = measure(f"file:{folder}/plain", concurrency, concurrency, 1)
    stepped = measure(f"file:{folder}/stepped", concurrency, concurrency, 1, step=True)
    plain_lines, plain_marks = _commits(folder / "plain")
    stepped_lines, stepped_marks = _commits(folder / "stepped")
    return {
        "concurrency": concurrency,
        "commits_of_a_task": plain_lines / concurrency,
        "commits_of_a_task_with_a_step": stepped_lines / concurrency,
        "commits_more": (stepped_lines - plain_lines) / concurrency,
        "commits_in_all": plain_marks,
        "commits_in_all_with_a_step": stepped_marks,
        "seconds": plain["seconds"],
        "seconds_with_a_step": stepped["seconds"],
    }


def _commits(store: Path) -> tuple[int, int]:
    """Records and commits in a store's log. A task's record is at most once in a commit."""
    lines = marks = 0
    for log in sorted(store.glob("log-*.jsonl")):
        for line in log.read_bytes().splitlines():
            fields = msgspec.json.decode(line)
            marks += "mark" in fields
            lines += "id" in fields
    return lines, marks
