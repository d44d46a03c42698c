"""How a store is going, in one look."""

from collections.abc import Collection, Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any, Final

import msgspec
from typing_extensions import Unpack

from .._core.fingerprint import gist
from .._core.query import Query, Where
from .._core.task import Status, Task
from ..tracker import BaseTracker

__all__ = ["Cause", "Durations", "Failed", "Minute", "Rate", "Running", "Summary", "Waiting", "summary"]

MINUTES: Final = 15  # that are looked back
WINDOWS: Final = (1, 5, 15)  # minutes
SAMPLE: Final = 10_000  # tasks that ended, looked at; the latest ones
RUNNING: Final = 10_000  # tasks under way, looked at
SHOWN: Final = 20  # running tasks, late ones, and failures, in a summary
CAUSES: Final = 5
_WRONG: Final = frozenset({Status.FAILED, Status.EXHAUSTED})
_ENDED: Final = _WRONG | {Status.SUCCEEDED}


class Rate(msgspec.Struct, frozen=True):
    """How many tasks ended a minute, lately."""

    minutes: float  # how far back; less than was asked for where the latest 10,000 ends do not reach that far
    succeeded: float  # a minute
    failed: float  # a minute, exhausted ones included


class Durations(msgspec.Struct, frozen=True):
    """How long the latest attempts of tasks took that succeeded lately, in seconds."""

    tasks: int  # of how many
    p50: float
    p90: float
    p99: float
    longest: float


class Minute(msgspec.Struct, frozen=True):
    """What ended in one minute."""

    start: datetime
    succeeded: int
    failed: int
    p50: float | None  # seconds that those took that succeeded; None: none did


class Waiting(msgspec.Struct, frozen=True):
    """A pending task."""

    id: str
    create_time: datetime
    seconds: float  # since then


class Running(msgspec.Struct, frozen=True):
    """A task under way."""

    id: str
    worker: str
    start_time: datetime
    attempts: int
    progress: float | None
    note: str | None
    step: str | None  # under way
    lease_left: float  # seconds, by the store's clock; negative: it may be taken over
    is_late: bool  # less than a third of its lease is left: two renewals have not come


class Failed(msgspec.Struct, frozen=True):
    """A task whose latest attempt failed."""

    id: str
    status: Status
    attempts: int
    time: datetime
    type: str
    message: str


class Cause(msgspec.Struct, frozen=True):
    """What several failures have in common."""

    fingerprint: str
    tasks: int  # failed or exhausted
    type: str
    message: str  # the first line, without what differs
    example: str  # the id of one of them


class Summary(msgspec.Struct, frozen=True):
    """How a store is going. Everything is as of some moment between the call and `time`."""

    time: datetime  # by the store's clock
    counts: dict[str, int]  # by status
    rates: tuple[Rate, ...]  # of the last 1, 5 and 15 minutes
    durations: Durations | None  # of the last 15 minutes; None: nothing succeeded
    minutes: tuple[Minute, ...]  # the last 15, oldest first
    oldest: Waiting | None  # the pending task that was made first
    running: tuple[Running, ...]  # those that were started first, 20 at the most
    late: tuple[Running, ...]  # leases about to end or over, the most urgent first, 20 at the most
    causes: tuple[Cause, ...]  # of failures, the most frequent 5
    failures: tuple[Failed, ...]  # the latest first, 20 at the most

    @property
    def total(self) -> int:
        """Tasks in all."""
        return sum(self.counts.values())


async def summary(tracker: BaseTracker[Any, Any], *, skip: Collection[str] = (), **where: Unpack[Where]) -> Summary:
    """How a store is going: counts, rates and durations of the last minutes, who is late, and what goes wrong.

    Rates and durations are of tasks whose latest claim ended within 15 minutes, by the store's clock: a task that
    failed twice meanwhile counts once. Some six queries; on a store without indexes each may walk over all tasks.

    Args:
        tracker: The store; may be `read_only`.
        skip: Ids of tasks that are left out.
        **where: Only of these tasks, see `Where`.

    Raises:
        InvalidValueError: A filter is not known.
        StoreError: The store cannot be read.
        UnsupportedError: The backend has no `scan`.
    """
    found = await tracker.count(**where)
    query = Query.build(where)
    for task_id in skip:
        task = await tracker.load(task_id)
        if task is not None and query.matches(task):
            found[task.status] -= 1
    counts = {status.value: found[status] for status in Status}
    now = tracker.now()
    since = now - timedelta(minutes=MINUTES)
    ended = await _find(tracker, skip, where, _ENDED, "-finish_time", SAMPLE, since)
    waiting = await _find(tracker, skip, where, {Status.PENDING}, "create_time", 1)
    running = [
        _running(task, now)
        for task in await _find(tracker, skip, where, {Status.IN_PROGRESS}, None, RUNNING)
        if task.lease
    ]
    failures = [task for task in ended if task.status in _WRONG][:SHOWN]
    if len(failures) < SHOWN:
        failures = await _find(tracker, skip, where, _WRONG, "-finish_time", SHOWN)
    late = sorted((run for run in running if run.is_late), key=lambda run: run.lease_left)
    return Summary(
        time=now,
        counts=counts,
        rates=tuple(_rate(ended, now, minutes) for minutes in WINDOWS),
        durations=_durations(ended),
        minutes=_minutes(ended, now),
        oldest=next((Waiting(task.id, task.create_time, _since(task.create_time, now)) for task in waiting), None),
        running=tuple(sorted(running, key=lambda run: run.start_time)[:SHOWN]),
        late=tuple(late[:SHOWN]),
        causes=await _causes(tracker, where) if counts["failed"] or counts["exhausted"] else (),
        failures=tuple(_failed(task) for task in failures if task.errors),
    )


async def _find(
    tracker: BaseTracker[Any, Any],
    skip: Collection[str],
    where: Where,
    statuses: Iterable[Status],
    order_by: str | None,
    limit: int,
    finished_after: datetime | None = None,
) -> list[Task]:
    """Those that match, of these statuses."""
    asked = _narrowed(where, statuses)
    if asked is None:
        return []
    if finished_after is not None:
        asked["finished_after"] = max(finished_after, asked.get("finished_after", finished_after))
    found = tracker.find(order_by=order_by, limit=limit + len(skip), **asked)
    return [task async for task in found if task.id not in skip][:limit]


def _narrowed(where: Where, statuses: Iterable[Status]) -> Where | None:
    """The filters, and these statuses alone; `None`: none of them is asked for."""
    given = Query.build(where).statuses
    wanted = [status for status in Status if status in statuses and (given is None or status in given)]
    narrowed = where.copy()
    narrowed["status"] = wanted
    return narrowed if wanted else None


async def _causes(tracker: BaseTracker[Any, Any], where: Where) -> tuple[Cause, ...]:
    asked = _narrowed(where, _WRONG)
    if asked is None:
        return ()
    counts = await tracker.count(by="fingerprint", **asked)
    causes = []
    for fingerprint, tasks in counts.most_common(CAUSES):
        if not fingerprint:
            continue
        asked["fingerprint"] = fingerprint
        async for task in tracker.find(limit=1, **asked):
            error = task.errors[-1]
            causes.append(Cause(fingerprint, tasks, error.type, gist(error.message, task.id), task.id))
    return tuple(causes)


def _since(time: datetime, now: datetime) -> float:
    return (now - time).total_seconds()


def _rate(ended: Sequence[Task], now: datetime, minutes: int) -> Rate:
    reached = float(minutes)
    if len(ended) == SAMPLE and ended[-1].finish_time is not None:
        reached = min(reached, max(1.0, _since(ended[-1].finish_time, now)) / 60)
    start = now - timedelta(minutes=reached)
    within = [task for task in ended if task.finish_time is not None and task.finish_time >= start]
    succeeded = sum(task.status is Status.SUCCEEDED for task in within)
    return Rate(reached, succeeded / reached, (len(within) - succeeded) / reached)


def _durations(ended: Iterable[Task]) -> Durations | None:
    took = _took(ended)
    if not took:
        return None
    return Durations(len(took), _percentile(took, 50), _percentile(took, 90), _percentile(took, 99), took[-1])


def _took(ended: Iterable[Task]) -> list[float]:
    return sorted(
        (task.finish_time - task.start_time).total_seconds()
        for task in ended
        if task.status is Status.SUCCEEDED and task.start_time is not None and task.finish_time is not None
    )


def _percentile(ordered: Sequence[float], percent: int) -> float:
    """The smallest value that this percentage of the values does not exceed."""
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]


def _minutes(ended: Iterable[Task], now: datetime) -> tuple[Minute, ...]:
    kept: list[list[Task]] = [[] for _ in range(MINUTES)]
    for task in ended:
        if task.finish_time is not None:
            # What ended a moment after `now` was read belongs to the last minute too.
            kept[min(MINUTES - 1, max(0, int(_since(task.finish_time, now) // 60)))].append(task)
    made = []
    for ago in reversed(range(MINUTES)):
        tasks, took = kept[ago], _took(kept[ago])
        succeeded = sum(task.status is Status.SUCCEEDED for task in tasks)
        median = _percentile(took, 50) if took else None
        made.append(Minute(now - timedelta(minutes=ago + 1), succeeded, len(tasks) - succeeded, median))
    return tuple(made)


def _running(task: Task, now: datetime) -> Running:
    lease = task.lease
    assert lease is not None
    left = -_since(lease.expires_at, now)
    step = next((step.name for step in reversed(task.steps) if step.status is Status.IN_PROGRESS), None)
    return Running(
        id=task.id,
        worker=lease.worker,
        start_time=task.start_time or lease.acquired_at,
        attempts=task.attempts,
        progress=task.progress,
        note=task.note,
        step=step,
        lease_left=left,
        is_late=left < lease.ttl / 3,
    )


def _failed(task: Task) -> Failed:
    error = task.errors[-1]
    return Failed(task.id, task.status, task.attempts, error.time, error.type, error.message)
