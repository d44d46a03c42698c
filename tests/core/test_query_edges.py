"""Each filter alone, on a task that it finds and on one that it just does not; times at the very moment."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from aiotracker._core.query import GroupBy, Query, Where, group_of
from aiotracker._core.task import Failure, Lease, Status, Task

NOW = datetime(2026, 1, 1, tzinfo=UTC)
TICK = timedelta(microseconds=1)
TASK = Task(
    id="a",
    status=Status.FAILED,
    create_time=NOW,
    update_time=NOW + timedelta(hours=1),
    finish_time=NOW + timedelta(hours=2),
)


@pytest.mark.parametrize(
    ("before", "after", "time"),
    [
        ("created_before", "created_after", TASK.create_time),
        ("updated_before", "updated_after", TASK.update_time),
        ("finished_before", "finished_after", TASK.finish_time),
    ],
)
def test_before_leaves_its_moment_out_and_after_has_it(before: str, after: str, time: datetime) -> None:
    def matches(name: str, moment: datetime) -> bool:
        where: Where = {name: moment}  # type: ignore[misc]  # one of the names above
        return Query.build(where).matches(TASK)

    assert [matches(before, time + tick) for tick in (-TICK, timedelta(), TICK)] == [False, False, True]
    assert [matches(after, time + tick) for tick in (-TICK, timedelta(), TICK)] == [True, True, False]


def test_what_has_not_finished_did_so_neither_before_nor_after() -> None:
    task = TASK.replace(finish_time=None)
    assert not Query.build({"finished_before": NOW + timedelta(days=1)}).matches(task)
    assert not Query.build({"finished_after": NOW - timedelta(days=1)}).matches(task)


def test_of_several_times_all_must_be_right() -> None:
    hour = timedelta(hours=1)
    assert Query.build({"created_after": NOW, "finished_before": NOW + 3 * hour}).matches(TASK)
    assert not Query.build({"created_after": NOW, "finished_before": NOW + hour}).matches(TASK)
    assert not Query.build({"created_after": NOW + hour, "finished_before": NOW + 3 * hour}).matches(TASK)


FAILED = TASK.replace(
    id="order-17",
    attempts=2,
    data={"n": {"m": [1, "a"]}, "x": 1},
    last_outcome="error",
    errors=(
        Failure(1, NOW, "bob", "KeyError", "gone", fingerprint="000000000001"),
        Failure(2, NOW, "cleo", "ValueError", "bad", fingerprint="000000000002"),
    ),
)
HELD = FAILED.replace(status=Status.IN_PROGRESS, lease=Lease("t", "dora", NOW, NOW, 1.0))


@pytest.mark.parametrize(
    ("task", "where", "matches"),
    [
        (FAILED, {"status": ["failed", "ignored"]}, True),
        (FAILED, {"status": "exhausted"}, False),
        (FAILED, {"prefix": "order-"}, True),
        (FAILED, {"prefix": "rder"}, False),
        (FAILED, {"min_attempts": 2}, True),
        (FAILED, {"min_attempts": 3}, False),
        (FAILED, {"last_outcome": "error"}, True),
        (FAILED, {"last_outcome": "timeout"}, False),
        (FAILED, {"error_type": "ValueError"}, True),
        (FAILED, {"error_type": "KeyError"}, False),
        (TASK, {"error_type": "ValueError"}, False),
        (FAILED, {"worker": "cleo"}, True),
        (FAILED, {"worker": "bob"}, False),
        (HELD, {"worker": "dora"}, True),
        (HELD, {"worker": "cleo"}, False),
        (TASK, {"worker": "cleo"}, False),
        (FAILED, {"fingerprint": "000000000002"}, True),
        (FAILED, {"fingerprint": "000000000001"}, False),
        (TASK, {"fingerprint": "000000000001"}, False),
        (FAILED, {"data": {"x": 1}}, True),
        (FAILED, {"data": {"n": {"m": [1, "a"]}, "x": 1}}, True),
        (FAILED, {"data": {"n": {"m": [1]}}}, False),
        (FAILED, {"data": {"y": None}}, False),
        (TASK, {"data": {}}, False),
    ],
)
def test_a_filter_finds_what_it_says_and_no_more(task: Task, where: Where, matches: bool) -> None:
    assert Query.build(where).matches(task) == matches


@pytest.mark.parametrize(
    ("by", "of_failed", "of_held", "of_new"),
    [
        ("status", "failed", "in_progress", "pending"),
        ("last_outcome", "error", "error", ""),
        ("error_type", "ValueError", "ValueError", ""),
        ("fingerprint", "000000000002", "000000000002", ""),
        ("worker", "cleo", "dora", ""),
    ],
)
def test_a_task_is_counted_by_its_latest_error_and_by_who_holds_it(
    by: GroupBy, of_failed: str, of_held: str, of_new: str
) -> None:
    new = Task(id="a", status=Status.PENDING, create_time=NOW, update_time=NOW)
    assert [group_of(task, by) for task in (FAILED, HELD, new)] == [of_failed, of_held, of_new]


@pytest.mark.parametrize(
    ("order_by", "ids"),
    [
        ("priority", "bacd"),
        ("-priority", "dacb"),
        ("finish_time", "bdac"),
        ("-finish_time", "dbac"),
        ("-id", "dcba"),
    ],
)
def test_ties_are_in_the_order_of_ids_and_what_lacks_the_field_is_last_either_way(order_by: str, ids: str) -> None:
    def task(task_id: str, **fields: Any) -> Task:
        return Task(id=task_id, status=Status.PENDING, create_time=NOW, update_time=NOW, **fields)

    found = [
        task("c", priority=1),
        task("a", priority=1),
        task("d", priority=2, finish_time=NOW + TICK),
        task("b", finish_time=NOW),
    ]
    assert "".join(each.id for each in Query.build({}, order_by=order_by).sorted(found)) == ids
