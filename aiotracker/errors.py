"""Every error that aiotracker raises.

* TrackerError
  + TaskUnavailableError        the task may not be run (now)
    - TaskLockedError           somebody holds it
    - TaskNotDueError           its `not_before` lies ahead
    - TaskSucceededError        done before
    - TaskExhaustedError        failed too often, or gave up
    - TaskIgnoredError          set aside by somebody
  + LeaseLostError              the run's claim is over; nothing more of it is recorded
  + OutcomeUnknownError         the store did not tell whether a write landed
  + StoreError                  the store cannot be used as it is
    - StoreUnavailableError     no answer; the write may have landed
    - StoreCorruptedError       what is stored is damaged
    - StoreUnsafeError          the store cannot keep the guarantees
  + ConflictError               a guarded write found another version
  + RecordTooLargeError         the record is over the store's limit
  + InvalidValueError           a value, id or argument that cannot be taken (also a ValueError)
  + UnsupportedError            this backend has no such method

All of them can be pickled; what they know is in their attributes.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._core.task import Task

__all__ = [
    "ConflictError",
    "InvalidValueError",
    "LeaseLostError",
    "OutcomeUnknownError",
    "RecordTooLargeError",
    "StoreCorruptedError",
    "StoreError",
    "StoreUnavailableError",
    "StoreUnsafeError",
    "TaskExhaustedError",
    "TaskIgnoredError",
    "TaskLockedError",
    "TaskNotDueError",
    "TaskSucceededError",
    "TaskUnavailableError",
    "TrackerError",
    "UnsupportedError",
]


class TrackerError(Exception):
    """Root of all errors of this library."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (type(self), self.args, self.__dict__)


def _restore(cls: type[TrackerError], args: tuple[Any, ...], state: dict[str, Any]) -> TrackerError:
    # Past __init__, whose signature is the subclass's own.
    exc = cls.__new__(cls)
    exc.args = args
    exc.__dict__.update(state)
    return exc


class TaskUnavailableError(TrackerError):
    """The task may not be run, or not now.

    Attributes:
        task: The record, read after the question was asked.
        retry_after: Seconds after which asking again may help; `None` where only a person can help.
    """

    def __init__(self, message: str, task: "Task", retry_after: float | None) -> None:
        super().__init__(message)
        self.task = task
        self.retry_after = retry_after


class TaskLockedError(TaskUnavailableError):
    """Somebody else holds a live lease on the task."""


class TaskNotDueError(TaskUnavailableError):
    """The task is not to be run before its `not_before`."""


class TaskSucceededError(TaskUnavailableError):
    """The task has succeeded; its result is in `task.result`."""


class TaskExhaustedError(TaskUnavailableError):
    """The task has failed too often, or its body gave up; `reset` makes it pending again."""


class TaskIgnoredError(TaskUnavailableError):
    """Somebody set the task aside; `reset` makes it pending again."""


class LeaseLostError(TrackerError):
    """The claim of this run is over: expired, taken over, or taken away. Nothing more of it is recorded.

    Attributes:
        task_id: Whose lease it was.
        fence: Of the lost claim.
    """

    def __init__(self, message: str, task_id: str, fence: int) -> None:
        super().__init__(message)
        self.task_id = task_id
        self.fence = fence


class OutcomeUnknownError(TrackerError):
    """The store did not tell, within the time there was, whether a write landed.

    Attributes:
        task_id: Of the record that was written.
    """

    def __init__(self, message: str, task_id: str) -> None:
        super().__init__(message)
        self.task_id = task_id


class StoreError(TrackerError):
    """The store cannot be used as it is: missing, full, read-only, of another format, removed."""


class StoreUnavailableError(StoreError):
    """The store gave no answer. After a write, whether that landed is not known."""


class StoreCorruptedError(StoreError):
    """What is stored is damaged.

    Attributes:
        path: The file or object, where known.
        offset: The first damaged byte, where known.
    """

    def __init__(self, message: str, path: str | None = None, offset: int | None = None) -> None:
        super().__init__(message)
        self.path = path
        self.offset = offset


class StoreUnsafeError(StoreError):
    """This kind of store cannot keep the guarantees, and was refused before anything was written."""


class ConflictError(TrackerError):
    """A guarded write found another version than it was made for; nothing was changed.

    Attributes:
        current: The stored record, if the store told. `None`: nothing is stored, or not told (see `known`).
        known: Whether `current` is what the store holds.
    """

    def __init__(self, message: str, current: "Task | None" = None, *, known: bool | None = None) -> None:
        super().__init__(message)
        self.current = current
        self.known = current is not None if known is None else known


class RecordTooLargeError(TrackerError):
    """The encoded record is over the store's limit; nothing was changed.

    Attributes:
        task_id: Whose record.
        size: Bytes that it would have taken.
        limit: Bytes that the store takes.
    """

    def __init__(self, message: str, task_id: str, size: int, limit: int) -> None:
        super().__init__(message)
        self.task_id = task_id
        self.size = size
        self.limit = limit


class InvalidValueError(TrackerError, ValueError):
    """A value, id, filter or argument that cannot be taken; the message says which and what to do."""


class UnsupportedError(TrackerError):
    """The backend does not implement this method, or may not (a store opened `read_only`).

    Attributes:
        method: Its name.
    """

    def __init__(self, message: str, method: str) -> None:
        super().__init__(message)
        self.method = method
