"""A store's tasks, in another store."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from abstract_tracker.base import StatusEnum  # type: ignore[import-untyped]  # it has no types
from abstract_tracker.trackers.file_tracker import FileTracker as OldTracker  # type: ignore[import-untyped]  # likewise

from aiotracker import (
    BaseTracker,
    ConflictError,
    End,
    Failure,
    FileTracker,
    FolderTracker,
    GiveUp,
    GroupBy,
    InvalidValueError,
    Lease,
    MemoryTracker,
    Query,
    Retry,
    RunningTask,
    Status,
    StoreError,
    StoreUnavailableError,
    Task,
    TaskLockedError,
    Transition,
    UnsupportedError,
    open_tracker,
)
from aiotracker.backends.postgres import PostgresTracker
from aiotracker.backends.redis import RedisTracker
from aiotracker.backends.sqlite import SqliteTracker
from aiotracker.copying import AT_ONCE, CopyReport, Progress, copy
from aiotracker.testing import FakeClock
from aiotracker.urls import shown
from tests.conftest import require
from tests.services import postgres, redis
from tests.services.dynamodb import DynamoDBService, moto_dynamodb
from tests.services.s3 import S3Service, moto_s3, raw_client

__all__ = ["moto_dynamodb", "moto_s3"]  # fixtures

Open = Callable[..., Awaitable[Any]]


@pytest.fixture
async def opened() -> AsyncIterator[Open]:
    """Opens trackers, and closes them at the end."""
    async with AsyncExitStack() as stack:
        yield stack.enter_async_context


def stored(tasks: dict[str, Task]) -> dict[str, Any]:
    """What a copy must keep: all but what a store writes for itself."""
    return {name: json.loads(task.replace(write_id="").encode()) for name, task in tasks.items()}


async def tasks_of(store: BaseTracker[Any, Any] | str) -> dict[str, Task]:
    if isinstance(store, str):
        async with open_tracker(store, read_only=True) as tracker:
            return await tasks_of(tracker)
    return {task.id: task async for task in store.find()}


async def body(task: RunningTask[Any, Any]) -> None:
    task.data = {"seen": [1, 1.0, True, None, "\u00e9\U0001f600\x00"], "z": 1, "a": 2}
    task.note, task.progress = "half", 0.5
    await task.step("first", asyncio.sleep, 0, {"rows": 3})
    if task.id.startswith("bad"):
        raise ValueError(f"{task.id} is bad")
    if task.id.startswith("worse"):
        raise GiveUp("hopeless")
    task.result = {"id": task.id}


async def fill(tracker: BaseTracker[Any, Any]) -> None:
    """Every status, and every field."""
    await tracker.add_many(["a/b", "..", "\x00\n\U0001f600", "x" * 2048])
    await tracker.add("new", {"country": "DE"})
    await tracker.add("later", not_before=datetime(2200, 1, 1, tzinfo=UTC), priority=-5)
    await tracker.add("aside")
    await tracker.ignore("aside")
    await tracker.work(body, ids=["good", "worse"])
    with contextlib.suppress(ValueError):
        async with tracker.run("bad") as task:
            await body(task)
    await tracker.dump(DEAD)


PAST = datetime(2020, 2, 29, 12, 30, 0, 123456, tzinfo=UTC)
DEAD = Task(
    id="dead",
    status=Status.IN_PROGRESS,
    attempts=2,
    fence=1_582_979_400_123_457,
    data={"n": 2**63},
    errors=(Failure(1, PAST, "w0", "OSError", "no", "Traceback"),),
    last_outcome="error",
    releases=1,
    create_time=PAST,
    update_time=PAST,
    start_time=PAST,
    progress=0.25,
    lease=Lease("dead-token", "w1", PAST, PAST + timedelta(seconds=60), 60.0, "some-boot", 12.5),
    ends=(End(1_582_979_400_123_456, "first-token", "failed"),),
    create_id="dead-create",
)


STORES: dict[str, Callable[[Path], BaseTracker[Any, Any]]] = {
    "memory": lambda path: MemoryTracker(),
    "file": FileTracker,
    "folder": FolderTracker,
    "sqlite": lambda path: SqliteTracker(path.with_suffix(".db")),
}


@pytest.mark.parametrize("to", STORES)
@pytest.mark.parametrize("of", STORES)
async def test_every_record_is_copied_whole_between_all_kinds_of_stores(
    tmp_path: Path, of: str, to: str, opened: Open
) -> None:
    source = await opened(STORES[of](tmp_path / "source"))
    target = await opened(STORES[to](tmp_path / "target"))
    await fill(source)
    report = await copy(source, target)
    assert report.ok, report.problems
    assert (report.read, report.created, report.verified) == (11, 11, 11)
    tasks = stored(await tasks_of(source))
    assert stored(await tasks_of(target)) == tasks
    assert {task["status"] for task in tasks.values()} == {*Status}
    again = await copy(source, target)
    assert (again.created, again.replaced, again.unchanged, again.verified, again.ok) == (0, 0, 11, 11, True)


@pytest.fixture
def on_s3(moto_s3: S3Service) -> BaseTracker[Any, Any]:
    return moto_s3.tracker(moto_s3.prefix())


@pytest.fixture
def on_dynamodb(moto_dynamodb: DynamoDBService) -> BaseTracker[Any, Any]:
    return moto_dynamodb.tracker(moto_dynamodb.namespace())


@pytest.fixture
def on_redis() -> Iterator[BaseTracker[Any, Any]]:
    require(redis.is_installed(), "redis-server and redis-cli")
    with redis.redis_server() as server:
        yield RedisTracker(server.url)


@pytest.fixture
def on_postgres() -> Iterator[BaseTracker[Any, Any]]:
    require(postgres.has_postgres(), "no PostgreSQL")
    with postgres.postgres_server() as server:
        asyncio.run(PostgresTracker(server.dsn).init())
        yield PostgresTracker(server.dsn)


@pytest.mark.parametrize("name", ["on_s3", "on_dynamodb", "on_redis", "on_postgres"])
def test_every_record_is_copied_whole_to_a_service_and_back(name: str, request: pytest.FixtureRequest) -> None:
    service: BaseTracker[Any, Any] = request.getfixturevalue(name)

    async def there_and_back() -> None:
        async with MemoryTracker() as source, service, MemoryTracker() as back:
            await fill(source)
            for of, to in ((source, service), (service, back)):
                report = await copy(of, to)
                assert (report.created, report.verified, report.ok) == (11, 11, True), report.problems
                again = await copy(of, to)
                assert (again.unchanged, again.verified, again.ok) == (11, 11, True)
            assert stored(await tasks_of(back)) == stored(await tasks_of(source))
            await source.ignore("new")
            assert (await copy(source, service)).replaced == 1

    asyncio.run(there_and_back())


async def test_stores_are_named_by_urls_and_the_target_is_read_again_from_its_files(tmp_path: Path) -> None:
    of, to = f"file:{tmp_path / 'a'}", f"folder:{tmp_path / 'b'}"
    async with open_tracker(of) as source:
        await fill(source)
    opens: list[Path] = []
    original = FolderTracker.connect

    async def connect(self: FolderTracker[Any, Any], stack: AsyncExitStack) -> None:
        opens.append(self.path)
        assert self.read_only == (len(opens) > 1)
        await original(self, stack)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FolderTracker, "connect", connect)
        report = await copy(of, to)
    assert (report.source, report.target, report.verified, report.ok) == (of, to, 11, True)
    assert len(opens) == 2
    assert stored(await tasks_of(to)) == stored(await tasks_of(of))


async def test_a_copied_task_goes_on_where_it_was(opened: Open) -> None:
    source, target = await opened(MemoryTracker(retry=Retry(3))), await opened(MemoryTracker(retry=Retry(3)))
    await fill(source)
    await copy(source, target)
    async with target.run("dead") as task:  # its lease is over: claimed by the ordinary claim, which counts
        assert (task.attempts, task.fence) == (3, DEAD.fence + 1)
    async with target.run("bad") as task:
        assert await task.step("first", asyncio.sleep, 0, {"rows": 0}) == {"rows": 3}
    record = await target.load("dead")
    assert record is not None
    assert [end.outcome for end in record.ends] == ["failed", "lease_lost", "succeeded"]


async def test_running_it_again_writes_only_what_is_missing_or_has_changed(opened: Open) -> None:
    source, target = await opened(MemoryTracker()), await opened(MemoryTracker())
    await source.add_many(f"t{number}" for number in range(20))
    await copy(source, target)
    before = await tasks_of(target)
    await source.add("new")
    await source.ignore("t7")
    async with source.run("t8") as task:
        task.result = 8
    report = await copy(source, target)
    assert (report.created, report.replaced, report.unchanged, report.verified) == (1, 2, 18, 21)
    after = await tasks_of(target)
    assert stored(after) == stored(await tasks_of(source))
    assert {name for name, task in before.items() if after[name].write_id != task.write_id} == {"t7", "t8"}


async def test_an_interrupted_copy_is_ended_by_the_next(tmp_path: Path, opened: Open) -> None:
    source = await opened(MemoryTracker())
    await source.add_many(f"t{number}" for number in range(2_000))
    to = f"file:{tmp_path / 'to'}"

    def interrupt(progress: Progress) -> None:
        if progress.done >= 500:
            me.cancel()

    me = asyncio.ensure_future(copy(source, to, on_progress=interrupt))
    with pytest.raises(asyncio.CancelledError):
        await me
    there = len(await tasks_of(to))
    assert 500 <= there < 2_000
    report = await copy(source, to)
    assert (report.unchanged, report.created, report.verified) == (there, 2_000 - there, 2_000)


async def test_what_has_gone_on_in_the_target_stays(opened: Open) -> None:
    source, target = await opened(MemoryTracker(retry=Retry(99, delay=0))), await opened(MemoryTracker())
    await source.add_many(["worked", "set aside", "still"])
    await copy(source, target)
    for _ in range(12):  # more than a record remembers
        with contextlib.suppress(ValueError):
            async with target.run("worked", retry=Retry(99, delay=0)) as task:
                task.data = "here"
                raise ValueError("again")
    await target.ignore("set aside")
    report = await copy(source, target)
    assert (report.newer, report.unchanged, report.replaced, report.verified, report.ok) == (2, 1, 0, 3, True)
    after = await tasks_of(target)
    assert (after["worked"].data, after["worked"].attempts, after["set aside"].status) == ("here", 12, "ignored")


async def test_what_has_gone_on_for_long_in_the_source_replaces(opened: Open) -> None:
    source, target = await opened(MemoryTracker()), await opened(MemoryTracker())
    await source.add("a")
    for _ in range(2):
        for _ in range(12):
            with contextlib.suppress(ValueError):
                async with source.run("a", retry=Retry(99, delay=0)):
                    raise ValueError("again")
        report = await copy(source, target)
    assert (report.replaced, report.verified, report.ok) == (1, 1, True)
    assert stored(await tasks_of(target)) == stored(await tasks_of(source))


async def both_have_gone_on(source: BaseTracker[Any, Any], target: BaseTracker[Any, Any]) -> None:
    await source.add("a")
    await copy(source, target)
    for tracker, result in ((source, "source"), (target, "target")):
        async with tracker.run("a") as task:
            task.result = result


async def two_of_one_name(source: BaseTracker[Any, Any], target: BaseTracker[Any, Any]) -> None:
    for tracker, result in ((source, "source"), (target, "target")):
        async with tracker.run("a") as task:
            task.result = result


async def test_runs_that_are_under_way_in_both_stores_are_a_conflict(opened: Open) -> None:
    source, target = await opened(MemoryTracker()), await opened(MemoryTracker())
    await source.add("a")
    await copy(source, target)
    async with source.run("a"), target.run("a"):
        assert (await copy(source, target, held=True)).failed == {"conflict": 1}
    assert (await copy(source, target)).failed == {"conflict": 1}


@pytest.mark.parametrize("happened", [both_have_gone_on, two_of_one_name])
async def test_a_record_that_is_no_earlier_state_is_overwritten_only_when_asked(
    opened: Open, happened: Callable[..., Awaitable[None]]
) -> None:
    source, target = await opened(MemoryTracker()), await opened(MemoryTracker())
    await happened(source, target)
    await source.add("b")
    report = await copy(source, target)
    assert not report.ok
    assert report.failed == {"conflict": 1}
    assert [(problem.id, problem.kind) for problem in report.problems] == [("a", "conflict")]
    tasks = await tasks_of(target)
    assert (tasks["a"].result, set(tasks)) == ("target", {"a", "b"})
    fence = tasks["a"].fence
    report = await copy(source, target, overwrite=True)
    assert (report.replaced, report.unchanged, report.verified, report.ok) == (1, 1, 2, True)
    tasks = await tasks_of(target)
    assert tasks["a"].result == "source"
    assert tasks["a"].fence >= fence
    again = await copy(source, target)
    assert (again.unchanged, again.verified, again.ok) == (2, 2, True)


async def test_a_fence_never_goes_back_where_a_record_is_overwritten(opened: Open) -> None:
    clock = FakeClock()
    source = await opened(MemoryTracker(clock=clock))
    async with source.run("a"):
        pass
    clock.jump(1000)
    target = await opened(MemoryTracker(clock=clock))
    async with target.run("a") as task:
        fence = task.fence
    assert (await copy(source, target, overwrite=True)).ok
    async with source.run("a", force=True):
        pass
    report = await copy(source, target)
    assert (report.replaced, report.ok) == (1, True)
    async with target.run("a", force=True) as task:
        assert task.fence > fence


async def test_a_record_that_somebody_holds_in_the_target_is_never_overwritten(opened: Open) -> None:
    source, target = await opened(MemoryTracker()), await opened(MemoryTracker())
    await source.add("a")
    async with target.run("a") as task:
        report = await copy(source, target, overwrite=True)
        assert report.failed == {"held": 1}
        task.result = "mine"
    assert (await tasks_of(target))["a"].result == "mine"


async def test_held_tasks_are_left_out_and_copied_once_their_runs_have_ended(opened: Open) -> None:
    source, target = await opened(MemoryTracker(worker="w1")), await opened(MemoryTracker())
    await source.add("b")
    async with source.run("a") as task:
        report = await copy(source, target)
        assert (report.created, report.failed, report.ok) == (1, {"held": 1}, False)
        assert report.problems[0].id == "a"
        assert "w1" in report.problems[0].what
        assert set(await tasks_of(target)) == {"b"}
        task.result = "done"
    report = await copy(source, target)
    assert (report.created, report.unchanged, report.ok) == (1, 1, True)
    assert (await tasks_of(target))["a"].result == "done"


async def test_held_copies_a_task_with_its_lease_which_the_target_respects(opened: Open, clock: FakeClock) -> None:
    source = await opened(MemoryTracker(clock=clock, lease=60))
    target = await opened(MemoryTracker(clock=clock, lease=60))
    async with source.run("a") as first:
        report = await copy(source, target, held=True)
        assert (report.created, report.verified, report.ok) == (1, 1, True)
        with pytest.raises(TaskLockedError):
            async with target.run("a"):
                pass
        first.result = "in the source"
    clock.jump(61)
    async with target.run("a") as second:
        assert (second.attempts, second.fence) == (2, first.fence + 1)
    # Now it was worked on in both, which the next copy finds out.
    assert (await copy(source, target)).failed == {"conflict": 1}


async def test_a_record_too_large_for_the_target_is_listed_and_the_others_are_copied(opened: Open) -> None:
    class SmallTracker(MemoryTracker[Any, Any]):
        max_record_bytes = 2_000

    source, target = await opened(MemoryTracker()), await opened(SmallTracker())
    await source.add_many([("big", "x" * 2_000), "a", "b"])
    for dry_run in (True, False):
        report = await copy(source, target, dry_run=dry_run)
        assert (report.created, report.failed, report.problems[0].id) == (2, {"too_large": 1}, "big")
    assert set(await tasks_of(target)) == {"a", "b"}


class LossyTracker(MemoryTracker[Any, Any]):
    """Acknowledges what it does not do."""

    def update(self, task_id: str, transition: Transition, **options: Any) -> Any:
        def changed(task: Task | None, now: datetime) -> Task | None:
            new = transition(task, now)
            return new if new is None else new.replace(data=1.0)

        if task_id == "lost":
            return asyncio.sleep(0, transition(None, self.now()))
        return super().update(task_id, changed if task_id == "wrong" else transition)

    async def scan(self, query: Query) -> AsyncIterator[Task]:
        async for task in super().scan(query):
            if task.id != "hidden":
                yield task

    async def tally(self, query: Query, by: GroupBy) -> Counter[str]:
        return await BaseTracker.tally(self, query, by)


async def test_what_is_not_there_or_not_the_same_afterwards_is_found_and_listed(opened: Open) -> None:
    source, target = await opened(MemoryTracker()), await opened(LossyTracker())
    await source.add_many([("lost", 1), ("wrong", 1), ("well", 1)])
    report = await copy(source, target)
    assert not report.ok
    assert (report.created, report.verified, report.failed) == (3, 1, {"missing": 1, "different": 1})
    listed = {problem.id: problem for problem in report.problems}
    assert listed["lost"].kind == "missing"
    assert listed["wrong"].kind == "different"
    assert listed["wrong"].what == "differs from the source in data"  # 1 and 1.0 are not the same
    assert (await copy(source, await opened(LossyTracker()), verify=False)).ok


async def test_a_target_whose_queries_do_not_find_all_is_told(opened: Open) -> None:
    source, target = await opened(MemoryTracker()), await opened(LossyTracker())
    await source.add_many(["hidden", "a"])
    report = await copy(source, target)
    assert (report.verified, report.failed, report.ok) == (2, {"not_listed": 1}, False)


async def test_a_task_that_was_added_meanwhile_is_found_missing(opened: Open) -> None:
    class GrowingTracker(MemoryTracker[Any, Any]):
        scans = 0

        async def scan(self, query: Query) -> AsyncIterator[Task]:
            self.scans += 1
            if self.scans == 2:
                await self.add("b")
            async for task in super().scan(query):
                yield task

    source, target = await opened(GrowingTracker()), await opened(MemoryTracker())
    await source.add("a")
    report = await copy(source, target)
    assert (report.created, report.verified, report.failed) == (1, 1, {"missing": 1})


async def test_a_dry_run_tells_and_changes_nothing(tmp_path: Path, opened: Open) -> None:
    source = await opened(MemoryTracker())
    await source.add_many(["a", "b"])
    to = f"file:{tmp_path / 'to'}"
    report = await copy(source, to, dry_run=True)
    assert (report.created, report.verified, report.dry_run, report.ok) == (2, None, True, True)
    assert not (tmp_path / "to").exists()
    await copy(source, to)
    await source.ignore("a")
    await source.add("c")
    report = await copy(source, to, dry_run=True)
    assert (report.created, report.replaced, report.unchanged) == (1, 1, 1)
    assert {name: str(task.status) for name, task in (await tasks_of(to)).items()} == {"a": "pending", "b": "pending"}


class TwoVerbTracker(BaseTracker[Any, Any]):
    """What a user's own backend has, and how often it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.tasks: dict[str, Task] = {}
        self.asked: list[str] = []
        self.is_down = 0

    async def load(self, task_id: str) -> Task | None:
        self.asked.append("load")
        if self.is_down:
            self.is_down -= 1
            raise StoreUnavailableError("try again")
        return self.tasks.get(task_id)

    async def dump(self, task: Task) -> Task:
        self.asked.append("dump")
        stored = self.tasks.get(task.id)
        if (None if stored is None else stored.version) != task.version:
            raise ConflictError("another version", stored)
        self.tasks[task.id] = task.replace(version=task.write_id)
        return self.tasks[task.id]

    async def scan(self, query: Query) -> AsyncIterator[Task]:
        for task in list(self.tasks.values()):
            yield task


async def test_a_new_record_costs_one_write_and_one_that_is_there_one_read(opened: Open) -> None:
    source, target = await opened(MemoryTracker()), await opened(TwoVerbTracker())
    await source.add_many(str(number) for number in range(1_000))
    await copy(source, target, verify=False)
    assert target.asked == ["dump"] * 1_000
    target.asked.clear()
    await copy(source, target, verify=False)
    assert target.asked.count("load") >= 1_000 - AT_ONCE
    assert target.asked.count("dump") <= AT_ONCE  # until it has learned that they are there


async def test_a_target_needs_no_queries(opened: Open) -> None:
    class NoQueries(TwoVerbTracker):
        scan = BaseTracker.scan  # as if it had none

    source, target = await opened(MemoryTracker()), await opened(NoQueries())
    await source.add_many(["a", "b"])
    report = await copy(source, target)
    assert (report.verified, report.ok) == (2, True)


async def test_a_read_without_an_answer_is_tried_again(opened: Open) -> None:
    source, target = await opened(MemoryTracker()), await opened(TwoVerbTracker())
    await source.add_many(["a", "b"])
    await copy(source, target)
    target.is_down = 3
    report = await copy(source, target, dry_run=True)
    assert (report.unchanged, report.ok) == (2, True)


async def test_many_writes_are_under_way_at_once_but_never_all(opened: Open) -> None:
    class CountingTracker(MemoryTracker[Any, Any]):
        now_running = most = 0

        def update(self, task_id: str, transition: Transition, **options: Any) -> Any:
            return self.slowly(super().update(task_id, transition))

        async def slowly(self, answer: Any) -> Any:
            self.now_running += 1
            self.most = max(self.most, self.now_running)
            for _ in range(5):
                await asyncio.sleep(0)
            self.now_running -= 1
            return await answer

    source, target = await opened(MemoryTracker()), await opened(CountingTracker())
    await source.add_many(str(number) for number in range(5 * AT_ONCE))
    report = await copy(source, target)
    assert report.verified == 5 * AT_ONCE
    assert AT_ONCE // 2 < target.most <= AT_ONCE


async def test_progress_is_told(opened: Open) -> None:
    source, target = await opened(MemoryTracker()), await opened(MemoryTracker())
    await source.add_many(str(number) for number in range(1_000))
    seen: list[Progress] = []
    await copy(source, target, on_progress=seen.append)
    for phase in ("copy", "verify"):
        done = [progress.done for progress in seen if progress.phase == phase]
        assert (done[0], done[-1]) == (0, 1_000)
        assert done == sorted(done)
        assert len(done) > 3
    assert {progress.total for progress in seen} == {1_000}


async def test_an_error_of_a_store_is_raised_and_leaves_no_writes_under_way(opened: Open) -> None:
    class FullTracker(MemoryTracker[Any, Any]):
        is_full = True

        def update(self, task_id: str, transition: Transition, **options: Any) -> Any:
            if self.is_full and int(task_id) == 50:
                raise StoreError("the disk is full")
            if self.is_full and int(task_id) > 50:
                return asyncio.get_running_loop().create_future()  # no answer, ever
            return super().update(task_id, transition)

    source, target = await opened(MemoryTracker()), await opened(FullTracker())
    await source.add_many(str(number) for number in range(1_000))
    others = asyncio.all_tasks()
    with pytest.raises(StoreError, match="full"):
        await copy(source, target)
    for _ in range(10):  # the source's generator is closed by the event loop
        await asyncio.sleep(0)
    assert asyncio.all_tasks() == others
    assert len(await tasks_of(target)) == 50
    target.is_full = False
    assert (await copy(source, target)).ok


async def test_what_cannot_be_a_copy_is_refused(tmp_path: Path, opened: Open) -> None:
    one = await opened(MemoryTracker())
    with pytest.raises(InvalidValueError, match="the same store"):
        await copy("file:a", "file:a")
    with pytest.raises(InvalidValueError, match="memory:"):
        await copy(one, "memory:")
    with pytest.raises(InvalidValueError, match="folder:PATH"):
        await copy(one, f"abstract-tracker:{tmp_path}")
    with pytest.raises(InvalidValueError, match="abstract-tracker:DIR"):
        await copy("abstract-tracker:", one)
    with pytest.raises(InvalidValueError, match="unknown parameter 'regoin'"):
        await copy("abstract-tracker:s3://bucket/jobs?regoin=x", one)
    with pytest.raises(UnsupportedError, match="read_only"):
        await copy(one, await opened(MemoryTracker(read_only=True)))
    with pytest.raises(StoreError, match="not open"):
        await copy(MemoryTracker(), one)
    with pytest.raises(StoreError, match="not open"):
        await copy(one, MemoryTracker())
    with pytest.raises(StoreError, match="there is no store"):
        await copy(f"file:{tmp_path / 'none'}", one)
    assert not (tmp_path / "none").exists()


def test_a_url_is_shown_without_user_and_password() -> None:
    assert shown("postgresql://me:se@cret@host:5432/db?x=a@b") == "postgresql://host:5432/db?x=a@b"
    assert shown("redis://:pw@host/0") == "redis://host/0"
    assert shown("file:a@b") == "file:a@b"
    assert shown("s3://bucket/a@b") == "s3://bucket/a@b"


# -- abstract_tracker's files


class Old(OldTracker):  # type: ignore[misc]  # it has no types
    folder = Path()

    @classmethod
    def get_path(cls, id: Any) -> Path:
        return cls.folder / f"{id}.json"


@pytest.fixture
def old(tmp_path: Path) -> type[Old]:
    """abstract_tracker's files, as it writes them: each status, one with an int as its id."""
    path = tmp_path / "old"
    (path / "more").mkdir(parents=True)
    old: type[Old] = type("Old", (Old,), {"folder": path})
    old.new("pending")
    run(old, "succeeded")
    run(old, "failed", ValueError("odd"))
    run(old, "exhausted", KeyError("x"), 3)
    run(old, 17)
    ignored = old.new("ignored")
    ignored.status = StatusEnum.ignored.value
    ignored.dump()
    dead = old.new("dead")
    dead.mark_as_in_progress(now=PAST, expire=60)
    # What is in a file counts, not its name or place.
    os.rename(path / "succeeded.json", path / "more" / "task-succeeded.json")
    return old


def run(old: type[Old], task_id: object, error: Exception | None = None, times: int = 1) -> None:
    tracker = old.load(task_id) or old.new(task_id)
    for _ in range(times):
        with contextlib.suppress(ValueError, KeyError), tracker.start():
            tracker.data = {"seen": str(task_id)}
            if error is not None:
                raise error


def check_old(report: CopyReport, tasks: dict[str, Task]) -> None:
    assert report.ok, report.problems
    assert (report.created, report.verified) == (7, 7)
    assert {name: (str(task.status), task.attempts) for name, task in tasks.items()} == {
        "pending": ("pending", 0),
        "succeeded": ("succeeded", 1),
        "failed": ("failed", 1),
        "exhausted": ("exhausted", 3),
        "17": ("succeeded", 1),
        "ignored": ("ignored", 0),
        "dead": ("in_progress", 1),
    }
    assert tasks["17"].data == {"seen": "17"}
    (failure,) = tasks["failed"].errors
    assert (failure.type, failure.message) == ("ValueError", "odd")
    assert "raise error" in failure.traceback
    lease = tasks["dead"].lease
    assert lease is not None
    assert lease.expires_at == PAST + timedelta(seconds=60)


async def test_abstract_trackers_files_are_copied(old: type[Old], tmp_path: Path) -> None:
    to = f"file:{tmp_path / 'to'}"
    report = await copy(f"abstract-tracker:{old.folder}", to)
    check_old(report, await tasks_of(to))
    again = await copy(f"abstract-tracker:{old.folder}", to)
    assert (again.unchanged, again.created, again.ok) == (7, 0, True)
    async with open_tracker(to) as tracker, tracker.run("dead") as task:
        assert task.attempts == 2
    await asyncio.to_thread(run, old, "failed")
    report = await copy(f"abstract-tracker:{old.folder}", to)
    assert (report.replaced, report.newer, report.unchanged, report.ok) == (1, 1, 5, True)


async def test_a_task_that_an_abstract_tracker_is_at_is_held(old: type[Old], opened: Open) -> None:
    def lock() -> None:
        old.load("pending").mark_as_in_progress()

    target = await opened(MemoryTracker())
    await asyncio.to_thread(lock)
    report = await copy(f"abstract-tracker:{old.folder}", target)
    assert (report.created, report.failed, report.problems[0].id) == (6, {"held": 1}, "pending")
    assert (await copy(f"abstract-tracker:{old.folder}", target, held=True)).ok
    with pytest.raises(TaskLockedError, match="abstract_tracker"):
        async with target.run("pending"):
            pass


async def test_files_that_are_no_records_are_listed_by_name(old: type[Old], opened: Open) -> None:
    def write() -> None:
        path = old.folder
        (path / "cut.json").write_bytes((path / "pending.json").read_bytes()[:50])
        (path / "more" / "other.json").write_text('{"name": "x"}')
        (path / "more" / "nan.json").write_text((path / "17.json").read_text().replace('"17"', "NaN"))
        (path / "huge.json").write_bytes(b" " * 9_000_000)
        record = json.loads((path / "17.json").read_text())
        (path / "zzz.json").write_text(json.dumps(record | {"id": "17", "attempts": 9}))
        (path / "long.json").write_text(json.dumps(record | {"id": "x" * 2049}))
        (path / "int.json").write_text(json.dumps(record | {"id": "int", "data": {"n": 10**30}}))
        (path / "README").write_text("about")
        (path / ".hidden.json").write_text("{}")
        os.mkfifo(path / "pipe.json")  # whoever opens it waits for ever

    await asyncio.to_thread(write)
    target = await opened(MemoryTracker())
    report = await copy(f"abstract-tracker:{old.folder}", target)
    assert (report.created, report.verified, report.passed_over) == (7, 7, 1)
    assert report.failed == {"unreadable": 7}
    assert {os.path.relpath(problem.id, old.folder): problem.kind for problem in report.problems} == dict.fromkeys(
        ("cut.json", "more/other.json", "more/nan.json", "huge.json", "zzz.json", "long.json", "int.json"),
        "unreadable",
    )
    huge = next(problem for problem in report.problems if problem.id.endswith("huge.json"))
    assert "more than 8,388,608 bytes" in huge.what
    assert (await tasks_of(target))["17"].attempts == 1


async def test_another_task_of_abstract_tracker_with_the_same_id_is_no_later_state(
    old: type[Old], tmp_path: Path, opened: Open
) -> None:
    def start_anew() -> None:
        (tmp_path / "new").mkdir()
        other: Any = type("Other", (Old,), {"folder": tmp_path / "new"})
        other.new("pending")

    target = await opened(MemoryTracker())
    await copy(f"abstract-tracker:{old.folder}", target)
    await asyncio.to_thread(start_anew)
    report = await copy(f"abstract-tracker:{tmp_path / 'new'}", target)
    assert report.failed == {"conflict": 1}


async def test_a_folder_without_files_of_abstract_tracker_is_an_error(tmp_path: Path, opened: Open) -> None:
    target = await opened(MemoryTracker())
    with pytest.raises(StoreError, match="there is no folder"):
        await copy(f"abstract-tracker:{tmp_path / 'none'}", target)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(StoreError, match="there are no files of abstract_tracker"):
        await copy(f"abstract-tracker:{tmp_path}", target)


async def test_records_that_a_folder_tracker_has_taken_over_are_read_too(old: type[Old], opened: Open) -> None:
    os.rename(old.folder / "more" / "task-succeeded.json", old.folder / "succeeded.json")
    async with FolderTracker(old.folder) as tracker, tracker.run("pending") as task:
        task.result = "ours"
    target = await opened(MemoryTracker())
    report = await copy(f"abstract-tracker:{old.folder}", target)
    assert report.ok, report.problems
    assert (await tasks_of(target))["pending"].result == "ours"


async def test_abstract_trackers_objects_in_s3_are_copied(
    old: type[Old], tmp_path: Path, moto_s3: S3Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = moto_s3.prefix()

    def upload() -> None:
        client = raw_client(moto_s3.url)
        for path in old.folder.rglob("*.json"):
            key = f"{prefix}/{path.relative_to(old.folder)}"
            client.put_object(Bucket=moto_s3.bucket, Key=key, Body=path.read_bytes())
        client.put_object(Bucket=moto_s3.bucket, Key=f"{prefix}-other/x.json", Body=b"{}")
        client.put_object(Bucket=moto_s3.bucket, Key=f"{prefix}/notes", Body=b"about")
        client.close()

    await asyncio.to_thread(upload)
    of, to = f"abstract-tracker:s3://{moto_s3.bucket}/{prefix}?endpoint_url={moto_s3.url}", f"file:{tmp_path / 'to'}"
    report = await copy(of, to)
    assert report.passed_over == 1
    check_old(report, await tasks_of(to))


def test_without_aioboto3_objects_in_s3_say_what_to_install() -> None:
    code = (
        "import asyncio, sys; sys.modules['aioboto3'] = None\n"
        "from aiotracker.copying import copy\n"
        "asyncio.run(copy('abstract-tracker:s3://bucket/jobs', 'file:never'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert 'pip install "aiotracker[s3]"' in done.stderr.splitlines()[-1]


def test_a_report_can_be_stored_as_json() -> None:
    report = CopyReport("a", "b", False, failed={"held": 1})
    assert msgspec.json.decode(msgspec.json.encode(report), type=CopyReport) == report
    assert not report.ok
