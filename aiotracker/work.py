"""Fan-out: many bodies at once, until every task is final."""

import asyncio
import heapq
import inspect
import itertools
import logging
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final, Protocol

import msgspec

from ._core.retry import Retry
from ._core.task import Status, Task
from .clock import wait_until
from .errors import (
    InvalidValueError,
    LeaseLostError,
    OutcomeUnknownError,
    StoreUnavailableError,
    TaskUnavailableError,
)

if TYPE_CHECKING:
    from .running import Run, RunningTask
    from .tracker import BaseTracker

__all__ = ["WorkSummary", "Worker"]

logger = logging.getLogger("aiotracker")

MIN_POLL: Final = 0.05  # seconds between looks at what other workers do; grows while nothing changes
MAX_POLL: Final = 5.0
YIELD_EVERY: Final = 16  # runs of one puller
UNREACHABLE: Final = 60.0  # seconds without one answer of the store, after which work ends


class StopEvent(Protocol):
    """asyncio's or anyio's event."""

    def is_set(self) -> bool: ...

    async def wait(self) -> object: ...


class WorkSummary(msgspec.Struct):
    """What one call of `work` did.

    Attributes:
        succeeded: Tasks that succeeded here.
        exhausted: Tasks that became exhausted here.
        skipped: Ids that were final already.
        released: Runs that were cancelled when the work was stopped.
        retried: Runs that failed, or lost their lease, with attempts left.
        seconds: How long it took.
        unmet: Of the skipped ones, those that had not succeeded.
        stopped: It ended because of `stop`, before all was done.
    """

    succeeded: int = 0
    exhausted: int = 0
    skipped: int = 0
    released: int = 0
    retried: int = 0
    seconds: float = 0.0
    unmet: int = 0
    stopped: bool = False

    @property
    def rate(self) -> float:
        """Tasks that became final here, a second."""
        return (self.succeeded + self.exhausted) / self.seconds if self.seconds > 0 else 0.0

    @property
    def ok(self) -> bool:
        """Every task that was asked for has succeeded, here or before."""
        return not (self.exhausted or self.released or self.unmet or self.stopped)

    def __str__(self) -> str:
        parts = [f"{self.succeeded:,} succeeded"]
        for name in ("exhausted", "skipped", "released", "retried"):
            if count := getattr(self, name):
                parts.append(f"{count:,} {name}")
        stopped = ", stopped" if self.stopped else ""
        return f"{', '.join(parts)} in {self.seconds:.1f} s ({self.rate:,.0f}/s){stopped}"


class Worker:
    """One call of `work`: a fixed number of asyncio tasks pull ids from one source."""

    def __init__(
        self,
        tracker: "BaseTracker[Any, Any]",
        fn: "Callable[[RunningTask[Any, Any]], Awaitable[object]]",
        *,
        ids: Iterable[str] | AsyncIterable[str] | None,
        concurrency: int,
        limit: int | None,
        forever: bool,
        retry: Retry,
        stop: StopEvent | None,
        grace: float,
        on_done: Callable[[Task], object] | None,
    ) -> None:
        if isinstance(grace, bool) or not isinstance(grace, int | float) or not grace >= 0:
            raise InvalidValueError(f"grace takes a number of seconds, 0 or more, not {grace!r}")
        if ids is not None and forever:
            raise InvalidValueError("forever=True waits for new tasks, and ids= names all there are: give one of them")
        self._tracker = tracker
        self._fn = fn
        self._concurrency = concurrency
        self._left = limit
        self._retry = retry
        self._stop = stop
        self._grace = grace
        self._on_done = on_done
        self._changed = asyncio.Event()
        self._active: set[asyncio.Task[None]] = set()
        self._stopping = False
        self._failing_since: float | None = None
        self._pause = MIN_POLL
        self._summary = WorkSummary()
        self._began = tracker.now()
        self._source: _Named | _Claimable = _Claimable(self, forever) if ids is None else _Named(self, ids)

    async def work(self) -> WorkSummary:
        """Does it all."""
        clock, summary = self._tracker.clock, self._summary
        began = clock.monotonic()
        self._tracker._listeners.add(self._changed)
        count = self._concurrency if self._left is None else min(self._concurrency, self._left)
        workers = {asyncio.create_task(self._pull()) for _ in range(count)}
        stopping = None if self._stop is None else asyncio.ensure_future(self._stop.wait())
        try:
            await self._until_done(workers, stopping)
        finally:
            self._tracker._listeners.discard(self._changed)
            if stopping is not None:
                stopping.cancel()
            await _cancel_all(workers)
        for worker in workers:
            if not worker.cancelled() and (exc := worker.exception()) is not None:
                raise exc
        summary.seconds = clock.monotonic() - began
        return summary

    async def _until_done(self, workers: set[asyncio.Task[None]], stopping: asyncio.Future[object] | None) -> None:
        over = asyncio.get_running_loop().create_future()
        left = len(workers)

        def ended(worker: asyncio.Task[None]) -> None:
            nonlocal left
            left -= 1
            failed = not worker.cancelled() and worker.exception() is not None
            if (failed or left == 0) and not over.done():
                over.set_result(None)

        for worker in workers:
            worker.add_done_callback(ended)
        if stopping is None:
            await over
            return
        await asyncio.wait({over, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if over.done():
            return
        self._stopping = True
        self._summary.stopped = not self._source.is_drained()
        self._changed.set()
        for worker in workers - self._active:
            worker.cancel()  # waits for work, and holds nothing
        await asyncio.wait({over}, timeout=self._grace)

    async def _pull(self) -> None:
        me = asyncio.current_task()
        assert me is not None
        for turn in itertools.count():
            if self._stopping or self._left == 0:
                return
            if self._left is not None:
                self._left -= 1
            if turn % YIELD_EVERY == 0:
                await asyncio.sleep(0)  # a store in memory never waits, and other tasks want their turn
            picked = await self._source.next()
            if picked is None:
                return
            self._active.add(me)
            ran = False
            try:
                ran = await self._run_one(*picked)
            finally:
                self._active.discard(me)
                self._source.ended(picked[0])
                self._changed.set()
            if not ran and self._left is not None:
                self._left += 1

    async def _run_one(self, task_id: str, known: Task | None) -> bool:
        """One claim and run; whether a body ran."""
        run = self._tracker._run(task_id, retry=self._retry, known=known)
        raised: BaseException | None = None
        entered = False
        try:
            async with run as task:
                entered = True
                try:
                    await self._fn(task)
                except BaseException as exc:
                    raised = exc
                    raise
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if current is not None and current.cancelling():
                self._summary.released += entered
                raise
        except TaskUnavailableError as exc:
            if exc is not raised:
                await self._refused(exc)
                return entered
        except LeaseLostError as exc:
            if exc is not raised or run.held.lost is not None:
                logger.warning("%s; it is tried again", exc)
                self._summary.retried += 1
                self._source.again(task_id, 0.0)
                return entered
        except (StoreUnavailableError, OutcomeUnknownError) as exc:
            if exc is not raised:
                self._no_answer(task_id, exc)
                return entered
        except Exception as exc:
            if exc is not raised and not (entered and run.record.lease is None):
                raise
        self._failing_since = None
        self._pause = MIN_POLL
        await self._ended(run)
        return True

    async def _ended(self, run: "Run[Any, Any]") -> None:
        record = run.record
        if record.status.is_final:
            if record.status is Status.SUCCEEDED:
                self._summary.succeeded += 1
            else:
                self._summary.exhausted += 1
            await self._report(record)
            return
        if record.status is Status.FAILED:
            self._summary.retried += 1
        due = record.not_before
        self._source.again(record.id, 0.0 if due is None else (due - self._tracker.now()).total_seconds())

    async def _refused(self, exc: TaskUnavailableError) -> None:
        record = exc.task
        if exc.retry_after is not None:
            # Held elsewhere, it may end long before its lease does.
            self._pause = min(MAX_POLL, self._pause * 1.5)
            held = record.lease is not None
            self._source.again(record.id, min(exc.retry_after, self._pause) if held else exc.retry_after)
        elif record.status is Status.EXHAUSTED and record.update_time >= self._began:
            self._summary.exhausted += 1  # our claim found the attempts used up
            await self._report(record)
        elif self._source.counts_skipped:
            self._summary.skipped += 1
            self._summary.unmet += record.status is Status.EXHAUSTED

    def _no_answer(self, task_id: str, exc: Exception) -> None:
        now = self._tracker.clock.monotonic()
        if self._failing_since is None:
            self._failing_since = now
        if now - self._failing_since > UNREACHABLE:
            raise exc
        logger.warning("%r is tried again: %s", task_id, exc)
        self._pause = min(MAX_POLL, self._pause * 1.5)
        self._source.again(task_id, self._pause)

    async def _report(self, record: Task) -> None:
        if self._on_done is None:
            return
        try:
            answer = self._on_done(record)
            if inspect.isawaitable(answer):
                await answer
        except Exception:
            logger.exception("on_done failed for %r", record.id)

    # -- what the sources need

    @property
    def tracker(self) -> "BaseTracker[Any, Any]":
        return self._tracker

    @property
    def concurrency(self) -> int:
        return self._concurrency

    @property
    def is_stopping(self) -> bool:
        return self._stopping

    @property
    def is_idle(self) -> bool:
        """No body runs that could make more work."""
        return not self._active

    async def until_changed(self, seconds: float | None) -> None:
        """Until a body ends, a task is added here, the work is stopped, or some seconds are over."""
        await wait_until(self._tracker.clock, self._changed, seconds)
        self._changed.clear()


class _Named:
    """The ids that the user named, each until it is final."""

    counts_skipped = True

    def __init__(self, worker: Worker, ids: Iterable[str] | AsyncIterable[str]) -> None:
        if isinstance(ids, str):
            raise InvalidValueError(f"ids takes an iterable of ids, and {ids!r} is one str; put it in a list")
        self._worker = worker
        self._sync: Iterator[str] | None = None if isinstance(ids, AsyncIterable) else iter(ids)
        self._async: AsyncIterator[str] | None = aiter(ids) if isinstance(ids, AsyncIterable) else None
        self._later: list[tuple[float, int, str]] = []
        self._order = 0
        self._lock = asyncio.Lock()

    def is_drained(self) -> bool:
        return self._sync is None and self._async is None and not self._later

    def again(self, task_id: str, seconds: float) -> None:
        self._order += 1
        due = self._worker.tracker.clock.monotonic() + max(0.0, seconds)
        heapq.heappush(self._later, (due, self._order, task_id))

    def ended(self, task_id: str) -> None:
        pass

    async def next(self) -> tuple[str, Task | None] | None:
        if self._sync is not None and not self._is_due():
            for task_id in self._sync:
                return task_id, None
            self._sync = None
        async with self._lock:
            while not self._worker.is_stopping:
                if self._is_due():
                    return heapq.heappop(self._later)[2], None
                if self._async is not None:
                    try:
                        return await anext(self._async), None
                    except StopAsyncIteration:
                        self._async = None
                    continue
                if self._later:
                    await self._worker.until_changed(self._later[0][0] - self._worker.tracker.clock.monotonic())
                elif self._worker.is_idle:
                    return None
                else:
                    await self._worker.until_changed(None)
        return None

    def _is_due(self) -> bool:
        return bool(self._later) and self._later[0][0] <= self._worker.tracker.clock.monotonic()


class _Claimable:
    """Whatever the store says may be claimed."""

    counts_skipped = False

    def __init__(self, worker: Worker, forever: bool) -> None:
        self._worker = worker
        self._forever = forever
        self._ready: deque[Task] = deque()
        self._busy: set[str] = set()  # ready or running here
        self._shunned: dict[str, float] = {}  # refused a moment ago; until when not to ask again
        self._lock = asyncio.Lock()
        self._pause = MIN_POLL

    def is_drained(self) -> bool:
        return self._forever  # a service is stopped when its time has come, not too early

    def again(self, task_id: str, seconds: float) -> None:
        if seconds > 0:
            self._shunned[task_id] = self._worker.tracker.clock.monotonic() + seconds

    def ended(self, task_id: str) -> None:
        self._busy.discard(task_id)

    async def next(self) -> tuple[str, Task | None] | None:
        if not self._ready:
            async with self._lock:
                while not self._ready:
                    if self._worker.is_stopping or not await self._refill():
                        return None
        task = self._ready.popleft()
        return task.id, task

    async def _refill(self) -> bool:
        """Looks for work, and waits where there is none now; `False` where there will be none."""
        worker = self._worker
        tracker = worker.tracker
        now = tracker.clock.monotonic()
        self._shunned = {task_id: until for task_id, until in self._shunned.items() if until > now}
        was_idle = worker.is_idle
        tasks, next_due = await tracker.claimable(2 * worker.concurrency + len(self._shunned) + len(self._busy))
        for task in tasks:
            if task.id not in self._busy and task.id not in self._shunned:
                self._busy.add(task.id)
                self._ready.append(task)
        if self._ready:
            self._pause = MIN_POLL
            return True
        if not tasks and next_due is None and was_idle and not self._forever:
            return False
        waits = [self._pause]
        if next_due is not None:
            waits.append((next_due - tracker.now()).total_seconds())
        if self._shunned:
            waits.append(min(self._shunned.values()) - now)
        self._pause = min(MAX_POLL, self._pause * 1.5)
        await worker.until_changed(max(0.001, min(waits)))
        return True


async def _cancel_all(workers: set[asyncio.Task[None]]) -> None:
    """Cancels and waits, so that every body is released, also if this is cancelled meanwhile."""
    left = {worker for worker in workers if not worker.done()}
    for worker in left:
        worker.cancel()
    cancelled = False
    while left:
        try:
            _, left = await asyncio.wait(left)
        except asyncio.CancelledError:
            # Their ends are bounded, and another cancel must not leave one of them held.
            cancelled = True
            left = {worker for worker in left if not worker.done()}
    if cancelled:
        raise asyncio.CancelledError
