"""The public API as a type checker sees it; never run. Checked by `test_api.py`."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypedDict, assert_type

import anyio
import msgspec

from aiotracker import (
    BaseTracker,
    ConflictError,
    Event,
    Exhausted,
    Failure,
    FileTracker,
    FolderTracker,
    GiveUp,
    Hook,
    MemoryTracker,
    Postpone,
    Query,
    Refused,
    Retry,
    RunningTask,
    Status,
    Task,
    TaskUnavailableError,
    Where,
    WorkSummary,
    log_events,
    open_tracker,
    stop_on_signals,
)


@dataclass
class Page:
    depth: int = 0


class Row(TypedDict):
    name: str


class Report(msgspec.Struct):
    lines: int


async def fetch(url: str, *, tries: int = 1) -> Page:
    return Page(tries)


def parse(page: Page) -> list[Row]:
    return [{"name": str(page.depth)}]


def notice(event: Event) -> None:
    if isinstance(event, Exhausted):
        assert_type(event.task, Task)
        assert_type(event.failure, Failure | None)
        assert_type(event.error, BaseException | None)
    elif isinstance(event, Refused):
        assert_type(event.reason, str)
    hook: Hook = notice
    hook(event)


async def typed_trackers() -> None:
    tracker = FileTracker("state", data_type=Page, result_type=int, retry=Retry(5, never=ValueError))
    assert_type(tracker, FileTracker[Page, int])
    async with tracker as opened:
        assert_type(opened, FileTracker[Page, int])
    async with tracker.run("a", data=Page(1), lease=10, timeout=5, retry=Retry(2), force=True) as task:
        assert_type(task, RunningTask[Page, int])
        assert_type(task.data, Page)
        assert_type(task.result, int | None)
        task.result = 3
        task.data = Page(2)
        task.data.depth += 1
        assert_type(task.progress, float | None)
        assert_type(task.note, str | None)
        task.progress = 0.5
        task.note = "half"
        assert_type(task.id, str)
        assert_type(task.attempts, int)
        assert_type(task.fence, int)
        assert_type(task.lease_left, float)
        assert_type(task.record, Task)
        await task.save()
        await task.renew()
        await task.renew(120)

    async with tracker.run("a", data="page"):  # type: ignore[arg-type]  # not a Page
        pass

    both = MemoryTracker(data_type=Row, result_type=Report)
    async with both.run("a") as row:
        assert_type(row.data, Row)
        row.result = Report(3)
    assert_type(both.peer(worker="two"), MemoryTracker[Row, Report])
    folder = FolderTracker("folder", lease=900, retry=Retry(max_attempts=5), hooks=[log_events, notice])
    FolderTracker("folder", hooks=[fetch])  # type: ignore[list-item]  # a hook is no async function, and takes an event
    async with folder.run("1") as one:
        one.result = await asyncio.to_thread(parse, Page())


async def steps_and_calls(tracker: BaseTracker) -> None:
    async with tracker.run("a") as task:
        assert_type(await task.step("fetch", fetch, "url", tries=3), Page)
        assert_type(await task.step("parse", asyncio.to_thread, parse, Page()), list[Row])
        await task.step("fetch", fetch, 3)  # type: ignore[arg-type]  # the url is a str
        await task.step("parse", parse, Page())  # type: ignore[arg-type]  # not async
    assert_type(await tracker.call("a", fetch, "url"), Page)
    await tracker.call("a", fetch, tries="x")  # type: ignore[call-arg,arg-type]  # no url, and a str for an int
    assert_type(await tracker.wait("a", timeout=5), Task)


async def bare(task: RunningTask) -> None:
    task.result = f"mailed {task.data['to']}"
    task.data["rows"] = 3


async def fan_out(tracker: BaseTracker[Page, int]) -> None:
    async def crawl(task: RunningTask[Page, int]) -> None:
        if task.data.depth > 5:
            raise GiveUp("too deep")
        if task.data.depth < 0:
            raise Postpone(1.5)
        task.result = task.data.depth

    def report(task: Task) -> None:
        print(task.id)

    async def report_later(task: Task) -> None:
        print(task.id)

    async def more() -> AsyncIterator[str]:
        yield "a"

    async with stop_on_signals() as stop:
        assert_type(stop, asyncio.Event)
        summary = await tracker.work(crawl, concurrency=1000, stop=stop, on_done=report, grace=5)
    assert_type(summary, WorkSummary)
    assert_type(summary.ok, bool)
    assert_type(summary.rate, float)
    await tracker.work(crawl, ids=["a"], limit=3, retry=Retry(), on_done=report_later)
    await tracker.work(crawl, ids=more())
    await tracker.work(crawl, forever=True, stop=anyio.Event())
    await tracker.work(bare)


async def managing(tracker: BaseTracker[Page, int]) -> None:
    assert_type(await tracker.add("a", Page(1), not_before=datetime.now(UTC), priority=3), bool)
    assert_type(await tracker.add_many(["a", "b"]), int)
    await tracker.add_many((name, Page(1)) for name in "ab")
    async for task in tracker.find(status={"failed", "exhausted"}, prefix="a", order_by="-priority", limit=10):
        assert_type(task, Task)
        assert_type(task.status, Status)
    assert_type(await tracker.count(status=Status.FAILED), Counter[str])
    assert_type(await tracker.count(by="step", fingerprint="0123456789ab"), Counter[str])
    await tracker.count(by="colour")  # type: ignore[arg-type]  # no such group
    assert_type(await tracker.reset(step="parse", step_status="failed", reason="mended", by="anna"), int)
    assert_type(await tracker.reset("a", from_step="parse", force=True), int)
    assert_type(await tracker.ignore(error_type="ValueError"), int)
    assert_type(await tracker.purge(created_before=datetime.now(UTC)), int)
    assert_type(await tracker.load("a"), Task | None)
    where: Where = {"status": "failed", "data": {"country": "DE"}}
    await tracker.count(**where)
    await tracker.count(colour="red")  # type: ignore[call-arg]  # no such filter


async def by_url() -> None:
    tracker = open_tracker("file:state", lease=30)
    assert_type(tracker, BaseTracker[Any, Any])
    await tracker.open()
    await tracker.aclose()
    try:
        async with tracker.run("a"):
            pass
    except TaskUnavailableError as exc:
        assert_type(exc.retry_after, float | None)
        assert_type(exc.task, Task)


class Mine(BaseTracker):
    """A backend of somebody's own."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.stored: dict[str, bytes] = {}

    async def load(self, task_id: str) -> Task | None:
        raw = self.stored.get(task_id)
        return None if raw is None else Task.decode(raw, version="1")

    async def dump(self, task: Task) -> Task:
        if task.version is None and task.id in self.stored:
            raise ConflictError("taken", await self.load(task.id))
        self.stored[task.id] = task.encode()
        return task.replace(version="1")

    async def scan(self, query: Query) -> AsyncIterator[Task]:
        for raw in self.stored.values():
            task = Task.decode(raw)
            if query.matches(task):
                yield task
