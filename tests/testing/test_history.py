"""The checker of histories: right ones pass, and each kind of wrong one is found."""

from datetime import UTC, datetime
from typing import Any

import pytest

from aiotracker import Lease, Status, Task
from aiotracker._core.task import End, Failure
from aiotracker.testing._history import Event, check_history, read_history

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def event(kind: Any, fence: int, time: float, **more: Any) -> Event:
    return Event(kind=kind, task="t", fence=fence, time=time, **more)


def claimed(fence: int, time: float, worker: str = "a", *, asked: float | None = None, left: float = 2.0) -> Event:
    return event("claimed", fence, time, asked=time - 0.1 if asked is None else asked, lease_left=left, worker=worker)


def ended(fence: int, time: float, outcome: str = "succeeded") -> list[Event]:
    return [
        event("effect", fence, time - 0.2),
        event("ending", fence, time - 0.1, outcome=outcome),
        event("ended", fence, time, outcome=outcome),
    ]


def record(status: Status = Status.SUCCEEDED, *, fence: int = 11, attempts: int = 1, **more: Any) -> Task:
    if status is Status.SUCCEEDED:
        more.setdefault("ends", (End(fence, "token", "succeeded"),))
    return Task(id="t", status=status, fence=fence, attempts=attempts, create_time=NOW, update_time=NOW, **more)


def rules(events: list[Event], task: Task | None, **options: Any) -> set[str]:
    return {violation.rule for violation in check_history(events, {"t": task}, max_attempts=3, **options)}


RIGHT = [event("added", 10, 0.0), claimed(11, 1.0), *ended(11, 2.0)]


def test_a_right_history_has_no_violation() -> None:
    assert rules(RIGHT, record()) == set()


def test_a_kill_and_a_takeover_after_the_lease_is_right() -> None:
    events = [event("added", 10, 0.0), claimed(11, 1.0), event("effect", 11, 1.5), claimed(12, 3.1, "b")]
    assert rules([*events, *ended(12, 4.0)], record(fence=12, attempts=2)) == set()


def test_a_claim_that_may_have_landed_just_after_the_lease_is_right() -> None:
    events = [event("added", 10, 0.0), claimed(11, 1.0), claimed(12, 3.2, "b", asked=2.9), *ended(12, 4.0)]
    assert rules(events, record(fence=12, attempts=2)) == set()


def test_a_claim_while_another_holds_a_live_lease_is_found() -> None:
    events = [event("added", 10, 0.0), claimed(11, 1.0), claimed(12, 2.5, "b"), *ended(12, 4.0)]
    assert rules(events, record(fence=12, attempts=2)) == {"one live lease"}


def test_a_claim_while_another_has_just_renewed_is_found() -> None:
    events = [
        event("added", 10, 0.0),
        claimed(11, 1.0),
        event("alive", 11, 2.8, lease_left=2.0),
        claimed(12, 4.0, "b"),
        *ended(12, 5.0),
    ]
    assert rules(events, record(fence=12, attempts=2)) == {"one live lease"}


def test_a_renewal_that_its_holder_learned_of_later_is_not_held_against_the_claim() -> None:
    events = [
        event("added", 10, 0.0),
        claimed(11, 1.0, left=0.5),
        claimed(12, 2.0, "b"),
        event("alive", 11, 2.1, lease_left=2.0),
        *ended(12, 4.0),
    ]
    assert rules(events, record(fence=12, attempts=2)) == set()


def test_a_claim_after_the_body_ended_is_right() -> None:
    events = [event("added", 10, 0.0), claimed(11, 1.0), *ended(11, 1.5, "failed"), claimed(12, 1.6, "b")]
    assert rules([*events, *ended(12, 4.0)], record(fence=12, attempts=2)) == set()


def test_two_claims_with_one_fence_are_found() -> None:
    assert "fences grow" in rules([*RIGHT, claimed(11, 9.0, "b")], record())


def test_a_fence_that_goes_back_is_found() -> None:
    events = [claimed(12, 1.0), *ended(12, 1.5, "failed"), claimed(11, 2.0, "b"), *ended(11, 3.0)]
    assert "fences grow" in rules(events, record(fence=11, attempts=2))


def test_two_acknowledged_successes_are_found() -> None:
    events = [*RIGHT, claimed(12, 1.95, "b", asked=1.85), *ended(12, 3.0)]
    assert "one outcome" in rules(events, record(fence=12, attempts=2))


def test_a_claim_after_an_acknowledged_success_is_found() -> None:
    assert "one outcome" in rules([*RIGHT, claimed(12, 5.0, "b")], record(fence=12, attempts=2))


def test_a_success_without_a_body_is_found() -> None:
    events = [event("added", 10, 0.0), claimed(11, 1.0), event("ended", 11, 2.0, outcome="succeeded")]
    assert rules(events, record()) == {"one outcome"}


@pytest.mark.parametrize(
    "task",
    [None, record(Status.PENDING), record(Status.FAILED, errors=(Failure(1, NOW, "a", "E", "e"),)), record(fence=12)],
    ids=["gone", "pending", "failed", "of another claim"],
)
def test_a_lost_success_is_found(task: Task | None) -> None:
    assert "nothing acknowledged is lost" in rules(RIGHT, task)


def test_a_lost_add_is_found() -> None:
    assert rules([event("added", 10, 0.0)], None) == {"nothing acknowledged is lost"}


def test_an_outcome_recorded_otherwise_than_told_is_found() -> None:
    events = [event("added", 10, 0.0), claimed(11, 1.0), *ended(11, 2.0, "lost")]
    assert "fenced" in rules(events, record())


def test_a_record_older_than_a_claim_is_found() -> None:
    assert "nothing acknowledged is lost" in rules([claimed(12, 1.0)], record(fence=11), finished=False)


@pytest.mark.parametrize("status", [Status.PENDING, Status.FAILED, Status.IN_PROGRESS])
def test_a_stuck_task_is_found_when_there_was_time_to_finish_it(status: Status) -> None:
    lease = Lease("t", "w", NOW, NOW, 2.0) if status is Status.IN_PROGRESS else None
    task = record(status, fence=10, attempts=0, lease=lease)
    assert rules([event("added", 10, 0.0)], task) == {"nothing is stuck"}
    assert rules([event("added", 10, 0.0)], task, finished=False) == set()


@pytest.mark.parametrize(
    ("attempts", "fence"), [(0, 11), (4, 20), (2, 11)], ids=["lost", "too many", "more than claims"]
)
def test_attempts_that_do_not_add_up_are_found(attempts: int, fence: int) -> None:
    events = [event("added", 10, 0.0), claimed(11, 1.0), event("effect", 11, 1.1)]
    task = record(Status.FAILED, fence=fence, attempts=attempts)
    assert rules(events, task, finished=False) == {"crashes count"}


def test_a_released_attempt_need_not_count() -> None:
    events = [event("added", 10, 0.0), claimed(11, 1.0), *ended(11, 2.0, "released")]
    assert rules(events, record(Status.PENDING, attempts=0), finished=False) == set()


def test_an_exhausted_task_without_an_error_is_found() -> None:
    task = record(Status.EXHAUSTED, fence=13, attempts=3)
    assert rules([event("added", 10, 0.0)], task) == {"crashes count"}


def test_an_effect_of_nobodys_claim_is_found() -> None:
    assert rules([event("added", 10, 0.0), event("effect", 12, 1.0)], record(fence=12), finished=False) == {
        "histories are whole"
    }


def test_an_effect_after_one_of_a_later_fence_is_found() -> None:
    events = [claimed(11, 1.0), claimed(12, 4.0, "b"), event("effect", 12, 4.5), event("effect", 11, 4.6)]
    assert rules(events, record(Status.FAILED, fence=12, attempts=2), finished=False) == {"effects are in order"}


def test_an_effect_of_an_older_fence_that_was_refused_is_right() -> None:
    events = [claimed(11, 1.0), claimed(12, 4.0, "b"), event("effect", 12, 4.5)]
    events.append(event("effect", 11, 4.6, accepted=False))
    assert rules(events, record(Status.FAILED, fence=12, attempts=2), finished=False) == set()


def test_an_effect_of_the_latest_fence_that_was_refused_is_found() -> None:
    events = [claimed(11, 1.0), event("effect", 11, 1.1, accepted=False)]
    assert rules(events, record(Status.FAILED), finished=False) == {"effects are in order"}


def test_a_success_of_a_claim_that_had_been_overtaken_is_found() -> None:
    events = [claimed(11, 1.0), claimed(12, 3.5, "b"), *ended(11, 4.0)]
    assert "one outcome" in rules(events, record(fence=12, attempts=2))


def test_a_release_that_was_overtaken_is_right_and_one_recorded_as_a_success_is_found() -> None:
    events = [event("added", 10, 0.0), claimed(11, 1.0), *ended(11, 2.0, "released")]
    lost = record(Status.PENDING, attempts=1, ends=(End(11, "token", "lease_lost"),))
    assert rules(events, lost, finished=False) == set()
    assert "fenced" in rules(events, record())


def test_an_attempt_that_was_released_and_counts_all_the_same_is_found() -> None:
    events = [event("added", 10, 0.0), claimed(11, 1.0), *ended(11, 2.0, "released")]
    task = record(Status.PENDING, attempts=1, releases=1, ends=(End(11, "token", "released"),))
    assert rules(events, task, finished=False) == {"crashes count"}
    assert rules(events, task.replace(releases=11), finished=False) == set()


def test_a_task_that_is_exhausted_too_early_is_found() -> None:
    failure = Failure(1, NOW, "a", "E", "e")
    task = record(Status.EXHAUSTED, fence=12, attempts=2, errors=(failure,))
    assert rules([event("added", 10, 0.0)], task) == {"crashes count"}


def test_a_task_that_kills_its_workers_and_is_not_exhausted_is_found() -> None:
    events = [event("added", 10, 0.0), claimed(11, 1.0), event("effect", 11, 1.1), claimed(12, 4.0, "b")]
    failure = Failure(3, NOW, "a", "E", "e")
    exhausted = record(Status.EXHAUSTED, fence=13, attempts=3, errors=(failure,))
    assert rules(events, exhausted, poison={"t": 3}) == set()
    assert rules(events, exhausted.replace(attempts=4, fence=14), poison={"t": 3}) == {"crashes count"}
    assert "crashes count" in rules(events, record(Status.PENDING, fence=12, attempts=2), poison={"t": 3})


def shift(kind: Any, time: float, worker: str) -> Event:
    return Event(kind=kind, task="", fence=0, time=time, worker=worker)


def early(boots: tuple[str, str], fence: int = 12) -> list[Event]:
    """A claim while another holds a live lease."""
    first = event("claimed", 11, 1.0, asked=0.9, lease_left=2.0, worker="a", boot=boots[0])
    second = event("claimed", fence, 2.5, asked=2.4, lease_left=2.0, worker="b", boot=boots[1])
    return [event("added", 10, 0.0), first, second, *ended(fence, 4.0)]


@pytest.mark.parametrize("boots", [("", ""), ("x", ""), ("x", "y")])
def test_a_lease_that_only_wall_clocks_could_tell_live_is_not_promised_when_one_is_off_beyond_bounds(
    boots: tuple[str, str],
) -> None:
    task = record(fence=12, attempts=2)
    for worker in "ab":
        beyond = shift("shifted_beyond", 2.0, worker)
        assert rules([*early(boots), beyond], task) == set()
        assert rules([*early(("x", "x")), beyond], task) == {"one live lease"}, "the boot's clock tells"
        over = [shift("shifted_beyond", 0.1, worker), shift("shifted", 0.5, worker)]
        assert rules([*early(boots), *over], task) == {"one live lease"}, "it is right again"
    assert rules([*early(boots), shift("shifted_beyond", 2.0, "c")], task) == {"one live lease"}


def test_a_lease_that_was_taken_by_one_who_died_with_his_clock_off_is_not_held_against_the_next() -> None:
    events, beyond = early(("x", "x"), fence=13), shift("shifted_beyond", 2.0, "c")
    assert rules([*events, beyond], record(fence=13, attempts=3)) == set()
    assert rules(events, record(fence=13, attempts=3)) == {"one live lease"}


def test_a_line_cut_off_by_a_kill_is_passed_over() -> None:
    whole = b'{"kind":"claimed","task":"t","fence":1,"time":1.0}\n'
    assert len(read_history([whole, whole[:20]])) == 1
