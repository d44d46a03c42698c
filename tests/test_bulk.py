"""Changes of many tasks: in windows, interrupted, and asked for again."""

import asyncio
import logging
from typing import Any

import pytest

from aiotracker import MemoryTracker, StoreUnavailableError
from aiotracker.bulk import WINDOW, in_windows

TASKS = 3 * WINDOW // 2


class Flaky(MemoryTracker[Any, Any]):
    """Answers so many changes, and then no more."""

    answers = TASKS * 10

    def update(self, *args: Any, **options: Any) -> "asyncio.Future[Any]":
        self.answers -= 1
        if self.answers < 0:
            raise StoreUnavailableError("gone")
        return super().update(*args, **options)


async def test_a_bulk_change_that_was_interrupted_goes_on_when_it_is_asked_for_again() -> None:
    async with Flaky() as tracker:
        await tracker.add_many(f"t{number}" for number in range(TASKS))
        tracker.answers = WINDOW + 17
        with pytest.raises(StoreUnavailableError):
            await tracker.ignore(status="pending", reason="first")
        assert (await tracker.count())["ignored"] == WINDOW + 17
        tracker.answers = TASKS
        assert await tracker.ignore(status="pending", reason="second") == TASKS - WINDOW - 17
        changes = [task.changes async for task in tracker.find()]
        assert all(len(some) == 1 for some in changes), "nothing is changed twice"
        assert sum(some[0].reason == "first" for some in changes) == WINDOW + 17


async def test_what_was_done_goes_to_the_log_with_who_and_why_also_when_it_was_interrupted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "aiotracker")
    async with Flaky(worker="w1") as tracker:
        await tracker.add_many(["a", "b", "c"])
        assert await tracker.reset("a") == 0
        assert await tracker.purge("a", "b", force=True, reason="by mistake", by="anna") == 2
        tracker.answers = 0
        with pytest.raises(StoreUnavailableError):
            await tracker.ignore("c")
    told = [(record.getMessage(), vars(record)["verb"], vars(record)["by"]) for record in caplog.records]
    assert told == [
        ("reset: 0 tasks, by w1", "reset", "w1"),
        ("purge: 2 tasks, by anna: by mistake", "purge", "anna"),
        ("ignore: 0 tasks, by w1", "ignore", "w1"),
    ]


async def test_never_more_than_a_window_is_under_way() -> None:
    under_way = most = 0

    async def change(number: int) -> bool:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0)
        under_way -= 1
        return number % 2 == 0

    changed = 0
    async for done in in_windows(range(3 * WINDOW), change):
        changed += done
    assert changed == 3 * WINDOW // 2
    assert WINDOW // 2 <= most <= WINDOW
