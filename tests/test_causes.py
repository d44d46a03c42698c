"""Errors by cause."""

import itertools
from datetime import UTC, datetime, timedelta
from typing import Any

from aiotracker import Failure, MemoryTracker, Retry, RunningTask, Status, Task
from aiotracker.causes import DETAILED, Causes
from aiotracker.testing import FakeClock

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def failed(number: int, message: str, kind: str = "ValueError", status: Status = Status.FAILED, **fields: Any) -> Task:
    time = NOW + timedelta(minutes=number)
    error = Failure(1, time, "w", kind, message, f"Traceback {number}")
    given = {"last_outcome": "error", "errors": (error,)} | fields
    return Task(id=f"t{number}", status=status, create_time=NOW, update_time=time, **given)


def test_tasks_are_counted_by_cause_the_most_frequent_first() -> None:
    causes = Causes()
    causes.add(failed(9, "odd", "KeyError"))
    for number in (3, 1, 2, 4):
        causes.add(failed(number, f"row {number}", status=Status.EXHAUSTED if number > 2 else Status.FAILED))
    most, least = causes.sorted()
    assert (most.type, most.message, most.count, most.exhausted) == ("ValueError", "row #", 4, 2)
    assert (most.first, most.last) == (NOW + timedelta(minutes=1), NOW + timedelta(minutes=4))
    assert (most.example, most.traceback) == ("row 4", "Traceback 4")
    assert most.ids == ["t3", "t1", "t2"]
    assert (least.type, least.count) == ("KeyError", 1)
    assert most.fingerprint != least.fingerprint


def test_faults_of_the_work_come_before_those_of_what_it_ran_on() -> None:
    causes = Causes()
    for number in range(5):
        causes.add(failed(number, f"the lease of w{number} ran out", "LeaseLostError", last_outcome="lease_lost"))
    causes.add(failed(9, "odd"))
    assert [(cause.outcome, cause.is_fault, cause.count) for cause in causes.sorted()] == [
        ("error", True, 1),
        ("lease_lost", False, 5),
    ]


def test_the_first_time_is_that_of_the_first_attempt_that_had_this_error() -> None:
    causes = Causes()
    history = tuple(
        Failure(attempt, NOW + timedelta(hours=attempt), "w", "ValueError", message)
        for attempt, message in enumerate(("other", "row 1", "row 2"))
    )
    causes.add(failed(1, "", errors=history))
    (cause,) = causes.sorted()
    assert (cause.first, cause.last) == (NOW + timedelta(hours=1), NOW + timedelta(hours=2))


async def test_a_cause_finds_its_tasks_again() -> None:
    async def parse(task: RunningTask) -> None:
        if task.id.startswith("slow"):
            raise TimeoutError(f"{task.id} took {len(task.id)} s")
        raise ValueError(f"row {len(task.id)} of {task.id!r}")

    causes = Causes()
    async with MemoryTracker(clock=FakeClock(), retry=Retry(1)) as tracker:
        await tracker.work(parse, ids=["a", "bb", "slow-1", "slow-22"])
        async for task in tracker.find(status="exhausted"):
            causes.add(task)
        found = {cause.type: cause for cause in causes.sorted()}
        for kind, ids in (("ValueError", {"a", "bb"}), ("TimeoutError", {"slow-1", "slow-22"})):
            cause = found[kind]
            assert cause.place == "test_causes.py:parse"
            assert {task.id async for task in tracker.find(fingerprint=cause.fingerprint)} == ids == set(cause.ids)
        assert await tracker.count(by="fingerprint") == {cause.fingerprint: 2 for cause in found.values()}
        assert await tracker.reset(fingerprint=found["ValueError"].fingerprint) == 2
        assert (await tracker.count())["pending"] == 2


def test_of_messages_that_nothing_groups_the_tracebacks_are_bounded() -> None:
    causes = Causes()
    words = ["".join(pair) for pair in itertools.product("abcdefghijklmnopqrstuvwxyz", repeat=3)][: DETAILED + 5]
    for number, word in enumerate(words):
        causes.add(failed(number, word))
    found = causes.sorted()
    assert len(found) == DETAILED + 5
    assert sum(cause.traceback != "" for cause in found) == DETAILED
