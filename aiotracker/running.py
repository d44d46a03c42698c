"""One run of one task: the claim, the body's view of it, and how it ends."""

import asyncio
import contextlib
import inspect
import logging
import random
import traceback
from collections.abc import Awaitable, Callable
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Generic, get_type_hints

import anyio
import msgspec
from typing_extensions import ParamSpec, TypeVar

from ._core.codec import find_problem, plain, typed
from ._core.retry import Retry, postponed
from ._core.task import Failure, Status, Step, Task
from ._core.transitions import Cause, Changes, Claim, Fail, Postpone, Release, Renew, Rule, Succeed, Terms, outcome_of
from .errors import (
    InvalidValueError,
    LeaseLostError,
    OutcomeUnknownError,
    RecordTooLargeError,
    StoreUnavailableError,
    TaskExhaustedError,
    TaskIgnoredError,
    TaskLockedError,
    TaskNotDueError,
    TaskSucceededError,
    TrackerError,
)
from .leases import Held

if TYPE_CHECKING:
    from .tracker import BaseTracker

__all__ = ["Run", "RunningTask", "check_async", "return_type"]

logger = logging.getLogger("aiotracker")

D = TypeVar("D", default=Any)
R = TypeVar("R", default=Any)
T = TypeVar("T")
P = ParamSpec("P")

RESERVE: Final = 32 * 1024  # bytes that `save` leaves free, so that the end of the run can always be recorded
RELEASE_TIME: Final = 5.0  # seconds at the most that a cancellation waits for its release to be written
MAX_MESSAGE: Final = 2_000
MAX_TRACEBACK: Final = 8_000  # characters
MAX_NOTE: Final = 2_000


class RunningTask(Generic[D, R]):
    """A claimed task, as its body sees it.

    Attributes:
        result: Set by the body; recorded with the success.
    """

    __slots__ = ("_data", "_data_seen", "_run", "_steps", "result")

    def __init__(self, run: "Run[D, R]") -> None:
        self._run = run
        self._data: Any = None
        self._data_seen = False
        self._steps: set[str] = set()
        self.result: R | None = None

    def __repr__(self) -> str:
        return f"<RunningTask {self.id!r} attempt {self.attempts} fence {self.fence}>"

    @property
    def id(self) -> str:
        """The task's id."""
        return self._run.task_id

    @property
    def attempts(self) -> int:
        """Which attempt this is, from 1."""
        return self.record.attempts

    @property
    def fence(self) -> int:
        """Larger than that of every earlier claim of this id. Let what you write to elsewhere refuse smaller ones."""
        return self.record.fence

    @property
    def lease_left(self) -> float:
        """Seconds until the lease ends, if it is not renewed, by the least favourable of our clocks."""
        return self._run.held.left

    @property
    def record(self) -> Task:
        """The record as it was last read or written by this run."""
        return self._run.record

    @property
    def data(self) -> D:
        """The task's data: a copy of this run's own. Changes are recorded by `save`, by each step, and at the end."""
        if not self._data_seen:
            copy = msgspec.json.decode(msgspec.json.encode(self.record.data))
            try:
                self._data = typed(copy, self._run.tracker.data_type, "data")
            except ValueError as exc:
                raise InvalidValueError(str(exc)) from exc
            self._data_seen = True
        return self._data  # type: ignore[no-any-return]  # checked against data_type, which mypy cannot see

    @data.setter
    def data(self, value: D) -> None:
        self._data, self._data_seen = value, True

    @property
    def progress(self) -> float | None:
        """How far the body is, from 0 to 1 or in any unit of yours; rides on the next renewal."""
        fields = self._run.changes.fields
        return fields["progress"] if "progress" in fields else self.record.progress

    @progress.setter
    def progress(self, value: float | None) -> None:
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or value - value != 0):
            raise InvalidValueError(f"progress takes a finite number or None, not {value!r}")
        self._run.changes.fields["progress"] = value if value is None else float(value)

    @property
    def note(self) -> str | None:
        """A line for whoever looks; rides on the next renewal."""
        fields = self._run.changes.fields
        return fields["note"] if "note" in fields else self.record.note

    @note.setter
    def note(self, value: str | None) -> None:
        if value is not None and (type(value) is not str or find_problem(value, "note") or len(value) > MAX_NOTE):
            raise InvalidValueError(f"note takes a str of at most {MAX_NOTE} characters or None, not {value!r}")
        self._run.changes.fields["note"] = value

    async def save(self) -> None:
        """Records data, progress and note now, and renews the lease.

        Raises:
            InvalidValueError: `data` holds what JSON cannot; nothing was written.
            RecordTooLargeError: Nothing was written.
            LeaseLostError: The claim is over; nothing was written.
            OutcomeUnknownError: The store did not tell whether it was written.
        """
        await self._run.save(self._changed())

    async def renew(self, seconds: float | None = None) -> None:
        """Renews the lease now. Not needed for bodies that give the event loop its turns.

        Args:
            seconds: The new length of the lease; by default the length that it has.

        Raises:
            LeaseLostError: The claim is over.
            OutcomeUnknownError: The store did not tell.
        """
        await self._run.renew(seconds)

    async def step(self, name: str, fn: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs one step of a pipeline, or gives what it returned when it finished in an earlier attempt.

        The result, times, attempts and error are in the record before this returns or raises. Steps may run
        concurrently.

        Args:
            name: Of the step, once in a run.
            fn: An async function; its result is stored as JSON, and given as its return annotation says, also the
                first time. Return a path, not the payload.
            *args: For `fn`.
            **kwargs: For `fn`.

        Raises:
            InvalidValueError: The name was used before in this run, or the result cannot be stored.
            TypeError: `fn` is not async.
            LeaseLostError: The claim is over; the step is not recorded.
            OutcomeUnknownError: The store did not tell whether the step was recorded.
        """
        check_async(fn, "step")
        if not isinstance(name, str) or not name or find_problem(name, "name"):
            raise InvalidValueError(f"a step's name is a str that is not empty, not {name!r}")
        if name in self._steps:
            raise InvalidValueError(f"step {name!r} was already used in this run of {self.id!r}; names are used once")
        self._steps.add(name)
        kind = return_type(fn)
        run, before = self._run, next((step for step in self.record.steps if step.name == name), None)
        if before is not None and before.status is Status.SUCCEEDED:
            return _fitting(before.result, kind, f"the result of step {name!r}")  # type: ignore[no-any-return]  # as fn's annotation
        run.check()
        step = Step(name, Status.IN_PROGRESS, before.attempts + 1 if before else 1, run.tracker.now())
        run.changes.steps[name] = step
        try:
            value = await fn(*args, **kwargs)
            try:
                stored = plain(value, kind, f"the result of step {name!r}")
            except ValueError as exc:
                raise InvalidValueError(str(exc)) from exc
        except BaseException as exc:
            cause = await run.describe(exc) if isinstance(exc, Exception) else _brief(exc)
            now = run.tracker.now()
            failure = Failure(self.attempts, now, run.tracker.worker, cause.type, cause.message, cause.traceback)
            run.changes.steps[name] = msgspec.structs.replace(
                step, status=Status.FAILED, finish_time=now, error=failure
            )
            if isinstance(exc, Exception):
                try:
                    await run.save(self._changed(data=False))
                except TrackerError as error:
                    logger.warning("the failed step %r of %r could not be recorded: %s", name, self.id, error)
            raise
        done = msgspec.structs.replace(
            step, status=Status.SUCCEEDED, finish_time=run.tracker.now(), result=stored, error=None
        )
        changes = self._changed()
        await run.save(Changes(changes.fields, changes.steps | {name: done}))
        run.changes.steps[name] = done
        return _fitting(stored, kind, f"the result of step {name!r}")  # type: ignore[no-any-return]  # as fn's annotation

    def _changed(self, *, data: bool = True) -> Changes:
        changes = self._run.changes
        if not (data and self._data_seen):
            return changes
        try:
            stored = plain(self._data, self._run.tracker.data_type, "data")
        except ValueError as exc:
            raise InvalidValueError(str(exc)) from exc
        return Changes(changes.fields | {"data": _copy(stored)}, changes.steps)


class Run(Generic[D, R]):
    """What `tracker.run(...)` returns: `async with` claims the task, and records how its body ends."""

    __slots__ = (
        "_cancelling",
        "_explicit",
        "_force",
        "_known",
        "_new_data",
        "_retry",
        "_running",
        "_timeout",
        "changes",
        "held",
        "task_id",
        "terms",
        "tracker",
    )

    held: Held

    def __init__(
        self,
        tracker: "BaseTracker[D, R]",
        task_id: str,
        terms: Terms,
        retry: Retry,
        *,
        data: Any,
        timeout: float | None,
        force: bool,
        explicit: bool,
        known: Task | None,
    ) -> None:
        self.tracker = tracker
        self.task_id = task_id
        self.terms = terms
        self.changes = Changes({}, {})
        self._retry = retry
        self._new_data = data
        self._timeout = timeout
        self._force = force
        self._explicit = explicit
        self._known = known
        self._cancelling = 0
        self._running: RunningTask[D, R] | None = None

    @property
    def record(self) -> Task:
        """As last read or written by this run; after `async with`, how it ended."""
        return self.held.record

    async def __aenter__(self) -> RunningTask[D, R]:
        if self._running is not None:
            raise RuntimeError("a run is entered once; call tracker.run(...) again for another")
        tracker = self.tracker
        body = asyncio.current_task(tracker.loop)
        if body is None:
            raise RuntimeError("a tracker is used on the event loop that opened it")
        asked = tracker.clock.moment()
        record = await self._claim()
        if record is None or record.lease is None or record.lease.token != self.terms.token:
            raise self._refusal(record)
        self._running = RunningTask(self)
        held = self.held = Held(tracker.clock, record, self.terms, asked, self.changes)
        if not held.check():
            self._give_back()
            raise StoreUnavailableError(
                f"claiming {self.task_id!r} took longer than the lease of {self.terms.ttl:g} s; it was given back"
            )
        held.body = body
        self._cancelling = body.cancelling()
        if self._timeout is not None:
            held.timeout_at = tracker.clock.monotonic() + self._timeout
        tracker.keeper.enter(held)
        return self._running

    async def _claim(self) -> Task | None:
        claim = Claim(
            self.task_id,
            self.terms,
            self.tracker.judge,
            self._retry.max_attempts,
            self._new_data,
            self._force,
            self._explicit,
        )
        answer = self.tracker.update(self.task_id, claim, known=self._known)
        # A future comes from a store that undoes by itself a claim whose waiter has gone.
        future = answer if isinstance(answer, asyncio.Future) else asyncio.ensure_future(answer)
        try:
            if future.done():
                return future.result()
            return await (future if future is answer else asyncio.shield(future))
        except asyncio.CancelledError:
            if future.cancelled():
                raise
            if future.done():
                await self._undo(future)
            else:
                future.add_done_callback(self._undo_later)
            raise
        except (StoreUnavailableError, OutcomeUnknownError):
            self._give_back()
            raise

    async def _undo(self, future: asyncio.Future[Task | None]) -> None:
        if future.exception() is None and self._holds(future.result()):
            await self._settle(Release(self.terms.token, Changes(), counted=False), RELEASE_TIME)

    def _undo_later(self, future: asyncio.Future[Task | None]) -> None:
        if not future.cancelled() and future.exception() is None and self._holds(future.result()):
            self._give_back()

    def _holds(self, record: Task | None) -> bool:
        return record is not None and record.lease is not None and record.lease.token == self.terms.token

    def _give_back(self) -> None:
        undo = Release(self.terms.token, Changes(), counted=False)
        self.tracker.keeper.give_back(self.task_id, self.terms.token, undo, self.terms.ttl)

    def _refusal(self, record: Task | None) -> TrackerError:
        name = repr(self.task_id)
        if record is None or outcome_of(record, self.terms.token) not in (None, "exhausted"):
            return LeaseLostError(f"{name} was claimed, and taken away before the store's answer came", self.task_id, 0)
        if record.lease is not None:
            left = self.tracker.judge.left(record.lease, self.tracker.now())
            holder = record.lease.worker
            return TaskLockedError(f"{name} is held by {holder} for another {left:.1f} s", record, left)
        if record.status is Status.SUCCEEDED:
            return TaskSucceededError(f"{name} has succeeded; reset it or use force=True to run it again", record, None)
        if record.status is Status.IGNORED:
            return TaskIgnoredError(f"{name} is ignored; reset it or use force=True to run it", record, None)
        if record.status is Status.EXHAUSTED:
            last = f" ({record.errors[-1].type}: {record.errors[-1].message})" if record.errors else ""
            return TaskExhaustedError(
                f"{name} is exhausted after {record.attempts} attempts{last}; reset it to run it again", record, None
            )
        due = record.not_before or self.tracker.now()
        left = max(0.0, (due - self.tracker.now()).total_seconds())
        return TaskNotDueError(f"{name} is not to be run before {due.isoformat()}", record, left)

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> bool:
        held, task = self.held, self._running
        assert task is not None
        body = asyncio.current_task(self.tracker.loop)
        self.tracker.keeper.leave(held)
        if isinstance(exc, GeneratorExit):
            return False  # the event loop is gone, and nothing can be awaited: the lease runs out
        if body is not held.body or body is None:
            raise RuntimeError(f"the run of {self.task_id!r} must end in the asyncio task that entered it")
        if held.interrupted:
            cancelled_outside = await self._outlive_interrupt(body, exc)
        else:
            cancelled_outside = isinstance(exc, asyncio.CancelledError) and body.cancelling() > 0
        if not held.check():
            return self._end_lost(exc, cancelled_outside)
        if cancelled_outside or isinstance(exc, KeyboardInterrupt | SystemExit):
            await self._end_cancelled(task)
            return False
        if held.timed_out:
            timeout = TimeoutError(f"{self.task_id!r} ran longer than its timeout of {self._timeout:g} s")
            timeout.__cause__ = None if isinstance(exc, asyncio.CancelledError) else exc
            await self._end_failed(task, timeout)
            raise timeout
        if exc is None:
            await self._end_succeeded(task)
            return False
        await self._end_failed(task, exc)
        return False

    async def _outlive_interrupt(self, body: asyncio.Task[Any], exc: BaseException | None) -> bool:
        """Takes our own cancellation back; whether there was another one from outside."""
        left = body.uncancel()
        if not isinstance(exc, asyncio.CancelledError):
            # The body ended before our cancellation reached it; it comes with the next await.
            try:
                await asyncio.sleep(0)
            except asyncio.CancelledError:
                left = body.cancelling()
        return left > self._cancelling

    def _end_lost(self, exc: BaseException | None, cancelled_outside: bool) -> bool:
        held = self.held
        if held.unreachable:
            # Nobody could claim it meanwhile, if nobody could reach the store: that is not the task's fault.
            undo = Release(self.terms.token, Changes(), counted=False, outcome="lease_lost")
            self.tracker.keeper.give_back(self.task_id, self.terms.token, undo, self.terms.ttl)
        if cancelled_outside or isinstance(exc, KeyboardInterrupt | SystemExit):
            logger.warning("the lease of %r was lost: %s", self.task_id, held.lost)
            return False
        if isinstance(exc, LeaseLostError) and exc.task_id == self.task_id and exc.fence == self.record.fence:
            return False
        raise self._lost() from (None if isinstance(exc, asyncio.CancelledError) else exc)

    def _lost(self) -> LeaseLostError:
        return LeaseLostError(
            f"the lease of {self.task_id!r} is over ({self.held.lost}); nothing more of this run is recorded",
            self.task_id,
            self.record.fence,
        )

    async def _end_succeeded(self, task: RunningTask[D, R]) -> None:
        try:
            changes = task._changed()
            result = task.result
            if result is not None:
                try:
                    result = plain(result, self.tracker.result_type, "result")
                except ValueError as exc:
                    raise InvalidValueError(str(exc)) from exc
            await self._record(Succeed(self.terms.token, changes, result), "succeeded")
        except (InvalidValueError, RecordTooLargeError) as exc:
            await self._end_failed(task, exc)
            raise

    async def _end_failed(self, task: RunningTask[D, R], exc: BaseException) -> None:
        if not isinstance(exc, ExceptionGroup) and isinstance(exc, LeaseLostError) and exc.fence == self.record.fence:
            raise exc
        changes = self.changes
        try:
            changes = task._changed()
        except InvalidValueError as error:
            logger.warning("the data of %r cannot be stored, and is kept as it was: %s", self.task_id, error)
        if (seconds := postponed(exc)) is not None:
            await self._record(Postpone(self.terms.token, changes, seconds), "postponed")
            return
        retry = self._retry
        cause, stopped = await self._shielded(self.describe(exc))
        try:
            wait = retry.wait(self.record.attempts, random.random())
        except Exception:
            logger.exception("the retry's delay failed; %r is tried again after max_delay", self.task_id)
            wait = retry.max_delay
        ends = {
            "max_attempts": retry.max_attempts,
            # A cancellation without a canceller is somebody else's task that was cancelled: an error like others.
            "retryable": retry.allows(exc) or isinstance(exc, asyncio.CancelledError),
            "wait": wait,
            "outcome": "timeout" if self.held.timed_out else "error",
        }
        try:
            await self._record(Fail(self.terms.token, changes, cause, **ends), "failed", "exhausted")
        except RecordTooLargeError:
            short = Cause(cause.type, cause.message[:200], cause.traceback[-1000:])
            await self._record(Fail(self.terms.token, Changes(), short, **ends), "failed", "exhausted")
        if stopped:
            raise asyncio.CancelledError

    async def _end_cancelled(self, task: RunningTask[D, R]) -> None:
        changes = self.changes
        try:
            changes = task._changed()
        except InvalidValueError as error:
            logger.warning("the data of %r cannot be stored, and is kept as it was: %s", self.task_id, error)
        for kept in (changes, Changes()):
            rule = Release(self.terms.token, kept, random.random())
            future = await self._settle(rule, min(RELEASE_TIME, max(0.1, self.held.left)))
            if not future.done():
                logger.warning("%r could not be released in time; its lease runs out", self.task_id)
                return
            if future.cancelled():
                return
            error = future.exception()
            if error is None:
                if (record := future.result()) is not None:
                    self.held.record = record
                return
            logger.warning("%r could not be released: %s", self.task_id, error)
            if not isinstance(error, RecordTooLargeError):
                return

    async def _record(self, rule: Rule, *outcomes: str) -> None:
        """Writes how the run ends. A cancellation that arrives meanwhile is raised after it is recorded."""
        cancelled = False
        try:
            try:
                record = await self.tracker.update(self.task_id, rule, known=self.held.record)
            except asyncio.CancelledError:
                # Whether it landed is not known. Writing it again tells: a rule changes nothing that it has changed.
                cancelled = True
                record = (await self._settle(rule, None)).result()
        except (StoreUnavailableError, OutcomeUnknownError) as exc:
            if cancelled:
                logger.warning("whether the end of %r was recorded is not known: %s", self.task_id, exc)
                raise asyncio.CancelledError from exc
            raise OutcomeUnknownError(
                f"whether the end of {self.task_id!r} was recorded is not known: {exc}", self.task_id
            ) from exc
        if record is not None:
            self.held.record = record
        if outcome_of(record, self.terms.token) not in outcomes:
            self.held.lost = "taken away or taken over"
            if not cancelled:
                raise self._lost()
        if cancelled:
            raise asyncio.CancelledError

    async def _settle(self, rule: Rule, seconds: float | None) -> "asyncio.Future[Task | None]":
        """Writes, and waits for the answer whatever cancels, for some seconds at the most."""
        loop = asyncio.get_running_loop()
        deadline = None if seconds is None else loop.time() + seconds
        # Both are needed: a scope keeps anyio from cancelling again and again, the loop outlives asyncio's cancels.
        with anyio.CancelScope(shield=True):
            future = asyncio.ensure_future(self.tracker.update(self.task_id, rule))
            while not future.done():
                left = None if deadline is None else deadline - loop.time()
                if left is not None and left <= 0:
                    break
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait({future}, timeout=left)
        return future

    async def _shielded(self, work: Awaitable[Cause]) -> tuple[Cause, bool]:
        future = asyncio.ensure_future(work)
        cancelled = False
        with anyio.CancelScope(shield=True):
            while not future.done():
                try:
                    await asyncio.wait({future})
                except asyncio.CancelledError:
                    cancelled = True
        return future.result(), cancelled

    def check(self) -> None:
        """Raises `LeaseLostError` where the lease is over by our own clocks."""
        if not self.held.check():
            raise self._lost()

    async def save(self, changes: Changes) -> None:
        """Writes the run's changes under its lease, and renews that."""
        self.check()
        limit = self.tracker.max_record_bytes - RESERVE
        size = len(self.record.replace(**changes.onto(self.record)).encode())
        if size > limit:
            raise RecordTooLargeError(
                f"the record of {self.task_id!r} would take {size:,} bytes; {limit:,} are the most while it runs: "
                "keep large values elsewhere, and their path here",
                self.task_id,
                size,
                limit,
            )
        await self._renew_with(Renew(self.terms, changes))

    async def renew(self, seconds: float | None) -> None:
        self.check()
        if seconds is not None:
            self.terms = self.held.terms = msgspec.structs.replace(self.terms, ttl=check_seconds("renew", seconds))
        await self._renew_with(Renew(self.terms, self.changes))

    async def _renew_with(self, rule: Rule) -> None:
        asked, terms = self.tracker.clock.moment(), self.terms
        record = await self.tracker.update(self.task_id, rule, known=self.record)
        if not self._holds(record):
            self.held.lost = "taken away or taken over"
            self.check()
        assert record is not None
        self.held.record = record
        if terms is self.held.terms:
            self.held.grant(asked)

    async def describe(self, exc: BaseException) -> Cause:
        """The error as it is kept. Formatting reads source files, which must not block the event loop."""
        if isinstance(exc, asyncio.CancelledError):
            return _brief(exc)
        return await asyncio.to_thread(_describe, exc)


def _describe(exc: BaseException) -> Cause:
    text = "".join(traceback.format_exception(exc))
    if len(text) > MAX_TRACEBACK:
        text = f"{text[:1000]}\n... {len(text) - MAX_TRACEBACK:,} characters left out ...\n{text[1000 - MAX_TRACEBACK :]}"
    return Cause(type(exc).__name__, _message(exc), _storable(text))


def _brief(exc: BaseException) -> Cause:
    return Cause(type(exc).__name__, _message(exc) or "cancelled")


def _message(exc: BaseException) -> str:
    try:
        text = str(exc)
    except Exception as error:
        text = f"<{type(exc).__name__} without a text: {type(error).__name__}>"
    return _storable(text[:MAX_MESSAGE])


def _storable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _copy(value: Any) -> Any:
    return msgspec.json.decode(msgspec.json.encode(value))


def _fitting(stored: Any, kind: Any, path: str) -> Any:
    try:
        return typed(_copy(stored), kind, path)
    except ValueError as exc:
        raise InvalidValueError(str(exc)) from exc


def check_async(fn: object, user: str) -> None:
    """Refuses what is not an async function, before anything is called.

    Raises:
        TypeError: With what to write instead.
    """
    inner = fn
    while hasattr(inner, "func") and hasattr(inner, "args"):  # functools.partial
        inner = inner.func
    if not callable(inner):
        raise TypeError(f"{user} takes an async function, not {fn!r}")
    if inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(type(inner).__call__):
        return
    name = getattr(inner, "__name__", repr(inner))
    example = f'task.step("{name}", asyncio.to_thread, {name}, ...)' if user == "step" else (
        f"an async def that awaits asyncio.to_thread({name}, ...)"
    )
    raise TypeError(f"{user} takes an async function, and {name} is a plain one; use {example}")


def return_type(fn: Callable[..., Any]) -> Any:
    """What an async function says that it returns; `Any` where it says nothing that can be used."""
    while hasattr(fn, "func") and hasattr(fn, "args"):
        fn = fn.func
    try:
        kind = get_type_hints(fn).get("return", Any)
    except Exception:
        return Any  # names that exist for the type checker alone
    return Any if isinstance(kind, TypeVar) or kind is type(None) else kind


def check_seconds(name: str, value: float) -> float:
    """A length of time that was given by a user.

    Raises:
        InvalidValueError: It is not a positive, finite number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= timedelta.max.total_seconds():
        raise InvalidValueError(f"{name} takes a positive number of seconds, not {value!r}")
    return float(value)

