"""Tracks business-critical tasks: which are pending, running, failed, done; who holds which; what to run again."""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING

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

if _TYPE_CHECKING:
    from .backends.dynamodb import DynamoDBTracker
    from .backends.postgres import PostgresTracker
    from .backends.redis import RedisTracker
    from .backends.s3 import S3Tracker
    from .backends.sqlite import SqliteTracker

# Imported when they are asked for: their drivers are extras, or cost more to import than all the rest.
_LAZY = {
    "DynamoDBTracker": "dynamodb",
    "PostgresTracker": "postgres",
    "RedisTracker": "redis",
    "S3Tracker": "s3",
    "SqliteTracker": "sqlite",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_import_module(f".backends.{_LAZY[name]}", __name__), name)


__all__ = [
    "UNKNOWN",
    "BaseTracker",
    "Claimable",
    "Clock",
    "ConflictError",
    "Contract",
    "DynamoDBTracker",
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
    "PostgresTracker",
    "Postpone",
    "Query",
    "RecordTooLargeError",
    "RedisTracker",
    "Retry",
    "RunningTask",
    "S3Tracker",
    "SqliteTracker",
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
    "UnsupportedError",
    "Where",
    "WorkSummary",
    "open_tracker",
    "stop_on_signals",
]
