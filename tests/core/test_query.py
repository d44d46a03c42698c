import itertools
import re
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiotracker._core.fingerprint import fingerprint
from aiotracker._core.query import GROUPS, ORDERS, Query, Where, aware, check_group, group_of
from aiotracker._core.task import Failure, Lease, Status, Step, Task

NOW = datetime(2026, 1, 1, tzinfo=UTC)
HOURS = [NOW + timedelta(hours=hour) for hour in range(4)]
WORDS = ["", "a", "ab", "b"]

failures = st.builds(
    Failure,
    attempt=st.just(1),
    time=st.just(NOW),
    worker=st.sampled_from(["w1", "w2"]),
    type=st.sampled_from(["ValueError", "KeyError"]),
    message=st.sampled_from(["row 1", "row 2", "gone"]),
    fingerprint=st.sampled_from(["", "0123456789ab"]),
)
leases = st.builds(
    Lease,
    token=st.just("t"),
    worker=st.sampled_from(["w1", "w2"]),
    acquired_at=st.just(NOW),
    expires_at=st.just(NOW),
    ttl=st.just(1.0),
)
steps = st.builds(Step, name=st.sampled_from(["s", "t"]), status=st.sampled_from([Status.FAILED, Status.SUCCEEDED]))
tasks = st.builds(
    Task,
    id=st.sampled_from(["a", "ab", "abc", "b"]),
    status=st.sampled_from(list(Status)),
    attempts=st.integers(0, 3),
    data=st.sampled_from([None, 1, {}, {"n": 1}, {"n": True}, {"n": {"m": [1]}}]),
    steps=st.lists(steps, max_size=2).map(tuple),
    errors=st.lists(failures, max_size=2).map(tuple),
    last_outcome=st.sampled_from([None, "error", "cancelled"]),
    create_time=st.sampled_from(HOURS),
    update_time=st.sampled_from(HOURS),
    finish_time=st.sampled_from([None, *HOURS]),
    priority=st.integers(0, 2),
    lease=st.none() | leases,
)


def is_wanted(task: Task, name: str, value: Any) -> Any:
    """Each filter in the plainest words."""
    match name:
        case "status":
            return task.status in ([value] if isinstance(value, str) else value)
        case "prefix":
            return task.id[: len(value)] == value
        case "data":
            if not isinstance(task.data, dict):
                return False
            return all(key in task.data and repr(task.data[key]) == repr(value[key]) for key in value)
        case "error_type":
            return [error.type for error in task.errors][-1:] == [value]
        case "worker":
            who = task.lease.worker if task.lease else task.errors[-1].worker if task.errors else None
            return who == value
        case "fingerprint":
            error = task.errors[-1] if task.errors else None
            return error and (error.fingerprint or fingerprint(error.type, error.message)) == value
        case "last_outcome":
            return task.last_outcome == value
        case "min_attempts":
            return task.attempts >= value
        case "created_after":
            return task.create_time >= value
        case "updated_before":
            return task.update_time < value
        case "finished_before":
            return task.finish_time is not None and task.finish_time < value
    raise AssertionError(name)


wheres = st.fixed_dictionaries(
    {},
    optional={
        "status": st.sampled_from(list(Status)) | st.lists(st.sampled_from(list(Status)), min_size=1),
        "prefix": st.sampled_from(WORDS),
        "data": st.sampled_from([{}, {"n": 1}, {"n": True}, {"n": {"m": [1]}}, {"x": 1}]),
        "error_type": st.sampled_from(["ValueError", "KeyError"]),
        "worker": st.sampled_from(["w1", "w2"]),
        "last_outcome": st.sampled_from(["error", "cancelled"]),
        "fingerprint": st.sampled_from(
            ["0123456789ab", fingerprint("KeyError", "row 3"), fingerprint("KeyError", "gone")]
        ),
        "min_attempts": st.integers(0, 3),
        "created_after": st.sampled_from(HOURS),
        "updated_before": st.sampled_from(HOURS),
        "finished_before": st.sampled_from(HOURS),
    },
)


@given(where=wheres, task=tasks)
def test_a_task_matches_where_every_filter_says_so(where: dict[str, Any], task: Task) -> None:
    query = Query.build(where)  # type: ignore[arg-type]  # made by hypothesis
    assert query.matches(task) == all(is_wanted(task, name, value) for name, value in where.items())


@pytest.mark.parametrize(
    ("where", "matches"),
    [
        ({"step": "s"}, True),
        ({"step": "t"}, True),
        ({"step": "u"}, False),
        ({"step_status": "failed"}, True),
        ({"step_status": "in_progress"}, False),
        ({"step": "s", "step_status": "failed"}, False),
        ({"step": "t", "step_status": "failed"}, True),
    ],
)
def test_a_step_and_its_status_are_those_of_one_step(where: Where, matches: bool) -> None:
    steps = (Step("s", Status.SUCCEEDED), Step("t", Status.FAILED))
    task = Task(id="a", status=Status.FAILED, create_time=NOW, update_time=NOW, steps=steps)
    assert Query.build(where).matches(task) == matches


@pytest.mark.parametrize(
    ("stored", "wanted", "matches"),
    [
        (1, 1.0, True),
        (True, 1, False),
        (1, True, False),
        ({"a": 1}, {"a": True}, False),
        ({"a": 1}, {"a": 1}, True),
        ({"a": 1}, {}, False),
        ({"a": 1}, 1, False),
        ([1, 2], (1, 2), True),
        ([1, 2], [1], False),
        ([1], "1", False),
        ([True], [1], False),
        (None, None, True),
    ],
)
def test_data_is_compared_as_json(stored: Any, wanted: Any, matches: bool) -> None:
    task = Task(id="a", status=Status.PENDING, create_time=NOW, update_time=NOW, data={"x": stored})
    assert Query.build({"data": {"x": wanted}}).matches(task) == matches


@given(found=st.lists(tasks, max_size=12), order=st.sampled_from(ORDERS), descending=st.booleans())
def test_the_order_is_by_the_field_then_by_id_and_what_lacks_the_field_comes_last(
    found: list[Task], order: str, descending: bool
) -> None:
    query = Query.build({}, order_by=f"-{order}" if descending else order)
    got = query.sorted(found)
    assert sorted(map(repr, got)) == sorted(map(repr, found))
    values = [getattr(task, order) for task in got]
    having = [value for value in values if value is not None]
    assert values == having + [None] * (len(values) - len(having))
    assert having == sorted(having, reverse=descending)
    if order != "id":
        for one, two in itertools.pairwise(got):
            if getattr(one, order) == getattr(two, order):
                assert one.id <= two.id


def test_without_an_order_they_stay_as_they_come() -> None:
    found = [Task(id=name, status=Status.PENDING, create_time=NOW, update_time=NOW) for name in "bca"]
    assert Query.build({}).sorted(found) == found


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ({"colour": "red"}, "unknown filter 'colour'; there are: status, prefix"),
        ({"status": "done"}, "no status 'done'; there are: pending"),
        ({"status": []}, "an empty list would match nothing"),
        ({"status": 3}, "status takes a status or several, not 3"),
        ({"status": [3]}, "no status 3"),
        ({"min_attempts": -1}, "min_attempts takes an int of 0 or more, not -1"),
        ({"min_attempts": True}, "not True"),
        ({"data": 3}, "data takes a dict of keys and values, not 3"),
        ({"prefix": 3}, "prefix takes a str, not 3"),
        ({"created_after": "now"}, "created_after takes a datetime, not 'now'"),
        ({"created_before": datetime(2026, 1, 1)}, "has no time zone"),
        ({"fingerprint": "ValueError"}, "fingerprint takes 12 hexadecimal digits"),
        ({"last_outcome": "bad"}, "last_outcome is one of error, cancelled"),
        ({"step_status": "pending"}, "step_status is in_progress, failed or succeeded"),
    ],
)
def test_what_cannot_be_asked_is_refused_with_what_can(where: Any, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        Query.build(where)


@pytest.mark.parametrize(("order", "limit"), [("colour", None), (3, None), ("", None), (None, -1), (None, 1.5)])
def test_orders_and_limits_are_checked(order: Any, limit: Any) -> None:
    with pytest.raises(ValueError, match=r"(order_by is one of|limit takes)"):
        Query.build({}, order_by=order, limit=limit)


def test_times_are_taken_in_any_zone() -> None:
    given = datetime(2026, 1, 1, 9, tzinfo=ZoneInfo("Asia/Tokyo"))
    assert aware("x", given) == NOW
    assert aware("x", given).tzinfo is UTC


def test_one_status_may_be_given_as_a_word_or_as_itself() -> None:
    assert (
        Query.build({"status": "failed"})
        == Query.build({"status": Status.FAILED})
        == Query.build({"status": ["failed"]})
    )
    assert Query.build({}, limit=5).limit == 5


@given(task=tasks, by=st.sampled_from([group for group in GROUPS if group != "step"]))
def test_a_task_is_counted_where_the_filter_of_that_name_finds_it(task: Task, by: Any) -> None:
    group = group_of(task, by)
    if group:
        assert Query.build({by: group}).matches(task)  # type: ignore[misc]  # any name of a filter
    else:
        assert not task.errors or by == "last_outcome"


@pytest.mark.parametrize(
    ("status", "steps", "stands_at"),
    [
        (Status.PENDING, [], ""),
        (Status.IN_PROGRESS, ["succeeded", "in_progress"], "b"),
        (Status.IN_PROGRESS, ["in_progress", "failed"], "a"),
        (Status.IN_PROGRESS, ["in_progress", "in_progress"], "b"),
        (Status.FAILED, ["succeeded", "failed", "succeeded"], "b"),
        (Status.EXHAUSTED, ["succeeded", "succeeded"], "b"),
        (Status.PENDING, ["succeeded", "failed"], "b"),
        (Status.SUCCEEDED, ["succeeded", "failed", "succeeded"], "c"),
    ],
)
def test_a_task_stands_at_the_step_that_runs_or_failed_or_was_started_last(
    status: Status, steps: list[str], stands_at: str
) -> None:
    made = tuple(Step(name, Status(step)) for name, step in zip("abc", steps, strict=False))
    task = Task(id="t", status=status, create_time=NOW, update_time=NOW, steps=made)
    assert group_of(task, "step") == stands_at


def test_what_cannot_be_counted_by_is_refused_with_what_can() -> None:
    assert check_group("worker") == "worker"
    for by in ("colour", "", None, ["status"]):
        with pytest.raises(ValueError, match="by is one of status, error_type"):
            check_group(by)
