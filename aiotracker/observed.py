"""Runs, steps and leases that tell hooks what happens. Imported where there are hooks; else the plain ones are used."""

from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Final, TypedDict, cast

from typing_extensions import ParamSpec, TypeVar

from ._core.codec import find_problem
from ._core.retry import Retry
from ._core.task import Status, Step, Task
from ._core.transitions import Claim, outcome_of
from .clock import Clock
from .errors import InvalidValueError, LeaseLostError, OutcomeUnknownError, StoreUnavailableError, TaskUnavailableError
from .events import (
    Claimed,
    Ended,
    Exhausted,
    Failed,
    LeaseLost,
    LoopLagged,
    Observer,
    OutcomeUnknown,
    Postponed,
    Refused,
    Released,
    Renewed,
    StepFailed,
    StepReused,
    StepStarted,
    StepSucceeded,
    Succeeded,
)
from .leases import Answer, Held, Keeper, Update
from .running import Run, RunningTask

__all__ = ["ObservedKeeper", "ObservedRun", "ObservedTask"]

D = TypeVar("D", default=Any)
R = TypeVar("R", default=Any)
T = TypeVar("T")
P = ParamSpec("P")

MAX_TRACE: Final = 500  # characters
ENDS: Final[dict[str | None, type[Ended]]] = {
    kind.outcome: kind for kind in (Succeeded, Failed, Exhausted, Released, Postponed, LeaseLost)
}


class ClaimFields(TypedDict):
    """The fields of events of one claim."""

    task_id: str
    token: str
    fence: int
    attempt: int
    task: Task


def _fields(record: Task, token: str) -> ClaimFields:
    return {
        "task_id": record.id,
        "token": token,
        "fence": record.fence,
        "attempt": record.attempts,
        "task": record,
    }


class ObservedTask(RunningTask[D, R]):
    """Tells of its steps."""

    __slots__ = ()

    async def step(self, name: str, fn: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
        run = cast("ObservedRun[D, R]", self._run)
        # A name that is used twice is refused, and the first use goes on.
        is_new = isinstance(name, str) and name not in (self._steps or ())
        try:
            value = await super().step(name, fn, *args, **kwargs)
        except BaseException as exc:
            if is_new:
                run.step_failed(name, exc)
            raise
        run.step_succeeded(name)
        return value


class ObservedRun(Run[D, R]):
    """Tells of its claim, steps and end."""

    __slots__ = ("_began", "_observer", "_step_began")

    task_type = ObservedTask

    def __init__(self, tracker: Any, claim: Claim, retry: Retry, timeout: float | None, known: Task | None) -> None:
        super().__init__(tracker, claim, retry, timeout, known)
        self._observer: Observer = tracker.observer
        self._began = 0.0
        self._step_began: dict[str, float] = {}

    async def __aenter__(self) -> RunningTask[D, R]:
        observer, clock = self._observer, self.tracker.clock
        asked = clock.monotonic()
        try:
            task = await super().__aenter__()
        except (TaskUnavailableError, LeaseLostError) as exc:
            seconds = clock.monotonic() - asked
            observer.tell(Refused(**observer.origin(), task_id=self.task_id, error=exc, seconds=seconds))
            raise
        except (StoreUnavailableError, OutcomeUnknownError) as exc:
            observer.unreachable("claim", exc, self.task_id)
            raise
        self._began = clock.monotonic()
        observer.tell(
            Claimed(
                **observer.origin(),
                **_fields(self.record, self.terms.token),
                seconds=self._began - asked,
                set_trace=self._set_trace,
            )
        )
        return task

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> bool:
        seconds, raised = self.tracker.clock.monotonic() - self._began, exc
        try:
            return await super().__aexit__(exc_type, exc, tb)
        except BaseException as error:
            if exc is None or isinstance(error, Exception):
                raised = error
            raise
        finally:
            self._tell_end(seconds, raised)

    def _set_trace(self, text: str) -> None:
        # What could not be stored would keep the run's end from being recorded.
        if type(text) is not str or len(text) > MAX_TRACE or find_problem(text, "trace"):
            raise InvalidValueError(f"set_trace takes a str of at most {MAX_TRACE} characters, not {text!r}")
        self.change(trace=text)

    def _tell_end(self, seconds: float, error: BaseException | None) -> None:
        record, token = self.record, self.terms.token
        kind = ENDS.get(outcome_of(record, token)) or (OutcomeUnknown if self.held.lost is None else LeaseLost)
        if kind is Succeeded:
            error = None  # a cancellation that came while it was recorded
        self._observer.tell(kind(**self._observer.origin(), **_fields(record, token), seconds=seconds, error=error))

    async def renew(self, seconds: float | None) -> None:
        asked = self.tracker.clock.monotonic()
        await super().renew(seconds)
        took = self.tracker.clock.monotonic() - asked
        observer = self._observer
        observer.tell(Renewed(**observer.origin(), **_fields(self.record, self.terms.token), seconds=took))

    # -- steps

    def change_step(self, step: Step) -> None:
        super().change_step(step)
        if step.status is Status.IN_PROGRESS:
            self._step_began[step.name] = self.tracker.clock.monotonic()
            observer = self._observer
            observer.tell(StepStarted(**observer.origin(), **_fields(self.record, self.terms.token), step=step))

    def step_succeeded(self, name: str) -> None:
        """The step's result is recorded, or was when the run began."""
        began = self._step_began.pop(name, None)
        origin, fields, step = self._observer.origin(), _fields(self.record, self.terms.token), self._step(name)
        if began is None:
            self._observer.tell(StepReused(**origin, **fields, step=step))
        else:
            seconds = self.tracker.clock.monotonic() - began
            self._observer.tell(StepSucceeded(**origin, **fields, step=step, seconds=seconds))

    def step_failed(self, name: str, error: BaseException) -> None:
        """The step raised this, or was refused before it began, which is nothing to tell."""
        began = self._step_began.pop(name, None)
        if began is None:
            return
        observer, seconds = self._observer, self.tracker.clock.monotonic() - began
        fields = _fields(self.record, self.terms.token)
        step = self._step(name)
        observer.tell(StepFailed(**observer.origin(), **fields, step=step, seconds=seconds, error=error))

    def _step(self, name: str) -> Step:
        changed = self.changes.steps.get(name)
        return next(step for step in self.record.steps if step.name == name) if changed is None else changed


class ObservedKeeper(Keeper):
    """Tells of renewals, and of the event loop's lag."""

    def __init__(self, clock: Clock, update: Update, observer: Observer) -> None:
        super().__init__(clock, update)
        self._observer = observer

    def _renew(self, held: Held) -> None:
        asked, token, observer = self._clock.monotonic(), held.terms.token, self._observer
        super()._renew(held)

        def answered(future: Answer) -> None:
            if future.cancelled() or held.ending or token not in self._held:
                return
            exc = future.exception()
            if isinstance(exc, Exception):
                observer.unreachable("renew", exc, held.task_id)
            elif held.lost is None:
                seconds = self._clock.monotonic() - asked
                observer.tell(Renewed(**observer.origin(), **_fields(held.record, token), seconds=seconds))

        if held.renewing is not None:
            held.renewing.add_done_callback(answered)  # after what the keeper itself makes of the answer

    def _measure(self, planned: float) -> None:
        lag = max(0.0, self._clock.monotonic() - planned)
        super()._measure(planned)
        self._observer.tell(LoopLagged(**self._observer.origin(), seconds=lag))
