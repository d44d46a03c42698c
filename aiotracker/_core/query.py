"""Which tasks a query matches, and in what order."""

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, Literal, TypedDict, get_args

import msgspec

from .fingerprint import fingerprint_of
from .task import LastOutcome, Status, Step, Task

__all__ = ["GROUPS", "ORDERS", "GroupBy", "Query", "Where", "check_group", "group_of"]

GroupBy = Literal["status", "error_type", "worker", "step", "last_outcome", "fingerprint"]
"""What `count` counts by, see `group_of`."""

GROUPS: Final[tuple[GroupBy, ...]] = get_args(GroupBy)


class Where(TypedDict, total=False):
    """The filters of `find`, `count`, `reset`, `ignore` and `purge`; a task must match all that are given."""

    status: str | Iterable[str]  # one or several
    prefix: str  # the id starts with it
    data: Mapping[str, Any]  # `data` is an object that has these keys with these values
    error_type: str  # the class name of the latest error; that may be of a task that has succeeded since: give `status`
    worker: str  # who holds it or, if nobody does, whose attempt failed last
    last_outcome: str  # error, cancelled, lease_lost, timeout
    fingerprint: str  # of the latest error, names its cause; likewise
    step: str  # it has a step of this name
    step_status: str  # ... (or any step, without `step`) of this status
    min_attempts: int  # this many attempts or more
    created_before: datetime  # exclusive, like all `before`
    created_after: datetime  # inclusive, like all `after`
    updated_before: datetime
    updated_after: datetime
    finished_before: datetime  # a task that has not finished matches neither
    finished_after: datetime


ORDERS: Final = (
    "id",
    "create_time",
    "update_time",
    "start_time",
    "finish_time",
    "not_before",
    "priority",
    "attempts",
)
_FINGERPRINT: Final = re.compile("[0-9a-f]{12}")
_TIMES: Final = {"created": "create_time", "updated": "update_time", "finished": "finish_time"}


class Query(msgspec.Struct, frozen=True):
    """A checked query. Backends read what they can use of it; `matches` has the last word."""

    statuses: frozenset[Status] | None = None  # None: all
    prefix: str = ""
    data: Mapping[str, Any] | None = None
    error_type: str | None = None
    worker: str | None = None
    last_outcome: str | None = None
    fingerprint: str | None = None
    step: str | None = None
    step_status: str | None = None
    min_attempts: int = 0
    times: tuple[tuple[str, bool, datetime], ...] = ()  # field of the task, True: at or after, False: before
    order_by: str | None = None  # one of ORDERS; None: whatever is cheapest
    descending: bool = False
    limit: int | None = None

    @classmethod
    def build(cls, where: Where, *, order_by: str | None = None, limit: int | None = None) -> "Query":
        """Checks what a user typed.

        Args:
            where: The filters.
            order_by: A name in `ORDERS`, with a `-` before it for descending. Ties are in the order of ids; tasks
                without the field come last.
            limit: How many at the most.

        Raises:
            ValueError: A filter is unknown or has a value that it cannot have.
        """
        given: dict[str, Any] = dict(where)
        if unknown := sorted(given.keys() - Where.__annotations__.keys()):
            raise ValueError(f"unknown filter {unknown[0]!r}; there are: {', '.join(Where.__annotations__)}")
        fields: dict[str, Any] = {}
        times = []
        for name, value in given.items():
            if name == "status":
                fields["statuses"] = _statuses(value)
            elif name == "min_attempts":
                fields[name] = _whole(name, value, 0)
            elif name == "data":
                if not isinstance(value, Mapping):
                    raise ValueError(f"data takes a dict of keys and values, not {value!r}")
                fields[name] = dict(value)
            elif name.endswith(("_before", "_after")):
                what, _, side = name.rpartition("_")
                times.append((_TIMES[what], side == "after", aware(name, value)))
            elif not isinstance(value, str):
                raise ValueError(f"{name} takes a str, not {value!r}")
            elif any("\ud800" <= letter <= "\udfff" for letter in value):
                raise ValueError(f"{name} must be Unicode text; {value!r} has a lone surrogate")
            else:
                fields[name] = value
        if (outcome := fields.get("last_outcome")) is not None and outcome not in get_args(LastOutcome):
            raise ValueError(f"last_outcome is one of {', '.join(get_args(LastOutcome))}, not {outcome!r}")
        if (status := fields.get("step_status")) is not None and status not in ("in_progress", "failed", "succeeded"):
            raise ValueError(f"step_status is in_progress, failed or succeeded, not {status!r}")
        if (cause := fields.get("fingerprint")) is not None and not _FINGERPRINT.fullmatch(cause):
            raise ValueError(f"fingerprint takes 12 hexadecimal digits, as errors have them, not {cause!r}")
        descending = False
        if order_by is not None:
            if not isinstance(order_by, str) or order_by.removeprefix("-") not in ORDERS:
                raise ValueError(f"order_by is one of {', '.join(ORDERS)}, or '-' and one of them, not {order_by!r}")
            descending = order_by.startswith("-")
            order_by = order_by.removeprefix("-")
        if limit is not None:
            limit = _whole("limit", limit, 0)
        return cls(times=tuple(times), order_by=order_by, descending=descending, limit=limit, **fields)

    def matches(self, task: Task) -> bool:
        """Whether this task is asked for."""
        if self.statuses is not None and task.status not in self.statuses:
            return False
        if self.prefix and not task.id.startswith(self.prefix):
            return False
        if task.attempts < self.min_attempts:
            return False
        if self.last_outcome is not None and task.last_outcome != self.last_outcome:
            return False
        if self.error_type is not None and (not task.errors or task.errors[-1].type != self.error_type):
            return False
        if self.worker is not None and self.worker != _worker(task):
            return False
        if self.fingerprint is not None and self.fingerprint != _fingerprint(task):
            return False
        if self.data is not None and not _has(task.data, self.data):
            return False
        if (self.step is not None or self.step_status is not None) and not any(
            (self.step is None or step.name == self.step)
            and (self.step_status is None or step.status == self.step_status)
            for step in task.steps
        ):
            return False
        for field, after, limit in self.times:
            value = getattr(task, field)
            if value is None or (value < limit if after else value >= limit):
                return False
        return True

    def sorted(self, tasks: Iterable[Task]) -> list[Task]:
        """The tasks in the query's order, whether they match or not."""
        if self.order_by is None:
            return list(tasks)
        field = self.order_by
        having: list[Task] = []
        lacking: list[Task] = []
        for task in sorted(tasks, key=lambda task: task.id):
            (lacking if getattr(task, field) is None else having).append(task)
        having.sort(key=lambda task: getattr(task, field), reverse=self.descending)
        return having + lacking


def aware(name: str, value: object) -> datetime:
    """A time that a user gave, in UTC.

    Raises:
        ValueError: It is no datetime, or a naive one.
    """
    if not isinstance(value, datetime):
        raise ValueError(f"{name} takes a datetime, not {value!r}")
    if value.tzinfo is None or value.utcoffset() is None:
        raise ValueError(f"{name} takes an aware datetime, e.g. datetime.now(UTC); {value!r} has no time zone")
    try:
        time = value.astimezone(UTC)
    except OverflowError:
        raise ValueError(f"{name} takes a time of the years 1 to 9999 in UTC, not {value!r}") from None
    # A plain one: encoders refuse what others have made of it.
    return datetime.combine(time.date(), time.time(), UTC)


def _statuses(value: object) -> frozenset[Status]:
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, Iterable):
        raise ValueError(f"status takes a status or several, not {value!r}")
    statuses = set()
    for word in words:
        try:
            statuses.add(Status(word))
        except ValueError:
            raise ValueError(f"no status {word!r}; there are: {', '.join(Status)}") from None
    if not statuses:
        raise ValueError("status takes a status or several; an empty list would match nothing")
    return frozenset(statuses)


def _whole(name: str, value: object, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} takes an int of {least} or more, not {value!r}")
    return value


def check_group(by: object) -> GroupBy:
    """What `count` is to count by, checked.

    Raises:
        ValueError: It cannot.
    """
    for group in GROUPS:
        if by == group:
            return group
    raise ValueError(f"by is one of {', '.join(GROUPS)}, not {by!r}")


def group_of(task: Task, by: GroupBy) -> str:
    """Where `count(by=...)` counts this task. Empty: there is nothing to count it by.

    - `status`, `last_outcome`: the field.
    - `error_type`, `fingerprint`: of the latest error, also after a later success.
    - `worker`: who holds it or, if nobody does, whose attempt failed last.
    - `step`: where in its pipeline it stands: the step that is in progress, or else the one that failed, or else the
      one that was started last. Of several the last. A task that has succeeded stands at its last step.

    For all but `step`, `count(by=x)[y]` is how many tasks `find(x=y)` finds.
    """
    match by:
        case "status":
            return task.status
        case "last_outcome":
            return task.last_outcome or ""
        case "error_type":
            return task.errors[-1].type if task.errors else ""
        case "fingerprint":
            return _fingerprint(task) or ""
        case "worker":
            return _worker(task) or ""
        case _:
            return _step(task.status, task.steps)


def _step(status: Status, steps: Sequence[Step]) -> str:
    if status is not Status.SUCCEEDED:
        for wanted in (Status.IN_PROGRESS, Status.FAILED):
            for step in reversed(steps):
                if step.status is wanted:
                    return step.name
    return steps[-1].name if steps else ""


def _fingerprint(task: Task) -> str | None:
    return fingerprint_of(task.errors[-1], task.id) if task.errors else None


def _worker(task: Task) -> str | None:
    if task.lease is not None:
        return task.lease.worker
    return task.errors[-1].worker if task.errors else None


def _has(data: object, wanted: Mapping[str, Any]) -> bool:
    if not isinstance(data, dict):
        return False
    return all(key in data and _is_same(data[key], value) for key, value in wanted.items())


def _is_same(stored: object, value: object) -> bool:
    """Equal as JSON, which keeps true and 1 apart; Python's == does not."""
    if isinstance(stored, bool) or isinstance(value, bool):
        return stored is value
    if isinstance(stored, dict):
        return (
            isinstance(value, Mapping)
            and stored.keys() == value.keys()
            and all(_is_same(inner, value[key]) for key, inner in stored.items())
        )
    if isinstance(stored, list):
        return isinstance(value, list | tuple) and len(stored) == len(value) and all(map(_is_same, stored, value))
    return stored == value
