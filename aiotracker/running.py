"""One run of one task: the claim, the body's view of it, and how it ends."""

import asyncio
import contextlib
import functools
import inspect
import logging
import random
import traceback
from collections.abc import Awaitable, Callable
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Generic, get_type_hints
from typing import TypeVar as StandardTypeVar

import anyio
import msgspec
from typing_extensions import ParamSpec, TypeVar

from ._core.codec import copied, find_problem, plain, typed
from ._core.retry import Retry, leaves, postponed
from ._core.task import Failure, Status, Step, Task
from ._core.transitions import (
    ENDS_KEPT,
    NO_CHANGES,
    Cause,
    Changes,
    Claim,
    Fail,
    Postpone,
    Release,
    Renew,
    Rule,
    Succeed,
    outcome_of,
)
from .contract import UNKNOWN
from .errors import (
    InvalidValueError,
    LeaseLostError,
    OutcomeUnknownError,
    RecordTooLargeError,
    StoreError,
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

__all__ = ["Run", "RunningTask", "check_async", "check_room", "check_seconds", "return_type"]

logger = logging.getLogger("aiotracker")

D = TypeVar("D", default=Any)
R = TypeVar("R", default=Any)
T = TypeVar("T")
P = ParamSpec("P")

RESERVE: Final = (
    32 * 1024
)  # bytes of a record that are kept for errors, ends, lease and note, so that each end can be recorded
CLAIM_TIME: Final = 1.0  # seconds at the most that a cancellation waits for the answer to a claim
DESCRIBE_TIME: Final = 2.0  # seconds at the most that an error waits for a thread that formats it
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
        self._steps: set[str] | None = None
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
            self._data = _fitting(self.record.data, self._run.tracker.data_type, "data")
            self._data_seen = True
        return self._data  # type: ignore[no-any-return]  # checked against data_type, which mypy cannot see

    @data.setter
    def data(self, value: D) -> None:
        self._data, self._data_seen = value, True

    @property
    def progress(self) -> float | None:
        """How far the body is, from 0 to 1 or in any unit of yours; rides on the next renewal."""
        fields = self._run.changes.fields
        return fields.get("progress", self.record.progress)

    @progress.setter
    def progress(self, value: float | None) -> None:
        try:
            number = None if value is None or isinstance(value, bool) else float(value)
            is_fine = value is None or (number is not None and number - number == 0)
        except (TypeError, ValueError, OverflowError):
            is_fine = False
        if not is_fine:
            raise InvalidValueError(f"progress takes a finite number or None, not {value!r}")
        self._run.change(progress=number)

    @property
    def note(self) -> str | None:
        """A line for whoever looks; rides on the next renewal."""
        fields = self._run.changes.fields
        return fields.get("note", self.record.note)

    @note.setter
    def note(self, value: str | None) -> None:
        if value is not None and (type(value) is not str or find_problem(value, "note") or len(value) > MAX_NOTE):
            raise InvalidValueError(f"note takes a str of at most {MAX_NOTE} characters or None, not {value!r}")
        self._run.change(note=value)

    async def save(self) -> None:
        """Records data, progress and note now, and renews the lease.

        Raises:
            InvalidValueError: `data` holds what JSON cannot; nothing was written.
            RecordTooLargeError: Nothing was written.
            LeaseLostError: The claim is over; nothing was written.
            OutcomeUnknownError: The store did not tell whether it was written.
        """
        self._keep_data()
        await self._run.save()

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
        if self._steps is None:
            self._steps = set()
        if name in self._steps:
            raise InvalidValueError(f"step {name!r} was already used in this run of {self.id!r}; names are used once")
        self._steps.add(name)
        kind = return_type(fn, *args)
        path = f"the result of step {name!r}"
        run, before = self._run, next((step for step in self.record.steps if step.name == name), None)
        if before is not None and before.status is Status.SUCCEEDED:
            return _fitting(before.result, kind, path)  # type: ignore[no-any-return]  # as fn's annotation
        run.check()
        step = Step(name, Status.IN_PROGRESS, before.attempts + 1 if before else 1, run.tracker.now())
        run.change_step(step)
        try:
            value = await fn(*args, **kwargs)
            done = msgspec.structs.replace(
                step, status=Status.SUCCEEDED, finish_time=run.tracker.now(), result=_plain(value, kind, path)
            )
            run.check_size(run.changes.fields, run.changes.steps | {name: done})
        except BaseException as exc:
            await self._step_failed(step, exc)
            raise
        run.change_step(done)
        self._keep_data()
        await run.save()
        return _fitting(done.result, kind, path)  # type: ignore[no-any-return]  # as fn's annotation

    async def _step_failed(self, step: Step, exc: BaseException) -> None:
        run = self._run
        # A cancellation must not wait, and is recorded with the release.
        cause = await run.describe(exc) if isinstance(exc, Exception) else _brief(exc)
        now = run.tracker.now()
        failure = Failure(self.attempts, now, run.tracker.worker, cause.type, cause.message, cause.traceback)
        run.change_step(msgspec.structs.replace(step, status=Status.FAILED, finish_time=now, error=failure))
        if isinstance(exc, Exception):
            try:
                await run.save()
            except TrackerError as error:
                logger.warning("the failed step %r of %r could not be recorded: %s", step.name, self.id, error)

    def _keep_data(self) -> None:
        """Takes the body's data into what is written next.

        Raises:
            InvalidValueError: JSON cannot hold it.
            RecordTooLargeError: The record would not fit.
        """
        if self._data_seen:
            run = self._run
            fields = run.changes.fields | {"data": _plain(self._data, run.tracker.data_type, "data")}
            run.check_size(fields, run.changes.steps)
            run.changes.fields = fields


class Run(Generic[D, R]):
    """What `tracker.run(...)` returns: `async with` claims the task, and records how its body ends."""

    __slots__ = (
        "_cancelled",
        "_cancelling",
        "_claim",
        "_keeper",
        "_known",
        "_retry",
        "_running",
        "_timeout",
        "_uncancelled",
        "changes",
        "held",
        "result_type",
        "task_id",
        "terms",
        "tracker",
    )

    held: Held

    def __init__(
        self, tracker: "BaseTracker[D, R]", claim: Claim, retry: Retry, timeout: float | None, known: Task | None
    ) -> None:
        self.tracker = tracker
        self.task_id = claim.task_id
        self.terms = claim.terms
        self.result_type = tracker.result_type
        self.changes = Changes(NO_CHANGES.fields, NO_CHANGES.steps)
        self._claim: Claim | None = claim  # until it is made
        self._keeper = tracker.keeper
        self._retry = retry
        self._timeout = timeout
        self._known = known
        self._cancelling = 0  # of the body's asyncio task, before the body
        self._cancelled = False  # somebody cancelled while the end was written
        self._uncancelled = False  # our own cancellation of the body was taken back
        self._running: RunningTask[D, R] | None = None

    @property
    def record(self) -> Task:
        """As last read or written by this run; after `async with`, how it ended."""
        return self.held.record

    # -- the claim

    async def __aenter__(self) -> RunningTask[D, R]:
        claim, self._claim = self._claim, None
        if claim is None:
            raise RuntimeError("a run is entered once; call tracker.run(...) again for another")
        tracker = self.tracker
        body = asyncio.current_task(tracker.loop)
        if body is None:
            raise RuntimeError("a tracker is used on the event loop that opened it")
        asked = tracker.clock.moment()
        answer = tracker.update(self.task_id, claim, known=self._known)
        # A future comes from a store that undoes by itself a claim whose waiter has gone; a coroutine goes on.
        undoes = isinstance(answer, asyncio.Future) and not isinstance(answer, asyncio.Task)
        try:
            if undoes:
                record = await answer
            else:
                answer = asyncio.ensure_future(answer)
                record = await asyncio.shield(answer)
        except asyncio.CancelledError:
            if isinstance(answer, asyncio.Future) and not (undoes and answer.cancelled()):
                await self._undo(answer)
            raise
        except GeneratorExit:  # dropped while it waited, without a cancellation
            if isinstance(answer, asyncio.Future) and not tracker.loop.is_closed():
                self._keeper.adopt(answer, self.task_id, self.terms.token, self._release(), self.terms.ttl)
            raise
        except (StoreUnavailableError, OutcomeUnknownError):
            self._give_back()
            raise
        if record is None or record.lease is None or record.lease.token != self.terms.token:
            raise self._refusal(record)
        held = self.held = Held(tracker.clock, record, self.terms, asked, self.changes)
        if not held.check():
            self._give_back()
            raise StoreUnavailableError(
                f"claiming {self.task_id!r} took longer than the lease of {self.terms.ttl:g} s; it was given back"
            )
        self._running = RunningTask(self)
        held.body = body
        self._cancelling = body.cancelling()
        if self._timeout is not None:
            held.timeout_at = tracker.clock.monotonic() + self._timeout
        self._keeper.enter(held)
        return self._running

    async def _undo(self, future: asyncio.Future[Task | None]) -> None:
        """Gives back a claim whose claimant is being cancelled: now if it is answered soon, else when it is."""
        undo = self._release()
        await self._wait_for(future, CLAIM_TIME)
        if not future.done():
            self._keeper.adopt(future, self.task_id, self.terms.token, undo, self.terms.ttl)
            return
        if not future.cancelled() and future.exception() is None and not self._holds(future.result()):
            return
        # Where the event loop is being closed the claim was cancelled too, and may be on its way to the store still.
        deadline = asyncio.get_running_loop().time() + (CLAIM_TIME if future.cancelled() else 0.0)
        while True:
            release = self._submit(undo)
            await self._wait_for(release, RELEASE_TIME)
            if not release.done() or release.cancelled() or release.exception() is not None:
                release.cancel()
                break
            if outcome_of(release.result(), self.terms.token) is not None:
                return
            if asyncio.get_running_loop().time() > deadline:
                break
            await self._wait_for(asyncio.ensure_future(asyncio.sleep(0.02)), 1.0)
        if not future.cancelled():  # else nobody would be there to do it later
            self._give_back()

    def _give_back(self) -> None:
        self._keeper.give_back(self.task_id, self.terms.token, self._release(), self.terms.ttl)

    def _release(self) -> Release:
        """Gives the claim back as if it had never been made."""
        return Release(self.terms.token, NO_CHANGES, counted=False)

    def _holds(self, record: Task | None) -> bool:
        return record is not None and record.lease is not None and record.lease.token == self.terms.token

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

    # -- the end

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> bool:
        held, task, keeper = self.held, self._running, self._keeper
        assert task is not None
        if isinstance(exc, GeneratorExit):
            self._abandon(task)
            return False
        keeper.end(held)
        try:
            if exc is None and not held.interrupted and held.check() and self._is_inside():
                await self._end_succeeded(task)
            else:
                await self._end(task, exc)
        except BaseException as error:
            if not self._cancelled or isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            if error is not exc and not isinstance(error, asyncio.CancelledError):
                logger.warning("while %r was cancelled: %s: %s", self.task_id, type(error).__name__, error)
        finally:
            keeper.leave(held)
            self._running = None  # or the two would keep each other until the garbage collector comes
        if self._cancelled and not (isinstance(exc, asyncio.CancelledError) or _is_exit(exc)):
            raise asyncio.CancelledError
        return False

    def _is_inside(self) -> bool:
        return asyncio.current_task(self.tracker.loop) is self.held.body

    async def _end(self, task: RunningTask[D, R], exc: BaseException | None) -> None:
        held, body = self.held, self.held.body
        if body is None or not self._is_inside():
            self._abandon(task)
            raise RuntimeError(f"the run of {self.task_id!r} must end in the asyncio task that entered it") from exc
        is_cancel = isinstance(exc, asyncio.CancelledError)
        if held.interrupted:
            self._take_interrupt_back()
            if not is_cancel:
                try:
                    await asyncio.sleep(0)  # the body ended before our cancellation reached it, which comes now
                except asyncio.CancelledError:
                    self._note_cancel()
        # Ours is taken back: what is left came from outside. Of a cancellation without a canceller, somebody else's
        # task was the victim: an error like others.
        from_outside = is_cancel and body.cancelling() > (self._cancelling if held.interrupted else 0)
        must_go = from_outside or _is_exit(exc)
        if not held.check():
            self._end_lost(exc, must_go)
        elif must_go:
            await self._end_cancelled(task)
        elif held.timed_out:
            timeout = TimeoutError(f"{self.task_id!r} ran longer than its timeout of {self._timeout:g} s")
            timeout.__cause__ = None if is_cancel else exc
            await self._end_failed(task, timeout)
            raise timeout
        elif exc is None:
            await self._end_succeeded(task)
        else:
            await self._end_failed(task, exc)

    def _take_interrupt_back(self) -> None:
        held = self.held
        if held.interrupted and not self._uncancelled and held.body is not None:
            self._uncancelled = True
            held.body.uncancel()

    def _note_cancel(self) -> None:
        """After a `CancelledError` that is ours, or that is raised when the end is recorded."""
        self._take_interrupt_back()
        if self.held.body is not None and self.held.body.cancelling() > self._cancelling:
            self._cancelled = True

    def _abandon(self, task: RunningTask[D, R]) -> None:
        """Nothing can be awaited here: the keeper releases the task, or the lease runs out with the event loop."""
        self._keeper.leave(self.held)
        with contextlib.suppress(RuntimeError):  # there is no event loop any more
            asyncio.get_running_loop()
            self._keep_data(task)
            self._finish_later(Release(self.terms.token, self.changes, random.random()))

    def _finish_later(self, rule: Rule) -> None:
        self._keeper.give_back(self.task_id, self.terms.token, rule, max(0.5, self.held.left))

    def _end_lost(self, exc: BaseException | None, must_go: bool) -> None:
        held = self.held
        if held.unreachable:
            # Nobody could claim it meanwhile, if nobody could reach the store: that is not the task's fault.
            undo = Release(self.terms.token, NO_CHANGES, counted=False, outcome="lease_lost")
            self._keeper.give_back(self.task_id, self.terms.token, undo, self.terms.ttl)
        if must_go:
            logger.warning("the lease of %r was lost: %s", self.task_id, held.lost)
        elif not (isinstance(exc, LeaseLostError) and exc.task_id == self.task_id and exc.fence == self.record.fence):
            raise self._lost() from (None if isinstance(exc, asyncio.CancelledError) else exc)

    def _lost(self) -> LeaseLostError:
        return LeaseLostError(
            f"the lease of {self.task_id!r} is over ({self.held.lost}); nothing more of this run is recorded",
            self.task_id,
            self.record.fence,
        )

    async def _end_succeeded(self, task: RunningTask[D, R]) -> None:
        try:
            task._keep_data()
            result = task.result
            if result is not None:
                result = _plain(result, self.result_type, "result")
            await self._record(Succeed(self.terms.token, self.changes, result), "succeeded")
        except (InvalidValueError, RecordTooLargeError) as exc:
            await self._end_failed(task, exc)
            raise

    async def _end_failed(self, task: RunningTask[D, R], exc: BaseException) -> None:
        self._keep_data(task)
        token, retry = self.terms.token, self._retry
        if (seconds := postponed(exc)) is not None:
            try:
                await self._record(Postpone(token, self.changes, seconds), "postponed")
            except RecordTooLargeError:
                await self._record(Postpone(token, NO_CHANGES, seconds), "postponed")
            return
        cause = await self._described(exc)
        try:
            wait = retry.wait(self.record.attempts, random.random())
        except Exception:
            logger.exception("the retry's delay failed; %r is tried again after max_delay", self.task_id)
            wait = retry.max_delay
        rule = Fail(
            token,
            self.changes,
            cause,
            retry.max_attempts,
            retryable=retry.allows(exc) or isinstance(exc, asyncio.CancelledError),
            wait=wait,
            outcome="timeout" if self.held.timed_out else "error",
        )
        try:
            await self._record(rule, "failed", "exhausted")
        except RecordTooLargeError:
            await self._record(msgspec.structs.replace(rule, changes=NO_CHANGES), "failed", "exhausted")

    async def _end_cancelled(self, task: RunningTask[D, R]) -> None:
        """Releases the task. Whatever goes wrong is logged, and does not replace the cancellation."""
        self._keep_data(task)
        rule = Release(self.terms.token, self.changes, random.random())
        try:
            try:
                record = await self._insist(rule, self.record)
            except RecordTooLargeError:
                record = await self._insist(msgspec.structs.replace(rule, changes=NO_CHANGES))
        except Exception as exc:
            logger.warning("%r could not be released in time: %s: %s", self.task_id, type(exc).__name__, exc)
            return
        if record is not None and outcome_of(record, self.terms.token) == "released":
            self.held.record = record
        else:
            logger.warning("%r was not released: it had been taken away or taken over", self.task_id)

    def _keep_data(self, task: RunningTask[D, R]) -> None:
        try:
            task._keep_data()
        except (InvalidValueError, RecordTooLargeError) as exc:
            logger.warning("the data of %r cannot be stored, and is kept as it was: %s", self.task_id, exc)

    async def _record(self, rule: Rule, *outcomes: str) -> None:
        """Writes how the run ends. A cancellation that arrives meanwhile is raised after it is recorded."""
        held = self.held
        try:
            record = await self.tracker.update(self.task_id, rule, known=held.record)
        except asyncio.CancelledError:
            self._note_cancel()
            # Whether it landed is not known. Writing it again tells: a rule changes nothing that it has changed.
            record = await self._insist(rule)
        except (StoreError, OutcomeUnknownError) as exc:
            self._finish_later(rule)
            if isinstance(exc, StoreUnavailableError | OutcomeUnknownError):
                raise self._unknown(exc) from exc
            raise
        if record is not None and outcome_of(record, self.terms.token) in outcomes:
            held.record = record
            return
        if record is not None and len(record.ends) >= ENDS_KEPT and record.ends[0].fence > held.record.fence:
            raise self._unknown("so many claims have ended since that the record does not remember this one")
        held.lost = "taken away or taken over"
        raise self._lost()

    async def _insist(self, rule: Rule, known: Task | None = None) -> Task | None:
        """Writes, whatever cancels, within a bound; then it goes on being tried without us.

        Raises:
            OutcomeUnknownError: The store did not answer in time.
        """
        answer = self._submit(rule, known)
        # After the lease others may claim, and waiting gains nothing.
        seconds = min(RELEASE_TIME, max(0.1, self.held.left))
        await self._wait_for(answer, seconds)
        if not answer.done() or answer.cancelled():
            answer.cancel()
            self._finish_later(rule)
            raise self._unknown(f"the store did not answer within {seconds:g} s")
        try:
            return answer.result()
        except (StoreUnavailableError, OutcomeUnknownError) as exc:
            self._finish_later(rule)
            raise self._unknown(exc) from exc

    def _unknown(self, why: object) -> OutcomeUnknownError:
        return OutcomeUnknownError(
            f"whether the end of {self.task_id!r} was recorded is not known: {why}", self.task_id
        )

    def _submit(self, rule: Rule, known: Task | None = None) -> asyncio.Future[Task | None]:
        try:
            return asyncio.ensure_future(self.tracker.update(self.task_id, rule, known=known or UNKNOWN))
        except Exception as exc:
            answer: asyncio.Future[Task | None] = asyncio.get_running_loop().create_future()
            answer.set_exception(exc)
            return answer

    async def _wait_for(self, future: asyncio.Future[Any], seconds: float) -> None:
        """Waits whatever cancels, for some seconds at the most."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        # Both are needed: a scope keeps anyio from cancelling again and again, the loop outlives asyncio's cancels.
        with anyio.CancelScope(shield=True):
            while not future.done() and (left := deadline - loop.time()) > 0:
                try:
                    await asyncio.wait({future}, timeout=left)
                except asyncio.CancelledError:
                    if self._running is not None:
                        self._note_cancel()

    # -- what the body writes

    def change(self, **fields: Any) -> None:
        """Sets fields of the record, in what is written next."""
        self.changes.fields = self.changes.fields | fields

    def change_step(self, step: Step) -> None:
        """Sets a step, in what is written next."""
        self.changes.steps = self.changes.steps | {step.name: step}

    def check(self) -> None:
        """Raises `LeaseLostError` where the lease is over by our own clocks."""
        if not self.held.check():
            raise self._lost()

    def check_size(self, fields: dict[str, Any], steps: dict[str, Step]) -> None:
        """Raises `RecordTooLargeError` where the record with these changes would not leave room for the run's end."""
        record = self.record
        # What `RESERVE` is for does not count.
        new = record.replace(
            **Changes(fields, steps).onto(record) | {"errors": (), "ends": (), "lease": None, "note": None}
        )
        check_room(self.task_id, len(new.encode()), self.tracker.max_record_bytes)

    async def save(self) -> None:
        """Writes the run's changes under its lease, and renews that."""
        self.check()
        held, terms = self.held, self.terms
        asked = self.tracker.clock.moment()
        held.ask(asked)
        record = await self.tracker.update(self.task_id, Renew(terms, self.changes), known=held.record)
        if record is None or not self._holds(record):
            held.lost = "taken away or taken over"
            raise self._lost()
        held.record = record
        if held.terms is terms:
            held.grant(asked)
        else:
            self._keeper.renew_soon(held)  # the store may have the old length now

    async def renew(self, seconds: float | None) -> None:
        """Renews the lease, for another length from now on."""
        self.check()
        held, is_under_way = self.held, self.held.renewing is not None
        if seconds is not None:
            self.terms = held.terms = msgspec.structs.replace(self.terms, ttl=check_seconds("renew", seconds))
        await self.save()
        if seconds is not None and is_under_way:
            self._keeper.renew_soon(held)  # the other one may have landed later, with the old length

    # -- errors

    async def describe(self, exc: BaseException) -> Cause:
        """The error as it is kept. Formatting reads source files, which must not block the event loop."""
        if isinstance(exc, asyncio.CancelledError):
            return _brief(exc)
        try:
            future = asyncio.get_running_loop().run_in_executor(None, _describe, exc)
        except RuntimeError:  # the event loop is being closed
            return _brief(exc)
        await asyncio.wait({future}, timeout=DESCRIBE_TIME)
        if future.done() and not future.cancelled() and future.exception() is None:
            return future.result()
        future.cancel()  # all threads are busy with something that takes long
        return _brief(exc)

    async def _described(self, exc: BaseException) -> Cause:
        future = asyncio.ensure_future(self.describe(exc))
        await self._wait_for(future, 2 * DESCRIBE_TIME)
        if future.done() and not future.cancelled() and future.exception() is None:
            return future.result()
        future.cancel()
        return _brief(exc)


def check_room(task_id: str, size: int, limit: int) -> None:
    """Raises `RecordTooLargeError` where a record leaves no room for how a run ends."""
    limit -= RESERVE
    if size > limit:
        raise RecordTooLargeError(
            f"the record of {task_id!r} would take {size:,} bytes, and {limit:,} are the most: "
            "keep large values elsewhere, and their path here",
            task_id,
            size,
            limit,
        )


def _is_exit(exc: BaseException | None) -> bool:
    """Whether the program is to end, as Ctrl-C in a body says."""
    return exc is not None and any(isinstance(cause, KeyboardInterrupt | SystemExit) for cause in leaves(exc))


def _describe(exc: BaseException) -> Cause:
    text = "".join(traceback.format_exception(exc))
    if len(text) > MAX_TRACEBACK:
        text = (
            f"{text[:1000]}\n... {len(text) - MAX_TRACEBACK:,} characters left out ...\n{text[1000 - MAX_TRACEBACK :]}"
        )
    return Cause(type(exc).__name__, _message(exc), _storable(text))


def _brief(exc: BaseException) -> Cause:
    # Without lines of source code, which would have to be read.
    frames = (
        f"in {frame.f_code.co_name}, {frame.f_code.co_filename}:{n}"
        for frame, n in traceback.walk_tb(exc.__traceback__)
    )
    text = "" if isinstance(exc, asyncio.CancelledError) else _storable("\n".join(frames)[-MAX_TRACEBACK:])
    return Cause(type(exc).__name__, _message(exc) or "cancelled", text)


def _message(exc: BaseException) -> str:
    try:
        text = str(exc)
    except Exception as error:
        text = f"<{type(exc).__name__} without a text: {type(error).__name__}>"
    return _storable(text[:MAX_MESSAGE])


def _storable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _plain(value: Any, kind: Any, path: str) -> Any:
    try:
        return plain(value, kind, path)
    except ValueError as exc:
        raise InvalidValueError(str(exc)) from exc


def _fitting(stored: Any, kind: Any, path: str) -> Any:
    try:
        return typed(copied(stored), kind, path)
    except ValueError as exc:
        raise InvalidValueError(str(exc)) from exc


def check_async(fn: object, user: str) -> None:
    """Refuses what is not an async function, before anything is called.

    Raises:
        TypeError: With what to write instead.
    """
    inner = fn
    while isinstance(inner, functools.partial):
        inner = inner.func
    if not callable(inner):
        raise TypeError(f"{user} takes an async function, not {fn!r}")
    if inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(type(inner).__call__):
        return
    name = getattr(inner, "__name__", repr(inner))
    example = (
        f'task.step("{name}", asyncio.to_thread, {name}, ...)'
        if user == "step"
        else (f"an async def that awaits asyncio.to_thread({name}, ...)")
    )
    raise TypeError(f"{user} takes an async function, and {name} is a plain one; use {example}")


def return_type(fn: Callable[..., Any], *args: object) -> Any:
    """What an async function says that it returns; `Any` where it says nothing that can be used.

    Args:
        fn: The function. Of `asyncio.to_thread`, the function that it calls counts.
        *args: What `fn` is called with.
    """
    while isinstance(fn, functools.partial):
        args = (*fn.args, *args)
        fn = fn.func
    if fn is asyncio.to_thread and args and callable(args[0]):
        return return_type(args[0], *args[1:])
    if not (inspect.isfunction(fn) or inspect.ismethod(fn)):
        fn = type(fn).__call__
    try:
        fn = inspect.unwrap(fn)
        kind = fn.__annotations__["return"]
        if isinstance(kind, str):
            # The return alone: names of other parameters may exist for the type checker only.
            kind = get_type_hints(_Returns(kind, getattr(fn, "__globals__", {})))["return"]
    except Exception:
        return Any
    return Any if isinstance(kind, TypeVar | StandardTypeVar) or kind in (None, type(None)) else kind


class _Returns:
    def __init__(self, kind: str, names: dict[str, Any]) -> None:
        self.__annotations__ = {"return": kind}
        self.__globals__ = names


def check_seconds(name: str, value: float) -> float:
    """A length of time that was given by a user.

    Raises:
        InvalidValueError: It is not a positive, finite number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= timedelta.max.total_seconds():
        raise InvalidValueError(f"{name} takes a positive number of seconds, not {value!r}")
    return float(value)
