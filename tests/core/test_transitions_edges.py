"""What each rule changes, field by field, and that it changes nothing else; and its limits, to the last byte."""

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from aiotracker._core.fingerprint import fingerprint
from aiotracker._core.task import BootTime, Change, End, Failure, Lease, Status, Step, Task
from aiotracker._core.transitions import (
    ERRORS_BYTES,
    NO_CHANGES,
    Add,
    Aim,
    Author,
    Cause,
    Changes,
    Claim,
    Fail,
    Ignore,
    Judge,
    Postpone,
    Purge,
    Release,
    Renew,
    Reset,
    Rule,
    Succeed,
    Terms,
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)
THEN = NOW + timedelta(seconds=10)  # when the rule is applied
DUE = NOW + timedelta(days=1)
TTL = 60.0
JUDGE = Judge(lambda: BootTime("", 0.0), 0.0)
ANNA = Author("anna", "mended")
CHANGES = Changes({"note": "of the run", "progress": 0.75}, {"b": Step("b", Status.SUCCEEDED)})

HELD = Task(  # every field differs from what a rule would write into it
    id="job",
    status=Status.IN_PROGRESS,
    attempts=2,
    fence=100,
    data={"n": 1},
    result="of an earlier success",
    steps=(Step("a", Status.SUCCEEDED), Step("b", Status.FAILED)),
    errors=(Failure(1, NOW, "bob", "ValueError", "bad"),),
    last_outcome="error",
    releases=3,
    create_time=NOW - timedelta(days=3),
    update_time=NOW,
    start_time=NOW,
    finish_time=NOW - timedelta(days=1),
    not_before=DUE,
    backoff=True,
    priority=5,
    progress=0.5,
    note="kept",
    trace="kept too",
    changes=(Change("ignore", NOW, "bob"),),
    lease=Lease("mine", "cleo", NOW, NOW + timedelta(seconds=TTL), TTL),
    ends=(End(99, "bobs", "failed"),),
    create_id="first",
    write_id="latest",
    version="7",
)
FREE = replace(HELD, status=Status.FAILED, lease=None)
RAN = {"note": "of the run", "progress": 0.75, "steps": (Step("a", Status.SUCCEEDED), Step("b", Status.SUCCEEDED))}


def terms(token: str = "mine") -> Terms:
    return Terms(token, f"worker of {token}", TTL, lambda: BootTime("", 0.0))


def lease(token: str, acquired_at: datetime, renewed_at: datetime) -> Lease:
    return Lease(token, f"worker of {token}", acquired_at, renewed_at + timedelta(seconds=TTL), TTL)


def claim(token: str = "next", **options: Any) -> Claim:
    given: dict[str, Any] = {"max_attempts": 9} | options
    return Claim("job", terms(token), JUDGE, **given)


def fail(**options: Any) -> Fail:
    given: dict[str, Any] = {"max_attempts": 3, "retryable": True, "wait": 0.0} | options
    return Fail("mine", CHANGES, Cause("KeyError", "gone", "the traceback", "0123456789ab"), **given)


def failure(attempt: int = 2) -> Failure:
    return Failure(attempt, THEN, "cleo", "KeyError", "gone", "the traceback", "0123456789ab")


def ended(outcome: str) -> tuple[End, ...]:
    return (*HELD.ends, End(100, "mine", outcome))


def aim(task: Task, force: bool = False) -> Aim:
    return Aim(JUDGE, task.fence, task.status, force)


FINISHED = {"lease": None, "releases": 0, "update_time": THEN, "finish_time": THEN, **RAN}


@pytest.mark.parametrize(
    ("transition", "changed"),
    [
        (Renew(terms(), CHANGES), {"lease": lease("mine", NOW, THEN), "update_time": THEN, **RAN}),
        (
            Succeed("mine", CHANGES, "new"),
            FINISHED | {"status": Status.SUCCEEDED, "result": "new", "ends": ended("succeeded"), "last_outcome": None},
        ),
        (
            fail(wait=0.5, outcome="timeout"),
            FINISHED
            | {
                "status": Status.FAILED,
                "errors": (*HELD.errors, failure()),
                "ends": ended("failed"),
                "last_outcome": "timeout",
                "not_before": THEN + timedelta(seconds=0.5),
                "backoff": True,
            },
        ),
        (
            Postpone("mine", CHANGES, 30.0),
            FINISHED
            | {
                "status": Status.PENDING,
                "attempts": 1,
                "ends": ended("postponed"),
                "last_outcome": None,
                "not_before": THEN + timedelta(seconds=30),
                "backoff": False,
            },
        ),
        (
            Release("mine", CHANGES, counted=False),
            FINISHED
            | {
                "status": Status.PENDING,
                "attempts": 1,
                "ends": ended("released"),
                "last_outcome": "cancelled",
                "releases": 3,
            },
        ),
        (
            Release("mine", CHANGES, chance=0.5, outcome="timeout"),
            FINISHED
            | {
                "status": Status.PENDING,
                "attempts": 1,
                "ends": ended("released"),
                "last_outcome": "timeout",
                "releases": 4,
                "not_before": THEN + timedelta(seconds=2),
                "backoff": True,
            },
        ),
    ],
    ids=["renew", "succeed", "fail", "postpone", "undo", "release"],
)
def test_what_its_holder_writes_changes_these_fields_and_no_others(transition: Rule, changed: dict[str, Any]) -> None:
    assert transition(HELD, THEN) == replace(HELD, **changed)


@pytest.mark.parametrize(
    "transition",
    [
        Renew(terms("other"), CHANGES),
        Succeed("other", CHANGES, 1),
        replace(fail(), token="other"),
        Release("other", CHANGES),
        Postpone("other", CHANGES, 1.0),
    ],
    ids=lambda transition: type(transition).__name__,
)
@pytest.mark.parametrize("task", [HELD, FREE], ids=["held", "free"])
def test_who_does_not_hold_a_task_writes_nothing(transition: Rule, task: Task) -> None:
    assert transition(task, THEN) is task


@pytest.mark.parametrize(
    ("options", "status"),
    [
        ({"max_attempts": 3}, Status.FAILED),
        ({"max_attempts": 2}, Status.EXHAUSTED),
        ({"max_attempts": 1}, Status.EXHAUSTED),
        ({"max_attempts": 3, "retryable": False}, Status.EXHAUSTED),
    ],
)
@pytest.mark.parametrize("wait", [0.0, 0.5])
def test_a_failure_waits_if_there_is_another_attempt_and_is_the_end_otherwise(
    options: dict[str, Any], status: Status, wait: float
) -> None:
    task = fail(wait=wait, **options)(HELD, THEN)
    assert task is not None
    waits = status is Status.FAILED and wait > 0
    assert task.status is status
    assert task.ends[-1].outcome == status.value
    assert (task.not_before, task.backoff) == (THEN + timedelta(seconds=wait) if waits else None, waits)


def test_a_claim_after_a_failure_changes_these_fields_and_no_others() -> None:
    assert claim()(FREE, DUE) == replace(
        FREE,
        status=Status.IN_PROGRESS,
        attempts=3,
        fence=101,
        lease=lease("next", DUE, DUE),
        update_time=DUE,
        start_time=DUE,
        finish_time=None,
        not_before=None,
        backoff=False,
        progress=None,
    )


OVER = NOW + timedelta(seconds=TTL)
LOST = Failure(
    2,
    OVER,
    "cleo",
    "LeaseLostError",
    "the lease of cleo ran out: killed, paused, blocked or cut off",
    fingerprint=fingerprint("LeaseLostError", "the lease of anybody ran out: killed, paused, blocked or cut off"),
)


def test_a_lease_is_taken_over_from_its_last_moment_on_and_the_record_says_whose_it_was() -> None:
    assert claim()(HELD, OVER - timedelta(microseconds=1)) is HELD
    assert claim()(HELD, OVER) == replace(
        HELD,
        attempts=3,
        fence=101,
        errors=(*HELD.errors, LOST),
        ends=ended("lease_lost"),
        last_outcome="lease_lost",
        lease=lease("next", OVER, OVER),
        update_time=OVER,
        start_time=OVER,
        finish_time=None,
        not_before=None,
        backoff=False,
        progress=None,
    )


def test_a_claim_that_finds_the_attempts_used_up_by_dead_workers_ends_the_task_and_remembers_that_it_did() -> None:
    assert claim(max_attempts=3)(HELD, OVER) != claim(max_attempts=2)(HELD, OVER)
    assert claim(max_attempts=2)(HELD, OVER) == replace(
        HELD,
        status=Status.EXHAUSTED,
        lease=None,
        errors=(*HELD.errors, LOST),
        ends=(*ended("lease_lost"), End(100, "next", "exhausted")),
        last_outcome="lease_lost",
        update_time=OVER,
        finish_time=OVER,
        not_before=None,
        backoff=False,
    )


def test_a_task_that_was_only_ever_cancelled_ends_with_an_error_of_nobody() -> None:
    task = claim(max_attempts=2)(replace(FREE, errors=()), DUE)
    assert task is not None
    name = fingerprint("CancelledError", "cancelled too often")
    assert task.errors == (Failure(2, DUE, "", "CancelledError", "cancelled too often", fingerprint=name),)


def test_a_new_record_has_what_it_was_given_and_nothing_else() -> None:
    assert Add("job", "me", {"n": 1}, DUE, -2)(None, NOW) == Task(
        id="job",
        status=Status.PENDING,
        fence=1_767_225_600_000_000,
        data={"n": 1},
        create_time=NOW,
        update_time=NOW,
        not_before=DUE,
        priority=-2,
        create_id="me",
    )
    assert Add("job", "me")(HELD, NOW) is HELD


def test_a_first_claim_is_the_same_whether_it_makes_the_record_or_finds_it_just_added() -> None:
    made = claim(data=1)(None, NOW)
    found = claim()(Add("job", "next", 1)(None, NOW), NOW)
    assert made == found
    assert made is not None
    # In microseconds since 1970, which later claims and later releases of this library must not fall behind.
    assert made.fence == 1_767_225_600_000_001
    assert (made.create_time, made.update_time, made.start_time) == (NOW, NOW, NOW)


def test_a_reset_changes_these_fields_and_no_others() -> None:
    changed: dict[str, Any] = {
        "status": Status.PENDING,
        "attempts": 0,
        "result": None,
        "releases": 0,
        "start_time": None,
        "finish_time": None,
        "not_before": None,
        "backoff": False,
        "progress": None,
        "update_time": THEN,
        "changes": (*HELD.changes, Change("reset", THEN, "anna", "mended")),
    }
    assert Reset(aim(FREE), ANNA)(FREE, THEN) == replace(FREE, **changed)
    taken = {"lease": None, "ends": ended("lease_lost"), "last_outcome": "lease_lost"}
    assert Reset(aim(HELD, force=True), ANNA)(HELD, THEN) == replace(HELD, **changed, **taken)


def test_to_ignore_changes_these_fields_and_no_others() -> None:
    changed: dict[str, Any] = {
        "status": Status.IGNORED,
        "not_before": None,
        "backoff": False,
        "update_time": THEN,
        "changes": (*HELD.changes, Change("ignore", THEN, "anna", "mended")),
    }
    assert Ignore(aim(FREE), ANNA)(FREE, THEN) == replace(FREE, **changed)
    taken = {"lease": None, "ends": ended("lease_lost"), "last_outcome": "lease_lost"}
    assert Ignore(aim(HELD, force=True), ANNA)(HELD, THEN) == replace(HELD, **changed, **taken)
    ignored = replace(FREE, status=Status.IGNORED)
    assert Ignore(aim(ignored), ANNA)(ignored, THEN) is ignored


HOUR = timedelta(hours=1)


@pytest.mark.parametrize("age", [timedelta(), HOUR - timedelta(microseconds=1), HOUR])
def test_a_purge_spares_records_younger_than_an_hour_unless_it_is_forced(age: timedelta) -> None:
    kept = Purge(aim(FREE))(FREE, FREE.update_time + age)
    assert kept is (None if age >= HOUR else FREE)
    assert Purge(aim(FREE, force=True))(FREE, FREE.update_time + age) is None


@pytest.mark.parametrize("force", [False, True])
def test_by_hand_what_is_held_is_passed_over_until_its_lease_is_over_or_with_force(force: bool) -> None:
    old = replace(HELD, update_time=NOW - HOUR)
    for rule in (Reset(aim(old, force), ANNA), Ignore(aim(old, force), ANNA), Purge(aim(old, force))):
        assert (rule(old, OVER - timedelta(microseconds=1)) is old) is not force
        assert rule(old, OVER) is not old


@pytest.mark.parametrize(
    ("releases", "longest"), [(0, None), (1, 1.0), (2, 2.0), (3, 4.0), (6, 32.0), (7, 60.0), (500, 60.0)]
)
def test_the_wait_after_a_release_doubles_up_to_a_minute_and_is_drawn_from_all_of_it(
    releases: int, longest: float | None
) -> None:
    for chance in (0.0, 0.25):
        task = Release("mine", NO_CHANGES, chance)(replace(HELD, releases=releases, not_before=None), THEN)
        assert task is not None
        assert task.not_before == (None if longest is None else THEN + timedelta(seconds=chance * longest))


@pytest.mark.parametrize("attempts", [0, 1, 5])
def test_what_gives_an_attempt_back_gives_one_and_never_more_than_there_were(attempts: int) -> None:
    for transition in (Release("mine", NO_CHANGES), Postpone("mine", NO_CHANGES, 1.0)):
        task = transition(replace(HELD, attempts=attempts, releases=0), THEN)
        assert task is not None
        assert task.attempts == (attempts - 1 if attempts else 0)


# -- numbers that the documentation names, and what goes without saying


def test_the_last_5_errors_and_the_last_8_ends_are_kept() -> None:
    task: Task = replace(HELD, errors=(), ends=())
    for attempt in range(1, 11):
        failed = fail(max_attempts=99)(replace(task, attempts=attempt, lease=HELD.lease), THEN)
        assert failed is not None
        task = failed
    assert [each.attempt for each in task.errors] == [6, 7, 8, 9, 10]
    assert len(task.ends) == 8


@pytest.mark.parametrize(("releases", "attempts"), [(0, 1), (9, 1), (10, 2), (11, 2)])
def test_ten_releases_in_a_row_give_the_attempt_back(releases: int, attempts: int) -> None:
    task = Release("mine", NO_CHANGES)(replace(HELD, releases=releases), THEN)
    assert task is not None
    assert task.attempts == attempts


def test_what_is_not_given_is_what_most_would_want() -> None:
    added, made = Add("job", "me")(None, NOW), claim()(None, NOW)
    assert added is not None
    assert made is not None
    assert (added.data, added.not_before, added.priority, made.data) == (None, None, 0, None)
    assert claim()(FREE, THEN) is not FREE, "who asks for a task does not wait for a backoff"
    due = replace(FREE, backoff=False)
    assert claim()(due, THEN) is due, "nor overrides a due time"
    failed = Fail("mine", NO_CHANGES, Cause("E", "m"), 3, True, 0.0)(HELD, THEN)
    assert failed is not None
    assert (failed.last_outcome, failed.errors[-1].traceback) == ("error", "")
    released = Release("mine", NO_CHANGES)(HELD, THEN)
    assert released is not None
    assert (released.not_before, released.last_outcome, released.releases) == (THEN, "cancelled", 4)
    assert (released.note, released.progress, released.steps) == (HELD.note, HELD.progress, HELD.steps)
    reset = Reset(aim(FREE), Author("anna"))(FREE, THEN)
    assert reset is not None
    assert reset.changes[-1].reason == ""
    assert reset.steps == FREE.steps


# -- how much is kept of errors


def errors_after(errors: tuple[Failure, ...], cause: Cause) -> tuple[Failure, ...]:
    task = replace(fail(), cause=cause)(replace(HELD, errors=errors), THEN)
    assert task is not None
    return task.errors


def size(*failures: Failure) -> int:
    return sum(len(msgspec.json.encode(each)) for each in failures)


def test_an_error_is_named_by_its_cause_unless_the_cause_has_a_name() -> None:
    traceback = 'Traceback (most recent call last):\n  File "/app/job.py", line 1, in load\n    x\n'
    cause = Cause("KeyError", "no row of job", traceback)
    (named,) = errors_after((), cause)
    assert named.fingerprint == fingerprint("KeyError", "no row of job", traceback, "job")
    others = {
        fingerprint("ValueError", "no row of job", traceback, "job"),
        fingerprint("KeyError", "no column of job", traceback, "job"),
        fingerprint("KeyError", "no row of job", "", "job"),
        fingerprint("KeyError", "no row of job", traceback, ""),
    }
    assert named.fingerprint not in others
    (given,) = errors_after((), replace(cause, fingerprint="0123456789ab"))
    assert given.fingerprint == "0123456789ab"


def test_an_error_that_is_too_long_alone_keeps_its_beginning_and_the_end_of_its_traceback() -> None:
    type_, message, traceback = ("".join(f"{n}," for n in range(count)) for count in (100, 1000, 9000))
    (kept,) = errors_after((), Cause(type_, message, traceback, "0123456789ab"))
    assert kept == Failure(2, THEN, "cleo", type_[:100], message[:100], traceback[-500:], "0123456789ab")


@pytest.mark.parametrize("too_many", [0, 1])
def test_errors_that_fill_their_room_to_the_last_byte_are_kept_whole(too_many: int) -> None:
    old = tuple(Failure(1, NOW, "bob", "E", "m", "t" * 2000) for _ in range(4))
    room = ERRORS_BYTES - size(*old, replace(failure(), traceback=""))
    # An empty traceback is not encoded; another one costs its name, too.
    room -= size(replace(failure(), traceback="t")) - size(replace(failure(), traceback="")) - 1
    new = replace(failure(), traceback="t" * (room + too_many))
    cause = Cause(new.type, new.message, new.traceback, new.fingerprint)
    short = replace(old[0], traceback="")
    assert errors_after(old, cause) == ((short if too_many else old[0]), *old[1:], new)


@pytest.mark.parametrize("too_many", [0, 1])
def test_no_more_errors_are_shortened_than_must_be_and_the_oldest_first(too_many: int) -> None:
    old = tuple(Failure(1, NOW, "bob", "E", "m", "t" * 2000) for _ in range(4))
    short = replace(old[0], traceback="")
    new = failure()
    room = ERRORS_BYTES - size(short, *old[1:], new)
    new = replace(new, traceback=new.traceback + "t" * (room + too_many))
    cause = Cause(new.type, new.message, new.traceback, new.fingerprint)
    assert size(*old, new) > ERRORS_BYTES
    assert errors_after(old, cause) == (short, (short if too_many else old[1]), *old[2:], new)


def test_of_errors_that_are_all_shortened_only_the_latest_keeps_any_of_its_traceback() -> None:
    old = tuple(Failure(1, NOW, "bob", "E", "m", "t" * 8000) for _ in range(4))
    kept = errors_after(old, Cause("E", "m", "t" * 16_000))
    assert [len(each.traceback) for each in kept] == [0, 0, 0, 0, 500]
