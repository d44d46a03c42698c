"""What users hand in by mistake is refused at the door, and a tracker that is used wrongly says so."""

import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from datetime import datetime, timedelta, timezone
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest

from aiotracker import (
    BaseTracker,
    DynamoDBTracker,
    FileTracker,
    FolderTracker,
    InvalidValueError,
    LeaseLostError,
    MemoryTracker,
    Postpone,
    Retry,
    RunningTask,
    SqliteTracker,
    StoreError,
    SystemClock,
    Task,
    UnsupportedError,
    open_tracker,
    stop_on_signals,
)
from aiotracker import clock as clock_module
from aiotracker.cli.map import output_folder
from aiotracker.copying import copy
from aiotracker.doctor import examine


class Text(str):
    """As HTML parsers give it."""

    def __str__(self) -> str:
        return f"<{super().__str__()}>"


class Stage(StrEnum):
    FETCH = "fetch"


class Stamp(datetime):
    """As libraries for times make them."""


@pytest.fixture(params=["memory", "file", "folder", "sqlite"])
async def tracker(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[BaseTracker]:
    kinds: dict[str, Callable[[], BaseTracker]] = {
        "memory": MemoryTracker,
        "file": lambda: FileTracker(tmp_path / "file", fsync=False),
        "folder": lambda: FolderTracker(tmp_path / "folder"),
        "sqlite": lambda: SqliteTracker(tmp_path / "store.db", synchronous="off"),
    }
    async with kinds[request.param]() as tracker:
        yield tracker


@pytest.fixture
async def memory() -> AsyncIterator[MemoryTracker]:
    async with MemoryTracker() as tracker:
        yield tracker


async def fine(task: RunningTask) -> None:
    pass


# -- ids


async def test_a_text_of_another_type_is_an_id_like_the_plain_one(tracker: BaseTracker) -> None:
    # In one commit: what cannot be encoded there would fail the others too.
    assert all(await asyncio.gather(tracker.add(Text("a")), tracker.add("b"), tracker.add(Stage.FETCH)))
    assert not await tracker.add("a")
    assert await tracker.add_many([Text("a"), Text("c")]) == 1
    async with tracker.run(Text("a")) as task:
        assert type(task.id) is str
    summary = await tracker.work(fine, ids=[Text("b"), Stage.FETCH])
    assert summary.succeeded == 2
    for task_id in (Text("a"), Text("b"), Stage.FETCH):
        found = await tracker.load(task_id)
        assert found is not None
        assert (type(found.id), found.status) == (str, "succeeded")
    assert await tracker.wait(Text("a"), timeout=0) == await tracker.load("a")
    assert await tracker.reset(Text("a")) == 1
    assert [found.id async for found in tracker.find(prefix=Text("fe"))] == ["fetch"]


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (5, r"use str\(id\) for 5"),
        (b"a", r"use str\(id, 'utf-8'\) for b'a'"),
        (["a"], r"one by one, instead of \['a'\]"),
    ],
)
async def test_what_is_no_id_is_refused_with_what_to_do(memory: MemoryTracker, wrong: Any, hint: str) -> None:
    with pytest.raises(TypeError, match=hint):
        await memory.reset(wrong)


async def test_a_text_of_another_type_is_looked_for_as_the_plain_one_on_dynamodb(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []

    async def get(key: str) -> None:
        asked.append(key)

    tracker = DynamoDBTracker("jobs")
    monkeypatch.setattr(tracker._table, "get", get)
    assert await tracker.load(Text("a")) is None
    assert asked == ["default/a"]


async def test_a_dict_of_data_is_not_taken_for_ids_alone(memory: MemoryTracker) -> None:
    items: Any = {"a": {"n": 1}}
    with pytest.raises(InvalidValueError, match=r"items\(\)"):
        await memory.add_many(items)
    assert await memory.add_many(items.items()) == 1
    task = await memory.load("a")
    assert task is not None
    assert task.data == {"n": 1}


@pytest.mark.parametrize("value", [Text("a"), Path("a"), Stage.FETCH])
async def test_a_value_that_is_almost_a_str_is_refused_with_what_to_do(memory: MemoryTracker, value: Any) -> None:
    with pytest.raises(InvalidValueError, match=r"data\['x'\] is of type .*; use str\(\.\.\.\)"):
        await memory.add("a", {"x": value})


# -- values


class Files(msgspec.Struct):
    first: Path
    others: list[Path]


async def test_a_path_is_stored_where_the_annotation_names_it_and_is_one_again(memory: MemoryTracker) -> None:
    async def fetch() -> Path:
        return Path("a/b")

    async def fetch_more() -> Files:
        return Files(Path("a"), [Path("b")])

    for _ in range(2):
        assert await memory.call("one", fetch) == Path("a/b")
        assert await memory.call("more", fetch_more) == Files(Path("a"), [Path("b")])
    async with memory.run("steps") as task:
        assert await task.step("fetch", fetch) == Path("a/b")
        assert task.record.steps[0].result == "a/b"


# -- times


EDGE = datetime.max.replace(tzinfo=timezone(timedelta(hours=-5)))


async def test_a_time_beyond_the_calendar_is_refused(memory: MemoryTracker) -> None:
    with pytest.raises(InvalidValueError, match="not_before takes a time of the years"):
        await memory.add("a", not_before=EDGE)
    with pytest.raises(InvalidValueError, match="created_before takes a time of the years"):
        await memory.count(created_before=EDGE)


async def test_a_time_of_another_class_is_stored_as_a_plain_one(tracker: BaseTracker) -> None:
    due = Stamp(2040, 1, 2, 3, 4, 5, 6, tzinfo=timezone(timedelta(hours=2)))
    await tracker.add("a", not_before=due)
    task = await tracker.load("a")
    assert task is not None
    assert task.not_before == due


async def test_a_datetime_that_a_test_has_replaced_does_not_reach_the_store(
    memory: MemoryTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clock_module, "datetime", Stamp)
    assert type(SystemClock().now()) is datetime
    assert await memory.add("a")


@pytest.mark.parametrize("wrong", [float("nan"), "1", True])
async def test_a_wait_of_no_length_is_refused(memory: MemoryTracker, wrong: Any) -> None:
    with pytest.raises(InvalidValueError, match="timeout takes a number of seconds"):
        await memory.wait("a", timeout=wrong)


async def test_a_wait_whose_time_is_over_looks_once(memory: MemoryTracker) -> None:
    with pytest.raises(TimeoutError):
        await memory.wait("a", timeout=-1)


@pytest.mark.parametrize("wrong", [10**400, float("inf"), float("nan")])
def test_seconds_beyond_all_numbers_are_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match="Postpone takes a number of seconds"):
        Postpone(wrong)
    with pytest.raises(ValueError, match="max_delay must be 0 or more seconds"):
        Retry(max_delay=wrong)


# -- filters, and changes by hand


@pytest.mark.parametrize("name", ["prefix", "error_type", "worker", "step"])
async def test_a_filter_that_is_no_text_is_refused(tracker: BaseTracker, name: str) -> None:
    where: Any = {name: "\ud800"}
    with pytest.raises(InvalidValueError, match=f"{name} must be Unicode text"):
        await tracker.count(**where)


async def test_a_filter_may_be_an_iterator_wherever_tasks_are_changed(memory: MemoryTracker) -> None:
    await memory.add("a")
    assert await memory.ignore(status=(status for status in ("pending", "failed"))) == 1


@pytest.mark.parametrize("given", [{"reason": None}, {"reason": Text("x")}, {"by": Text("x")}, {"by": 5}])
async def test_who_and_why_that_could_not_be_read_again_are_refused(memory: MemoryTracker, given: Any) -> None:
    await memory.add("a")
    with pytest.raises(InvalidValueError, match="takes a line of text"):
        await memory.ignore("a", **given)
    task = await memory.load("a")
    assert task is not None
    assert task.status == "pending"


@pytest.mark.parametrize("wrong", ["\ud800", Text("x"), "", 5])
def test_a_workers_name_that_could_not_be_stored_is_refused(wrong: Any) -> None:
    with pytest.raises(InvalidValueError, match="worker takes a str"):
        MemoryTracker(worker=wrong)


@pytest.mark.parametrize("wrong", ["", 5, ["b"]])
async def test_a_step_to_begin_from_that_is_no_name_is_refused(memory: MemoryTracker, wrong: Any) -> None:
    with pytest.raises(InvalidValueError, match="from_step takes the name of a step"):
        await memory.reset("a", from_step=wrong)


async def test_a_step_that_a_named_task_does_not_have_is_refused_with_those_it_has(memory: MemoryTracker) -> None:
    async with memory.run("a") as task:
        await task.step("fetch", asyncio.sleep, 0)
        await task.step("load", asyncio.sleep, 0)
    await memory.add("b")
    before = await memory.load("a")
    with pytest.raises(InvalidValueError, match="'a' has no step 'lod'; there are: 'fetch', 'load'"):
        await memory.reset("a", from_step="lod")
    with pytest.raises(InvalidValueError, match="'b' has no step 'load'; it has none"):
        await memory.reset("b", from_step="load")
    assert await memory.load("a") == before
    # Of many, some may not have come to it, and what has succeeded without it need not run again.
    assert await memory.reset(status="succeeded", from_step="lod") == 0
    assert await memory.load("a") == before
    assert await memory.reset(status="succeeded", from_step="load") == 1


@pytest.mark.parametrize("wrong", [2**31, -(2**31) - 1, True, 1.0])
async def test_a_priority_beyond_32_bits_is_refused(memory: MemoryTracker, wrong: Any) -> None:
    with pytest.raises(InvalidValueError, match="priority takes an int of at most 32 bits"):
        await memory.add("a", priority=wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clock": time}, "clock takes an object of a class that extends Clock"),
        ({"clock": SystemClock}, "clock takes an object of a class that extends Clock"),
        ({"read_only": "no"}, "read_only takes True or False"),
        ({"read_only": None}, "read_only takes True or False"),
    ],
)
def test_an_option_of_a_wrong_type_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValueError, match=message):
        MemoryTracker(**options)


# -- work


@pytest.mark.parametrize("wrong", [True, threading.Event(), asyncio.Event])
async def test_a_stop_that_would_block_or_is_no_event_is_refused(memory: MemoryTracker, wrong: Any) -> None:
    before = asyncio.all_tasks()
    with pytest.raises(InvalidValueError, match=r"stop takes an asyncio\.Event"):
        await memory.work(fine, ids=["a"], stop=wrong)
    assert asyncio.all_tasks() == before


async def test_an_on_done_that_cannot_be_called_is_refused(memory: MemoryTracker) -> None:
    wrong: Any = 5
    with pytest.raises(InvalidValueError, match="on_done takes a function"):
        await memory.work(fine, ids=["a"], on_done=wrong)


async def test_a_cancellation_that_on_done_saw_elsewhere_stops_no_work(
    memory: MemoryTracker, caplog: pytest.LogCaptureFixture
) -> None:
    elsewhere = asyncio.get_running_loop().create_future()
    elsewhere.cancel()

    async def on_done(task: Task) -> None:
        await elsewhere

    summary = await memory.work(fine, ids=["a", "b", "c"], concurrency=2, on_done=on_done)
    assert summary.succeeded == 3
    assert caplog.text.count("on_done failed") == 3


@pytest.mark.parametrize("is_delivered", [True, False])
async def test_a_body_that_cancels_its_own_asyncio_task_ends_that_run_alone(
    memory: MemoryTracker, is_delivered: bool
) -> None:
    ran: list[str] = []

    async def body(task: RunningTask) -> None:
        ran.append(task.id)
        me = asyncio.current_task()
        assert me is not None
        assert me.cancelling() == 0
        if task.id == "a" and ran == ["a"]:
            me.cancel()
            if not is_delivered:
                return
        await asyncio.sleep(0)

    summary = await memory.work(body, ids=["a", "b"], concurrency=1)
    assert (summary.succeeded, summary.ok) == (2, True)
    assert ran == (["a", "a", "b"] if is_delivered else ["a", "b"])


async def test_an_on_done_that_cancels_its_own_asyncio_task_stops_no_work(memory: MemoryTracker) -> None:
    async def on_done(task: Task) -> None:
        me = asyncio.current_task()
        assert me is not None
        me.cancel()
        await asyncio.sleep(0)

    summary = await memory.work(fine, ids=["a", "b", "c"], concurrency=2, on_done=on_done)
    assert (summary.succeeded, summary.ok) == (3, True)


# -- URLs, and paths


def test_a_path_that_begins_in_a_home_folder_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/a%20b")
    for path, expected in (
        ("~/jobs%3F", "/a%20b/jobs?"),
        ("~root/jobs", os.path.expanduser("~root/jobs")),
        ("~", "~"),
        ("~jobs", "~jobs"),
        ("%7E/jobs", "~/jobs"),
        ("./~/jobs", "~/jobs"),
        ("~no such user/jobs", "~no such user/jobs"),
    ):
        for scheme in ("file", "folder", "sqlite"):
            assert open_tracker(f"{scheme}:{path}?lease=5").path == Path(expected)  # type: ignore[attr-defined]  # each has it
        assert str(output_folder(f"file:{path}?lease=5")) == str(Path(f"{expected}-output").absolute())


async def test_the_doctor_and_a_copy_look_in_the_home_folder_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    async with open_tracker("folder:~/jobs") as tracker:
        await tracker.add("a")
    assert (await examine("folder:~/jobs")).tasks == 1
    assert (await copy("folder:~/jobs", "folder:~/others")).created == 1
    assert (await copy("folder:~/jobs", "folder:~/others", dry_run=True)).unchanged == 1
    await asyncio.to_thread((tmp_path / "old").mkdir)
    with pytest.raises(StoreError, match=f"no files of abstract_tracker in {tmp_path}/old"):
        await copy("abstract-tracker:~/old", "folder:~/others")


async def test_a_path_with_a_nul_is_refused() -> None:
    for scheme in ("file", "folder", "sqlite"):
        with pytest.raises(InvalidValueError, match="a path has no NUL in it"):
            open_tracker(f"{scheme}:a%00b")
    with pytest.raises(InvalidValueError, match="a path has no NUL in it"):
        await examine("file:a%00b")


@pytest.mark.parametrize("scheme", ["file", "folder", "sqlite"])
def test_a_path_behind_two_slashes_is_not_taken_as_one_from_the_root(scheme: str) -> None:
    with pytest.raises(InvalidValueError, match=f"write {scheme}:PATH"):
        open_tracker(f"{scheme}://state/jobs")
    assert open_tracker(f"{scheme}:///state/jobs").path == Path("/state/jobs")  # type: ignore[attr-defined]  # each has it


# -- backends


class Forgetful(MemoryTracker):
    """Written in a hurry."""

    def update(self, *args: Any, **options: Any) -> Any:
        return BaseTracker.update(self, *args, **options)

    async def dump(self, task: Task) -> Task:
        await super().dump(task)
        return None  # type: ignore[return-value]  # that is the mistake


@pytest.mark.parametrize("hooks", [[], [lambda event: None]])
async def test_a_dump_that_returns_nothing_is_told_its_author(hooks: list[Any]) -> None:
    async with Forgetful(hooks=hooks) as tracker:
        with pytest.raises(TypeError, match=r"Forgetful\.dump must return what it has stored, .* returned None"):
            async with tracker.run("a"):
                pass


# -- signals


async def test_nested_stops_hear_one_signal_each_from_the_inside_out() -> None:
    earlier: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: earlier.append(number))
    try:
        async with asyncio.timeout(30), stop_on_signals(signal.SIGUSR1) as outer:
            async with stop_on_signals(signal.SIGUSR1):
                pass
            async with stop_on_signals(signal.SIGUSR1) as inner:
                signal.raise_signal(signal.SIGUSR1)
                await inner.wait()
                assert not outer.is_set()
            signal.raise_signal(signal.SIGUSR1)
            await outer.wait()
            assert earlier == []
            signal.raise_signal(signal.SIGUSR1)
            assert earlier == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)


async def test_stops_that_do_not_end_in_turn_leave_the_earlier_handler() -> None:
    earlier: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: earlier.append(number))
    try:
        one, two = stop_on_signals(signal.SIGUSR1), stop_on_signals(signal.SIGUSR1)
        await one.__aenter__()
        stop = await two.__aenter__()
        await one.__aexit__(None, None, None)
        async with asyncio.timeout(30):
            signal.raise_signal(signal.SIGUSR1)
            await stop.wait()
        await two.__aexit__(None, None, None)
        assert earlier == []
        for count in (1, 2):
            signal.raise_signal(signal.SIGUSR1)
            assert earlier == [signal.SIGUSR1] * count
    finally:
        signal.signal(signal.SIGUSR1, before)


async def test_an_earlier_handler_of_the_event_loop_hears_signals_again_after_a_stop() -> None:
    loop, heard = asyncio.get_running_loop(), asyncio.Event()
    loop.add_signal_handler(signal.SIGUSR1, heard.set)
    try:
        async with stop_on_signals(signal.SIGUSR1):
            pass
        signal.raise_signal(signal.SIGUSR1)
        async with asyncio.timeout(30):
            await heard.wait()
    finally:
        loop.remove_signal_handler(signal.SIGUSR1)


async def test_signals_that_cannot_be_caught_are_told() -> None:
    with pytest.raises(RuntimeError, match="SIGKILL cannot be caught"):
        async with stop_on_signals(signal.SIGKILL):
            pass

    async def elsewhere() -> None:
        async with stop_on_signals():
            pass

    with pytest.raises(RuntimeError, match="SIGINT cannot be caught: signal only works in main thread"):
        await asyncio.to_thread(asyncio.run, elsewhere())


# -- lives of trackers and runs


async def test_a_tracker_that_is_being_opened_is_not_opened_twice(tmp_path: Path) -> None:
    tracker = FileTracker(tmp_path / "store", fsync=False)
    opened = asyncio.create_task(tracker.open()), asyncio.create_task(tracker.open())
    await asyncio.wait(opened)
    assert opened[0].result() is tracker
    with pytest.raises(StoreError, match="open already"):
        opened[1].result()
    await tracker.aclose()
    name = f"aiotracker {tmp_path / 'store'}"
    assert [thread.name for thread in threading.enumerate() if thread.name == name] == []
    async with tracker:
        assert await tracker.add("a")


@pytest.mark.parametrize("kind", [FileTracker, FolderTracker, SqliteTracker])
async def test_what_is_read_only_is_not_changed_with_a_rule_of_ones_own(kind: Any, tmp_path: Path) -> None:
    async with kind(tmp_path / "store") as writer:
        await writer.add("a")
    async with kind(tmp_path / "store", read_only=True) as reader:
        with pytest.raises(UnsupportedError, match="was opened read_only"):
            await reader.update("a", lambda task, now: task.replace(note="changed"))
        task = await reader.load("a")
        assert task is not None
        assert task.note is None


@pytest.mark.parametrize(("inner", "status"), [(ValueError(), "failed"), (Postpone(60), "pending")])
async def test_an_error_that_is_nested_deeper_than_python_calls_is_recorded(
    memory: MemoryTracker, inner: Exception, status: str
) -> None:
    nested = inner
    for _ in range(2 * sys.getrecursionlimit()):
        nested = ExceptionGroup("again", [nested])
    with pytest.raises(ExceptionGroup):
        async with memory.run("a"):
            raise nested
    task = await memory.load("a")
    assert task is not None
    assert task.status == status


async def test_a_step_of_a_run_that_has_ended_does_not_begin(memory: MemoryTracker) -> None:
    began = False

    async def step() -> None:
        nonlocal began
        began = True

    async with memory.run("a") as task:
        pass
    with pytest.raises(LeaseLostError, match="the run of 'a' has ended"):
        await task.step("late", step)
    assert not began
    with pytest.raises(LeaseLostError, match="the run of 'a' has ended"):
        await task.save()


async def test_another_threads_event_loop_is_refused_while_a_task_runs_here(memory: MemoryTracker) -> None:
    refused: list[str] = []

    async def enter() -> None:
        try:
            async with memory.run("a"):
                refused.append("entered")
        except RuntimeError as exc:
            refused.append(str(exc))

    # The thread is waited for within one step of this task, so that it is what runs on our event loop meanwhile.
    thread = threading.Thread(target=asyncio.run, args=(enter(),))
    thread.start()
    thread.join()
    assert refused == ["a tracker is used on the event loop that opened it"]
    assert await memory.load("a") is None


@pytest.mark.parametrize(
    "kind", [MemoryTracker, partial(FileTracker, "store", fsync=False), partial(SqliteTracker, "store.db")]
)
async def test_what_another_threads_event_loop_asks_for_is_refused_and_not_stored(
    kind: Callable[[], BaseTracker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused: list[str] = []
    async with kind() as tracker:

        async def ask() -> None:
            for asked in (tracker.add("a"), tracker.load("a"), tracker.count()):
                try:
                    await asked
                except RuntimeError as exc:
                    refused.append(str(exc))

        await asyncio.to_thread(asyncio.run, ask())
        assert refused == ["a tracker is used on the event loop that opened it"] * 3
        assert await tracker.load("a") is None
