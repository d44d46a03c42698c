"""What the parts of the suite have in common."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, ClassVar

import pytest
from typing_extensions import TypeVar

from ..._core.task import Status, Task
from ...running import RunningTask
from ...tracker import BaseTracker
from .._clock import FakeClock

__all__ = [
    "HOSTILE_IDS",
    "LEASE",
    "MISSING",
    "Base",
    "Holder",
    "MakeTracker",
    "abandon",
    "check_sound",
    "held",
    "loaded",
    "needs_scan",
    "settle",
    "until",
]

T = TypeVar("T")
C = TypeVar("C", bound=type)

MakeTracker = Callable[..., BaseTracker[Any, Any]]

LEASE = 60.0
MISSING = "no-such-task"

HOSTILE_IDS = [
    "..",
    ".",
    "/",
    "//",
    "../../etc/passwd",
    "/etc/passwd",
    "a/b/c",
    "a//b",
    "a/",
    "\\..\\",
    "C:\\NUL",
    "CON",
    "con",
    "nul.json",
    "task.json",
    ".lock",
    ".hidden",
    "-rf",
    "~",
    "$HOME",
    "`id`",
    "%",
    "%2e%2e%2f",
    "%00",
    "a%2Fb",
    "*",
    "?",
    "a?b=c&d#e",
    "[a-z]",
    "{}",
    "{hash}:tag",
    ":",
    "a:b",
    "'; drop table tasks; --",
    '"',
    "'",
    " ",
    " leading and trailing ",
    "a b",
    "\t",
    "\n",
    "line\nbreak",
    "\r\n",
    "\x00",
    "a\x00b",
    "\x1b[31m",
    "\x7f",
    "\u0085",
    "\u2028",
    "\ufeff",
    "\u200b",
    "\u202e",
    "\uffff",
    "é",
    "e\u0301",  # the same letter, decomposed: another id
    "ß",
    "ẞ",
    "İ",
    "Ω",
    "\u2126",  # the ohm sign, which some file systems make an omega
    "日本語",
    "😀",
    "👩‍👩‍👧‍👦",
    "A",
    "a",  # differs from the one before in case alone
    "null",
    "0",
    "1",
    "01",
    "1.0",
    "1e3",
    "true",
    "x" * 255,
    "x" * 256,
    "x" * 1024,
    "x" * 2048,
    "/" * 2048,
    "%" * 2048,
    "😀" * 512,
]


class Base:
    """What a backend says about itself.

    Attributes:
        has_scan: The backend implements `scan`.
        has_delete: The backend implements `delete`.
        has_processes: Several processes can use one store.
    """

    has_scan: ClassVar[bool] = True
    has_delete: ClassVar[bool] = True
    has_processes: ClassVar[bool] = True

    @pytest.fixture
    def make_tracker(self) -> MakeTracker:
        """A function that takes the options of a tracker and gives one that is not open: with each call another
        worker on the same store, which is empty when a test begins.
        """
        raise NotImplementedError("override the fixture make_tracker; see aiotracker.testing.ConformanceSuite")

    @pytest.fixture
    def store_url(self) -> str:
        """The store of `make_tracker`, as another process can open it: see `aiotracker.testing.open_store`."""
        raise NotImplementedError("override the fixture store_url, or say has_processes = False")

    @pytest.fixture
    def clock(self) -> FakeClock:
        """The clock of one machine."""
        return FakeClock()

    @pytest.fixture
    def other_clock(self) -> FakeClock:
        """The clock of another machine."""
        return FakeClock()

    @pytest.fixture
    def scan(self) -> None:
        if not self.has_scan:
            pytest.skip("this backend has no scan")

    @pytest.fixture
    def delete(self) -> None:
        if not self.has_delete:
            pytest.skip("this backend has no delete")

    @pytest.fixture
    def processes(self) -> None:
        if not self.has_processes:
            pytest.skip("this store lives in one process")


Order = tuple[Callable[[RunningTask], Awaitable[Any]], asyncio.Future[Any]]


def needs_scan(cls: C) -> C:
    """All tests of a class are passed over for a backend that has no scan."""
    for name, value in list(vars(cls).items()):
        if name.startswith("test_"):
            setattr(cls, name, pytest.mark.usefixtures("scan")(value))
    return cls


class Holder:
    """A run in an asyncio task of its own, whose body does what it is told: what happens to it does not happen to
    the test.
    """

    def __init__(self, tracker: BaseTracker[Any, Any], task_id: str, options: dict[str, Any]) -> None:
        self._orders: asyncio.Queue[Order | BaseException | None] = asyncio.Queue()
        self._entered: asyncio.Future[RunningTask] = asyncio.get_running_loop().create_future()
        self.run = asyncio.create_task(self._run(tracker, task_id, options))

    async def _run(self, tracker: BaseTracker[Any, Any], task_id: str, options: dict[str, Any]) -> None:
        try:
            async with tracker.run(task_id, **options) as task:
                self._entered.set_result(task)
                while (order := await self._orders.get()) is not None:
                    if isinstance(order, BaseException):
                        raise order
                    fn, answer = order
                    try:
                        value = await fn(task)
                    except Exception as exc:
                        answer.set_exception(exc)
                    else:
                        answer.set_result(value)
        except BaseException as exc:
            if self._entered.done():
                raise
            self._entered.set_exception(exc)
            self._entered.exception()  # looked at, in case nobody else does

    async def task(self) -> RunningTask:
        """The running task, as soon as the claim is made; raises what the claim raised."""
        return await asyncio.shield(self._entered)

    async def do(self, fn: Callable[[RunningTask], Awaitable[T]]) -> T:
        """Lets the body await `fn(task)`, and gives what it gives, or raises what it raises."""
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._orders.put_nowait((fn, answer))
        waited: set[asyncio.Future[Any]] = {answer, self.run}
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        assert answer.done(), f"the body has ended before: {self.run!r}"
        return answer.result()

    async def end(self) -> None:
        """Lets the body end, and raises what the run raises."""
        self._orders.put_nowait(None)
        await self.run

    async def fail(self, error: BaseException) -> None:
        """Lets the body raise, and raises what the run raises."""
        self._orders.put_nowait(error)
        await self.run

    async def cancel(self) -> None:
        """Cancels the body, waits until it is over, and raises what the run raises instead of the cancellation."""
        self.run.cancel()
        await asyncio.wait({self.run})
        if not self.run.cancelled():
            self.run.result()


@asynccontextmanager
async def held(tracker: BaseTracker[Any, Any], task_id: str, **options: Any) -> AsyncIterator[Holder]:
    """A task that is held while this is entered, unless the test ends the run before."""
    holder = Holder(tracker, task_id, options)
    try:
        await holder.task()
        yield holder
    finally:
        if not holder.run.done():
            holder.run.cancel()
        await asyncio.wait({holder.run})
        if not holder.run.cancelled():
            holder.run.exception()


async def abandon(tracker: BaseTracker[Any, Any], *task_ids: str, **options: Any) -> None:
    """Claims tasks, and stops as a killed worker does: nothing more is written.

    Args:
        tracker: Not open; opened and closed here.
        *task_ids: What to claim.
        **options: Of each run.
    """

    async def claim(task_id: str) -> None:
        await tracker.run(task_id, **options).__aenter__()

    async with tracker:
        for task_id in task_ids:
            # In a task of its own, since the keeper cancels the task that entered a run.
            await asyncio.create_task(claim(task_id))
            tracker.keeper.held.clear()


async def settle() -> None:
    """Gives everything that is ready its turn."""
    for _ in range(20):
        await asyncio.sleep(0)


async def until(condition: Callable[[], Awaitable[T]], seconds: float = 10.0) -> T:
    """Waits for a condition, and gives its first true value."""
    deadline = asyncio.get_running_loop().time() + seconds
    while not (value := await condition()):
        assert asyncio.get_running_loop().time() < deadline, "it did not come about in time"
        await asyncio.sleep(0.002)
    return value


async def loaded(tracker: BaseTracker[Any, Any], task_id: str) -> Task:
    """The record, which must be there."""
    task = await tracker.load(task_id)
    assert task is not None, f"{task_id!r} is not in the store"
    return task


def check_sound(task: Task) -> None:
    """What is true of every record at every time."""
    assert (task.lease is not None) == (task.status is Status.IN_PROGRESS), task
    assert task.attempts >= 0
    assert task.update_time >= task.create_time
    if task.status is Status.EXHAUSTED:
        assert task.errors, "an exhausted task says why"
    if task.status is Status.SUCCEEDED:
        assert task.ends
        assert task.ends[-1].outcome == "succeeded"
