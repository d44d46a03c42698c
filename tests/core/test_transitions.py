"""The rules, as a machine of states that several workers, a person and time push about; and as tables."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule
from msgspec.structs import replace

from aiotracker._core.query import Query
from aiotracker._core.task import BootTime, Change, End, Failure, Lease, Status, Step, Task
from aiotracker._core.transitions import (
    CHANGES_KEPT,
    ENDS_KEPT,
    ERRORS_BYTES,
    ERRORS_KEPT,
    FREE_RELEASES,
    NO_CHANGES,
    PURGE_AGE,
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
    outcome_of,
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)
TTL = 60.0


def nowhere() -> BootTime:
    return BootTime("", 0.0)


JUDGE = Judge(nowhere, 0.0)
ANNA = Author("anna", "mended")


def terms(token: str, ttl: float = TTL) -> Terms:
    return Terms(token, f"worker of {token}", ttl, nowhere)


def claim(token: str, **options: Any) -> Claim:
    given: dict[str, Any] = {"judge": JUDGE, "max_attempts": 3} | options
    return Claim("job", terms(token), **given)


def apply(task: Task | None, *rules: Rule, now: datetime = NOW) -> Task:
    for transition in rules:
        task = transition(task, now)
    assert task is not None
    return task


def fail(token: str, **options: Any) -> Fail:
    given = {"max_attempts": 3, "retryable": True, "wait": 0.0} | options
    return Fail(token, NO_CHANGES, Cause("ValueError", "bad"), **given)


def held(token: str = "one", now: datetime = NOW) -> Task:
    return apply(None, claim(token), now=now)


class Life(RuleBasedStateMachine):
    """One record in a store, and any number of claims that think they hold it."""

    claims: Bundle[str] = Bundle("claims")

    def __init__(self) -> None:
        super().__init__()
        self.task: Task | None = None
        self.now = NOW
        self.tokens = 0
        self.fences: list[int] = []  # of all claims that were granted, over purges too
        self.holder: str | None = None
        self.ended: dict[str, str] = {}

    def do(self, transition: Rule) -> Task | None:
        """Applies a rule as a store does, and once more, as after a lost reply."""
        before = self.task
        self.task = transition(before, self.now)
        again = transition(self.task, self.now)
        assert again == self.task, "a rule changes nothing that it has changed"
        if not isinstance(transition, Renew):
            assert again is self.task
        return before

    @initialize(exists=st.booleans(), priority=st.integers(-3, 3))
    def begin(self, exists: bool, priority: int) -> None:
        if exists:
            self.do(Add("job", "added", {"n": 1}, None, priority))
            assert self.task is not None
            assert self.task.status is Status.PENDING

    @rule(target=claims, force=st.booleans(), explicit=st.booleans(), most=st.integers(1, 4))
    def claim(self, force: bool, explicit: bool, most: int) -> str:
        self.tokens += 1
        token = f"t{self.tokens}"
        before = self.do(claim(token, force=force, explicit=explicit, max_attempts=most))
        task = self.task
        assert task is not None
        if before is not None and JUDGE.is_live(before.lease, self.now):
            assert task is before, "a live lease is never taken"
        if task.lease is not None and task.lease.token == token:
            assert all(task.fence > fence for fence in self.fences), "fences grow"
            self.fences.append(task.fence)
            self.holder = token
            attempts = 0 if before is None else before.attempts
            assert task.attempts == attempts + 1
            if before is not None and before.lease is not None:
                assert outcome_of(task, before.lease.token) == "lease_lost"
                assert task.errors[-1].type == "LeaseLostError"
            if before is not None and not force:
                assert not before.status.is_final
                assert before.attempts < most
        elif task is not before:
            assert task.status is Status.EXHAUSTED
            assert task.attempts >= most
            assert task.errors, "it says why"
            assert outcome_of(task, token) == "exhausted"
            self.holder = None
        return token

    def end(self, token: str, transition: Rule, *outcomes: str) -> None:
        mine = self.task is not None and self.task.lease is not None and self.task.lease.token == token
        before = self.do(transition)
        if not mine:
            assert self.task is before, "who does not hold it changes nothing"
            return
        task = self.task
        assert task is not None
        assert task.lease is None
        assert outcome_of(task, token) in outcomes
        self.ended[token] = task.ends[-1].outcome
        self.holder = None

    @rule(token=claims)
    def succeed(self, token: str) -> None:
        self.end(token, Succeed(token, NO_CHANGES, 1), "succeeded")

    @rule(token=claims, retryable=st.booleans(), wait=st.sampled_from([0.0, 30.0, 1e300]))
    def fail(self, token: str, retryable: bool, wait: float) -> None:
        self.end(token, fail(token, retryable=retryable, wait=wait), "failed", "exhausted")

    @rule(token=claims, chance=st.floats(0, 0.999), counted=st.booleans())
    def release(self, token: str, chance: float, counted: bool) -> None:
        before = self.task
        self.end(token, Release(token, NO_CHANGES, chance, counted), "released")
        if self.task is not before:
            assert self.task is not None
            assert before is not None
            gives_back = self.task.releases <= FREE_RELEASES
            assert self.task.attempts == before.attempts - gives_back

    @rule(token=claims, seconds=st.sampled_from([0.0, 100.0]))
    def postpone(self, token: str, seconds: float) -> None:
        self.end(token, Postpone(token, NO_CHANGES, seconds), "postponed")

    @rule(token=claims)
    def renew(self, token: str) -> None:
        mine = self.task is not None and self.task.lease is not None and self.task.lease.token == token
        before = self.do(Renew(terms(token), NO_CHANGES))
        assert (self.task is not before) == mine

    @rule(seconds=st.sampled_from([1.0, TTL - 1, TTL, 4000.0]))
    def pass_time(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)

    def aim(self, force: bool) -> Aim:
        task = self.task
        return Aim(JUDGE, task.fence if task else 0, task.status if task else Status.PENDING, force)

    @rule(force=st.booleans())
    def reset(self, force: bool) -> None:
        self.by_hand(Reset(self.aim(force), ANNA), force)
        if self.task is not None and self.holder is None:
            assert self.task.status is Status.PENDING
            assert self.task.attempts == 0

    @rule(force=st.booleans())
    def ignore(self, force: bool) -> None:
        self.by_hand(Ignore(self.aim(force), ANNA), force)

    @rule(force=st.booleans())
    def purge(self, force: bool) -> None:
        before = self.task
        self.by_hand(Purge(self.aim(force)), force)
        if before is not None and self.now - before.update_time < PURGE_AGE and not force:
            assert self.task is before
        # Whoever adds it again needs longer than a microsecond for that.
        self.now += timedelta(microseconds=len(self.fences) + 1)

    def by_hand(self, transition: Rule, force: bool) -> None:
        before = self.do(transition)
        if before is not None and JUDGE.is_live(before.lease, self.now) and not force:
            assert self.task is before, "what is held is passed over"
        if self.task is None or self.task.lease is None:
            self.holder = None

    @rule(token=consumes(claims))
    def forget(self, token: str) -> None:
        """A worker dies."""

    @invariant()
    def is_sound(self) -> None:
        task = self.task
        if task is None:
            return
        assert (task.lease is not None) == (task.status is Status.IN_PROGRESS)
        assert (task.lease.token if task.lease else None) == self.holder
        assert task.attempts >= 0
        assert len(task.errors) <= ERRORS_KEPT
        assert len(task.ends) <= ENDS_KEPT
        assert [end.fence for end in task.ends] == sorted(end.fence for end in task.ends)
        if task.status is Status.EXHAUSTED:
            assert task.errors
        for token, outcome in self.ended.items():
            assert outcome_of(task, token) in (outcome, None), "an end does not change"
        assert Task.decode(task.encode()) == task


Life.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestLife = Life.TestCase


def test_a_claim_of_an_unknown_id_makes_the_record_with_its_data() -> None:
    task = apply(None, claim("one", data={"n": 1}))
    assert task.status is Status.IN_PROGRESS
    assert (task.data, task.attempts, task.create_id) == ({"n": 1}, 1, "one")
    assert task.lease == Lease("one", "worker of one", NOW, NOW + timedelta(seconds=TTL), TTL)


def test_a_claim_that_landed_is_recognised_after_its_own_lease_is_over() -> None:
    # Else it would be granted twice under one token, and its end would be taken for a lost lease.
    task = held()
    assert claim("one")(task, NOW + timedelta(seconds=TTL + 1)) is task


def test_a_claim_that_landed_and_was_overtaken_does_not_come_back() -> None:
    task = apply(held(), Release("one", NO_CHANGES))
    assert claim("one")(task, NOW) is task


@pytest.mark.parametrize("status", [Status.SUCCEEDED, Status.EXHAUSTED, Status.IGNORED])
def test_a_final_task_is_refused_unless_forced(status: Status) -> None:
    task = replace(
        apply(None, Add("job", "a")), status=status, attempts=3, result=1, steps=(Step("s", Status.SUCCEEDED),)
    )
    assert claim("one")(task, NOW) is task
    again = apply(task, claim("one", force=True))
    assert (again.status, again.attempts) == (Status.IN_PROGRESS, 4)
    assert (again.result, again.steps) == ((None, ()) if status is Status.SUCCEEDED else (1, task.steps))


@pytest.mark.parametrize(
    ("backoff", "explicit", "force", "is_refused"),
    [
        (False, False, False, True),
        (False, True, False, True),
        (False, True, True, False),
        (True, False, False, True),
        (True, True, False, False),
        (True, False, True, False),
    ],
)
def test_backoff_binds_the_machine_and_a_due_time_binds_both(
    backoff: bool, explicit: bool, force: bool, is_refused: bool
) -> None:
    task = replace(apply(None, Add("job", "a")), not_before=NOW + timedelta(seconds=1), backoff=backoff)
    transition = claim("one", explicit=explicit, force=force)
    assert (transition(task, NOW) is task) == is_refused
    assert transition(task, NOW + timedelta(seconds=1)) is not task


def test_the_undoing_of_a_claim_gives_the_attempt_back_and_counts_no_release() -> None:
    mine = claim("one")
    task = apply(apply(None, mine), mine.undo())
    assert (task.status, task.attempts, task.releases, task.lease) == (Status.PENDING, 0, 0, None)


def test_from_the_second_release_in_a_row_on_it_is_not_to_be_run_at_once() -> None:
    task = apply(held(), Release("one", NO_CHANGES, 0.5))
    assert task.not_before is None
    task = apply(task, claim("two"), Release("two", NO_CHANGES, 0.5))
    assert (task.not_before, task.backoff) == (NOW + timedelta(seconds=0.5), True)


def test_cancelled_too_often_it_is_exhausted_and_says_so() -> None:
    task = apply(None, Add("job", "a"))
    for count in range(1, FREE_RELEASES + 2):
        task = apply(task, claim(f"t{count}", max_attempts=1), Release(f"t{count}", NO_CHANGES))
        assert task.attempts == (count > FREE_RELEASES)
    task = apply(task, claim("last", max_attempts=1))
    assert task.status is Status.EXHAUSTED
    assert task.errors[-1].message == "cancelled too often"


def test_a_release_because_of_a_lost_lease_says_so() -> None:
    task = apply(held(), Release("one", NO_CHANGES, counted=False, outcome="lease_lost"))
    assert (task.last_outcome, outcome_of(task, "one"), task.attempts) == ("lease_lost", "lease_lost", 0)


def test_steps_keep_the_order_of_their_first_start() -> None:
    task = replace(held(), steps=(Step("a", Status.SUCCEEDED), Step("b", Status.FAILED)))
    changes = Changes({"note": "n"}, {"c": Step("c", Status.SUCCEEDED), "b": Step("b", Status.SUCCEEDED)})
    task = apply(task, Renew(terms("one"), changes))
    assert [(step.name, step.status) for step in task.steps] == [
        ("a", "succeeded"),
        ("b", "succeeded"),
        ("c", "succeeded"),
    ]
    assert task.note == "n"


@pytest.mark.parametrize(
    ("status", "from_step", "kept"),
    [
        (Status.FAILED, None, ["a", "b", "c"]),
        (Status.FAILED, "b", ["a"]),
        (Status.FAILED, "a", []),
        (Status.FAILED, "unknown", ["a", "b", "c"]),
        (Status.SUCCEEDED, None, []),
        (Status.SUCCEEDED, "c", ["a", "b"]),
        (Status.SUCCEEDED, "unknown", ["a", "b", "c"]),
    ],
)
def test_reset_forgets_the_steps_that_are_to_be_run_again(
    status: Status, from_step: str | None, kept: list[str]
) -> None:
    steps = tuple(Step(name, Status.SUCCEEDED) for name in "abc")
    task = replace(apply(None, Add("job", "a")), status=status, attempts=1, steps=steps)
    task = apply(task, Reset(Aim(JUDGE, task.fence, status, False), ANNA, from_step))
    assert [step.name for step in task.steps] == kept
    assert task.status is (Status.SUCCEEDED if (status, from_step) == (Status.SUCCEEDED, "unknown") else Status.PENDING)


def test_reset_drops_a_backoff_and_keeps_a_due_time() -> None:
    later = NOW + timedelta(days=1)
    for backoff, expected in ((True, None), (False, later)):
        task = replace(apply(None, Add("job", "a")), status=Status.FAILED, not_before=later, backoff=backoff)
        assert apply(task, Reset(Aim(JUDGE, task.fence, task.status, False), ANNA)).not_before == expected


@pytest.mark.parametrize("make", [partial(Reset, author=ANNA), partial(Ignore, author=ANNA), Purge])
def test_a_change_by_hand_is_for_the_record_that_was_looked_at(make: Callable[[Aim], Rule]) -> None:
    task = apply(held(), fail("one"))
    good = Aim(JUDGE, task.fence, Status.FAILED, True, Query())
    for aim in (
        replace(good, fence=task.fence - 1),
        replace(good, status=Status.PENDING),
        replace(good, query=Query(prefix="other")),
    ):
        assert make(aim)(task, NOW) is task
    assert make(good)(task, NOW) is not task
    assert make(good)(None, NOW) is None


def test_force_takes_a_lease_away_and_its_holder_can_write_nothing_more() -> None:
    task = held()
    for make in (Reset, Ignore):
        taken = apply(task, make(Aim(JUDGE, task.fence, task.status, True), ANNA))
        assert outcome_of(taken, "one") == "lease_lost"
        assert taken.last_outcome == "lease_lost"
        for late in (Renew(terms("one"), NO_CHANGES), Succeed("one", NO_CHANGES, 1), fail("one")):
            assert late(taken, NOW) is taken


@pytest.mark.parametrize(
    "transition",
    [
        Renew(terms("one"), NO_CHANGES),
        Succeed("one", NO_CHANGES, 1),
        fail("one"),
        Release("one", NO_CHANGES),
        Postpone("one", NO_CHANGES, 1.0),
    ],
    ids=lambda transition: type(transition).__name__,
)
def test_a_record_that_is_gone_is_not_made_again_by_its_old_holder(transition: Rule) -> None:
    assert transition(None, NOW) is None


def test_only_the_last_ends_are_kept() -> None:
    task = held("t0")
    for index in range(ENDS_KEPT + 1):
        task = apply(task, fail(f"t{index}", max_attempts=99), claim(f"t{index + 1}", max_attempts=99))
    assert outcome_of(task, "t0") is None
    assert outcome_of(task, "t1") == "failed"
    assert len(task.ends) == ENDS_KEPT
    assert len(task.errors) == ERRORS_KEPT


def test_however_long_errors_are_they_leave_room_and_the_latest_says_most() -> None:
    task = held("t0")
    for index in range(8):
        cause = Cause("\x01" * 200, "\x01" * 2000, f"{index}" + "\x01" * 8000)
        end = Fail(f"t{index}", NO_CHANGES, cause, 99, True, 0.0)
        task = apply(task, end, claim(f"t{index + 1}", max_attempts=99))
        assert len(replace(task, lease=None, ends=()).encode()) <= ERRORS_BYTES + 1000
    assert task.errors[-1].traceback
    assert not task.errors[0].traceback


def test_short_errors_are_kept_as_they_are() -> None:
    task = apply(held(), Fail("one", NO_CHANGES, Cause("E", "m", "t" * 8000), 3, True, 0.0))
    (failure,) = task.errors
    assert replace(failure, fingerprint="") == Failure(1, NOW, "worker of one", "E", "m", "t" * 8000)


def test_a_purged_and_added_record_has_a_larger_fence_although_it_was_claimed_very_often() -> None:
    task = apply(None, Add("job", "a"))
    for index in range(50):
        task = apply(task, claim(f"t{index}"), Release(f"t{index}", NO_CHANGES))
    assert apply(None, claim("new"), now=NOW + timedelta(microseconds=51)).fence > task.fence


# -- who may judge a lease


@pytest.mark.parametrize(
    ("boot", "seconds", "margin", "is_live"),
    [
        (BootTime("", 0.0), 59.9, 0.0, True),
        (BootTime("", 0.0), 60.0, 0.0, False),
        (BootTime("", 0.0), 64.9, 5.0, True),
        (BootTime("", 0.0), 65.0, 5.0, False),
        (BootTime("here", 1059.9), 1e6, 0.0, True),  # the wall clock jumped; the clock that nobody sets decides
        (BootTime("here", 1060.0), 0.0, 5.0, False),  # ... without a margin, since it is one and the same clock
        (BootTime("rebooted", 1.0), 59.9, 0.0, True),
        (BootTime("rebooted", 1.0), 60.0, 0.0, False),
    ],
)
def test_a_lease_is_live_until_its_last_moment(boot: BootTime, seconds: float, margin: float, is_live: bool) -> None:
    lease = Terms("t", "w", TTL, lambda: BootTime("here", 1000.0)).lease(NOW, NOW)
    judge = Judge(lambda: boot, margin)
    now = NOW + timedelta(seconds=seconds)
    assert judge.is_live(lease, now) == is_live
    assert (judge.left(lease, now) > 0) == is_live


def test_where_there_is_no_lease_none_is_live() -> None:
    assert not JUDGE.is_live(None, NOW)


def test_without_a_boot_clock_a_lease_does_not_name_one() -> None:
    lease = terms("t").lease(NOW, NOW)
    assert (lease.boot_id, lease.boot_expires) == ("", 0.0)


def test_a_lease_beyond_the_end_of_the_calendar_is_one_without_an_end() -> None:
    assert terms("t", 1e300).lease(NOW, NOW).expires_at == datetime.max.replace(tzinfo=UTC)


def test_an_end_says_which_claim_it_was() -> None:
    task = apply(held(), Succeed("one", NO_CHANGES, None))
    assert task.ends == (End(task.fence, "one", "succeeded"),)
    assert outcome_of(None, "one") is None


def test_a_change_by_hand_says_who_made_it_when_and_why_and_the_last_few_are_kept() -> None:
    task = apply(held(), fail("one"))
    for number in range(CHANGES_KEPT + 2):
        later = NOW + timedelta(minutes=number)
        aim = Aim(JUDGE, task.fence, task.status, False)
        author = Author("anna", f"reason {number}")
        task = apply(task, Ignore(aim, author) if number % 2 else Reset(aim, author), now=later)
    assert len(task.changes) == CHANGES_KEPT
    assert task.changes[-2] == Change("reset", NOW + timedelta(minutes=4), "anna", "reason 4")
    assert task.changes[-1] == Change("ignore", NOW + timedelta(minutes=5), "anna", "reason 5")


def test_a_reset_that_changes_nothing_is_not_noted() -> None:
    task = apply(None, Add("job", "a"))
    assert apply(task, Reset(Aim(JUDGE, task.fence, task.status, False), ANNA)) is task


def test_a_plain_lifecycle_stores_nothing_about_changes() -> None:
    done = apply(held(), Succeed("one", NO_CHANGES, 1))
    assert b"changes" not in done.encode()
