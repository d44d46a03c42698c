"""Tasks as tables: which columns there are, what is in them, and how a store is read into them, a batch at a time.

The columns are named as in the views of the SQLite and PostgreSQL trackers, so that a query works in both places.
"""

from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec

from .._core.fingerprint import fingerprint_of
from .._core.query import Where, group_of
from .._core.task import Failure, Step, Task
from ..errors import InvalidValueError
from ..tracker import BaseTracker
from ._extra import driver

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["TABLES", "Column", "builder", "check_columns", "pieces", "schema"]

FIRST_ROWS: Final = 500  # of a store, read before it is known how large they are
MAX_ROWS: Final = 10_000  # read before others get them
BATCH_BYTES: Final = 8 * 1024 * 1024  # that a batch takes, as nearly as the one before it tells


class Column(NamedTuple):
    """One column of a table."""

    name: str
    kind: str  # of pyarrow: string, int64, float64 or timestamp
    read: Callable[[Any], Any]  # from a row
    what: str  # for people


def _json(value: Any) -> str | None:
    return None if value is None else _encode(value).decode()


_encode: Final = msgspec.json.Encoder().encode


def _seconds(task: Task) -> float | None:
    if task.lease is not None or task.start_time is None or task.finish_time is None:
        return None
    return (task.finish_time - task.start_time).total_seconds()


def _of_error(field: str) -> Callable[[Task], Any]:
    return lambda task: getattr(task.errors[-1], field) if task.errors else None


class _Error(NamedTuple):
    """A row of `errors`."""

    task: Task
    error: Failure


class _Step(NamedTuple):
    """A row of `steps`."""

    task: Task
    number: int
    step: Step


def _inner(field: str, name: str) -> Callable[[Any], Any]:
    return attrgetter(f"{field}.{name}")


TASKS: Final = (
    Column("id", "string", attrgetter("id"), "The task's id."),
    Column("status", "string", lambda task: task.status.value, "pending, in_progress, failed, ..."),
    Column("attempts", "int64", attrgetter("attempts"), "Claims that count."),
    Column("fence", "int64", attrgetter("fence"), "Of the latest claim."),
    Column("priority", "int64", attrgetter("priority"), "Higher ones are worked on first."),
    Column("create_time", "timestamp", attrgetter("create_time"), "When it was made."),
    Column("update_time", "timestamp", attrgetter("update_time"), "Of the latest change, renewals included."),
    Column("start_time", "timestamp", attrgetter("start_time"), "Of the latest claim."),
    Column("finish_time", "timestamp", attrgetter("finish_time"), "When the latest claim ended."),
    Column("seconds", "float64", _seconds, "How long the latest attempt took; NULL while it runs."),
    Column("not_before", "timestamp", attrgetter("not_before"), "Not to be run before."),
    Column(
        "lease_expires_at",
        "timestamp",
        lambda task: None if task.lease is None else task.lease.expires_at,
        "Until when it is held.",
    ),
    Column(
        "worker",
        "string",
        lambda task: group_of(task, "worker") or None,
        "Who holds it or, if nobody does, whose attempt failed last.",
    ),
    Column("error_type", "string", _of_error("type"), "The class name of the latest error."),
    Column("error_message", "string", _of_error("message"), "Of the latest error."),
    Column(
        "fingerprint",
        "string",
        lambda task: fingerprint_of(task.errors[-1], task.id) if task.errors else None,
        "What the latest error has in common with others of the same cause.",
    ),
    Column("last_outcome", "string", attrgetter("last_outcome"), "error, cancelled, lease_lost, timeout or NULL."),
    Column("step", "string", lambda task: group_of(task, "step") or None, "Where in its pipeline it stands."),
    Column("releases", "int64", attrgetter("releases"), "Cancelled claims in a row."),
    Column("progress", "float64", attrgetter("progress"), "Set by the body."),
    Column("note", "string", attrgetter("note"), "Set by the body, or by who changed the task by hand."),
    Column("data", "string", lambda task: _json(task.data), "The input, as JSON."),
    Column("result", "string", lambda task: _json(task.result), "The output, as JSON."),
)
ERRORS: Final = (
    Column("task_id", "string", attrgetter("task.id"), "Whose."),
    Column("task_status", "string", lambda row: row.task.status.value, "How that task stands now."),
    Column("attempt", "int64", _inner("error", "attempt"), "Which attempt failed."),
    Column("time", "timestamp", _inner("error", "time"), "When."),
    Column("worker", "string", _inner("error", "worker"), "Whose attempt it was."),
    Column("type", "string", _inner("error", "type"), "The class name."),
    Column("message", "string", _inner("error", "message"), "What it said."),
    Column("fingerprint", "string", lambda row: fingerprint_of(row.error, row.task.id), "Of its cause."),
    Column("traceback", "string", lambda row: row.error.traceback or None, "Where it was raised."),
)
STEPS: Final = (
    Column("task_id", "string", attrgetter("task.id"), "Whose."),
    Column("task_status", "string", lambda row: row.task.status.value, "How that task stands."),
    Column("number", "int64", attrgetter("number"), "1 is the step that was started first."),
    Column("name", "string", _inner("step", "name"), "The step's name."),
    Column("status", "string", lambda row: row.step.status.value, "in_progress, succeeded or failed."),
    Column("attempts", "int64", _inner("step", "attempts"), "How often it was started."),
    Column("start_time", "timestamp", _inner("step", "start_time"), "Of the latest attempt."),
    Column("finish_time", "timestamp", _inner("step", "finish_time"), "Of the latest attempt."),
    Column("seconds", "float64", _inner("step", "seconds"), "How long the latest attempt took."),
    Column(
        "error_type", "string", lambda row: row.step.error.type if row.step.error else None, "Of the latest attempt."
    ),
    Column(
        "error_message",
        "string",
        lambda row: row.step.error.message if row.step.error else None,
        "Of the latest attempt.",
    ),
    Column("result", "string", lambda row: _json(row.step.result), "What it gave, as JSON."),
)
TABLES: Final[Mapping[str, tuple[Column, ...]]] = {"tasks": TASKS, "errors": ERRORS, "steps": STEPS}


def _rows(table: str, tasks: Sequence[Task]) -> Sequence[Any]:
    if table == "errors":
        return [_Error(task, error) for task in tasks for error in task.errors]
    if table == "steps":
        return [_Step(task, number, step) for task in tasks for number, step in enumerate(task.steps, 1)]
    return tasks


def check_columns(table: str, columns: Iterable[str] | None) -> tuple[str, ...]:
    """The columns that are wanted; `None`: all.

    Raises:
        InvalidValueError: There is no such table, or no such column in it.
    """
    if table not in TABLES:
        raise InvalidValueError(f"no table {table!r}; there are: {', '.join(TABLES)}")
    names = tuple(column.name for column in TABLES[table])
    if columns is None:
        return names
    wanted = (columns,) if isinstance(columns, str) else tuple(columns)
    for name in wanted:
        if name not in names:
            raise InvalidValueError(f"no column {name!r} in {table}; there are: {', '.join(names)}")
    if not wanted or len(set(wanted)) < len(wanted):
        raise InvalidValueError("columns takes one or several names of columns, each once")
    return wanted


def _columns(table: str, names: Sequence[str]) -> list[Column]:
    by_name = {column.name: column for column in TABLES[table]}
    return [by_name[name] for name in names]


def schema(table: str, names: Sequence[str]) -> "pa.Schema":
    """The types of columns."""
    pyarrow = driver("pyarrow")
    types = {
        "string": pyarrow.string(),
        "int64": pyarrow.int64(),
        "float64": pyarrow.float64(),
        "timestamp": pyarrow.timestamp("us", tz="UTC"),
    }
    made: pa.Schema = pyarrow.schema([(column.name, types[column.kind]) for column in _columns(table, names)])
    return made


def builder(table: str, names: Sequence[str]) -> "Callable[[Sequence[Task]], pa.RecordBatch]":
    """What makes a table's rows of tasks; for a thread, since it takes some microseconds a task."""
    pyarrow = driver("pyarrow")
    columns, types = _columns(table, names), schema(table, names)

    def build(tasks: Sequence[Task]) -> "pa.RecordBatch":
        rows = _rows(table, tasks)
        arrays = [
            pyarrow.array([column.read(row) for row in rows], field.type)
            for column, field in zip(columns, types, strict=True)
        ]
        made: pa.RecordBatch = pyarrow.RecordBatch.from_arrays(arrays, schema=types)
        return made

    return build


async def pieces(
    tracker: BaseTracker[Any, Any],
    where: Where,
    skip: Collection[str],
    *,
    order_by: str | None = None,
    limit: int | None = None,
) -> AsyncIterator[tuple[list[Task], Callable[[int], None]]]:
    """The tasks that match, some at a time.

    Yields:
        Tasks, and a function that takes how many bytes they were: the next ones are as many as fit.
    """
    rows = FIRST_ROWS
    tasks: list[Task] = []

    def set_size(size: int) -> None:
        nonlocal rows
        fitting = BATCH_BYTES * len(tasks) // max(1, size)
        rows = max(1, min(MAX_ROWS, fitting))

    async for task in tracker.find(order_by=order_by, limit=limit, **where):
        if task.id not in skip:
            tasks.append(task)
        if len(tasks) >= rows:
            yield tasks, set_size
            tasks = []
    if tasks:
        yield tasks, set_size
