"""The tracker: what users call, and what backends extend."""

import asyncio
import logging
import os
import socket
from collections import Counter
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import AsyncExitStack
from datetime import datetime
from types import TracebackType
from typing import Any, Generic, Self, TypedDict

import anyio
import msgspec
from typing_extensions import ParamSpec, TypeVar, Unpack

from ._core.codec import check_id, find_problem
from ._core.query import GroupBy, Query, Where, aware, check_group
from ._core.retry import Retry
from ._core.task import Task
from ._core.transitions import Add, Aim, Author, Claim, Ignore, Judge, Purge, Reset, Rule, Terms
from ._values import check_async, check_room, check_seconds, fitting_value, plain_value, return_type
from .bulk import WINDOW, Witness, in_windows
from .clock import Clock, SystemClock
from .contract import Contract
from .errors import InvalidValueError, StoreError, TaskSucceededError, UnsupportedError
from .events import Hook, Observer, check_hooks
from .leases import Keeper
from .names import Names
from .running import Run, RunningTask
from .work import Worker, WorkSummary

__all__ = ["BaseTracker", "Options"]

logger = logging.getLogger("aiotracker")

D = TypeVar("D", default=Any)
R = TypeVar("R", default=Any)
T = TypeVar("T")
P = ParamSpec("P")


class Options(TypedDict, Generic[D, R], total=False):
    """The options of every tracker, see `BaseTracker`: for a backend's `def __init__(self, path, **options:
    Unpack[Options[D, R]])`, so that type checkers know them, and infer what a tracker's data and results are.
    """

    lease: float
    retry: Retry | None
    data_type: type[D]
    result_type: type[R]
    worker: str | None
    clock: Clock | None
    clock_skew: float
    read_only: bool
    hooks: Iterable[Hook]


class BaseTracker(Contract, Generic[D, R]):
    """Tracks tasks in a store. The extension point: a subclass that implements `load` and `dump` has everything but
    queries; with `scan` those too, with `delete` also `purge`.

    `async with` opens and closes it; so do `open()` and `aclose()`, also in two different asyncio tasks.

    Args:
        lease: Seconds for which a claim holds a task unless it is renewed; it is, at a third of that, while the
            event loop runs.
        retry: How often a task is tried, and when.
        data_type: Of the tasks' data: a msgspec Struct, dataclass, TypedDict or pydantic model. What is stored stays
            plain JSON.
        result_type: Of the tasks' results, likewise.
        worker: This worker's name, for people; by default made of host name, process id and a random part.
        clock: Where time is read from.
        clock_skew: Seconds by which the clocks of the workers' machines may differ; somebody else's lease is only
            taken over when it ended this long ago. On one machine, a clock that nobody can set decides instead.
        read_only: Nothing is written; verbs that would raise `UnsupportedError`.
        hooks: Plain functions that are told what happens, see `aiotracker.events`.

    Raises:
        InvalidValueError: An argument is out of range.
    """

    def __init__(
        self,
        *,
        lease: float = 60.0,
        retry: Retry | None = None,
        data_type: type[D] | Any = Any,
        result_type: type[R] | Any = Any,
        worker: str | None = None,
        clock: Clock | None = None,
        clock_skew: float = 0.0,
        read_only: bool = False,
        hooks: Iterable[Hook] = (),
    ) -> None:
        self.lease = check_seconds("lease", lease)
        self.retry = Retry() if retry is None else _check_retry(retry)
        self.data_type: Any = data_type
        self.result_type: Any = result_type
        if clock is not None and not isinstance(clock, Clock):
            raise InvalidValueError(f"clock takes an object of a class that extends Clock, not {clock!r}")
        if not isinstance(read_only, bool):
            raise InvalidValueError(f"read_only takes True or False, not {read_only!r}")
        self.clock = SystemClock() if clock is None else clock
        self.read_only = read_only
        if isinstance(clock_skew, bool) or not isinstance(clock_skew, int | float) or not 0 <= clock_skew < 1e9:
            raise InvalidValueError(f"clock_skew takes a number of seconds, 0 or more, not {clock_skew!r}")
        self.clock_skew = float(clock_skew)
        if worker is not None and (type(worker) is not str or not 1 <= len(worker) <= 200 or find_problem(worker, "")):
            raise InvalidValueError(f"worker takes a str of 1 to 200 characters, not {worker!r}")
        self._names = Names()
        self.worker = worker or f"{socket.gethostname()[:60]}:{os.getpid()}:{self._names.prefix[:4]}"
        self._patience = self.lease / 3
        self._boot = self.clock.boot
        self.loop: asyncio.AbstractEventLoop | None = None  # the one that opened it
        self._stack: AsyncExitStack | None = None
        self._is_opening = False
        self._is_closing = False
        self._keeper: Keeper | None = None
        self._listeners: set[asyncio.Event] = set()  # to be set when there may be new work
        self._run_type: type[Run[D, R]] = Run
        if checked := check_hooks(hooks):
            from .observed import ObservedRun

            self.observer = Observer(checked, self.kind, self.worker, self.now)
            self._run_type = ObservedRun

    # -- lifecycle

    async def open(self) -> Self:
        """Connects to the store; creates it where there is none, unless `read_only`.

        Raises:
            StoreError: It cannot be used; the message says why and what to do.
        """
        if self._stack is not None or self._is_opening:
            raise StoreError(f"this {type(self).__name__} is open already; use one `async with` a tracker")
        self.loop = asyncio.get_running_loop()
        stack = AsyncExitStack()
        self._is_opening = True
        try:
            await asyncio.to_thread(self.clock.boot)  # the first look reads a file
            await self.connect(stack)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await stack.aclose()
            raise
        finally:
            self._is_opening = False
        self._stack = stack
        self.judge = Judge(self._boot, self.clock_skew + self.clock_uncertainty)
        self._keeper = self._new_keeper()
        return self

    def _new_keeper(self) -> Keeper:
        def update(task_id: str, rule: Rule, known: Task | None) -> Awaitable[Task | None]:
            return self.update(task_id, rule, known=known)

        if self.observer is None:
            return Keeper(self.clock, update)
        from .observed import ObservedKeeper

        return ObservedKeeper(self.clock, update, self.observer)

    async def init(self) -> None:
        """Makes what the store needs before it is used for the first time: tables of a database. May be called again.

        Most stores make themselves: they are opened and closed once.

        Raises:
            StoreError: It cannot be done, or what is there is of another kind or release; nothing was changed.
        """
        async with self:
            pass

    async def aclose(self) -> None:
        """Closes what `open` opened; on a tracker that is not open it does nothing.

        Runs must have ended before; a lease that is still held then runs out. Not cut short by a cancellation, and
        bounded in time.
        """
        stack, keeper = self._stack, self._keeper
        if stack is None or keeper is None or self._is_closing:
            return
        self._is_closing = True
        # What is closed here bounds itself, and is closed whatever cancels.
        with anyio.CancelScope(shield=True):
            try:
                await keeper.aclose()
            finally:
                self._stack = self._keeper = None
                self._is_closing = False
                await stack.aclose()

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.aclose()

    @property
    def keeper(self) -> Keeper:
        """Renews the leases of this tracker.

        Raises:
            StoreError: The tracker is not open.
        """
        if self._keeper is None:
            raise StoreError(f"this {type(self).__name__} is not open; use `async with`, or await open()")
        return self._keeper

    @property
    def kind(self) -> str:
        """The kind of store, as events and logs call it: `file`, `s3`, ...; the class's name without `Tracker`."""
        return type(self).__name__.removesuffix("Tracker").lower()

    def new_id(self) -> str:
        return self._names.new()

    # -- running

    def run(
        self,
        task_id: str,
        *,
        data: D | None = None,
        lease: float | None = None,
        timeout: float | None = None,
        retry: Retry | None = None,
        force: bool = False,
    ) -> Run[D, R]:
        """Claims a task and records how the body ends: `async with tracker.run("order-17") as task: ...`.

        Left normally: succeeded, with `task.result`. An exception: failed, with its traceback, or exhausted after the
        last attempt; it is raised on. Cancelled: released, pending again, the attempt given back. `GiveUp` exhausts it
        at once, and `Postpone` makes it pending for later; both are raised on too.

        The lease is renewed for as long as the body runs and the event loop turns. The body may run more than once,
        after a crash for instance; its outcome is recorded once.

        Args:
            task_id: Which task; a new record is made where there is none.
            data: Of a new record; not looked at where there is one.
            lease: Seconds, instead of the tracker's.
            timeout: Seconds after which the body is cancelled and has failed with `TimeoutError`. A time-out that you
                put around is a cancellation instead.
            retry: Instead of the tracker's.
            force: Overrides status and due time, never somebody's live lease.

        Raises:
            TaskUnavailableError: It may not be run, or not now: `TaskLockedError`, `TaskNotDueError`,
                `TaskSucceededError`, `TaskExhaustedError`, `TaskIgnoredError`.
            LeaseLostError: From the end of `async with`: the lease was lost, and the body cancelled.
            OutcomeUnknownError: From the end: the store did not tell whether the outcome was recorded.
            InvalidValueError: An argument, or at the end the result or data, cannot be taken.
            RecordTooLargeError: At the end: recorded as failed, without the result.
            TimeoutError: From the end: `timeout` is over.
            StoreError: The store cannot be used.
            TypeError: The id is no str.
        """
        return self._run(task_id, data=data, lease=lease, timeout=timeout, retry=retry, force=force, explicit=True)

    def _run(
        self,
        task_id: str,
        *,
        data: D | None = None,
        lease: float | None = None,
        timeout: float | None = None,
        retry: Retry | None = None,
        force: bool = False,
        explicit: bool = False,
        known: Task | None = None,
    ) -> Run[D, R]:
        self._check_writable("run")
        task_id = self._check_id(task_id)
        ttl = self.lease if lease is None else check_seconds("lease", lease)
        terms = Terms(self._names.new(), self.worker, ttl, self._boot)
        retry = self.retry if retry is None else _check_retry(retry)
        stored = None if data is None else self._plain_data(task_id, data)
        claim = Claim(task_id, terms, self.judge, retry.max_attempts, stored, force, explicit)
        return self._run_type(self, claim, retry, None if timeout is None else check_seconds("timeout", timeout), known)

    async def call(self, task_id: str, fn: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Calls an async function once for this id, and gives its result then and every other time.

        As with every body, `fn` may run again if the process died, or the lease was lost, before the result was
        recorded.

        Args:
            task_id: What must happen once.
            fn: Its result is stored as JSON, and given as its return annotation says, also the first time.
            *args: For `fn`.
            **kwargs: For `fn`.

        Raises:
            TaskUnavailableError: Somebody else is at it, or it is exhausted or ignored.
            TypeError: `fn` is not async.
            InvalidValueError: The result cannot be stored (recorded as a failure), or does not fit the annotation.
            LeaseLostError: The lease was lost, and `fn` cancelled; no result is recorded.
            OutcomeUnknownError: The store did not tell whether the result was recorded.
            StoreError: The store cannot be used.
            Exception: What `fn` raises; recorded as a failure.
        """
        check_async(fn, "call")
        kind = return_type(fn, *args)
        run = self._run(task_id, explicit=True)
        if kind is not Any:
            run.result_type = kind
        is_entered = False
        try:
            async with run as task:
                is_entered = True
                task.result = await fn(*args, **kwargs)  # type: ignore[assignment]  # of fn's type, instead of R
            record = run.record
        except TaskSucceededError as exc:
            if is_entered:
                raise  # of another task, which fn asked for
            record = exc.task
        return fitting_value(record.result, run.result_type, f"the result of {task_id!r}")  # type: ignore[no-any-return]  # as fn's annotation

    async def work(
        self,
        fn: Callable[[RunningTask[D, R]], Awaitable[object]],
        *,
        ids: Iterable[str] | AsyncIterable[str] | None = None,
        concurrency: int = 64,
        limit: int | None = None,
        forever: bool = False,
        retry: Retry | None = None,
        stop: Any = None,
        grace: float = 30.0,
        on_done: Callable[[Task], object] | None = None,
    ) -> WorkSummary:
        """Claims, runs, records and retries tasks until every one is final, however many workers share them.

        Args:
            fn: The body. What it raises is recorded, and stops no other task.
            ids: Which tasks, in this order, taken one by one as there is room; made where there are none. Tasks that
                are added meanwhile are not taken. By default all tasks of the store, highest priority first.
            concurrency: Bodies at once.
            limit: Runs at the most, retries included.
            forever: Waits for more tasks, until `stop`.
            retry: Instead of the tracker's.
            stop: An event (asyncio's or anyio's). When it is set no more tasks are claimed; bodies under way have
                `grace` to end, then they are cancelled and released. See `stop_on_signals`.
            grace: Seconds that bodies under way have to end by themselves, once `stop` is set; `inf`: as many as they
                take.
            on_done: Called with the record of each task that became final here; may be async.

        Returns:
            What was done. Tasks held by other workers are waited for, until they are final too.

        Raises:
            TypeError: `fn` is not async.
            InvalidValueError: An argument, or one of the ids, cannot be taken.
            StoreError: The store cannot be used (it is full, say), or could not be reached for a minute; bodies under
                way were cancelled and released.
            UnsupportedError: Without `ids`, on a backend without `scan`.
        """
        check_async(fn, "work")
        self._check_writable("work")
        worker = Worker(
            self,
            fn,
            ids=ids,
            concurrency=_check_count("concurrency", concurrency),
            limit=None if limit is None else _check_count("limit", limit),
            forever=forever,
            retry=self.retry if retry is None else _check_retry(retry),
            stop=stop,
            grace=grace,
            on_done=on_done,
        )
        return await worker.work()

    async def wait(self, task_id: str, timeout: float | None = None) -> Task:
        """The record, as soon as it is final; a task that is not there yet is waited for.

        It reads the record again and again, after 0.02 seconds at first and every 2 seconds later on.

        Args:
            task_id: Which task.
            timeout: Seconds; by default without an end.

        Raises:
            TimeoutError: It is not final yet.
            InvalidValueError: An argument cannot be taken.
        """
        task_id = self._check_id(task_id)
        if isinstance(timeout, bool) or not isinstance(timeout, int | float | None) or timeout != timeout:
            raise InvalidValueError(f"timeout takes a number of seconds or None, not {timeout!r}")
        until = None if timeout is None else self.clock.monotonic() + timeout
        pause = 0.02
        while True:
            task = await self.load(task_id)
            if task is not None and task.status.is_final:
                return task
            if until is not None:
                left = until - self.clock.monotonic()
                if left <= 0:
                    stands = "does not exist" if task is None else f"is {task.status}"
                    raise TimeoutError(f"{task_id!r} {stands} after {timeout:g} s")
                pause = min(pause, left)
            await self.clock.sleep(pause)
            pause = min(2.0, pause * 1.5)

    # -- managing

    async def add(
        self, task_id: str, data: D | None = None, *, not_before: datetime | None = None, priority: int = 0
    ) -> bool:
        """Makes a pending task, unless there is one of this id.

        Args:
            task_id: 1 to 2,048 bytes of UTF-8, any character.
            data: The input, kept with the task.
            not_before: Nobody runs it before, an explicit `run` included.
            priority: Higher ones are worked on first.

        Returns:
            Whether it is new. A task that is there already stays as it is.

        Raises:
            TypeError: The id is no str.
            InvalidValueError: An argument cannot be taken: a naive time, say, or data that JSON cannot hold.
            RecordTooLargeError: `data` leaves no room for how the task's runs end.
            StoreError: The store cannot be used.
        """
        self._check_writable("add")
        rule = self._adding(task_id, data, not_before, priority)
        task = await self.update(rule.task_id, rule, known=None)
        self._wake()
        return task is not None and task.create_id == rule.create_id

    async def add_many(
        self,
        items: Iterable[str] | Iterable[tuple[str, D]] | AsyncIterable[str] | AsyncIterable[tuple[str, D]],
    ) -> int:
        """Makes many pending tasks; those that are there already stay as they are.

        They share commits, up to 1,000 at a time, and never are all of them in memory. If it is interrupted or fails,
        those that were added stay, and it may be called again.

        Args:
            items: Ids, or pairs of id and data; any sync or async iterable, of any length.

        Returns:
            How many are new.

        Raises:
            TypeError: An id is no str.
            InvalidValueError: An item cannot be taken.
            RecordTooLargeError: The data of one leaves no room for how its runs end.
            StoreError: The store cannot be used.
        """
        self._check_writable("add_many")
        if isinstance(items, Mapping):
            raise InvalidValueError("add_many takes ids or pairs, not a dict: give its items(), or a list of its keys")

        async def add_one(item: Any) -> bool:
            task_id, data = item if isinstance(item, tuple) and len(item) == 2 else (item, None)
            rule = self._adding(task_id, data, None, 0)
            task = await self.update(rule.task_id, rule, known=None)
            return task is not None and task.create_id == rule.create_id

        added = 0
        try:
            async for new in in_windows(items, add_one):
                added += new
                if added % WINDOW == 0:
                    self._wake()
        finally:
            self._wake()
        return added

    def find(
        self, *, order_by: str | None = None, limit: int | None = None, **where: Unpack[Where]
    ) -> AsyncIterator[Task]:
        """The tasks that match: `async for task in tracker.find(status="failed"): ...`.

        Each record is as it was at some moment after the call. Nothing is held while your loop body runs.

        Args:
            order_by: `id`, `create_time`, `update_time`, `start_time`, `finish_time`, `not_before`, `priority` or
                `attempts`; with a `-` before it descending. By default whatever order is cheapest for the store.
            limit: How many at the most.
            **where: See `Where`.

        Raises:
            InvalidValueError: A filter is unknown, or has a value that it cannot have.
            UnsupportedError: The backend has no `scan`.
        """
        return self._find(self._query(where, order_by, limit))

    async def _find(self, query: Query) -> AsyncIterator[Task]:
        left = query.limit
        if left == 0:
            return
        async for task in self.scan(query):
            if query.matches(task):
                yield task
                if left is not None:
                    left -= 1
                    if left == 0:
                        return

    async def count(self, *, by: GroupBy = "status", **where: Unpack[Where]) -> Counter[str]:
        """How many tasks match, in groups; what no task has counts 0.

        Args:
            by: `status`; `error_type` or `fingerprint` of the latest error, also after a later success; `worker` who
                holds it or, if nobody does, whose attempt failed last; `last_outcome`; `step` where in its pipeline it
                stands: at the step in progress, or else the one that failed, or else the one that was started last.
                Tasks that have nothing of the kind are counted under the empty string.
            **where: See `Where`.

        Raises:
            InvalidValueError: A filter is unknown, or has a value that it cannot have; or there is no such `by`.
            UnsupportedError: The backend has no `scan`.
        """
        query = self._query(where)
        try:
            group = check_group(by)
        except ValueError as exc:
            raise InvalidValueError(str(exc)) from exc
        return await self.tally(query, group)

    async def reset(
        self,
        *ids: str,
        from_step: str | None = None,
        force: bool = False,
        reason: str = "",
        by: str | None = None,
        **where: Unpack[Where],
    ) -> int:
        """Makes tasks pending again, with all their attempts before them; errors of the past stay in the record.

        Finished steps are kept, so that a pipeline goes on at the step that failed; those of a task that had
        succeeded are forgotten. Many tasks are changed in batches; if that is interrupted, ask again: what is done
        already is passed over.

        Args:
            *ids: Which tasks.
            from_step: Forget this step, and those that were first started after it. With filters, a task that has not
                come to it keeps its steps, and one that has succeeded without it is passed over.
            force: Also tasks that are held; their lease is taken away, and the body cancelled at its next renewal.
            reason: Why, in a line of at most 200 characters. Kept in each record (`Task.changes`, the last 4), together
                with the verb, the time, and who.
            by: Who; by default this tracker's `worker`.
            **where: ... or which tasks, see `Where`.

        Returns:
            How many were changed.

        Raises:
            InvalidValueError: Neither ids nor filters are given, or one cannot be taken; or a task named by its id
                alone has no step `from_step`, and stays as it is.
        """
        if from_step is not None and (not isinstance(from_step, str) or not from_step):
            raise InvalidValueError(f"from_step takes the name of a step, not {from_step!r}")
        author = self._author(by, reason)
        return await self._change(
            "reset", ids, where, force, author, lambda aim: Reset(aim, author, from_step), from_step
        )

    async def ignore(
        self, *ids: str, force: bool = False, reason: str = "", by: str | None = None, **where: Unpack[Where]
    ) -> int:
        """Sets tasks aside; nobody runs them until they are reset.

        Args:
            *ids: Which tasks.
            force: Also tasks that are held; their lease is taken away, and the body cancelled at its next renewal.
            reason: Why; kept in each record, as with `reset`.
            by: Who; by default this tracker's `worker`.
            **where: ... or which tasks, see `Where`.

        Returns:
            How many were changed.

        Raises:
            InvalidValueError: Neither ids nor filters are given, or a filter cannot be taken.
        """
        author = self._author(by, reason)
        return await self._change("ignore", ids, where, force, author, lambda aim: Ignore(aim, author))

    async def purge(
        self, *ids: str, force: bool = False, reason: str = "", by: str | None = None, **where: Unpack[Where]
    ) -> int:
        """Removes records: the store forgets these tasks, and their ids may be run again.

        Records that were changed within the last hour are spared unless `force`: they may still be needed to recognise
        a write whose reply was lost. A later claim of the same id has a larger fence than all earlier ones.

        Args:
            *ids: Which tasks.
            force: Also tasks that are held, and those that were changed within the last hour.
            reason: Why; since no record is left to keep it, it goes to the log only, and so does `by`.
            by: Who; by default this tracker's `worker`.
            **where: ... or which tasks, see `Where`.

        Returns:
            How many were removed.

        Raises:
            InvalidValueError: Neither ids nor filters are given, or a filter cannot be taken.
            UnsupportedError: The backend has no `delete`.
        """
        return await self._change("purge", ids, where, force, self._author(by, reason), Purge)

    def _author(self, by: str | None, reason: str) -> Author:
        for name, text in (("by", "" if by is None else by), ("reason", reason)):
            # Of exactly this type: encoders refuse subclasses.
            if type(text) is not str or len(text) > 200 or not text.isprintable():
                raise InvalidValueError(f"{name} takes a line of text of at most 200 characters, not {text!r}")
        return Author(by or self.worker, reason)

    async def _change(
        self,
        verb: str,
        ids: tuple[str, ...],
        where: Where,
        force: bool,
        author: Author,
        rule: Callable[[Aim], Rule],
        from_step: str | None = None,
    ) -> int:
        self._check_writable(verb)
        if not ids and not where:
            raise InvalidValueError(
                f"{verb} takes ids or filters, e.g. {verb}(status='failed'); for all tasks give every status"
            )
        ids = tuple(self._check_id(task_id) for task_id in ids)
        query = self._query(where) if where else None

        async def change(item: str | Task) -> bool:
            first = await self.load(item) if isinstance(item, str) else item
            if first is None or (query is not None and not query.matches(first)):
                return False
            if query is None and from_step is not None:
                _check_step(first, from_step)
            change = Witness(rule(Aim(self.judge, first.fence, first.status, force, query)))
            await self.update(first.id, change, known=first)
            return change.is_made

        items: Iterable[str] | AsyncIterable[Task] = ids if ids or query is None else self._find(query)
        changed = 0
        try:
            async for done in in_windows(items, change):
                changed += done
        finally:
            self._wake()
            logger.info(
                "%s: %d tasks, by %s%s",
                verb,
                changed,
                author.who,
                f": {author.reason}" if author.reason else "",
                extra={
                    "event": "tasks_changed",
                    "store": self.kind,
                    "verb": verb,
                    "changed": changed,
                    "by": author.who,
                    "reason": author.reason,
                },
            )
        return changed

    def _wake(self) -> None:
        for event in self._listeners:
            event.set()

    def _adding(self, task_id: str, data: Any, not_before: datetime | None, priority: int) -> Add:
        task_id = self._check_id(task_id)
        if isinstance(priority, bool) or not isinstance(priority, int) or not -(2**31) <= priority < 2**31:
            raise InvalidValueError(f"priority takes an int of at most 32 bits, not {priority!r}")
        try:
            due = None if not_before is None else aware("not_before", not_before)
        except ValueError as exc:
            raise InvalidValueError(str(exc)) from exc
        stored = None if data is None else self._plain_data(task_id, data)
        return Add(task_id, self._names.new(), stored, due, priority)

    def _plain_data(self, task_id: str, data: Any) -> Any:
        stored = plain_value(data, self.data_type, "data")
        # What is added must leave room for how its runs end.
        check_room(task_id, len(task_id) + len(msgspec.json.encode(stored)), self.max_record_bytes)
        return stored

    def _query(self, where: Where, order_by: str | None = None, limit: int | None = None) -> Query:
        try:
            return Query.build(where, order_by=order_by, limit=limit)
        except ValueError as exc:
            raise InvalidValueError(str(exc)) from exc

    def _check_id(self, task_id: str) -> str:
        try:
            return check_id(task_id)
        except ValueError as exc:
            raise InvalidValueError(str(exc)) from exc

    def _check_writable(self, verb: str) -> None:
        if self.read_only:
            raise UnsupportedError(f"{verb}() writes, and this {type(self).__name__} was opened read_only", verb)
        if self._stack is None or self._is_closing:
            raise StoreError(f"this {type(self).__name__} is not open; use `async with`, or await open()")


def _check_retry(retry: Retry) -> Retry:
    if not isinstance(retry, Retry):
        raise InvalidValueError(f"retry takes a Retry, e.g. Retry(max_attempts=5), not {retry!r}")
    return retry


def _check_step(task: Task, name: str) -> None:
    names = [step.name for step in task.steps]
    if name not in names:
        there = f"there are: {', '.join(map(repr, names))}" if names else "it has none"
        raise InvalidValueError(f"{task.id!r} has no step {name!r}; {there}")


def _check_count(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidValueError(f"{name} takes an int of 1 or more, not {value!r}")
    return value
