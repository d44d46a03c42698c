"""Errors by cause."""

from datetime import UTC, datetime, timedelta

import pytest

from aiotracker import Failure, Status, Task
from aiotracker.cli.causes import Causes, cause_of

NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("message", "cause"),
    [
        ("row 17 of 2,000 is bad", "row # of # is bad"),
        ("no key 'tom' in \"users\"", "no key '…' in '…'"),
        ("<Thing at 0x7f00aa12bc>", "<Thing at #>"),
        ("blob 5f3c9a0b11 not found", "blob # not found"),
        ("user 123e4567-e89b-12d3-a456-426614174000 is gone", "user # is gone"),
        ("exit code 3: line 12", "exit code 3: line #"),
        ("cannot read the-id, sorry", "cannot read {}, sorry"),
        ("first line\nsecond line", "first line"),
        ("defaced facade", "defaced facade"),
        ("", ""),
    ],
)
def test_what_differs_from_task_to_task_is_left_out(message: str, cause: str) -> None:
    assert cause_of(message, "the-id") == cause


def failed(number: int, message: str, kind: str = "ValueError", status: Status = Status.FAILED) -> Task:
    time = NOW + timedelta(minutes=number)
    error = Failure(1, time, "w", kind, message)
    return Task(id=f"t{number}", status=status, create_time=NOW, update_time=time, errors=(error,))


def test_tasks_are_counted_by_cause_the_most_frequent_first() -> None:
    causes = Causes()
    causes.add(failed(9, "odd", "KeyError"))
    for number in (3, 1, 2, 4):
        causes.add(failed(number, f"row {number}", status=Status.EXHAUSTED if number > 2 else Status.FAILED))
    most, least = causes.sorted()
    assert (most.type, most.message, most.count, most.exhausted) == ("ValueError", "row #", 4, 2)
    assert (most.first, most.last) == (NOW + timedelta(minutes=1), NOW + timedelta(minutes=4))
    assert most.example == "row 4"
    assert most.ids == ["t3", "t1", "t2"]
    assert (least.type, least.count) == ("KeyError", 1)
