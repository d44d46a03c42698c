"""Work on threads: nobody goes on while it still writes."""

import asyncio
import threading

import pytest

from aiotracker.analytics._extra import in_thread


async def test_a_cancelled_caller_waits_for_the_thread_however_often_it_is_cancelled() -> None:
    started, goes_on = threading.Event(), threading.Event()
    ended: list[str] = []

    def write() -> None:
        started.set()
        assert goes_on.wait(60)
        ended.append("written")

    async def caller() -> None:
        try:
            await in_thread(write)
        finally:
            ended.append("removed")

    task = asyncio.create_task(caller())
    assert await asyncio.to_thread(started.wait, 60)
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0.001)
    assert not task.done()
    goes_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended == ["written", "removed"]


async def test_what_can_be_interrupted_is_and_its_error_is_not_raised() -> None:
    interrupted = threading.Event()

    def query() -> None:
        assert interrupted.wait(60)
        raise ValueError("interrupted")

    task = asyncio.create_task(in_thread(query, interrupt=interrupted.set))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_errors_are_those_of_the_function() -> None:
    def fail() -> None:
        raise KeyError("a")

    with pytest.raises(KeyError):
        await in_thread(fail)
