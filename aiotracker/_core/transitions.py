"""The life of a task: every rule about it, written once.

Each transition is a frozen value that maps (record, now) to the new record. It never refuses by raising: it gives the
very same record back, and the caller reads the verdict from that. All of them may be applied again to a record that
they have already changed (the write landed, its reply was lost) and then change nothing.
"""

from collections.abc import Callable, Iterable
from datetime import datetime, timedelta
from typing import Any, Final, Literal

import msgspec
from msgspec.structs import replace

from .fingerprint import fingerprint
from .query import Query
from .retry import later
from .task import BootTime, Change, End, Failure, LastOutcome, Lease, Status, Step, Task

__all__ = [
    "Add",
    "Aim",
    "Author",
    "Cause",
    "Changes",
    "Claim",
    "Fail",
    "Ignore",
    "Judge",
    "Postpone",
    "Purge",
    "Release",
    "Renew",
    "Reset",
    "Rule",
    "Succeed",
    "Terms",
    "outcome_of",
]

ERRORS_KEPT: Final = 5
ERRORS_BYTES: Final = 16 * 1024  # of all errors of a task, encoded, so that its end can always be recorded
ENDS_KEPT: Final = 8
CHANGES_KEPT: Final = 4  # by hand
FREE_RELEASES: Final = 10  # in a row; from then on a cancellation counts as an attempt
RELEASE_DELAY: Final = 1.0  # seconds, doubled with each further release
MAX_RELEASE_DELAY: Final = 60.0
PURGE_AGE: Final = timedelta(hours=1)  # a younger record may still be needed to recognise a write whose reply was lost

Rule = Callable[[Task | None, datetime], Task | None]


class Judge(msgspec.Struct, frozen=True, gc=False):
    """How a tracker tells whether somebody else's lease is live."""

    boot: Callable[[], BootTime]
    margin: float  # seconds that clocks may differ

    def is_live(self, lease: Lease | None, now: datetime) -> bool:
        if lease is None:
            return False
        if lease.boot_id:
            boot = self.boot()
            if boot.boot_id == lease.boot_id:
                return boot.seconds < lease.boot_expires
        return now < later(lease.expires_at, self.margin)

    def left(self, lease: Lease, now: datetime) -> float:
        """Seconds until somebody else may claim."""
        boot = self.boot()
        if lease.boot_id and boot.boot_id == lease.boot_id:
            return max(0.0, lease.boot_expires - boot.seconds)
        return max(0.0, (later(lease.expires_at, self.margin) - now).total_seconds())


class Terms(msgspec.Struct, frozen=True, gc=False):
    """Under which name and for how long a claim is made."""

    token: str
    worker: str
    ttl: float  # seconds
    boot: Callable[[], BootTime]

    def lease(self, acquired_at: datetime, now: datetime) -> Lease:
        boot = self.boot()
        return Lease(
            self.token,
            self.worker,
            acquired_at,
            later(now, self.ttl),
            self.ttl,
            boot.boot_id,
            boot.seconds + self.ttl if boot.boot_id else 0.0,
        )


class Changes(msgspec.Struct, gc=False):
    """What a run has changed in its record.

    Read when a transition is applied, perhaps on another thread: so the latest is written, whatever the order of
    writes. Both dicts are replaced, never changed in place.
    """

    fields: dict[str, Any]  # of data, progress, note, trace
    steps: dict[str, Step]

    def onto(self, task: Task) -> dict[str, Any]:
        """All changed fields of the record."""
        fields, steps = self.fields, self.steps
        if not steps:
            return fields
        known = {step.name: step for step in task.steps}
        return fields | {"steps": tuple((known | steps).values())}


NO_CHANGES: Final = Changes({}, {})


class Cause(msgspec.Struct, frozen=True, gc=False):
    """Why an attempt failed."""

    type: str
    message: str
    traceback: str = ""
    fingerprint: str = ""  # empty: to be made of the others


def outcome_of(task: Task | None, token: str) -> str | None:
    """How the claim of this token ended, as far as the record remembers."""
    if task is not None:
        for end in task.ends:
            if end.token == token:
                return end.outcome
    return None


def _ended(task: Task, outcome: str) -> tuple[End, ...]:
    assert task.lease is not None
    return _with_end(task, task.lease.token, outcome)


def _with_end(task: Task, token: str, outcome: str) -> tuple[End, ...]:
    return (*task.ends[1 - ENDS_KEPT :], End(task.fence, token, outcome))


def _failed(task: Task, now: datetime, worker: str, cause: Cause) -> tuple[Failure, ...]:
    name = cause.fingerprint or fingerprint(cause.type, cause.message, cause.traceback, task.id)
    failure = Failure(task.attempts, now, worker, cause.type, cause.message, cause.traceback, name)
    failures = [*task.errors[1 - ERRORS_KEPT :], failure]
    left = ERRORS_BYTES - sum(map(_size, failures))
    for index, long in enumerate(failures):  # the oldest give first
        if left >= 0:
            break
        kept = "" if index < len(failures) - 1 else long.traceback[-500:]
        short = replace(long, type=long.type[:100], message=long.message[:100], traceback=kept)
        left += _size(long) - _size(short)
        failures[index] = short
    return tuple(failures)


def _size(failure: Failure) -> int:
    return len(msgspec.json.encode(failure))


def _first_fence(now: datetime) -> int:
    # Microseconds grow faster than a task can be claimed, so a purged and re-added id never goes back.
    return int(now.timestamp() * 1_000_000)


class Add(msgspec.Struct, frozen=True, gc=False):
    """A new pending record, unless there is one."""

    task_id: str
    create_id: str  # names this very write
    data: Any = None
    not_before: datetime | None = None
    priority: int = 0

    def __call__(self, task: Task | None, now: datetime) -> Task | None:
        if task is not None:
            return task
        return Task(
            id=self.task_id,
            status=Status.PENDING,
            fence=_first_fence(now),
            data=self.data,
            create_time=now,
            update_time=now,
            not_before=self.not_before,
            priority=self.priority,
            create_id=self.create_id,
        )


class Claim(msgspec.Struct, frozen=True, gc=False):
    """This claim holds the task, if nobody else does and it may be run.

    Takes over an expired lease. A claim that finds the attempts used up stores `exhausted` instead. A class, so that
    a store can undo a claim whose claimant has gone.
    """

    task_id: str
    terms: Terms
    judge: Judge
    max_attempts: int  # claims that count before the task is exhausted
    data: Any = None  # of a new record
    force: bool = False  # overrides status and due time, never a live lease
    explicit: bool = True  # somebody asked for this very task, who does not wait for a failure's backoff

    def undo(self) -> Rule:
        """As if it had not been."""
        return Release(self.terms.token, NO_CHANGES, counted=False)

    def __call__(self, task: Task | None, now: datetime) -> Task | None:
        terms = self.terms
        if task is None:
            return Task(
                id=self.task_id,
                status=Status.IN_PROGRESS,
                attempts=1,
                fence=_first_fence(now) + 1,
                data=self.data,
                create_time=now,
                update_time=now,
                start_time=now,
                lease=terms.lease(now, now),
                create_id=terms.token,
            )
        if task.lease is not None and (task.lease.token == terms.token or self.judge.is_live(task.lease, now)):
            return task  # held, perhaps by this claim
        if outcome_of(task, terms.token) is not None:
            return task  # this claim landed and was overtaken
        if task.lease is not None:
            task = _expired(task, now)
        elif not self.force and (task.status.is_final or self._is_early(task, now)):
            return task
        if not self.force and task.attempts >= self.max_attempts:
            return _exhausted(task, now, terms.token)
        if task.status is Status.SUCCEEDED:
            task = replace(task, result=None, steps=())
        return replace(
            task,
            status=Status.IN_PROGRESS,
            attempts=task.attempts + 1,
            fence=task.fence + 1,
            lease=terms.lease(now, now),
            update_time=now,
            start_time=now,
            finish_time=None,
            not_before=None,
            backoff=False,
            progress=None,
        )

    def _is_early(self, task: Task, now: datetime) -> bool:
        return task.not_before is not None and now < task.not_before and not (self.explicit and task.backoff)


class Renew(msgspec.Struct, frozen=True, gc=False):
    """The run's changes are in the record, and its lease lasts a full term from now.

    Every write under a lease renews it. A store may serve these first.
    """

    terms: Terms
    changes: Changes

    def __call__(self, task: Task | None, now: datetime) -> Task | None:
        if task is None or task.lease is None or task.lease.token != self.terms.token:
            return task
        lease = self.terms.lease(task.lease.acquired_at, now)
        return replace(task, lease=lease, update_time=now, **self.changes.onto(task))


class Succeed(msgspec.Struct, frozen=True, gc=False):
    """The claim ends with a success."""

    token: str
    changes: Changes
    result: Any

    def __call__(self, task: Task | None, now: datetime) -> Task | None:
        if task is None or task.lease is None or task.lease.token != self.token:
            return task
        return replace(
            task,
            status=Status.SUCCEEDED,
            result=self.result,
            lease=None,
            ends=_ended(task, "succeeded"),
            last_outcome=None,
            releases=0,
            update_time=now,
            finish_time=now,
            **self.changes.onto(task),
        )


class Fail(msgspec.Struct, frozen=True, gc=False):
    """The claim ends with an error: `failed`, or `exhausted` where no attempt is left or none is wanted."""

    token: str
    changes: Changes
    cause: Cause
    max_attempts: int
    retryable: bool  # whether this error is worth another attempt
    wait: float  # seconds before that
    outcome: Literal["error", "timeout"] = "error"

    def __call__(self, task: Task | None, now: datetime) -> Task | None:
        if task is None or task.lease is None or task.lease.token != self.token:
            return task
        again = self.retryable and task.attempts < self.max_attempts
        waits = again and self.wait > 0
        return replace(
            task,
            status=Status.FAILED if again else Status.EXHAUSTED,
            errors=_failed(task, now, task.lease.worker, self.cause),
            lease=None,
            ends=_ended(task, "failed" if again else "exhausted"),
            last_outcome=self.outcome,
            releases=0,
            update_time=now,
            finish_time=now,
            not_before=later(now, self.wait) if waits else None,
            backoff=waits,
            **self.changes.onto(task),
        )


class Release(msgspec.Struct, frozen=True, gc=False):
    """The claim ends without an outcome: pending again, and the attempt is given back."""

    token: str
    changes: Changes
    chance: float = 0.0  # a random number in [0, 1), for the wait after repeated releases
    counted: bool = True  # a body had begun; after ten such releases in a row the attempt is kept
    outcome: LastOutcome = "cancelled"  # why

    def __call__(self, task: Task | None, now: datetime) -> Task | None:
        if task is None or task.lease is None or task.lease.token != self.token:
            return task
        releases = task.releases + self.counted
        fields = self.changes.onto(task)
        if self.counted and releases > 1:
            wait = self.chance * min(MAX_RELEASE_DELAY, RELEASE_DELAY * 2.0 ** (releases - 2))
            fields = fields | {"not_before": later(now, wait), "backoff": True}
        return replace(
            task,
            status=Status.PENDING,
            attempts=task.attempts if releases > FREE_RELEASES else max(0, task.attempts - 1),
            lease=None,
            ends=_ended(task, "lease_lost" if self.outcome == "lease_lost" else "released"),
            last_outcome=self.outcome,
            releases=releases,
            update_time=now,
            finish_time=now,
            **fields,
        )


class Postpone(msgspec.Struct, frozen=True, gc=False):
    """The claim ends as its body asked: pending, not to be run by anybody for some seconds, the attempt given back."""

    token: str
    changes: Changes
    seconds: float

    def __call__(self, task: Task | None, now: datetime) -> Task | None:
        if task is None or task.lease is None or task.lease.token != self.token:
            return task
        return replace(
            task,
            status=Status.PENDING,
            attempts=max(0, task.attempts - 1),
            lease=None,
            ends=_ended(task, "postponed"),
            last_outcome=None,
            releases=0,
            update_time=now,
            finish_time=now,
            not_before=later(now, self.seconds),
            backoff=False,
            **self.changes.onto(task),
        )


class Aim(msgspec.Struct, frozen=True, gc=False):
    """Which record a change by hand is meant for: the one that was first read, as long as it is the same."""

    judge: Judge
    fence: int
    status: Status
    force: bool  # takes a live lease away
    query: Query | None = None

    def hits(self, task: Task, now: datetime) -> bool:
        if (task.fence, task.status) != (self.fence, self.status):
            return False
        if self.query is not None and not self.query.matches(task):
            return False
        return self.force or not self.judge.is_live(task.lease, now)


class Author(msgspec.Struct, frozen=True, gc=False):
    """Who changes tasks by hand, and why."""

    who: str
    reason: str = ""

    def noted(self, task: Task, verb: Literal["reset", "ignore"], now: datetime) -> tuple[Change, ...]:
        """The task's changes, with this one."""
        return (*task.changes[1 - CHANGES_KEPT :], Change(verb, now, self.who, self.reason))


class Reset(msgspec.Struct, frozen=True, gc=False):
    """Pending, with all attempts before it.

    Finished steps are kept, so that a pipeline goes on at the one that failed, unless the task had succeeded, or
    `from_step` names the first one to forget. A task that had succeeded without that one stays as it is.
    """

    aim: Aim
    author: Author
    from_step: str | None = None

    def __call__(self, task: Task | None, now: datetime) -> Task | None:
        if task is None or not self.aim.hits(task, now):
            return task
        steps = _steps_before(task, self.from_step)
        if self.from_step is not None and task.status is Status.SUCCEEDED and steps is task.steps:
            return task
        new = replace(
            _taken_away(task),
            status=Status.PENDING,
            attempts=0,
            result=None,
            steps=steps,
            releases=0,
            start_time=None,
            finish_time=None,
            not_before=None if task.backoff else task.not_before,
            backoff=False,
            progress=None,
        )
        if new == task:
            return task
        return replace(new, update_time=now, changes=self.author.noted(task, "reset", now))


class Ignore(msgspec.Struct, frozen=True, gc=False):
    """Set aside: not run until somebody resets it."""

    aim: Aim
    author: Author

    def __call__(self, task: Task | None, now: datetime) -> Task | None:
        if task is None or task.status is Status.IGNORED or not self.aim.hits(task, now):
            return task
        return replace(
            _taken_away(task),
            status=Status.IGNORED,
            update_time=now,
            not_before=None,
            backoff=False,
            changes=self.author.noted(task, "ignore", now),
        )


class Purge(msgspec.Struct, frozen=True, gc=False):
    """The record is gone, if it is older than an hour or `force` is set."""

    aim: Aim

    def __call__(self, task: Task | None, now: datetime) -> Task | None:
        if task is None or not self.aim.hits(task, now):
            return task
        return None if self.aim.force or now - task.update_time >= PURGE_AGE else task


def _expired(task: Task, now: datetime) -> Task:
    assert task.lease is not None
    worker = task.lease.worker
    cause = Cause("LeaseLostError", f"the lease of {worker} ran out: killed, paused, blocked or cut off")
    return replace(
        task,
        lease=None,
        ends=_ended(task, "lease_lost"),
        errors=_failed(task, now, worker, cause),
        last_outcome="lease_lost",
    )


def _exhausted(task: Task, now: datetime, token: str) -> Task:
    errors = task.errors or _failed(task, now, "", Cause("CancelledError", "cancelled too often"))
    return replace(
        task,
        status=Status.EXHAUSTED,
        errors=errors,
        ends=_with_end(task, token, "exhausted"),  # so that the claim that found it out can tell
        update_time=now,
        finish_time=now,
        not_before=None,
        backoff=False,
    )


def _taken_away(task: Task) -> Task:
    if task.lease is None:
        return task
    return replace(task, lease=None, ends=_ended(task, "lease_lost"), last_outcome="lease_lost")


def _steps_before(task: Task, name: str | None) -> tuple[Step, ...]:
    if name is None:
        return () if task.status is Status.SUCCEEDED else task.steps
    names: Iterable[str] = (step.name for step in task.steps)
    for index, step_name in enumerate(names):
        if step_name == name:
            return task.steps[:index]
    return task.steps
