"""Group commit for stores with an asyncio driver: what waits while one commit is in flight goes into the next.

`Pump` brings operations together and answers them. `Round` is what one commit of guarded writes comes to: which records
must be read for it, what is to be written, and which operations must be tried again since somebody else was faster.
`PumpTracker` is a tracker made of these two; a backend adds how records are read and how they are written.

A commit is made in an asyncio task that nobody else sees: the end of `asyncio.run` cancels every task that it knows,
and the store may commit all the same. A second task, which is seen, waits until the hidden one has answered everybody.
"""

import asyncio
import contextlib
import copy
import functools
import logging
import os
import random
import time
import weakref
from abc import abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from contextlib import AsyncExitStack
from datetime import datetime
from typing import Any, Final, Generic, Protocol

import msgspec
from msgspec.structs import force_setattr
from typing_extensions import TypeVar

from .._core.task import Task
from .._core.transitions import Claim, Renew
from ..contract import UNKNOWN, Transition
from ..errors import (
    ConflictError,
    InvalidValueError,
    OutcomeUnknownError,
    RecordTooLargeError,
    StoreError,
    StoreUnavailableError,
    TrackerError,
)
from ..tracker import BaseTracker

__all__ = ["Operation", "Pump", "PumpTracker", "Round", "Write", "orphaned"]

logger = logging.getLogger("aiotracker")

D = TypeVar("D", default=Any)
R = TypeVar("R", default=Any)

MAX_ITEMS: Final = 5_000  # of a commit
MAX_BYTES: Final = 4 * 1024 * 1024  # of records written in a commit
CLOSE_TIME: Final = 10.0  # seconds that closing waits for the last commit, at the most


class Item(Protocol):
    """What is committed."""

    answer: Any
    error: Exception | None
    again: float | None  # seconds after which it must be tried once more; None: it is answered


I = TypeVar("I", bound=Item)  # noqa: E741 - the usual letter for an item


class _Waiting(Generic[I]):
    __slots__ = ("future", "item", "since", "urgent")

    def __init__(self, future: "asyncio.Future[Any]", item: I, since: float, urgent: bool) -> None:
        self.future = future
        self.item = item
        self.since = since
        self.urgent = urgent


class Pump(Generic[I]):
    """Commits what waits, all of it together; no timers: a lone item is committed at once.

    Args:
        commit: Stores items and sets of each `answer`, `error` or `again`. What it raises is the error of all. Bounds
            itself; it is cancelled only when closing has waited in vain.
        orphaned: Gives what must be committed for an item that may be stored but whose waiter has gone; or `None`.
        blame: Says why a commit may be stuck.
        patience: Seconds after which a waiter gives up with `StoreUnavailableError`.
        name: Of the task.
        max_items: Of a commit.
        pace: Awaited before what waits is taken, so that others have their turn.
    """

    def __init__(
        self,
        commit: Callable[[list[I]], Awaitable[None]],
        *,
        orphaned: Callable[[I], I | None],
        blame: Callable[[], str],
        patience: float,
        name: str,
        max_items: int = MAX_ITEMS,
        pace: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._is_inherited = False  # by a forked child, where nothing of it runs
        self._commit = commit
        self._orphaned = orphaned
        self._blame = blame
        self._patience = patience
        self._name = name
        self._max_items = max_items
        self._pace = pace
        self._urgent: deque[_Waiting[I]] = deque()
        self._normal: deque[_Waiting[I]] = deque()
        self._in_flight: set[_Waiting[I]] = set()
        self._delayed: set[_Waiting[I]] = set()
        self._first: list[_Waiting[I]] = []
        self._worker: asyncio.Task[None] | None = None
        self._guard: asyncio.Task[None] | None = None
        self._watching: asyncio.TimerHandle | None = None
        self._closing = False
        self._aborted = False
        _watch_forks()
        _pumps.add(self)

    def submit(self, item: I, *, urgent: bool = False) -> "asyncio.Future[Any]":
        """Commits an item, and answers with its `answer` or `error`.

        A future that is cancelled before its commit begins takes its item back. One that is cancelled later leaves
        it stored, and `orphaned` says what is to be done about it.
        """
        future = self._loop.create_future()
        if self._closing:
            future.set_exception(StoreError("the tracker is closed"))
            return future
        if self._is_inherited:
            raise StoreError("this tracker was opened before a fork; open another one in the child process")
        self._put(_Waiting(future, item, time.monotonic(), urgent))
        if self._watching is None:
            self._watching = self._loop.call_later(self._patience, self._watch)
        return future

    async def aclose(self) -> bool:
        """Commits what waits, within a bound; takes nothing more.

        Returns:
            Whether all was committed in time. If not, what is in flight is cancelled.
        """
        self._closing = True
        deadline = time.monotonic() + min(CLOSE_TIME, max(1.0, self._patience))
        while self._worker is not None or self._delayed:
            left = deadline - time.monotonic()
            if left <= 0:
                extra = {"event": "close_timed_out", "where": self._name}
                logger.warning("closing did not wait for a commit that is stuck: %s", self._blame(), extra=extra)
                await self._abort()
                break
            if self._worker is not None:
                await asyncio.wait({self._worker}, timeout=left)
            else:
                await asyncio.sleep(0.002)
        if self._watching is not None:
            self._watching.cancel()
        return not self._aborted

    async def _abort(self) -> None:
        self._aborted = True
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.wait({self._worker}, timeout=1.0)
        for waiting in (*self._in_flight, *self._delayed, *self._urgent, *self._normal):
            if not waiting.future.done():
                waiting.future.set_exception(StoreUnavailableError(f"the tracker was closed: {self._blame()}"))

    # -- waiting

    def _put(self, waiting: _Waiting[I]) -> None:
        (self._urgent if waiting.urgent else self._normal).append(waiting)
        if self._worker is None:
            self._start()

    def _put_again(self, waiting: _Waiting[I]) -> None:
        self._delayed.discard(waiting)
        self._put(waiting)

    def _watch(self) -> None:
        """Gives up what has waited too long. One timer for all."""
        self._watching = None
        now = time.monotonic()
        oldest: float | None = None
        reason: str | None = None
        for waiting in (*self._in_flight, *self._delayed, *self._urgent, *self._normal):
            if waiting.future.done():
                continue
            if waiting.since + self._patience > now:
                oldest = waiting.since if oldest is None else min(oldest, waiting.since)
                continue
            reason = reason or self._blame()
            waiting.future.set_exception(StoreUnavailableError(f"no answer within {self._patience:.3g} s: {reason}"))
        if oldest is not None:
            self._watching = self._loop.call_later(max(0.01, oldest + self._patience - now), self._watch)

    # -- committing

    def _start(self) -> None:
        worker = self._loop.create_task(self._work(), name=self._name)
        asyncio.tasks._unregister_task(worker)  # documented for those who extend asyncio: hides it from all_tasks()
        worker.add_done_callback(self._ended)
        self._worker = worker
        self._guard = self._loop.create_task(_see_through(worker), name=f"{self._name}: waits for the commit")

    def _ended(self, worker: "asyncio.Task[None]") -> None:
        self._worker = None
        if not worker.cancelled() and (exc := worker.exception()) is not None:
            extra = {"event": "commits_stopped", "where": self._name, "error_type": type(exc).__name__}
            logger.error("the commits of %s stopped, and begin anew", self._name, exc_info=exc, extra=extra)
        if (self._urgent or self._normal) and not self._aborted:
            self._start()

    async def _work(self) -> None:
        while self._urgent or self._normal:
            if self._pace is not None:
                await self._pace()
            if batch := self._take():
                await self._do(batch)
            # Those who were answered ask for more now, which shall be in the next commit.
            await asyncio.sleep(0)

    def _take(self) -> list[_Waiting[I]]:
        batch: list[_Waiting[I]] = []
        for queue in (self._urgent, self._normal):
            batch += [queue.popleft() for _ in range(min(len(queue), self._max_items - len(batch)))]
        return [waiting for waiting in batch if not waiting.future.done()]  # the others' waiters have gone

    def _put_first(self) -> None:
        """What is to be tried again at once comes before all others, in the order that it had."""
        while self._first:
            waiting = self._first.pop()
            (self._urgent if waiting.urgent else self._normal).appendleft(waiting)

    async def _do(self, batch: list[_Waiting[I]]) -> None:
        self._in_flight.update(batch)
        try:
            await self._commit([waiting.item for waiting in batch])
        except asyncio.CancelledError:
            self._fail(batch, StoreUnavailableError("the tracker was closed in the middle of a commit"))
            raise
        except Exception as exc:
            if not isinstance(exc, TrackerError):
                extra = {"event": "commit_failed", "where": self._name, "error_type": type(exc).__name__}
                logger.exception("a commit failed", extra=extra)
            self._fail(batch, exc)
        finally:
            self._in_flight.difference_update(batch)
            for waiting in batch:
                self._deliver(waiting)
            self._put_first()

    def _fail(self, batch: list[_Waiting[I]], exc: Exception) -> None:
        for waiting in batch:
            item = waiting.item
            item.error = item.error if isinstance(item.error, OutcomeUnknownError) else alike(exc)
            item.again = None

    def _deliver(self, waiting: _Waiting[I]) -> None:
        future, item = waiting.future, waiting.item
        if item.again is not None:
            if future.done():
                return  # it is not stored, and nobody waits for it
            pause, item.again = item.again, None
            if pause:
                self._delayed.add(waiting)
                self._loop.call_later(pause, self._put_again, waiting)
            else:
                self._first.append(waiting)
        elif future.done():
            if (undo := self._orphaned(item)) is not None:
                answer = self._loop.create_future()
                answer.add_done_callback(asyncio.Future.exception)  # nobody waits, and asyncio need not complain
                self._put(_Waiting(answer, undo, time.monotonic(), urgent=True))
        elif item.error is None:
            future.set_result(item.answer)
        else:
            future.set_exception(item.error)


# Not asked of the system with each item: that would cost more than the item.
_pumps: "weakref.WeakSet[Pump[Any]]" = weakref.WeakSet()


@functools.cache
def _watch_forks() -> None:
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_after_fork)


def _after_fork() -> None:
    for pump in _pumps:
        pump._is_inherited = True


async def _see_through(worker: "asyncio.Task[None]") -> None:
    """Waits for a task whatever cancels, so that whoever ends all tasks waits for that one too."""
    while not worker.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait({worker})


def alike(exc: Exception) -> Exception:
    """One of many equal errors: one exception for many waiters would collect all their tracebacks."""
    other = copy.copy(exc)
    other.__cause__ = exc
    return other


# -- guarded writes


class Operation(msgspec.Struct, gc=False):
    """One update that waits for a commit, and its answer."""

    task_id: str
    transition: Transition | None = None  # None: only a look
    write_id: str = ""  # for what it writes
    known: Any = UNKNOWN  # the record as seen before; None: believed absent
    races: int = 0  # that it has lost
    answer: Any = None
    error: Exception | None = None
    again: float | None = None


class Write(msgspec.Struct, gc=False):
    """One guarded write: it replaces the version that is expected, and none other."""

    task_id: str
    expected: str | None  # the version; None: no record
    task: Task | None  # None: to be deleted
    raw: bytes  # encoded


class Round:
    """What some operations come to in one commit of guarded writes. Nothing is refused on a guess.

    First `missing` says what must be read, and is told what was `found`. Then `decide` gives the writes, each on what
    those before it made of the same record. Then `settle` is told which of them landed, and sets of each operation
    `answer`, `error` or `again`.
    """

    def __init__(self, operations: Iterable[Operation], limit: int) -> None:
        self._operations = list(operations)
        self._limit = limit
        self._read: dict[str, Task | None] = {}
        self._chains: dict[str, list[Operation]] = {}
        self._writes: dict[str, Write] = {}

    def missing(self) -> list[str]:
        """The ids whose records must be read."""
        return list({operation.task_id: None for operation in self._operations if operation.known is UNKNOWN})

    def found(self, records: Mapping[str, Task]) -> None:
        """What was read; what is not there is not stored."""
        self._read = {task_id: records.get(task_id) for task_id in self.missing()}

    def decide(self, now: datetime) -> dict[str, Write]:
        """Runs the transitions. One that fails fails alone.

        Args:
            now: The store's time.

        Returns:
            The writes, by id, in the order of the operations.
        """
        base: dict[str, Task | None] = {}
        current: dict[str, Task | None] = {}
        raws: dict[str, bytes] = {}
        size = 0
        for operation in self._operations:
            task_id = operation.task_id
            if size > MAX_BYTES:
                operation.again = 0.0
                continue
            if task_id in current:
                task = current[task_id]
            else:
                task = base[task_id] = current[task_id] = self._read.get(task_id, operation.known)
            chain = self._chains.setdefault(task_id, [])
            chain.append(operation)
            if operation.transition is None:
                operation.answer = task
                continue
            try:
                new = operation.transition(task, now)
                if new is not task:
                    if new is not None:
                        raws[task_id] = raw = self._encoded(new, operation.write_id)
                        size += len(raw)
                    current[task_id] = new
                operation.answer = new
            except Exception as exc:
                if task_id in self._read:
                    operation.error = exc
                else:  # perhaps the guess is to blame
                    operation.known, operation.again = UNKNOWN, 0.0
                    chain.pop()
        writes = self._writes
        for task_id, task in current.items():
            if task is not base[task_id]:
                old = base[task_id]
                writes[task_id] = Write(
                    task_id, None if old is None else old.version, task, b"" if task is None else raws[task_id]
                )
            elif task_id not in self._read:
                # A guess that nothing was written on: it must be read before anybody is refused.
                for operation in self._chains.pop(task_id):
                    operation.known, operation.again = UNKNOWN, 0.0
        return writes

    def settle(self, landed: Collection[str], errors: Mapping[str, Exception] | None = None) -> None:
        """Says which writes were stored, and which failed for good; those neither stored nor failed lost a race."""
        for task_id in self._writes:
            if task_id in landed:
                continue
            error = None if errors is None else errors.get(task_id)
            for operation in self._chains[task_id]:
                if operation.error is not None:
                    continue
                if error is not None:
                    operation.error = _named(error, task_id)
                    continue
                operation.known = UNKNOWN
                operation.again = random.uniform(0, min(0.05, 0.0005 * 2 ** min(operation.races, 10)))
                operation.races += 1

    def fail(self, exc: Exception) -> None:
        """The writes were not made, or nobody knows; operations that wrote nothing keep their answers."""
        self.settle((), dict.fromkeys(self._writes, exc))

    def _encoded(self, task: Task, write_id: str) -> bytes:
        # The transition has just made this record, and nobody else has seen it.
        force_setattr(task, "write_id", write_id)
        force_setattr(task, "version", None)
        raw = task.encode()
        if len(raw) > self._limit:
            raise RecordTooLargeError(
                f"the record of {task.id!r} would take {len(raw):,} bytes, and {self._limit:,} are the most; "
                "keep large values elsewhere, and their path here",
                task.id,
                len(raw),
                self._limit,
            )
        force_setattr(task, "version", write_id)
        return raw


def _named(exc: Exception, task_id: str) -> Exception:
    other = alike(exc)
    if isinstance(other, OutcomeUnknownError):
        other.task_id = task_id
    return other


def orphaned(operation: Operation, write_id: str) -> Operation | None:
    """What undoes a claim that landed, or may have landed, although its claimant has gone."""
    claim = operation.transition
    if not isinstance(claim, Claim):
        return None
    task, token = operation.answer, claim.terms.token
    if operation.error is None:
        holds = isinstance(task, Task) and task.lease is not None and task.lease.token == token
        return Operation(operation.task_id, claim.undo(), write_id, task) if holds else None
    if isinstance(operation.error, StoreUnavailableError | OutcomeUnknownError):
        return Operation(operation.task_id, claim.undo(), write_id)
    return None


class _Replacement:
    """The transition of a guarded write."""

    def __init__(self, old: Task, new: Task | None) -> None:
        self._old = old
        self._new = new

    def __call__(self, task: Task | None, now: datetime) -> Task | None:
        return self._new if (None if task is None else task.version) == self._old.version else task


class PumpTracker(BaseTracker[D, R]):
    """What all trackers have in common whose guarded writes are brought together by a `Pump`.

    `connect` of the backend opens its driver and then calls `_start_pumps`, so that what is still under way is
    committed before the driver is closed.
    """

    _pump: Pump[Operation] | None = None

    @abstractmethod
    async def _read_many(self, task_ids: list[str]) -> dict[str, Task]:
        """The stored records of these ids, with their versions.

        Raises:
            StoreError: They cannot be read.
        """

    @abstractmethod
    async def _write_many(self, writes: Mapping[str, Write]) -> tuple[Collection[str], Mapping[str, Exception]]:
        """Guarded writes, as many as find what they expect.

        Returns:
            The ids whose write is stored, and the errors of those that can never be stored. Others lost a race.

        Raises:
            OutcomeUnknownError: Whether they are stored is not known.
            StoreError: None of them is stored.
        """

    @abstractmethod
    def _blame(self) -> str:
        """Why the store may not answer, as far as is known; without I/O."""

    def _start_pumps(self, stack: AsyncExitStack, name: str) -> None:
        self._pump = Pump(
            self._commit,
            orphaned=lambda operation: orphaned(operation, self.new_id()),
            blame=self._blame,
            patience=self._patience,
            name=name,
        )
        pump = self._pump

        async def close() -> None:
            self._pump = None
            await pump.aclose()

        stack.push_async_callback(close)

    async def _commit(self, operations: list[Operation]) -> None:
        work = Round(operations, self.max_record_bytes)
        if missing := work.missing():
            work.found(await self._read_many(missing))
        writes = work.decide(self.now())
        if not writes:
            return
        began = time.perf_counter()
        try:
            landed, errors = await self._write_many(writes)
        except (StoreError, OutcomeUnknownError) as exc:
            work.fail(exc)
        else:
            work.settle(landed, errors)
            if self.observer is not None:
                size = sum(len(writes[task_id].raw) for task_id in landed)
                self.observer.committed(len(operations), size, time.perf_counter() - began)
                for task_id in writes.keys() - set(landed) - set(errors):
                    self.observer.conflicted(task_id)

    def update(self, task_id: str, transition: Transition, *, known: Any = UNKNOWN) -> "asyncio.Future[Task | None]":
        if self.read_only:
            self._check_writable("update")
        return self._submit(Operation(task_id, transition, self.new_id(), known))

    async def load(self, task_id: str) -> Task | None:
        task_id = self._check_id(task_id)
        # In turn with the writes: a claim that was cancelled on its way is undone before this is answered.
        task: Task | None = await self._submit(Operation(task_id))
        return task

    async def dump(self, task: Task) -> Task:
        self._check_writable("dump")
        self._check_id(task.id)
        # A write_id that is the version already would not show that anything was written.
        write_id = self.new_id() if task.write_id in ("", task.version) else task.write_id
        new = task.replace()
        await self._replace(task, new, write_id)
        return new

    async def delete(self, task: Task) -> None:
        self._check_writable("delete")
        await self._replace(task, None, self.new_id())

    async def _replace(self, task: Task, new: Task | None, write_id: str) -> None:
        known = UNKNOWN if task.version is not None else None
        try:
            stored = await self._submit(Operation(task.id, _Replacement(task, new), write_id, known))
        except OutcomeUnknownError as exc:
            raise StoreUnavailableError(str(exc)) from exc
        except ValueError as exc:
            raise InvalidValueError(str(exc)) from exc
        is_landed = stored is new or (new is not None and stored is not None and stored.version == write_id)
        if not is_landed:
            raise ConflictError(f"another version of {task.id!r} is stored", stored, known=True)

    def _submit(self, operation: Operation) -> "asyncio.Future[Any]":
        if self._pump is None:
            raise StoreError(f"this {type(self).__name__} is not open; use `async with`, or await open()")
        return self._pump.submit(operation, urgent=type(operation.transition) is Renew)
