"""The record of a task, as it is stored and as users see it.

`gc=False`: records hold JSON values, which have no cycles, and thousands of them at once would keep the garbage
collector busy for a quarter of the time.
"""

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Final, Literal, Self

import msgspec

__all__ = ["FINAL", "BootTime", "Change", "End", "Failure", "LastOutcome", "Lease", "Status", "Step", "Task"]


class Status(StrEnum):
    """Where a task stands. Stored as the word, so that a person can grep for it."""

    PENDING = "pending"
    IN_PROGRESS = "in_progress"
    FAILED = "failed"
    EXHAUSTED = "exhausted"
    SUCCEEDED = "succeeded"
    IGNORED = "ignored"

    @property
    def is_final(self) -> bool:
        """Nobody runs a task of this status again unless somebody asks."""
        return self in FINAL


FINAL: Final = frozenset({Status.SUCCEEDED, Status.EXHAUSTED, Status.IGNORED})

Time = Annotated[datetime, msgspec.Meta(tz=True)]  # a stored time without a zone would compare with nothing
LastOutcome = Literal["error", "cancelled", "lease_lost", "timeout"]
"""How a claim ended that did not succeed. `error`: the body raised, the work is at fault. The others tell of what it
ran on: `timeout`: the run's timeout was over, or a `TimeoutError` left the body; `lease_lost`: its worker died, was
paused, blocked or cut off, or the lease was taken away by hand; `cancelled`: it was told to stop."""


class BootTime(msgspec.Struct, frozen=True, gc=False):
    """A time that no one can set: it runs while the machine sleeps, and starts again with each boot."""

    boot_id: str  # empty: there is no such clock here
    seconds: float


class Lease(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """Who holds a task, and until when."""

    token: str  # names one claim; every write of that claim shows it
    worker: str  # who claimed, for people
    acquired_at: Time  # the store's time of the claim
    expires_at: Time  # the store's time at which anybody else may claim
    ttl: float  # seconds that each renewal grants
    boot_id: str = ""  # which boot of which machine `boot_expires` counts from; empty: unknown
    boot_expires: float = 0.0  # seconds since that boot; decides there, so that a wall clock that jumps expires nothing


class End(msgspec.Struct, frozen=True, gc=False):
    """How one claim ended; lets its holder recognise its own write after a lost reply."""

    fence: int
    token: str
    outcome: str  # succeeded, failed, exhausted, released, postponed, lease_lost


class Failure(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """One error of one attempt."""

    attempt: int
    time: Time
    worker: str
    type: str  # the name of the exception's class
    message: str
    traceback: str = ""
    fingerprint: str = ""  # names the cause, see `fingerprint_of`; empty if an older release or program wrote it


class Change(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """One change of a task by hand."""

    verb: Literal["reset", "ignore"]
    time: Time
    by: str  # who
    reason: str = ""  # why, if that was said


class Step(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """One named step of a pipeline."""

    name: str
    status: Status  # in_progress, succeeded or failed
    attempts: int = 1  # how often it was started
    start_time: Time | None = None  # of the last attempt
    finish_time: Time | None = None
    result: Any = None  # plain JSON; given instead of a second run
    error: Failure | None = None  # of the last attempt, if that failed

    @property
    def seconds(self) -> float | None:
        """How long the last attempt took; `None` while it runs."""
        if self.start_time is None or self.finish_time is None:
            return None
        return (self.finish_time - self.start_time).total_seconds()


class Task(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True, gc=False):
    """A task's record: immutable; `replace` gives a changed copy.

    `data`, `result` and the results of steps are plain JSON values (None, bool, int, float, str, list, dict).
    All times are aware, in UTC, by the store's clock.
    """

    id: str
    status: Status
    attempts: int = 0  # claims that count: a released or postponed one is given back
    fence: int = 0  # of the latest claim; grows with each, also over purge and re-adding
    data: Any = None  # the input and whatever the body keeps
    result: Any = None  # the output of a success
    steps: tuple[Step, ...] = ()  # in the order of their first start
    errors: tuple[Failure, ...] = ()  # the last few, oldest first
    last_outcome: LastOutcome | None = None  # how the latest claim ended, if not with a success
    releases: int = 0  # cancelled claims in a row
    create_time: Time
    update_time: Time  # of the latest stored change, renewals included
    start_time: Time | None = None  # of the latest claim
    finish_time: Time | None = None  # when the latest claim ended
    not_before: Time | None = None  # not to be run before
    backoff: bool = False  # `not_before` holds back `work` alone, not an explicit `run`
    priority: int = 0  # higher first
    progress: float | None = None  # set by the body
    note: str | None = None  # set by the body
    trace: str | None = None  # set by a hook: where the latest attempt is found in a tracing system
    changes: tuple[Change, ...] = ()  # the last few by hand, oldest first
    lease: Lease | None = None  # present while claimed
    ends: tuple[End, ...] = ()  # the last few ended claims, oldest first
    create_id: str = ""  # names the write that created the record
    write_id: str = ""  # names the latest write
    version: str | None = None  # what a guarded write compares; set by the backend, never encoded; None: not stored

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        return msgspec.structs.replace(self, **changes)

    def encode(self) -> bytes:
        """The stored form: one JSON object in UTF-8, without `version`.

        Raises:
            ValueError: A value cannot be stored as JSON.
        """
        task = self if self.version is None else msgspec.structs.replace(self, version=None)
        try:
            return _encoder.encode(task)
        except (TypeError, ValueError, OverflowError, RecursionError) as exc:
            raise ValueError(f"task {self.id!r} cannot be stored as JSON: {exc}") from exc

    @classmethod
    def decode(cls, raw: bytes | str, *, version: str | None = None) -> "Task":
        """The record from its stored form.

        Args:
            raw: What `encode` gave, or what an older release has stored.
            version: What a guarded write is to compare, as the store tells it.

        Raises:
            ValueError: `raw` is not a task's record.
        """
        try:
            task = _decoder.decode(raw)
        except (ValueError, RecursionError) as exc:
            raise ValueError(f"not a task's record: {exc}") from exc
        msgspec.structs.force_setattr(task, "version", version)
        return task


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Task)
