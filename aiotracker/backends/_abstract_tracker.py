"""The files of abstract_tracker 0.1, as records of ours."""

import ast
import contextlib
import re
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from .._core.task import Failure, Lease, Status, Task

__all__ = ["from_abstract_tracker"]


class _OldRecord(msgspec.Struct):
    id: str | int
    status: int
    attempts: int
    create_time: datetime
    update_time: datetime
    lock: str | None
    lock_time: datetime
    lock_expire_time: datetime
    data: Any
    errors: dict[str, Any]


_OLD_STATUS: Final = dict(zip((0, 10, 20, 30, 40, 50), Status, strict=True))
_OLD_WORKER: Final = "abstract_tracker"
_EXCEPTION: Final = re.compile(r"(\w+)\((.*)\)", re.DOTALL)


def from_abstract_tracker(raw: bytes) -> Task:
    """The record in a file that abstract_tracker 0.1 wrote.

    Raises:
        ValueError: It did not.
    """
    old = msgspec.json.decode(raw, type=_OldRecord)
    if old.status not in _OLD_STATUS:
        raise ValueError(f"{old.status} is no status of abstract_tracker")
    status, updated = _OLD_STATUS[old.status], _utc(old.update_time)
    lease = start = not_before = None
    if old.lock is not None and not status.is_final:
        start, end = _utc(old.lock_time), _utc(old.lock_expire_time)
        if status is Status.IN_PROGRESS:
            lease = Lease(old.lock, _OLD_WORKER, start, end, (end - start).total_seconds())
        else:
            not_before = end  # locked by hand, without a start
    elif status is Status.IN_PROGRESS:
        status = Status.PENDING  # unlocked by hand: anybody may start it
    return Task(
        id=str(old.id),
        status=status,
        attempts=old.attempts,
        data=old.data,
        errors=(_old_failure(old, updated),) if old.errors else (),
        last_outcome="error" if status in (Status.FAILED, Status.EXHAUSTED) else None,
        create_time=_utc(old.create_time),
        update_time=updated,
        start_time=start,
        finish_time=updated if status is Status.FAILED or status.is_final else None,
        not_before=not_before,
        lease=lease,
    )


def _old_failure(old: _OldRecord, time: datetime) -> Failure:
    text = str(old.errors.get("error", old.errors))
    kind, message = "Exception", text
    if found := _EXCEPTION.fullmatch(text):  # such as ValueError('x')
        kind, message = found.groups()
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            value = ast.literal_eval(message)
            message = value if isinstance(value, str) else message
    return Failure(old.attempts, time, _OLD_WORKER, kind, message, str(old.errors.get("traceback", "")))


def _utc(time: datetime) -> datetime:
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
