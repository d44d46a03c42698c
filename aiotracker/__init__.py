"""Tracks business-critical tasks: which are pending, running, failed, done; who holds which; what to run again."""

from ._core.query import Query, Where
from ._core.retry import GiveUp, Postpone, Retry
from ._core.task import End, Failure, Lease, Status, Step, Task
from .backends.file import FileTracker
from .backends.folder import FolderTracker
from .backends.memory import MemoryTracker
from .clock import Clock, SystemClock
from .contract import UNKNOWN, Claimable, Contract, Transition
from .errors import (
    ConflictError,
    InvalidValueError,
    LeaseLostError,
    OutcomeUnknownError,
    RecordTooLargeError,
    StoreCorruptedError,
    StoreError,
    StoreUnavailableError,
    StoreUnsafeError,
    TaskExhaustedError,
    TaskIgnoredError,
    TaskLockedError,
    TaskNotDueError,
    TaskSucceededError,
    TaskUnavailableError,
    TrackerError,
    UnsupportedError,
)
from .running import RunningTask
from .signals import stop_on_signals
from .tracker import BaseTracker
from .urls import open_tracker
from .work import WorkSummary

__all__ = [
    "BaseTracker",
    "Claimable",
    "Clock",
    "ConflictError",
    "Contract",
    "End",
    "Failure",
    "FileTracker",
    "FolderTracker",
    "GiveUp",
    "InvalidValueError",
    "Lease",
    "LeaseLostError",
    "MemoryTracker",
    "OutcomeUnknownError",
    "Postpone",
    "Query",
    "RecordTooLargeError",
    "Retry",
    "RunningTask",
    "Status",
    "Step",
    "StoreCorruptedError",
    "StoreError",
    "StoreUnavailableError",
    "StoreUnsafeError",
    "SystemClock",
    "Task",
    "TaskExhaustedError",
    "TaskIgnoredError",
    "TaskLockedError",
    "TaskNotDueError",
    "TaskSucceededError",
    "TaskUnavailableError",
    "TrackerError",
    "Transition",
    "UNKNOWN",
    "UnsupportedError",
    "Where",
    "WorkSummary",
    "open_tracker",
    "stop_on_signals",
]
