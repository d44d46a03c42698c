"""Filters by time, at the very moment."""

from datetime import UTC, datetime, timedelta

import pytest

from aiotracker._core.query import Query, Where
from aiotracker._core.task import Status, Task

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
