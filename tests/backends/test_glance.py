"""A look at a line says no only where the task does not match; and counts as a look at the task does."""

from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiotracker import Failure, Lease, Query, Status, Step, Task
from aiotracker._core.query import GROUPS, group_of
from aiotracker.backends._glance import counter, may_match

NOW = datetime(2026, 1, 1, 8, tzinfo=UTC)
ZONES = (UTC, timezone(timedelta(hours=9)))
NASTY = [
    '"',
    "\\",
    'a"b',
    "é",
    "\x00",
    "\u2028",
    "finish_time",
    '"finish_time":"2020-01-01T00:00:00Z"',
    '"errors":[',
    "",
]

texts = st.sampled_from(["x", "ValueError", *NASTY])
times = st.builds(
    lambda micros, zone: (NOW + timedelta(microseconds=micros)).astimezone(zone),
    st.sampled_from([0, 1, 499_999, 500_000, 999_999, 1_000_000, 3_600_000_000, -1, -86_400_000_000]),
    st.sampled_from(ZONES),
)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=4,
)
failures = st.builds(
    Failure,
    attempt=st.just(1),
    time=times,
    worker=texts,
    type=texts,
    message=texts,
    traceback=texts,
    fingerprint=st.just(""),
)
tasks = st.builds(
    Task,
    id=texts.filter(bool),
    status=st.sampled_from(list(Status)),
    data=values,
    result=values,
    note=st.none() | texts,
    steps=st.lists(
        st.builds(
            Step, name=texts, status=st.sampled_from([Status.FAILED, Status.SUCCEEDED]), finish_time=st.none() | times
        ),
        max_size=2,
    ).map(tuple),
    errors=st.lists(failures, max_size=2).map(tuple),
    last_outcome=st.sampled_from([None, "error", "timeout"]),
    create_time=times,
    update_time=times,
    finish_time=st.none() | times,
    lease=st.none()
    | st.builds(Lease, token=texts, worker=texts, acquired_at=times, expires_at=times, ttl=st.just(1.0)),
)
wheres = st.fixed_dictionaries(
    {},
    optional={
        "data": st.dictionaries(texts, values, max_size=1),
        "error_type": texts,
        "worker": texts,
        "step": texts,
        "step_status": st.sampled_from(["failed", "succeeded"]),
        "last_outcome": st.sampled_from(["error", "timeout"]),
        "created_before": times,
        "updated_after": times,
        "finished_before": times,
        "finished_after": times,
    },
)


@given(task=tasks, where=wheres)
def test_a_look_never_passes_over_a_task_that_matches(task: Task, where: dict[str, Any]) -> None:
    query = Query.build(where)  # type: ignore[arg-type]  # made by hypothesis
    if query.matches(task):
        assert may_match(query)(task.encode())


@pytest.mark.parametrize("zone", ZONES, ids=str)
@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize("field", ["created", "updated", "finished"])
def test_a_look_at_a_time_never_passes_over_a_task_that_matches(field: str, side: str, zone: timezone) -> None:
    other = datetime(2000, 1, 1, tzinfo=UTC)
    steps = (Step("s", Status.FAILED, finish_time=other),)
    name = {"created": "create_time", "updated": "update_time", "finished": "finish_time"}[field]
    skipped = matching = 0
    for micros in (0, 1, 500_000, 999_999):
        time = (NOW + timedelta(microseconds=micros)).astimezone(zone)
        task = Task(id="t", status=Status.FAILED, create_time=NOW, update_time=NOW, steps=steps).replace(**{name: time})
        for delta in (-3600, -1, -0.5, -1e-6, 0, 1e-6, 0.5, 1, 3600):
            query = Query.build({f"{field}_{side}": time + timedelta(seconds=delta)})  # type: ignore[misc]  # any of them
            for data in (None, {name: "2000-01-01T00:00:00Z"}, {name: "2100-01-01T00:00:00Z"}):
                may = may_match(query)(task.replace(data=data).encode())
                matches = query.matches(task)
                assert may or not matches, (time, delta, data)
                skipped += not may
                matching += matches
    assert matching > 0
    assert (skipped > 0) == (zone is UTC), "only what is stored in UTC is told by its text"


@given(found=st.lists(tasks, max_size=4), where=st.just({}) | wheres, by=st.sampled_from(GROUPS))
def test_lines_are_counted_as_their_tasks_are(found: list[Task], where: dict[str, Any], by: Any) -> None:
    query = Query.build(where)  # type: ignore[arg-type]  # made by hypothesis
    if by != "status" or where:
        groups = counter(query, by)([task.encode() for task in found])
        assert sorted(groups) == sorted(group_of(task, by) for task in found if query.matches(task))


def test_what_another_time_holds_is_passed_over() -> None:
    task = Task(
        id="t", status=Status.PENDING, create_time=NOW, update_time=NOW, data={"finish_time": "2030-01-01T00:00:00Z"}
    )
    for where in ({"created_after": NOW + timedelta(hours=1)}, {"updated_before": NOW - timedelta(hours=1)}):
        assert not may_match(Query.build(where))(task.encode())  # type: ignore[arg-type]  # a TypedDict in the making
    assert not may_match(Query.build({"finished_after": NOW}))(task.replace(data=None).encode())
