"""One run of one task: the claim, and how it ends."""

import asyncio
import contextlib
import logging
import random
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Final, Generic

import anyio
import msgspec
from typing_extensions import TypeVar

from ._core.retry import Retry, leaves, postponed
from ._core.task import Status, Step, Task
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
from ._describe import describe, describe_briefly
from ._values import check_room, check_seconds, plain_value
from .body import RunningTask
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

__all__ = ["Run", "RunningTask"]

logger = logging.getLogger("aiotracker")

D = TypeVar("D", default=Any)
R = TypeVar("R", default=Any)

CLAIM_TIME: Final = 1.0  # seconds at the most that a cancellation waits for the answer to a claim
DESCRIBE_TIME: Final = 2.0  # seconds at the most that an error waits for a thread that formats it
RELEASE_TIME: Final = 5.0  # seconds at the most that a cancellation waits for its release to be written


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

    task_type: ClassVar[type[RunningTask[Any, Any]]] = RunningTask  # what the body gets
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
        # On another thread, that is whatever runs on the tracker's event loop just now.
        if body is None or _is_elsewhere(tracker.loop):
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
            if isinstance(answer, asyncio.Future) and tracker.loop is not None and not tracker.loop.is_closed():
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
        self._running = self.task_type(self)
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
                extra = self.where("cancelled_with_error", error)
                logger.warning("while %r was cancelled: %s: %s", self.task_id, type(error).__name__, error, extra=extra)
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
            logger.warning("the lease of %r was lost: %s", self.task_id, held.lost, extra=self.where("lease_lost"))
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
                result = plain_value(result, self.result_type, "result")
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
        except Exception as error:
            extra = self.where("retry_delay_failed", error)
            logger.exception("the retry's delay failed; %r is tried again after max_delay", self.task_id, extra=extra)
            wait = retry.max_delay
        rule = Fail(
            token,
            self.changes,
            cause,
            retry.max_attempts,
            retryable=retry.allows(exc) or isinstance(exc, asyncio.CancelledError),
            wait=wait,
            outcome="timeout" if isinstance(exc, TimeoutError) else "error",
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
            extra = self.where("not_released", exc)
            logger.warning(
                "%r could not be released in time: %s: %s", self.task_id, type(exc).__name__, exc, extra=extra
            )
            return
        if record is not None and outcome_of(record, self.terms.token) == "released":
            self.held.record = record
        else:
            self.held.lost = "taken away or taken over"
            extra = self.where("not_released")
            logger.warning("%r was not released: it had been taken away or taken over", self.task_id, extra=extra)

    def _keep_data(self, task: RunningTask[D, R]) -> None:
        try:
            task._keep_data()
        except (InvalidValueError, RecordTooLargeError) as exc:
            extra = self.where("data_not_kept", exc)
            logger.warning("the data of %r cannot be stored, and is kept as it was: %s", self.task_id, exc, extra=extra)

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

    def where(self, event: str, error: BaseException | None = None) -> dict[str, Any]:
        """What a log record of this run has besides its message."""
        extra: dict[str, Any] = {
            "event": event,
            "store": self.tracker.kind,
            "worker": self.terms.worker,
            "task_id": self.task_id,
        }
        if hasattr(self, "held"):  # it was claimed
            extra |= {"attempt": self.record.attempts, "fence": self.record.fence}
        return extra if error is None else extra | {"error_type": type(error).__name__}

    # -- what the body writes

    def change(self, **fields: Any) -> None:
        """Sets fields of the record, in what is written next."""
        self.changes.fields = self.changes.fields | fields

    def change_step(self, step: Step) -> None:
        """Sets a step, in what is written next."""
        self.changes.steps = self.changes.steps | {step.name: step}

    def check(self) -> None:
        """Raises `LeaseLostError` where the run has ended, or the lease is over by our own clocks."""
        if self.held.ending and self.held.lost is None:
            message = f"the run of {self.task_id!r} has ended; nothing more of it is recorded"
            raise LeaseLostError(message, self.task_id, self.record.fence)
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
            return describe_briefly(exc, self.task_id)
        try:
            future = asyncio.get_running_loop().run_in_executor(None, describe, exc, self.task_id)
        except RuntimeError:  # the event loop is being closed
            return describe_briefly(exc, self.task_id)
        await asyncio.wait({future}, timeout=DESCRIBE_TIME)
        if future.done() and not future.cancelled() and future.exception() is None:
            return future.result()
        future.cancel()  # all threads are busy with something that takes long
        return describe_briefly(exc, self.task_id)

    async def _described(self, exc: BaseException) -> Cause:
        future = asyncio.ensure_future(self.describe(exc))
        await self._wait_for(future, 2 * DESCRIBE_TIME)
        if future.done() and not future.cancelled() and future.exception() is None:
            return future.result()
        future.cancel()
        return describe_briefly(exc, self.task_id)


def _is_elsewhere(loop: asyncio.AbstractEventLoop | None) -> bool:
    """Whether another event loop runs here; none does in a forked child, which the store refuses."""
    try:
        return asyncio.get_running_loop() is not loop
    except RuntimeError:
        return False


def _is_exit(exc: BaseException | None) -> bool:
    """Whether the program is to end, as Ctrl-C in a body says."""
    return exc is not None and any(isinstance(cause, KeyboardInterrupt | SystemExit) for cause in leaves(exc))
