"""What happens in a tracker, as values, and the hooks that are told.

* Event
  + TaskEvent                   of one task
    - Refused                   a claim was refused
    - Conflicted                another writer was faster; the change is made again
    + RunEvent                  of one claim
      - Claimed                 the body begins
      - StepStarted
      - StepReused              an earlier attempt had finished the step; its result was given
      - StepSucceeded
      - StepFailed
      - Renewed                 the lease lasts a full term again
      + Ended                   one of these for each `Claimed`
        - Succeeded
        - Failed                with attempts left
        - Exhausted             failed for good
        - Released              cancelled; pending again
        - Postponed             as the body asked
        - LeaseLost             nothing more of this run is recorded
        - OutcomeUnknown        the end could not be recorded in time
  + Committed                   writes reached the store together
  + StoreUnreachable            the store gave no answer
  + LoopLagged                  how late the event loop was

A hook is any plain function of one event. It is called on the event loop's thread, synchronously, in the order of
happening; events of a claim and its steps in the asyncio task that runs the body, so that a context variable that is
set at `Claimed` is seen by the body. What a hook raises is logged, and changes nothing. What a hook takes of time, it
takes from the event loop: hand slow work to a queue or a thread.
"""

import asyncio
import contextlib
import inspect
import logging
import time
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any, ClassVar, Final, Literal, TypedDict

import msgspec
from typing_extensions import TypeVar

from ._core.task import Failure, Step, Task
from .errors import InvalidValueError, TrackerError

__all__ = [
    "Claimed",
    "Committed",
    "Conflicted",
    "Ended",
    "Event",
    "Exhausted",
    "Failed",
    "Hook",
    "LeaseLost",
    "LoopLagged",
    "Observer",
    "OutcomeUnknown",
    "Postponed",
    "Refused",
    "Released",
    "Renewed",
    "RunEvent",
    "StepFailed",
    "StepReused",
    "StepStarted",
    "StepSucceeded",
    "StoreUnreachable",
    "Succeeded",
    "TaskEvent",
    "check_hooks",
    "log_events",
]

logger = logging.getLogger("aiotracker")

T = TypeVar("T")
StoreOperation = Literal["claim", "renew", "read", "write", "look"]  # look: for work


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Something that has happened."""

    time: datetime  # by the store's time as best known, aware, in UTC
    store: str  # the kind of store: memory, file, s3, ...; of a backend of your own its class's name, without Tracker
    worker: str  # the name of the tracker that it happened in


class TaskEvent(Event, frozen=True, kw_only=True):
    """Something that has happened to one task."""

    task_id: str


class Refused(TaskEvent, frozen=True, kw_only=True):
    """A claim was refused."""

    error: TrackerError  # what is raised: a TaskUnavailableError with the record, rarely LeaseLostError
    seconds: float  # from asking to the answer

    @property
    def reason(self) -> str:
        """In a word: `locked`, `not_due`, `succeeded`, `exhausted`, `ignored` or `lease_lost`."""
        return _REASONS.get(type(self.error).__name__, "other")


class Conflicted(TaskEvent, frozen=True, kw_only=True):
    """A guarded write found another record than it was made for: somebody else was faster. It changed nothing, and is
    made again on what is there.
    """


class RunEvent(TaskEvent, frozen=True, kw_only=True):
    """Something that has happened to one claim."""

    token: str  # names the claim; the same in all its events
    fence: int  # of the claim
    attempt: int  # which one this is, from 1
    task: Task  # the record as last read or written by the run

    def __repr__(self) -> str:
        shown = (name for name in self.__struct_fields__ if name not in ("task", "set_trace"))
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"


class Claimed(RunEvent, frozen=True, kw_only=True):
    """The task was claimed, and its body begins."""

    seconds: float  # from asking to the answer
    set_trace: Callable[[str], None]  # keeps a short text, such as a W3C traceparent, in the record's `trace`: later
    # attempts find it in `task.trace` of their `Claimed`. It rides on the run's next write. At most 500 characters;
    # what cannot be stored raises InvalidValueError.


class Renewed(RunEvent, frozen=True, kw_only=True):
    """The lease lasts a full term from when it was asked for. Writes of the body renew it too, without this event."""

    seconds: float  # from asking to the answer


class StepStarted(RunEvent, frozen=True, kw_only=True):
    """A step's function is about to be called."""

    step: Step


class StepReused(RunEvent, frozen=True, kw_only=True):
    """An earlier attempt had finished the step: its result was given, and nothing was called."""

    step: Step


class StepSucceeded(RunEvent, frozen=True, kw_only=True):
    """A step's result is recorded."""

    step: Step
    seconds: float  # the recording included


class StepFailed(RunEvent, frozen=True, kw_only=True):
    """A step raised, was cancelled, or could not be recorded."""

    step: Step
    seconds: float  # from its start
    error: BaseException  # what `task.step` raises

    @property
    def is_cancelled(self) -> bool:
        """Whether it was no failure."""
        return isinstance(self.error, asyncio.CancelledError)


class Ended(RunEvent, frozen=True, kw_only=True):
    """A run has ended. There is one event of this kind for each `Claimed`."""

    outcome: ClassVar[str] = "ended"  # in a word, as in the record's `ends`

    seconds: float  # that the body took
    error: BaseException | None  # what ended it; None: it was left normally


class Succeeded(Ended, frozen=True, kw_only=True):
    """Recorded: the task has succeeded."""

    outcome: ClassVar[str] = "succeeded"


class _Failing(Ended, frozen=True, kw_only=True):
    @property
    def failure(self) -> Failure | None:
        """The error as it was recorded, with its traceback as text."""
        return self.task.errors[-1] if self.task.errors else None


class Failed(_Failing, frozen=True, kw_only=True):
    """Recorded: the attempt has failed, and there will be another."""

    outcome: ClassVar[str] = "failed"


class Exhausted(_Failing, frozen=True, kw_only=True):
    """Recorded: the attempt has failed, and there will be none after it."""

    outcome: ClassVar[str] = "exhausted"


class Released(Ended, frozen=True, kw_only=True):
    """Recorded: the body was cancelled; the task is pending again."""

    outcome: ClassVar[str] = "released"


class Postponed(Ended, frozen=True, kw_only=True):
    """Recorded: the body asked for another time."""

    outcome: ClassVar[str] = "postponed"


class LeaseLost(Ended, frozen=True, kw_only=True):
    """The lease was lost; nothing more of this run is recorded."""

    outcome: ClassVar[str] = "lease_lost"


class OutcomeUnknown(Ended, frozen=True, kw_only=True):
    """How the run ended could not be recorded while somebody waited for it: the store gave no answer, or the body was
    dropped. It goes on being tried until the lease is over, and then the attempt counts as `lease_lost`.
    """

    outcome: ClassVar[str] = "unknown"


class Committed(Event, frozen=True, kw_only=True):
    """Writes are stored, all of them together. Stores in memory have no such moment."""

    operations: int  # that shared it
    bytes: int  # of what was written, as encoded
    seconds: float  # that it took


class StoreUnreachable(Event, frozen=True, kw_only=True):
    """The store gave no answer in time. What it was asked for is tried again, or raises what is here."""

    operation: StoreOperation  # what it was asked for
    task_id: str | None  # which task it was about, if one
    error: Exception  # a StoreUnavailableError or OutcomeUnknownError


class LoopLagged(Event, frozen=True, kw_only=True):
    """How late the event loop came to what was planned. Told a dozen times in a lease while tasks run, late or not."""

    seconds: float  # 0: it was on time


Hook = Callable[[Event], None]
"""A plain function, or any object with such a `__call__`, that is told what happens."""

_REASONS: Final = {
    "TaskLockedError": "locked",
    "TaskNotDueError": "not_due",
    "TaskSucceededError": "succeeded",
    "TaskExhaustedError": "exhausted",
    "TaskIgnoredError": "ignored",
    "LeaseLostError": "lease_lost",
}


def check_hooks(hooks: Iterable[Hook]) -> tuple[Hook, ...]:
    """The hooks that a user gave.

    Raises:
        InvalidValueError: One of them cannot be called with an event, or is async.
    """
    try:
        checked = tuple(hooks)
    except TypeError:
        raise InvalidValueError(f"hooks takes a list of functions, e.g. hooks=[log_events], not {hooks!r}") from None
    for hook in checked:
        if not callable(hook) or isinstance(hook, type):
            raise InvalidValueError(f"a hook is a function of one event, not {hook!r}")
        if inspect.iscoroutinefunction(hook) or inspect.iscoroutinefunction(type(hook).__call__):
            raise InvalidValueError(f"a hook is a plain function, and {hook!r} is async: let it put events in a queue")
    return checked


class Origin(TypedDict):
    """The fields that all events have."""

    time: datetime
    store: str
    worker: str


class Observer:
    """Tells one tracker's hooks. There is none where there are no hooks."""

    def __init__(self, hooks: tuple[Hook, ...], store: str, worker: str, now: Callable[[], datetime]) -> None:
        self._hooks = hooks
        self._store = store
        self._worker = worker
        self._now = now

    def origin(self) -> Origin:
        """Where and when, for an event of this moment."""
        return {"time": self._now(), "store": self._store, "worker": self._worker}

    def tell(self, event: Event) -> None:
        """Calls all hooks; on the event loop's thread."""
        for hook in self._hooks:
            try:
                hook(event)
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as exc:  # a CancelledError too: nobody cancelled the body
                logger.error(
                    "the hook %r failed on %s",
                    hook,
                    type(event).__name__,
                    exc_info=exc,
                    extra={"event": "hook_failed", "error_type": type(exc).__name__} | self._where(),
                )

    def conflicted(self, task_id: str) -> None:
        """A guarded write of this task lost a race."""
        self.tell(Conflicted(**self.origin(), task_id=task_id))

    def unreachable(self, operation: StoreOperation, error: Exception, task_id: str | None = None) -> None:
        """The store gave no answer."""
        self.tell(StoreUnreachable(**self.origin(), operation=operation, task_id=task_id, error=error))

    def committed(self, operations: int, size: int, seconds: float) -> None:
        """Some writes are stored together; `size` in bytes."""
        self.tell(Committed(**self.origin(), operations=operations, bytes=size, seconds=seconds))

    def commits(self, commit: Callable[[list[T]], int], written: Callable[[], int]) -> Callable[[list[T]], int]:
        """The same commit, telling of itself. To be called on the event loop; what it gives, on any thread.

        Args:
            commit: Stores some operations, and says how many it took.
            written: How many bytes all commits so far have stored.
        """
        loop = asyncio.get_running_loop()

        def observed(operations: list[T]) -> int:
            began, before = time.perf_counter(), written()
            taken = commit(operations)
            if size := written() - before:
                with contextlib.suppress(RuntimeError):  # the loop is closed
                    # Before the answers are delivered, which go the same way.
                    loop.call_soon_threadsafe(self.committed, taken, size, time.perf_counter() - began)
            return taken

        return observed

    def _where(self) -> dict[str, Any]:
        return {"store": self._store, "worker": self._worker}


_LEVELS: Final[dict[type[Event], int]] = {
    Succeeded: logging.INFO,
    Postponed: logging.INFO,
    Released: logging.INFO,
    Failed: logging.WARNING,
    StepFailed: logging.WARNING,
    StoreUnreachable: logging.WARNING,
    OutcomeUnknown: logging.WARNING,
    LeaseLost: logging.WARNING,
    Exhausted: logging.ERROR,
}
_IN_RECORDS: Final = ("task_id", "fence", "attempt", "outcome", "reason", "seconds", "operations", "bytes", "operation")


def log_events(event: Event) -> None:
    """A hook that logs each event under `aiotracker.events`, its fields as attributes of the log record.

    Outcomes are INFO, failures WARNING, exhausted tasks ERROR, all the rest DEBUG. To be given to a tracker:
    `hooks=[log_events]`.
    """
    log = logging.getLogger("aiotracker.events")
    level = _LEVELS.get(type(event), logging.DEBUG)
    if not log.isEnabledFor(level):
        return
    name = _snake(type(event).__name__)
    extra: dict[str, Any] = {"event": name, "store": event.store, "worker": event.worker}
    extra |= {field: value for field in _IN_RECORDS if (value := getattr(event, field, None)) is not None}
    if (step := getattr(event, "step", None)) is not None:
        extra["step"] = step.name
    words = [name.replace("_", " ")]
    if isinstance(event, TaskEvent):
        words.append(repr(event.task_id))
    if step is not None:
        words.append(f"step {step.name!r}")
    if (error := getattr(event, "error", None)) is not None:
        extra["error_type"] = type(error).__name__
        words.append(f"({type(error).__name__}: {error})")
    log.log(level, "%s", " ".join(words), extra=extra)


def _snake(name: str) -> str:
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).lstrip("_")
