"""Fan-out: many bodies at once, until every task is final."""

import asyncio
import heapq
import inspect
import itertools
import logging
import operator
from collections import deque
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final, Protocol

import anyio
import msgspec

from ._core.retry import Retry
from ._core.task import Status, Task
from ._core.transitions import outcome_of
from .clock import wait_until
from .errors import (
    InvalidValueError,
    LeaseLostError,
    OutcomeUnknownError,
    RecordTooLargeError,
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
        unmet: Skipped ids that had not succeeded, and tasks that were not final yet after their last run here.
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
        is_event = callable(getattr(stop, "is_set", None)) and inspect.iscoroutinefunction(getattr(stop, "wait", None))
        if stop is not None and (isinstance(stop, type) or not is_event):  # a thread's event would block us
            raise InvalidValueError(f"stop takes an asyncio.Event or an anyio.Event, not {stop!r}")
        if on_done is not None and not callable(on_done):
            raise InvalidValueError(f"on_done takes a function of one task, not {on_done!r}")
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
        self._undone: set[str] = set()  # were run here, and are not final yet
        self._failing_since: float | None = None
        self._failures = 0  # since that
        self._pauses: dict[str, float] = {}  # by id: before the next look at what another worker holds
        self._summary = WorkSummary()
        self._forever = forever
        self._is_cancelling = False  # our own asyncio tasks
        self._source: _Named | _Claimable = _Claimable(self) if ids is None else _Named(self, ids)

    async def work(self) -> WorkSummary:
        """Does it all."""
        clock, summary = self._tracker.clock, self._summary
        began = clock.monotonic()
        self._tracker._listeners.add(self._changed)
        count = self._concurrency if self._left is None else min(self._concurrency, self._left)
        workers = {asyncio.create_task(self._pull()) for _ in range(count)}
        helpers: set[asyncio.Future[Any]] = self._source.start()
        if self._stop is not None:
            helpers.add(stopping := asyncio.ensure_future(self._stop.wait()))
        try:
            await self._until_done(workers, None if self._stop is None else stopping)
        finally:
            self._tracker._listeners.discard(self._changed)
            self._is_cancelling = True
            await _cancel_all(workers, helpers)
        for worker in workers:
            if not worker.cancelled() and (exc := worker.exception()) is not None:
                raise exc
        if not self._forever:
            summary.unmet += len(self._undone)
            summary.stopped = self.is_stopping and not (self._source.is_drained and not self._undone)
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
        for worker in workers - self._active:
            worker.cancel()  # waits for work, and holds nothing
        grace = asyncio.ensure_future(self._tracker.clock.sleep(self._grace))
        try:
            await asyncio.wait({over, grace}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            grace.cancel()

    async def _pull(self) -> None:
        me = asyncio.current_task()
        assert me is not None
        for turn in itertools.count():
            if self._left == 0:
                return
            if self._left is not None:
                self._left -= 1
            if turn % YIELD_EVERY == 0:
                await asyncio.sleep(0)  # a store in memory never waits, and other tasks want their turn
            picked = None if self.is_stopping else await self._source.next()
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
            if not entered:
                raise
            if self._is_cancelling:
                await self._stopped(run)
                raise
        except TaskUnavailableError as exc:
            if exc is not raised:
                await self._refused(run, exc)
                return entered
        except LeaseLostError as exc:
            if exc is not raised or run.held.lost is not None:
                logger.warning("%s; it is tried again", exc, extra=run.where("lease_lost", exc))
                self._summary.retried += 1
                self._again(task_id, 0.0)
                return entered
        except (StoreUnavailableError, OutcomeUnknownError) as exc:
            if exc is not raised:
                self._no_answer(task_id, exc)
                return entered
        except RecordTooLargeError as exc:
            if not entered:
                extra = run.where("claim_impossible", exc)
                logger.error("%r cannot be claimed, and is left alone: %s", task_id, exc, extra=extra)
                self._undone.add(task_id)
                return False
        except Exception as exc:
            if exc is not raised and not (entered and run.record.lease is None):
                raise
        self._failing_since = None
        await self._take_cancel_back()
        await self._ended(run)
        return True

    async def _take_cancel_back(self) -> None:
        """Where a body has cancelled its own asyncio task: that ends the body, and not what runs one after another."""
        me = asyncio.current_task()
        if me is None or not me.cancelling() or self._is_cancelling:
            return
        while me.cancelling():
            me.uncancel()
        try:
            await asyncio.sleep(0)  # where the body has awaited nothing since, it comes now
        except asyncio.CancelledError:
            if self._is_cancelling:
                raise

    async def _ended(self, run: "Run[Any, Any]") -> None:
        record = run.record
        self._pauses.pop(record.id, None)
        # How our own claim ended: after a lost reply the record may show what somebody has made of the task since.
        outcome = outcome_of(record, run.terms.token)
        if outcome in ("succeeded", "exhausted"):
            self._undone.discard(record.id)
            if outcome == "succeeded":
                self._summary.succeeded += 1
            else:
                self._summary.exhausted += 1
            await self._report(record)
            return
        if outcome == "failed":
            self._summary.retried += 1
        due = record.not_before
        self._again(record.id, 0.0 if due is None else (due - self._tracker.now()).total_seconds(), record)

    async def _stopped(self, run: "Run[Any, Any]") -> None:
        """A run that was cancelled, perhaps after its end."""
        record = run.record
        if record.lease is None and record.status is not Status.PENDING:
            await self._ended(run)
        else:
            self._summary.released += 1

    async def _refused(self, run: "Run[Any, Any]", exc: TaskUnavailableError) -> None:
        self._failing_since = None
        record = exc.task
        if exc.retry_after is not None:
            wait = exc.retry_after
            if record.lease is not None:  # held elsewhere, it may end long before its lease does
                pause = self._pauses.get(record.id, MIN_POLL)
                self._pauses[record.id] = min(MAX_POLL, pause * 1.5)
                wait = min(wait, pause)
            self._source.again(record.id, wait, record)
            return
        self._pauses.pop(record.id, None)
        self._undone.discard(record.id)
        if outcome_of(record, run.terms.token) == "exhausted":
            self._summary.exhausted += 1  # our claim found the attempts used up
            await self._report(record)
        elif self._source.counts_skipped:
            self._summary.skipped += 1
            self._summary.unmet += record.status is not Status.SUCCEEDED

    def _again(self, task_id: str, seconds: float, known: Task | None = None) -> None:
        if not self._forever:
            self._undone.add(task_id)
        self._source.again(task_id, seconds, known)

    def _no_answer(self, task_id: str, exc: Exception) -> None:
        self._again(task_id, self.no_answer(f"{task_id!r} is tried again", exc))

    async def _report(self, record: Task) -> None:
        if self._on_done is None:
            return
        try:
            answer = self._on_done(record)
            if inspect.isawaitable(answer):
                await answer
        except (Exception, asyncio.CancelledError) as exc:
            if isinstance(exc, asyncio.CancelledError) and self._is_cancelling:
                raise  # else somebody else's task was cancelled, or it has cancelled itself, and ours goes on
            extra = {"event": "on_done_failed", "task_id": record.id, "error_type": type(exc).__name__}
            logger.exception("on_done failed for %r", record.id, extra=extra)
            await self._take_cancel_back()

    # -- what the sources need

    @property
    def tracker(self) -> "BaseTracker[Any, Any]":
        return self._tracker

    @property
    def concurrency(self) -> int:
        return self._concurrency

    @property
    def forever(self) -> bool:
        return self._forever

    @property
    def is_stopping(self) -> bool:
        return self._stop is not None and self._stop.is_set()

    @property
    def is_idle(self) -> bool:
        """No body runs that could make more work."""
        return not self._active

    def no_answer(self, what: str, exc: Exception) -> float:
        """Takes note that the store did not answer, and says after how many seconds to try again.

        Raises:
            Exception: The one given, where it has been so for too long.
        """
        now = self._tracker.clock.monotonic()
        if self._failing_since is None:
            self._failing_since, self._failures = now, 0
        if now - self._failing_since > UNREACHABLE:
            raise exc
        self._failures += 1
        extra = {"event": "store_unreachable", "store": self._tracker.kind, "error_type": type(exc).__name__}
        logger.warning("%s: %s", what, exc, extra=extra)
        return min(MAX_POLL, MIN_POLL * 1.5 ** min(self._failures, 20))

    def change(self) -> None:
        """Something is there that is waited for."""
        self._changed.set()

    async def until_changed(self, seconds: float | None) -> None:
        """Until a body ends, a task is added here, or some seconds are over. For one waiter at a time."""
        await wait_until(self._tracker.clock, self._changed, seconds)
        self._changed.clear()


class _Named:
    """The ids that the user named, each until it is final."""

    counts_skipped = True

    def __init__(self, worker: Worker, ids: Iterable[str] | AsyncIterable[str]) -> None:
        if isinstance(ids, str):
            raise InvalidValueError(f"ids takes an iterable of ids, and {ids!r} is one str; put it in a list")
        self._worker = worker
        self._sync: Iterator[str] | None = None
        self._async: AsyncIterable[str] | None = None
        if isinstance(ids, AsyncIterable):
            self._async = ids
        else:
            self._sync = iter(ids)
        self._fed: deque[str] = deque()  # of the async ones, taken from there and not yet from here
        self._wanted = 0  # how many wait for one
        self._is_wanted = asyncio.Event()
        self._error: Exception | None = None  # of the user's iterable
        self._later: list[tuple[float, int, str, Task | None]] = []
        self._order = itertools.count()
        self._lock = asyncio.Lock()

    def start(self) -> set[asyncio.Future[Any]]:
        """What must run for this to work; the caller ends it."""
        return {asyncio.create_task(self._feed(self._async))} if self._async is not None else set()

    async def _feed(self, ids: AsyncIterable[str]) -> None:
        """One asyncio task reads them all: an async generator must not be resumed from different ones."""
        try:
            async for task_id in ids:
                self._fed.append(task_id)
                self._worker.change()
                while len(self._fed) >= self._wanted:
                    self._is_wanted.clear()
                    await self._is_wanted.wait()
        except Exception as exc:
            self._error = exc
        self._async = None
        self._worker.change()

    @property
    def is_drained(self) -> bool:
        """Every id has been taken, and is final."""
        is_read = self._sync is None or operator.length_hint(self._sync, 1) == 0
        return is_read and self._async is None and not self._fed and not self._later

    def again(self, task_id: str, seconds: float, known: Task | None) -> None:
        due = self._worker.tracker.clock.monotonic() + max(0.0, seconds)
        heapq.heappush(self._later, (due, next(self._order), task_id, known))

    def ended(self, task_id: str) -> None:
        pass

    async def next(self) -> tuple[str, Task | None] | None:
        if (picked := self._pick()) is not None:
            return picked
        self._wanted += 1
        self._is_wanted.set()
        try:
            async with self._lock:
                while not self._worker.is_stopping:
                    if (picked := self._pick()) is not None:
                        return picked
                    if self._error is not None:
                        raise self._error
                    if self._later:
                        await self._worker.until_changed(self._later[0][0] - self._worker.tracker.clock.monotonic())
                    elif self._async is None and self._worker.is_idle:
                        return None
                    else:
                        await self._worker.until_changed(None)
            return None
        finally:
            self._wanted -= 1

    def _pick(self) -> tuple[str, Task | None] | None:
        if self._later and self._later[0][0] <= self._worker.tracker.clock.monotonic():
            return heapq.heappop(self._later)[2:]
        if self._sync is not None:
            for task_id in self._sync:
                return task_id, None
            self._sync = None
        if self._fed:
            self._is_wanted.set()
            return self._fed.popleft(), None
        return None


class _Claimable:
    """Whatever the store says may be claimed."""

    counts_skipped = False

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._ready: deque[Task] = deque()
        self._busy: set[str] = set()  # ready or running here
        self._shunned: dict[str, float] = {}  # refused a moment ago; until when not to ask again
        self._lock = asyncio.Lock()
        self._pause = MIN_POLL
        self._is_over = False

    def start(self) -> set[asyncio.Future[Any]]:
        return set()

    @property
    def is_drained(self) -> bool:
        return self._is_over

    def again(self, task_id: str, seconds: float, known: Task | None) -> None:
        if seconds > 0:
            self._shunned[task_id] = self._worker.tracker.clock.monotonic() + seconds

    def ended(self, task_id: str) -> None:
        self._busy.discard(task_id)

    async def next(self) -> tuple[str, Task | None] | None:
        if not self._ready:
            async with self._lock:
                while not self._ready:
                    if self._is_over or self._worker.is_stopping or not await self._refill():
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
        try:
            tasks, next_due = await tracker.claimable(2 * worker.concurrency + len(self._shunned) + len(self._busy))
        except StoreUnavailableError as exc:
            if tracker.observer is not None:
                tracker.observer.unreachable("look", exc)
            await worker.until_changed(worker.no_answer("the store is asked for work again", exc))
            return True
        for task in tasks:
            if task.id not in self._busy and task.id not in self._shunned:
                self._busy.add(task.id)
                self._ready.append(task)
        if self._ready:
            self._pause = MIN_POLL
            return True
        if not tasks and next_due is None and was_idle and not worker.forever:
            self._is_over = True
            return False
        waits = [self._pause]
        if next_due is not None:
            waits.append((next_due - tracker.now()).total_seconds())
        if self._shunned:
            waits.append(min(self._shunned.values()) - now)
        self._pause = min(MAX_POLL, self._pause * 1.5)
        await worker.until_changed(max(0.001, min(waits)))
        return True


async def _cancel_all(*groups: Iterable[asyncio.Future[Any]]) -> None:
    """Cancels and waits, so that every body is released, also if this is cancelled meanwhile."""
    cancelled = False
    # Both are needed: a scope keeps anyio from cancelling again and again, the loop outlives asyncio's cancels.
    with anyio.CancelScope(shield=True):
        for group in groups:
            for future in group:
                future.cancel()
            while left := {future for future in group if not future.done()}:
                try:
                    await asyncio.wait(left)
                except asyncio.CancelledError:
                    # Their ends are bounded, and another cancel must not leave one of them held.
                    cancelled = True
            for future in group:
                if not future.cancelled():
                    future.exception()  # looked at: the first one is raised, and asyncio need not complain
    if cancelled:
        raise asyncio.CancelledError
