"""Tracks business-critical tasks: which are pending, running, failed, done; who holds which; what to run again."""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING

from ._core.query import GroupBy, Query, Where
from ._core.retry import GiveUp, Postpone, Retry
from ._core.task import Change, End, Failure, Lease, Status, Step, Task
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
from .events import (
    Claimed,
    Committed,
    Conflicted,
    Ended,
    Event,
    Exhausted,
    Failed,
    Hook,
    LeaseLost,
    LoopLagged,
    OutcomeUnknown,
    Postponed,
    Refused,
    Released,
    Renewed,
    RunEvent,
    StepFailed,
    StepReused,
    StepStarted,
    StepSucceeded,
    StoreUnreachable,
    Succeeded,
    TaskEvent,
    log_events,
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
    from .backends.s3_log import S3LogTracker
    from .backends.sqlite import SqliteTracker
    from .otel import OpenTelemetryHook
    from .prometheus import PrometheusHook

# Imported when they are asked for: their drivers are extras, or cost more to import than all the rest.
_LAZY = {
    "DynamoDBTracker": "backends.dynamodb",
    "OpenTelemetryHook": "otel",
    "PostgresTracker": "backends.postgres",
    "PrometheusHook": "prometheus",
    "RedisTracker": "backends.redis",
    "S3LogTracker": "backends.s3_log",
    "S3Tracker": "backends.s3",
    "SqliteTracker": "backends.sqlite",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_import_module(f".{_LAZY[name]}", __name__), name)


__all__ = [
    "UNKNOWN",
    "BaseTracker",
    "Change",
    "Claimable",
    "Claimed",
    "Clock",
    "Committed",
    "ConflictError",
    "Conflicted",
    "Contract",
    "DynamoDBTracker",
    "End",
    "Ended",
    "Event",
    "Exhausted",
    "Failed",
    "Failure",
    "FileTracker",
    "FolderTracker",
    "GiveUp",
    "GroupBy",
    "Hook",
    "InvalidValueError",
    "Lease",
    "LeaseLost",
    "LeaseLostError",
    "LoopLagged",
    "MemoryTracker",
    "OpenTelemetryHook",
    "OutcomeUnknown",
    "OutcomeUnknownError",
    "PostgresTracker",
    "Postpone",
    "Postponed",
    "PrometheusHook",
    "Query",
    "RecordTooLargeError",
    "RedisTracker",
    "Refused",
    "Released",
    "Renewed",
    "Retry",
    "RunEvent",
    "RunningTask",
    "S3LogTracker",
    "S3Tracker",
    "SqliteTracker",
    "Status",
    "Step",
    "StepFailed",
    "StepReused",
    "StepStarted",
    "StepSucceeded",
    "StoreCorruptedError",
    "StoreError",
    "StoreUnavailableError",
    "StoreUnreachable",
    "StoreUnsafeError",
    "Succeeded",
    "SystemClock",
    "Task",
    "TaskEvent",
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
    "log_events",
    "open_tracker",
    "stop_on_signals",
]
