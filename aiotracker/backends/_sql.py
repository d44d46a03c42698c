"""What trackers on SQL databases share: the columns of a record, filters as SQL, and operations that are committed
together.

A record is kept as its JSON, which alone counts; beside it stand columns for people, indexes and filters, which are
made from it with each write.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from importlib import resources
from typing import Any, Final

import msgspec
from msgspec.structs import force_setattr

from .._core.fingerprint import fingerprint_of
from .._core.query import Query, group_of
from .._core.task import Task
from .._core.transitions import Claim
from ..contract import Transition
from ..errors import InvalidValueError, RecordTooLargeError

__all__ = [
    "COLUMNS",
    "MAX_COMMIT_BYTES",
    "RARE",
    "Operation",
    "Replacement",
    "check_namespace",
    "conditions",
    "decide",
    "escaped",
    "is_all_sql",
    "ordering",
    "orphaned",
    "row",
    "statements",
    "unescaped",
]

MAX_COMMIT_BYTES: Final = 4 * 1024 * 1024  # of records that are written, or read for it, in one transaction

RARE: Final = (
    "not_before",
    "error_type",  # of the latest error
    "fingerprint",  # of the latest error
    "last_outcome",
    "step",  # at which it stands
)  # of COLUMNS, what most tasks have none of
COLUMNS: Final = (
    "namespace",
    "id",
    "status",
    "attempts",
    "priority",
    "create_time",
    "update_time",
    "start_time",
    "finish_time",
    "lease_expires_at",
    "worker",  # who holds it or, if nobody does, whose attempt failed last
    "write_id",  # the version
    "record",
    *RARE,
)

NULLABLE: Final = frozenset({"start_time", "finish_time", "not_before"})  # of what queries order by

_NAMESPACE: Final = re.compile(r"[A-Za-z0-9_.-]{1,100}")
_HEADING: Final = re.compile(r"^-- (\w+): .+$", re.MULTILINE)
_encode: Final = msgspec.json.Encoder().encode


def check_namespace(namespace: object) -> str:
    """The namespace, if it can be one.

    Raises:
        InvalidValueError: It cannot.
    """
    if not isinstance(namespace, str) or not _NAMESPACE.fullmatch(namespace):
        raise InvalidValueError(f"namespace takes 1 to 100 letters, digits, '-', '_' and '.', not {namespace!r}")
    return namespace


def statements(file_name: str) -> dict[str, str]:
    """The statements of a file beside this one, by name. Each stands below a line `-- name: what it is for`. Reads the
    file, and so blocks.
    """
    _, *parts = _HEADING.split(resources.files(__package__).joinpath(file_name).read_text())
    return {name: text.strip().rstrip(";") for name, text in zip(parts[::2], parts[1::2], strict=True)}


# -- columns


def escaped(text: str) -> str:
    """Text as it stands in a column: NUL, which databases do not take, is written as U+0001 twice, and U+0001 as
    U+0001 U+0002. Other text is as it is. Order and prefixes are kept.
    """
    if "\x01" in text:
        text = text.replace("\x01", "\x01\x02")
    return text.replace("\x00", "\x01\x01") if "\x00" in text else text


def unescaped(text: str) -> str:
    """What was escaped."""
    return text.replace("\x01\x01", "\x00").replace("\x01\x02", "\x01") if "\x01" in text else text


def row(task: Task, record: str, namespace: str, time: Callable[[datetime], Any]) -> tuple[Any, ...]:
    """The values of `COLUMNS`; without those of `RARE`, which are the last, where all of them are None.

    Args:
        task: The record.
        record: It, encoded.
        namespace: Of the tracker.
        time: Makes of a time what the database takes.
    """
    lease, errors, due = task.lease, task.errors, task.not_before
    error = errors[-1] if errors else None
    worker = lease.worker if lease is not None else error.worker if error is not None else None
    start, finish = task.start_time, task.finish_time
    values = (
        namespace,
        escaped(task.id),
        task.status._value_,
        task.attempts,
        task.priority,
        time(task.create_time),
        time(task.update_time),
        None if start is None else time(start),
        None if finish is None else time(finish),
        None if lease is None else time(lease.expires_at),
        None if worker is None else escaped(worker),
        task.write_id,
        record,
    )
    if due is None and error is None and task.last_outcome is None and not task.steps:
        return values
    return (
        *values,
        None if due is None else time(due),
        None if error is None else escaped(error.type),
        None if error is None else escaped(fingerprint_of(error, task.id)),
        task.last_outcome,
        escaped(group_of(task, "step")) if task.steps else None,
    )


# -- queries


def is_all_sql(query: Query) -> bool:
    """Whether `conditions` says all that the query asks for; if not, it finds too much."""
    return query.data is None and query.step is None and query.step_status is None


def conditions(query: Query, put: Callable[[Any], str]) -> list[str]:
    """The query's filters as SQL conditions on the columns, to be joined with AND.

    Args:
        query: What is asked for.
        put: Takes a parameter (a str, an int or a datetime), and gives its placeholder.
    """
    found: list[str] = []
    if query.statuses is not None:
        found.append(f"status IN ({', '.join(put(status.value) for status in sorted(query.statuses))})")
    if query.prefix:
        prefix = escaped(query.prefix)
        found.append(f"id >= {put(prefix)}")
        if (end := _after_all_with(prefix)) is not None:
            found.append(f"id < {put(end)}")
    if query.min_attempts:
        found.append(f"attempts >= {put(min(query.min_attempts, 2**62))}")
    if query.min_attempts > 1:
        found.append("attempts > 1")  # says that the index has them
    if query.step is not None or query.step_status is not None:
        found.append("step IS NOT NULL")  # it has any
    for column in ("last_outcome", "error_type", "fingerprint", "worker"):
        if (value := getattr(query, column)) is not None:
            found.append(f"{column} = {put(escaped(value))}")
    found += [f"{field} {'>=' if after else '<'} {put(limit)}" for field, after, limit in query.times]
    return found


def ordering(query: Query) -> str:
    """The query's order, to follow ORDER BY; where it has none, `seq`, in which tasks were made."""
    if query.order_by is None:
        return "seq"
    if query.order_by == "id":
        return "id DESC" if query.descending else "id"
    direction = "DESC" if query.descending else "ASC"
    return f"{query.order_by} {direction}{' NULLS LAST' if query.order_by in NULLABLE else ''}, id"


def _after_all_with(prefix: str) -> str | None:
    """The first text, in the order of code points, behind all that begin with this."""
    while prefix:
        last = ord(prefix[-1])
        if last < 0x10FFFF:
            # Between U+D7FF and U+E000 there are no characters.
            return prefix[:-1] + chr(0xE000 if last == 0xD7FF else last + 1)
        prefix = prefix[:-1]
    return None


# -- operations


class Operation(msgspec.Struct, gc=False):
    """One update, or one look at a record, that waits for a transaction, and its answer."""

    task_id: str
    transition: Transition | None = None  # None: only look
    write_id: str = ""  # for what it writes
    known: Task | None = None  # the record, as seen before; spares reading it if its version is still stored
    answer: Any = None
    error: Exception | None = None


class Replacement:
    """The transition of a guarded write."""

    def __init__(self, old: Task, new: Task | None) -> None:
        self._old = old
        self._new = new

    def __call__(self, task: Task | None, now: datetime) -> Task | None:
        return self._new if (None if task is None else task.version) == self._old.version else task


Changes = dict[str, tuple[Task, bytes] | None]
"""What is to be stored, by id; `None`: deleted."""


def decide(
    operations: Iterable[Operation], stored: Mapping[str, Task | Exception | None], now: datetime, limit: int
) -> tuple[Changes, int]:
    """Runs transitions one after another, each on what those before it made; one that fails fails alone.

    Their answers count when the changes are stored.

    Args:
        operations: In their order.
        stored: The records of all their ids, or why one cannot be read.
        now: The store's time.
        limit: Bytes of a record.

    Returns:
        What to store, and how many of the operations, from the first on, that takes in.
    """
    changes: Changes = {}
    size = taken = 0
    for operation in operations:
        if size > MAX_COMMIT_BYTES:
            break
        taken += 1
        task_id = operation.task_id
        try:
            if task_id in changes:
                change = changes[task_id]
                current = None if change is None else change[0]
            else:
                found = stored[task_id]
                if isinstance(found, Exception):
                    raise found
                current = found
            new = current if operation.transition is None else operation.transition(current, now)
            if new is current:
                operation.answer = current
                continue
            if new is None:
                changes[task_id] = None
            else:
                raw = _encoded(new, operation.write_id, limit)
                changes[task_id] = (new, raw)
                size += len(raw)
            operation.answer = new
        except Exception as exc:
            operation.error = exc
    return changes, taken


def _encoded(task: Task, write_id: str, limit: int) -> bytes:
    # The transition has just made this record, and nobody else has seen it.
    force_setattr(task, "write_id", write_id)
    force_setattr(task, "version", None)
    raw = _encode(task)
    if len(raw) > limit:
        raise RecordTooLargeError(
            f"the record of {task.id!r} would take {len(raw):,} bytes, and {limit:,} are the most; "
            "keep large values elsewhere, and their path here",
            task.id,
            len(raw),
            limit,
        )
    force_setattr(task, "version", write_id)
    return raw


def orphaned(operation: Operation, write_id: str) -> Operation | None:
    """What undoes a claim that landed although its claimant had gone."""
    claim, task = operation.transition, operation.answer
    if isinstance(claim, Claim) and task is not None and task.lease is not None:
        if task.lease.token == claim.terms.token:
            return Operation(operation.task_id, claim.undo(), write_id)
    return None
