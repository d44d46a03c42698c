"""The contract: what a backend is."""

import asyncio
import random
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from datetime import datetime
from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple

from ._core.codec import MAX_RECORD_BYTES
from ._core.query import GroupBy, Query, group_of
from ._core.task import Status, Task
from .clock import Clock, SystemClock
from .errors import ConflictError, OutcomeUnknownError, StoreUnavailableError, UnsupportedError

if TYPE_CHECKING:
    from .events import Observer

__all__ = ["UNKNOWN", "Claimable", "Contract", "Transition", "in_order"]

Transition = Callable[[Task | None, datetime], Task | None]
"""A pure rule: the record (`None`: none is stored) and the store's time to the new record (`None`: delete it).
Gives the very same object back to write nothing. May run again, and on another thread."""

MAX_RACES: Final = 50  # that an update loses before it looks at the time


class _Unknown:
    def __repr__(self) -> str:
        return "UNKNOWN"


UNKNOWN: Final = _Unknown()
"""Nothing is believed about what is stored."""


class Claimable(NamedTuple):
    """What may be worth a claim. A hint: only the claim decides."""

    tasks: list[Task]  # in the order in which to try them
    next_due: datetime | None  # when more may become claimable; None: all other tasks are final


class Contract(ABC):
    """What a backend is: `load` and `dump`; everything else is correct on top of these, and overridden for speed."""

    max_record_bytes: ClassVar[int] = MAX_RECORD_BYTES
    clock: Clock = SystemClock()
    clock_uncertainty: float = 0.0  # seconds by which `now` may be off, on both sides together

    _patience: float = 20.0  # seconds during which a write is tried again
    observer: "Observer | None" = None  # tells the hooks; None: there are none

    async def connect(self, stack: AsyncExitStack) -> None:  # noqa: B027 - a backend may have nothing to open
        """Opens what is needed, and pushes on the stack what must be closed."""

    @abstractmethod
    async def load(self, task_id: str) -> Task | None:
        """The stored record and its version; `None` where there is none.

        Sees every write that was acknowledged before the call.

        Raises:
            StoreError: It cannot be read.
        """

    @abstractmethod
    async def dump(self, task: Task) -> Task:
        """One guarded write: stored only if the stored version still is `task.version` (`None`: nothing is stored).

        Returns:
            The record with its new version.

        Raises:
            ConflictError: Another version is stored; nothing was changed.
            StoreUnavailableError: Whether it was stored is not known.
            RecordTooLargeError: Nothing was changed.
        """

    def now(self) -> datetime:
        """The store's time as best known, without I/O."""
        return self.clock.now()

    def update(
        self, task_id: str, transition: Transition, *, known: Task | _Unknown | None = UNKNOWN
    ) -> Awaitable[Task | None]:
        """The one read-modify-write: the record is what the transition makes of it, however many others write.

        Args:
            task_id: Whose record.
            transition: The rule; run again whenever somebody else was faster.
            known: A record seen before, or `None` (believed absent), to spare the first read. A wrong guess costs
                one refused write; nothing is refused on a guess.

        Returns:
            The record as it is now stored; where the transition changed nothing, as it was read after the call.

        Raises:
            OutcomeUnknownError: Whether the write landed could not be found out in time.
            StoreUnavailableError: The store gave no answer in time. Where commits are shared, the write may have
                landed.
        """
        return self._update(task_id, transition, known)

    async def _update(self, task_id: str, transition: Transition, known: Task | _Unknown | None) -> Task | None:
        patience = _Patience(self.clock, self._patience)
        is_guess = not isinstance(known, _Unknown)
        current = await self._load_patiently(task_id, patience) if isinstance(known, _Unknown) else known
        while True:
            new = transition(current, self.now())
            if new is current:
                if not is_guess:
                    return current
                current, is_guess = await self._load_patiently(task_id, patience), False
                continue
            if new is not None:
                new = new.replace(write_id=self.new_id(), version=None if current is None else current.version)
            unknown: StoreUnavailableError | None = None
            while True:
                try:
                    return await self._write(current, new)
                except ConflictError as exc:
                    # It may be our own write, after an unknown outcome, or since the driver sent it twice; only now is
                    # what is read conclusive.
                    if self.observer is not None:
                        self.observer.conflicted(task_id)
                    try:
                        if not exc.known or patience.is_contended:
                            await patience.yield_to_others(task_id)
                            current = await self._load_patiently(task_id, patience)
                        else:
                            current = exc.current
                            patience.lost_race()
                    except StoreUnavailableError as error:
                        if unknown is None:
                            raise
                        raise _unknown(task_id, unknown) from error
                    if _is_stored(new, current):
                        return current
                    is_guess = False
                    break
                except StoreUnavailableError as exc:
                    unknown = exc
                    if self.observer is not None:
                        self.observer.unreachable("write", exc, task_id)
                    if not await patience.wait():
                        raise _unknown(task_id, exc) from exc

    async def _write(self, current: Task | None, new: Task | None) -> Task | None:
        if new is not None:
            write = self.dump(new) if self.observer is None else self._dump_observed(new, self.observer)
            stored: object = await write
            if not isinstance(stored, Task):
                raise TypeError(
                    f"{type(self).__name__}.dump must return what it has stored, as task.replace(version=...), and "
                    f"returned {stored!r}"
                )
            return stored
        if current is not None:
            await self.delete(current)
        return None

    async def _dump_observed(self, task: Task, observer: "Observer") -> Task:
        began = time.perf_counter()
        stored = await self.dump(task)
        observer.committed(1, len(task.encode()), time.perf_counter() - began)
        return stored

    async def _load_patiently(self, task_id: str, patience: "_Patience") -> Task | None:
        while True:
            try:
                return await self.load(task_id)
            except StoreUnavailableError as exc:
                if self.observer is not None:
                    self.observer.unreachable("read", exc, task_id)
                if not await patience.wait():
                    raise

    @abstractmethod
    def new_id(self) -> str:
        """A name that no other write has, in any process."""

    def scan(self, query: Query) -> AsyncIterator[Task]:
        """At least all tasks that match, in the query's order.

        Too many do no harm: whoever asks looks at each again. Holds nothing (cursor, lock, transaction) while it is
        suspended.

        Raises:
            UnsupportedError: The backend has no scan.
        """
        raise _unsupported(self, "scan")

    async def tally(self, query: Query, by: GroupBy) -> Counter[str]:
        """How many tasks match, in groups: what `count` answers.

        Args:
            query: Which tasks; it has neither order nor limit.
            by: What they are grouped by; tasks that have nothing of the kind are counted under the empty string.

        Raises:
            UnsupportedError: The backend has no scan.
        """
        counts: Counter[str] = Counter()
        async for task in self.scan(query):
            if query.matches(task):
                counts[group_of(task, by)] += 1
        return counts

    async def delete(self, task: Task) -> None:
        """Removes the record, guarded like `dump`.

        Raises:
            ConflictError: Another version is stored; nothing was changed.
            StoreUnavailableError: Whether it was removed is not known.
            UnsupportedError: The backend has no delete.
        """
        raise _unsupported(self, "delete")

    async def claimable(self, limit: int) -> Claimable:
        """Tasks that may be worth a claim, best first, and when more may become so.

        Args:
            limit: How many at the most.

        Raises:
            UnsupportedError: The backend has no scan.
        """
        now = self.now()
        tasks: list[Task] = []
        next_due: datetime | None = None
        query = Query(statuses=frozenset({Status.PENDING, Status.FAILED, Status.IN_PROGRESS}))
        async for task in self.scan(query):
            if task.status.is_final:
                continue
            due = task.lease.expires_at if task.lease is not None else task.not_before
            if due is None or due <= now:
                tasks.append(task)
            elif next_due is None or due < next_due:
                next_due = due
        tasks.sort(key=lambda task: (-task.priority, task.create_time, task.id))
        if len(tasks) > limit:
            next_due = now
        return Claimable(tasks[:limit], next_due)


async def in_order(query: Query, tasks: AsyncIterator[Task]) -> AsyncIterator[Task]:
    """For a `scan` on a store that has no order of its own: the tasks that match, in the query's order."""
    if query.order_by is None:
        async for task in tasks:
            yield task
        return
    kept: list[Task] = []
    async for task in tasks:
        if query.matches(task):
            kept.append(task)
            if query.limit is not None and len(kept) > 2 * query.limit + 1000:
                kept = (await asyncio.to_thread(query.sorted, kept))[: query.limit]
    for task in await asyncio.to_thread(query.sorted, kept):
        yield task


class _Patience:
    """How long an update goes on: bounded in time, and spread out so that contenders do not meet again."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        self._clock = clock
        self._deadline = clock.monotonic() + seconds
        # A clock that stands still, as in tests, must not make it wait for ever.
        self._real_deadline = time.monotonic() + seconds
        self._conflicts = 0
        self._failures = 0

    @property
    def _is_over(self) -> bool:
        return self._clock.monotonic() >= self._deadline or time.monotonic() >= self._real_deadline

    @property
    def is_contended(self) -> bool:
        """Whether the race was lost before: others are fast."""
        return self._conflicts > 0

    async def wait(self) -> bool:
        """After no answer; `False` where the time is over."""
        self._failures += 1
        await asyncio.sleep(random.uniform(0, min(1.0, 0.02 * 2 ** min(self._failures, 8))))
        return not self._is_over

    def lost_race(self) -> None:
        """Counts a lost race."""
        self._conflicts += 1

    async def yield_to_others(self, task_id: str) -> None:
        """After a lost race.

        Raises:
            StoreUnavailableError: It was lost too often.
        """
        self._conflicts += 1
        if self._conflicts > MAX_RACES and self._is_over:
            raise StoreUnavailableError(f"{task_id!r} is changed all the time: {self._conflicts} races were lost")
        await asyncio.sleep(random.uniform(0, min(0.2, 0.001 * 2 ** min(self._conflicts, 8))))


def _is_stored(new: Task | None, stored: Task | None) -> bool:
    if new is None or stored is None:
        return new is stored
    return new.write_id == stored.write_id


def _unknown(task_id: str, exc: Exception) -> OutcomeUnknownError:
    return OutcomeUnknownError(f"the store did not tell whether a write to {task_id!r} landed: {exc}", task_id)


def _unsupported(backend: Any, method: str) -> UnsupportedError:
    return UnsupportedError(
        f"{type(backend).__name__} does not implement {method}(): it has load and dump, which is enough to run tasks; "
        f"queries need scan, purge needs delete",
        method,
    )
