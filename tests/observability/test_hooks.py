"""How hooks are called, and what is there without them."""

import asyncio
import contextvars
import gc
import inspect
import logging
import re
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

import aiotracker
from aiotracker import (
    Claimed,
    Ended,
    Event,
    FileTracker,
    InvalidValueError,
    MemoryTracker,
    Retry,
    RunEvent,
    RunningTask,
    SqliteTracker,
    TaskIgnoredError,
    TaskSucceededError,
    TaskUnavailableError,
    events,
    open_tracker,
)
from aiotracker.running import Run
from aiotracker.testing import FakeClock

from .conftest import Seen, fail, one

KINDS = [kind for kind in vars(events).values() if isinstance(kind, type) and issubclass(kind, Event)]


@pytest.fixture
async def tracker(seen: Seen, clock: FakeClock) -> AsyncIterator[MemoryTracker]:
    async with MemoryTracker(hooks=[seen], clock=clock, worker="me", retry=Retry(max_attempts=2)) as tracker:
        yield tracker


# -- how hooks are called


async def test_hooks_are_called_on_the_loops_thread_in_the_order_of_happening(tmp_path: Path) -> None:
    seen: list[tuple[int, Event]] = []
    now = threading.get_ident
    async with FileTracker(tmp_path, hooks=[lambda event: seen.append((now(), event))]) as tracker:
        await asyncio.gather(*(tracker.call(f"job-{n}", one) for n in range(50)))
    assert {thread for thread, _ in seen} == {threading.get_ident()}
    times = [event.time for _, event in seen]
    assert times == sorted(times)
    kinds: dict[str, list[str]] = {}
    for _, event in seen:
        if isinstance(event, RunEvent):
            kinds.setdefault(event.task_id, []).append(type(event).__name__)
    assert kinds == {f"job-{n}": ["Claimed", "Succeeded"] for n in range(50)}


async def test_what_a_hook_sets_in_the_context_is_seen_by_the_body_and_taken_back_at_its_end(clock: FakeClock) -> None:
    current: contextvars.ContextVar[str] = contextvars.ContextVar("current", default="nobody")
    tokens: dict[str, contextvars.Token[str]] = {}

    def hook(event: Event) -> None:
        if isinstance(event, Claimed):
            tokens[event.token] = current.set(event.task_id)
        elif isinstance(event, Ended):
            current.reset(tokens.pop(event.token))

    inside: list[str] = []

    async def body(task: RunningTask) -> None:
        await asyncio.sleep(0)
        inside.append(current.get())

    async with MemoryTracker(hooks=[hook], clock=clock) as tracker:
        await tracker.work(body, ids=["a", "b", "c"], concurrency=3)
        async with tracker.run("d"):
            assert current.get() == "d"
        assert current.get() == "nobody"
    assert sorted(inside) == ["a", "b", "c"]
    assert tokens == {}


class Harmful:
    """A hook that raises each time."""

    def __init__(self, error: BaseException) -> None:
        self.error = error
        self.calls = 0

    def __call__(self, event: Event) -> None:
        self.calls += 1
        raise self.error


@pytest.mark.parametrize("error", [RuntimeError("a hook's own"), asyncio.CancelledError()], ids=["error", "cancel"])
async def test_a_hook_that_raises_is_logged_and_changes_nothing(
    error: BaseException, seen: Seen, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    harmful = Harmful(error)
    async with FileTracker(tmp_path, hooks=[harmful, seen], retry=Retry(delay=0)) as tracker:
        async with tracker.run("job") as task:
            assert await task.step("one", one) == 1
            await task.renew()
        with pytest.raises(TaskSucceededError):
            async with tracker.run("job"):
                pass
        with pytest.raises(ValueError, match="broken"):
            async with tracker.run("other") as task:
                await fail(task)
        assert (await tracker.count())["succeeded"] == 1
    assert harmful.calls == len(seen) > 8
    logged = [record for record in caplog.records if getattr(record, "event", "") == "hook_failed"]
    assert len(logged) == harmful.calls
    assert logged[0].levelno == logging.ERROR
    assert logged[0].error_type == type(error).__name__  # type: ignore[attr-defined]  # of extra=
    assert logged[0].exc_info is not None


async def test_one_hook_may_serve_several_trackers(seen: Seen, clock: FakeClock) -> None:
    first, second = MemoryTracker(hooks=[seen], clock=clock), MemoryTracker(hooks=[seen], clock=clock)
    async with first, second, first.run("job"), second.run("job"):
        pass
    tokens = [event.token for event in seen if isinstance(event, RunEvent)]
    assert tokens == [tokens[0], tokens[1], tokens[1], tokens[0]]
    assert tokens[0] != tokens[1]


async def async_hook(event: Event) -> None:
    pass


class AsyncHook:
    async def __call__(self, event: Event) -> None:
        pass


@pytest.mark.parametrize("hooks", [print, [3], "print", [async_hook], [AsyncHook()], [Seen], 7, None])
def test_what_can_be_no_hook_is_refused_at_the_door(hooks: Any) -> None:
    with pytest.raises(InvalidValueError, match="hook"):
        MemoryTracker(hooks=hooks)


async def test_a_tracker_by_url_takes_hooks(seen: Seen, tmp_path: Path) -> None:
    async with open_tracker(f"file:{tmp_path}/store", hooks=[seen]) as tracker:
        await tracker.call("job", one)
    assert seen.names == ["Committed", "Claimed", "Committed", "Succeeded"]


async def test_what_a_hook_leaves_in_the_record_is_found_by_later_attempts(clock: FakeClock) -> None:
    found: list[str | None] = []

    def hook(event: Event) -> None:
        if isinstance(event, Claimed):
            found.append(event.task.trace)
            event.set_trace(f"attempt {event.attempt}")

    async with MemoryTracker(hooks=[hook], clock=clock) as tracker:
        for _ in range(3):
            with pytest.raises(ValueError, match="broken"):
                async with tracker.run("job") as task:
                    await fail(task)
    assert found == [None, "attempt 1", "attempt 2"]


@pytest.mark.parametrize("text", [None, 3, "x" * 501, "\ud800"])
async def test_what_a_hook_cannot_leave_in_the_record_does_not_keep_the_end_from_it(
    text: Any, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    def hook(event: Event) -> None:
        if isinstance(event, Claimed):
            event.set_trace(text)

    async with MemoryTracker(hooks=[hook], clock=clock) as tracker:
        await tracker.call("job", one)
        record = await tracker.load("job")
    assert record is not None
    assert (record.status, record.trace) == ("succeeded", None)
    assert [vars(record)["error_type"] for record in caplog.records] == ["InvalidValueError"]


# -- without hooks


async def test_without_hooks_nothing_of_them_is_on_the_path(tmp_path: Path) -> None:
    async with FileTracker(tmp_path / "file") as tracker, SqliteTracker(tmp_path / "sqlite.db") as sqlite:
        assert type(tracker.run("job")) is Run
        assert type(tracker.keeper) is aiotracker.leases.Keeper
        assert tracker.observer is None
        assert tracker._committer is not None
        assert tracker._files is not None
        assert tracker._committer._commit == tracker._files.commit
        assert sqlite._writer is not None
        assert sqlite._writer._commit.__self__.counts is False  # type: ignore[attr-defined]  # a bound method
        async with tracker.run("job") as task:
            assert type(task) is RunningTask


def test_without_hooks_no_event_is_made_and_their_code_is_not_even_loaded() -> None:
    code = """
import asyncio, sys, aiotracker
from aiotracker import events

def refuse(*args, **fields):
    raise AssertionError("an event was made")

events.Observer.__init__ = events.Observer.tell = refuse
async def main():
    async with aiotracker.MemoryTracker() as tracker, tracker.run("job") as task:
        await task.step("one", asyncio.sleep, 0)
        await task.renew()
asyncio.run(main())
assert "aiotracker.observed" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# -- the names


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_event_is_public_documented_and_stands_in_the_tree(kind: type[Event]) -> None:
    if kind.__name__.startswith("_"):
        return
    assert kind.__name__ in aiotracker.__all__
    assert (kind.__doc__ or "").strip()
    assert re.search(rf"^ *[*+-] {kind.__name__}\b", events.__doc__ or "", re.MULTILINE)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_field_of_an_event_says_what_it_is(kind: type[Event]) -> None:
    source = inspect.getsource(kind)
    for field in msgspec.structs.fields(kind):
        line = re.search(rf"^    {field.name}: (.+)$", source, re.MULTILINE)
        if line is not None and field.name not in ("task_id", "step"):
            assert "#" in line[1], f"{kind.__name__}.{field.name}"


async def test_an_event_prints_without_the_whole_record(tracker: MemoryTracker, seen: Seen) -> None:
    async with tracker.run("job", data="x" * 1000):
        pass
    assert len(repr(seen[-1])) < 500
    assert "task_id='job'" in repr(seen[-1])
    assert "outcome" not in repr(seen[0])
    gc.collect()


def test_ignored_has_its_own_error() -> None:
    # The reasons are told by the names of errors: all of them are known.
    kinds = {kind.__name__ for kind in TaskUnavailableError.__subclasses__()}
    assert kinds <= events._REASONS.keys()
    assert TaskIgnoredError.__name__ in kinds
