"""A store with a bit of everything."""

import asyncio
from collections.abc import AsyncIterator
from importlib.util import find_spec
from typing import Any

import pytest

from aiotracker import BaseTracker, MemoryTracker, Retry, RunningTask
from tests.conftest import require


@pytest.fixture(autouse=True)
def extra() -> None:
    require(find_spec("duckdb") and find_spec("pyarrow"), 'duckdb and pyarrow are not installed; pip install ".[all]"')


async def fill(tracker: BaseTracker[Any, Any], *, tasks: int = 12) -> None:
    """Of every four tasks one fails, one is exhausted, one succeeds, one is pending; each that ran has a step."""

    async def body(task: RunningTask[Any, Any]) -> None:
        await task.step("fetch", asyncio.sleep, 0, f"page of {task.id}")
        if task.data["kind"] < 2:
            raise (ValueError if task.data["kind"] else KeyError)(f"no number in {task.id!r}")
        task.note = "done"
        task.result = {"length": task.data["number"]}

    for number in range(tasks):
        kind, task_id = number % 4, f"page/{number:05}"
        data = {"number": number, "kind": kind, "country": "DE" if number % 2 else "FR"}
        if kind == 3:
            await tracker.add(task_id, data, priority=number)
            continue
        try:
            async with tracker.run(task_id, data=data, retry=Retry(1 if kind == 1 else 2)) as task:
                await body(task)
        except (ValueError, KeyError):
            pass


@pytest.fixture
async def tracker() -> AsyncIterator[MemoryTracker]:
    async with MemoryTracker(worker="me") as tracker:
        await fill(tracker)
        yield tracker
