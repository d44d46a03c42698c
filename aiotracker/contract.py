"""The contract: what a backend is."""

import asyncio
import random
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from datetime import datetime
from typing import Any, ClassVar, Final, NamedTuple

from ._core.codec import MAX_RECORD_BYTES
from ._core.query import Query
from ._core.task import Status, Task
from .clock import Clock, SystemClock
from .errors import ConflictError, OutcomeUnknownError, StoreUnavailableError, UnsupportedError

__all__ = ["UNKNOWN", "Claimable", "Contract", "Transition", "in_order"]

Transition = Callable[[Task | None, datetime], Task | None]
"""A pure rule: the record (`None`: none is stored) and the store's time to the new record (`None`: delete it).
Gives the very same object back to write nothing. May run again, and on another thread."""


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
        self, task_id: str, transition: Transition, *, known: Task | None | _Unknown = UNKNOWN
    ) -> Awaitable[Task | None]:
        """The one read-modify-write: the record is what the transition makes of it, however many others write.

        Args:
            task_id: Whose record.
            transition: The rule; run again whenever somebody else was faster.
            known: A record seen before, or `None` (believed absent), to spare the first read. A wrong guess costs
                one refused write; nothing is refused on a guess.

        Returns:
            The record as it is now stored: written, or read after the call where the transition changed nothing.

        Raises:
            OutcomeUnknownError: Whether the write landed could not be found out in time.
            StoreUnavailableError: The store could not be read in time; nothing was written.
        """
        return self._update(task_id, transition, known)

    async def _update(self, task_id: str, transition: Transition, known: Task | None | _Unknown) -> Task | None:
        patience = _Patience(self.clock, self._patience)
        while True:
            guess = not isinstance(known, _Unknown)
            current = await self._load_patiently(task_id, patience) if isinstance(known, _Unknown) else known
            new = transition(current, self.now())
            if new is current:
                if not guess:
                    return current
                known = UNKNOWN
                continue
            if new is None:
                assert current is not None
                write = self.delete(current)
            else:
                new = new.replace(write_id=self.new_id(), version=current.version if current is not None else None)
                write = self.dump(new)
            unknown: StoreUnavailableError | None = None
            while True:
                try:
                    return await write
                except ConflictError as exc:
                    stored: Task | None | _Unknown = exc.current if exc.known else UNKNOWN
                    if unknown is not None:
                        # Our first try may have landed: only this refusal makes the next read conclusive.
                        if isinstance(stored, _Unknown):
                            stored = await self._load_after(task_id, patience, unknown)
                        if new is None and stored is None:
                            return None
                        if new is not None and stored is not None and stored.write_id == new.write_id:
                            return stored
                    known = stored
                    break
                except StoreUnavailableError as exc:
                    unknown = exc
                    if not await patience.wait():
                        raise OutcomeUnknownError(
                            f"the store did not tell whether a write to {task_id!r} landed: {exc}", task_id
                        ) from exc
                    write = self.delete(current) if new is None and current is not None else self.dump(_some(new))
            await patience.yield_to_others()

    async def _load_patiently(self, task_id: str, patience: "_Patience") -> Task | None:
        while True:
            try:
                return await self.load(task_id)
            except StoreUnavailableError:
                if not await patience.wait():
                    raise

    async def _load_after(self, task_id: str, patience: "_Patience", unknown: StoreUnavailableError) -> Task | None:
        try:
            return await self._load_patiently(task_id, patience)
        except StoreUnavailableError as exc:
            raise OutcomeUnknownError(
                f"the store did not tell whether a write to {task_id!r} landed: {unknown}", task_id
            ) from exc

    @abstractmethod
    def new_id(self) -> str:
        """A name that no other write has, in any process."""

    def scan(self, query: Query) -> AsyncIterator[Task]:
        """At least all tasks that match, in the query's order; holds nothing while suspended.

        Raises:
            UnsupportedError: The backend has no scan.
        """
        raise _unsupported(self, "scan")

    async def delete(self, task: Task) -> None:
        """Removes the record, guarded like `dump`.

        Raises:
            UnsupportedError: The backend has no delete.
        """
        raise _unsupported(self, "delete")

    async def claimable(self, limit: int) -> Claimable:
        """Tasks that may be worth a claim, best first, and when more may become so.

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
        self._conflicts = 0
        self._failures = 0

    async def wait(self) -> bool:
        """After no answer; `False` where the time is over."""
        self._failures += 1
        await asyncio.sleep(random.uniform(0, min(1.0, 0.02 * 2**self._failures)))
        return self._clock.monotonic() < self._deadline

    async def yield_to_others(self) -> None:
        """After a lost race."""
        self._conflicts += 1
        await asyncio.sleep(random.uniform(0, min(0.2, 0.001 * 2 ** min(self._conflicts, 8))))


def _some(task: Task | None) -> Task:
    assert task is not None
    return task


def _unsupported(backend: Any, method: str) -> UnsupportedError:
    return UnsupportedError(
        f"{type(backend).__name__} does not implement {method}(): it has load and dump, which is enough to run tasks; "
        f"queries need scan, purge needs delete",
        method,
    )
