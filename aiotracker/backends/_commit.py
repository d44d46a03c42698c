"""Group commit: what waits while one commit is in flight goes into the next.

The commits run on a thread of their own, not in an asyncio task (the end of `asyncio.run` would cancel that while the
thread still commits) nor in the default executor (where others' slow calls would be in the way). No timers: a lone
operation is committed at once, and thousands that come at once share a commit.
"""

import asyncio
import copy
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, Generic, Protocol

from typing_extensions import TypeVar

from ..errors import StoreError, StoreUnavailableError, TrackerError

__all__ = ["Committer", "Item"]

logger = logging.getLogger("aiotracker")

MAX_ITEMS = 5_000  # of a commit
CLOSE_TIME = 10.0  # seconds that closing waits for the last commit
LOOK_TIME = 0.05  # seconds between looks whether the event loop still lives, while it has answers to deliver


class Item(Protocol):
    """What is committed."""

    answer: Any
    error: Exception | None


I = TypeVar("I", bound=Item)  # noqa: E741 - the usual letter for an item
T = TypeVar("T")
Waiting = tuple["asyncio.Future[Any]", I, float]


class Committer(Generic[I]):
    """One daemon thread that commits what waits, all of it together.

    Args:
        commit: Stores items and sets their `answer` or `error`; gives how many of them it took, in their order. What
            it raises is the error of all.
        orphaned: Gives what must be committed for an item that was stored but whose waiter has gone; or `None`.
        blame: Says why a commit may be stuck.
        patience: Seconds after which a waiter gives up with `StoreUnavailableError`.
        name: Of the thread.
        tells: `commit` calls `tell` when it leaves the interpreter for long. Until then the answers of the commit
            before wait: delivered at once, they would take the interpreter from it, and then wait for it in turn.
    """

    def __init__(
        self,
        commit: Callable[[list[I]], int],
        *,
        orphaned: Callable[[I], I | None],
        blame: Callable[[], str],
        patience: float,
        name: str,
        tells: bool = False,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._commit = commit
        self._orphaned = orphaned
        self._blame = blame
        self._patience = patience
        self._urgent: deque[Waiting[I]] = deque()
        self._normal: deque[Waiting[I]] = deque()
        self._orphans: deque[I] = deque()
        self._calls: deque[Callable[[], None]] = deque()
        self._in_flight: list[Waiting[I]] = []
        self._tells = tells
        self._handed: deque[list[Waiting[I]]] = deque()  # to the loop, which has not delivered them yet
        self._untold = 0  # of these, that the loop does not know of yet
        self._wake: SimpleQueue[None] = SimpleQueue()
        self._watching = False
        self._idle = False  # the thread waits to be woken, or is about to
        self._closing = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    # -- on the event loop's thread

    def submit(self, item: I, *, urgent: bool = False) -> "asyncio.Future[Any]":
        """Commits an item, and answers with its `answer` or `error`.

        A future that is cancelled before its commit begins takes its item back. One that is cancelled later leaves
        it stored, and `orphaned` says what is to be done about it.
        """
        future: asyncio.Future[Any] = asyncio.Future(loop=self._loop)
        if self._closing:
            future.set_exception(StoreError("the tracker is closed"))
            return future
        if asyncio.get_running_loop() is not self._loop:
            # It would be stored, and its waiter be told of an error.
            raise RuntimeError("a tracker is used on the event loop that opened it")
        (self._urgent if urgent else self._normal).append((future, item, time.monotonic()))
        if self._idle:
            self._wake.put(None)
        if not self._watching:
            self._watching = True
            self._loop.call_later(self._patience, self._watch)
        return future

    async def call(self, fn: Callable[[], T]) -> T:
        """Runs a function on the thread, between commits."""
        future: asyncio.Future[T] = self._loop.create_future()

        def run() -> None:
            try:
                result, error = fn(), None
            except Exception as exc:
                result, error = None, exc
            _on(self._loop, _settle, future, result, error)

        self.post(run)
        return await future

    def post(self, fn: Callable[[], None]) -> None:
        """Runs a function on the thread, between commits; from any thread."""
        self._calls.append(fn)
        self._wake.put(None)

    def is_abandoned(self) -> bool:
        """Whether nobody waits any more for the commit under way; for that one to ask, before it writes."""
        return bool(self._in_flight) and all(future.done() for future, _, _ in self._in_flight)

    async def aclose(self, close: Callable[[], None], *, within: float | None = None) -> bool:
        """Commits what waits, runs `close` on the thread and ends that; within bounds.

        Args:
            close: What is to be done in the end.
            within: Seconds; by default `CLOSE_TIME`.

        Returns:
            Whether it ended in time. If not, it closes itself as soon as it is not stuck any more.
        """
        if not self._closing:
            self._closing = True
            self.post(close)
        deadline = time.monotonic() + (CLOSE_TIME if within is None else within)
        pause = 0.0
        while not self._ended.is_set():
            if time.monotonic() > deadline:
                extra = {"event": "close_timed_out", "where": self._thread.name}
                logger.warning("closing did not wait for a commit that is stuck: %s", self._blame(), extra=extra)
                return False
            await asyncio.sleep(pause)
            pause = min(0.05, pause + 0.001)
        return True

    def forget(self) -> None:
        """In a forked child, where the thread does not exist: nothing is committed any more."""
        self._closing = True
        self._ended.set()

    def _watch(self) -> None:
        """Gives up what has waited too long. One timer for all."""
        self._watching = False
        now = time.monotonic()
        oldest = now
        reason: str | None = None
        for future, _, since in (*self._in_flight, *self._urgent, *self._normal):
            if future.done():
                continue
            if since + self._patience > now:
                oldest = min(oldest, since)
                continue
            reason = reason or self._blame()
            future.set_exception(StoreUnavailableError(f"no answer within {self._patience:.3g} s: {reason}"))
        if oldest < now or self._urgent or self._normal:
            self._watching = True
            self._loop.call_later(max(0.01, oldest + self._patience - now), self._watch)

    def _deliver(self) -> None:
        for future, item, _ in self._handed.popleft():
            if not future.done():
                if item.error is None:
                    future.set_result(item.answer)
                else:
                    future.set_exception(item.error)
            else:
                self._orphan(item)

    def _orphan(self, item: I) -> None:
        undo = self._orphaned(item) if item.error is None else None
        if undo is not None:
            self._orphans.append(undo)
            self._wake.put(None)

    # -- on the thread

    def tell(self) -> None:
        """Answers what has been committed."""
        while self._untold:
            self._untold -= 1
            if not _on(self._loop, self._deliver):
                self._untold = 0
                self._take_back()

    def _run(self) -> None:
        try:
            while True:
                self._idle = True
                # Looked at after the flag is set: what is submitted before that is seen here, what comes later wakes.
                if not (self._urgent or self._normal):
                    self._sleep()
                self._idle = False
                while self._urgent or self._normal or self._orphans:
                    if self._orphans:
                        self._undo()
                    elif batch := self._take():
                        self._do(batch)
                self.tell()
                while self._calls:
                    self._calls.popleft()()
                if self._closing and not (self._urgent or self._normal or self._orphans or self._calls):
                    return
        finally:
            self._ended.set()

    def _sleep(self) -> None:
        while self._handed:
            try:
                return self._wake.get(timeout=LOOK_TIME)
            except Empty:
                if self._loop.is_closed():
                    self._take_back()
                    return None
        return self._wake.get()

    def _take_back(self) -> None:
        while self._handed:
            for _, item, _ in self._handed.popleft():
                self._orphan(item)

    def _undo(self) -> None:
        orphans = [self._orphans.popleft() for _ in range(len(self._orphans))]
        taken = self._attempt(orphans)
        for orphan in orphans[:taken]:
            if orphan.error is not None:
                extra = {
                    "event": "claim_not_given_back",
                    "where": self._thread.name,
                    "error_type": type(orphan.error).__name__,
                }
                logger.warning("a claim that nobody waits for could not be given back: %s", orphan.error, extra=extra)
        self._orphans.extend(orphans[taken:])

    def _take(self) -> list[Waiting[I]]:
        room = MAX_ITEMS
        if self._untold:
            # Those who are answered now come back while this commit is under way. Two crowds that take turns should
            # be of one size, so that the loop is busy with one as long as the thread is with the other.
            crowd = len(self._handed[-1]) + len(self._urgent) + len(self._normal)
            room = min(room, max(len(self._urgent), (crowd + 1) // 2))
        batch: list[Waiting[I]] = []
        for queue in (self._urgent, self._normal):
            batch += [queue.popleft() for _ in range(min(len(queue), room - len(batch)))]
        return [waiting for waiting in batch if not waiting[0].done()]  # the others' waiters have gone

    def _do(self, batch: list[Waiting[I]]) -> None:
        self._in_flight = batch
        taken = self._attempt([item for _, item, _ in batch])
        self.tell()
        self._in_flight = []
        if taken < len(batch):
            self._normal.extendleft(reversed(batch[taken:]))
            batch = batch[:taken]
        waited = []
        for waiting in batch:
            if waiting[0].done():
                self._orphan(waiting[1])  # before the next commit, which may ask for it
            else:
                waited.append(waiting)
        self._handed.append(waited)
        self._untold += 1
        if not (self._tells and (self._urgent or self._normal)):
            self.tell()

    def _attempt(self, items: list[I]) -> int:
        try:
            return self._commit(items)
        except Exception as exc:
            if not isinstance(exc, TrackerError):
                extra = {"event": "commit_failed", "where": self._thread.name, "error_type": type(exc).__name__}
                logger.exception("a commit failed", extra=extra)
            for item in items:
                # One exception for many would collect all their tracebacks.
                item.error = copy.copy(exc)
                item.error.__cause__ = exc
            return len(items)


def _on(loop: asyncio.AbstractEventLoop, fn: Callable[..., None], *args: Any) -> bool:
    """Runs a function on the loop's thread; `False` where the loop is closed."""
    try:
        loop.call_soon_threadsafe(fn, *args)
    except RuntimeError:
        return False
    return True


def _settle(future: "asyncio.Future[Any]", result: Any, error: Exception | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
