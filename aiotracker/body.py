"""A claimed task, as its body sees it."""

import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final, Generic

import msgspec
from typing_extensions import ParamSpec, TypeVar

from ._core.codec import find_problem
from ._core.task import Failure, Status, Step, Task
from ._describe import describe_briefly
from ._values import check_async, fitting_value, plain_value, return_type
from .errors import InvalidValueError, TrackerError

if TYPE_CHECKING:
    from .running import Run

__all__ = ["RunningTask"]

logger = logging.getLogger("aiotracker")

D = TypeVar("D", default=Any)
R = TypeVar("R", default=Any)
T = TypeVar("T")
P = ParamSpec("P")

MAX_NOTE: Final = 2_000  # characters


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
            self._data = fitting_value(self.record.data, self._run.tracker.data_type, "data")
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
            return fitting_value(before.result, kind, path)  # type: ignore[no-any-return]  # as fn's annotation
        run.check()
        step = Step(name, Status.IN_PROGRESS, before.attempts + 1 if before else 1, run.tracker.now())
        run.change_step(step)
        try:
            value = await fn(*args, **kwargs)
            done = msgspec.structs.replace(
                step, status=Status.SUCCEEDED, finish_time=run.tracker.now(), result=plain_value(value, kind, path)
            )
            run.check_size(run.changes.fields, run.changes.steps | {name: done})
        except BaseException as exc:
            await self._step_failed(step, exc)
            raise
        run.change_step(done)
        self._keep_data()
        await run.save()
        return fitting_value(done.result, kind, path)  # type: ignore[no-any-return]  # as fn's annotation

    async def _step_failed(self, step: Step, exc: BaseException) -> None:
        run = self._run
        # A cancellation must not wait, and is recorded with the release.
        cause = await run.describe(exc) if isinstance(exc, Exception) else describe_briefly(exc, self.id)
        now = run.tracker.now()
        failure = Failure(
            self.attempts, now, run.tracker.worker, cause.type, cause.message, cause.traceback, cause.fingerprint
        )
        run.change_step(msgspec.structs.replace(step, status=Status.FAILED, finish_time=now, error=failure))
        if isinstance(exc, Exception):
            try:
                await run.save()
            except TrackerError as error:
                extra = run.where("step_not_recorded", error) | {"step": step.name}
                logger.warning(
                    "the failed step %r of %r could not be recorded: %s", step.name, self.id, error, extra=extra
                )

    def _keep_data(self) -> None:
        """Takes the body's data into what is written next.

        Raises:
            InvalidValueError: JSON cannot hold it.
            RecordTooLargeError: The record would not fit.
        """
        if self._data_seen:
            run = self._run
            fields = run.changes.fields | {"data": plain_value(self._data, run.tracker.data_type, "data")}
            run.check_size(fields, run.changes.steps)
            run.changes.fields = fields
