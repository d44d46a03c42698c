"""`analytics.summary`: how a store is going."""

import asyncio
from datetime import timedelta

import pytest

from aiotracker import GiveUp, InvalidValueError, MemoryTracker, Retry, analytics
from aiotracker.analytics import _summary
from aiotracker.testing import FakeClock


async def ran(tracker: MemoryTracker, clock: FakeClock, task_id: str, seconds: float, error: str = "") -> None:
    try:
        async with tracker.run(task_id) as task:
            clock.jump(seconds)
            if error:
                raise GiveUp(error)
            task.result = "ok"
    except GiveUp:
        pass


async def test_a_summary_counts_and_tells_rates_and_durations_of_the_last_minutes(clock: FakeClock) -> None:
    async with MemoryTracker(clock=clock, lease=600) as tracker:
        await ran(tracker, clock, "long ago", 100)
        clock.jump(3600)
        for number in range(10):
            await ran(tracker, clock, f"slow/{number}", 20 + number)
        clock.jump(120)
        for number in range(20):
            await ran(tracker, clock, f"quick/{number}", 1, "no page" if number % 4 == 0 else "")
        await tracker.add("waits")
        clock.jump(5)
        await tracker.add("waits too")
        found = await analytics.summary(tracker)
    assert found.counts["succeeded"] == 26
    assert (found.counts["exhausted"], found.counts["pending"], found.total) == (5, 2, 33)
    assert [(rate.minutes, rate.succeeded, rate.failed) for rate in found.rates] == [
        (1, 15, 5),
        (5, pytest.approx((15 + 6) / 5), 1),
        (15, pytest.approx(25 / 15), pytest.approx(5 / 15)),
    ]
    assert found.durations == analytics.Durations(25, 1, 27, 29, 29)
    assert len(found.minutes) == 15
    assert sum(minute.succeeded for minute in found.minutes) == 25
    last = found.minutes[-1]
    assert (last.succeeded, last.failed, last.p50, found.time - last.start) == (15, 5, 1, timedelta(minutes=1))
    assert found.oldest == analytics.Waiting("waits", found.time - timedelta(seconds=5), 5)


async def test_running_tasks_are_told_with_their_leases_and_the_late_ones_first(
    clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with MemoryTracker(clock=clock, lease=90, worker="w") as tracker:
        async with tracker.run("first") as first, tracker.run("second", lease=900) as second:
            first.note = "reading"
            await first.save()
            second.progress = 0.25

            async def look() -> analytics.Summary:
                await second.save()
                later = tracker.now() + timedelta(seconds=61)  # and nobody has renewed anything
                monkeypatch.setattr(tracker, "now", lambda: later)
                return await analytics.summary(tracker)

            found = await second.step("parse", look)
            monkeypatch.undo()
        assert [(run.id, run.worker, run.note, run.step, run.is_late) for run in found.running] == [
            ("first", "w", "reading", None, True),
            ("second", "w", None, "parse", False),
        ]
        assert [run.id for run in found.late] == ["first"]
        assert found.late[0].lease_left == pytest.approx(29)


async def test_failures_are_told_by_cause_and_the_latest_first(clock: FakeClock) -> None:
    async with MemoryTracker(clock=clock) as tracker:
        for number in range(3):
            await ran(tracker, clock, f"page/{number}", 1, f"no page {number}")
        await ran(tracker, clock, "page/9", 1, "forbidden")
        clock.jump(86_400)
        found = await analytics.summary(tracker)
        assert [(cause.tasks, cause.message) for cause in found.causes] == [(3, "no page #"), (1, "forbidden")]
        assert found.causes[0].example.startswith("page/")
        same = [task.id async for task in tracker.find(fingerprint=found.causes[1].fingerprint)]
        assert same == ["page/9"]
        assert [(failed.id, failed.type) for failed in found.failures][:2] == [
            ("page/9", "GiveUp"),
            ("page/2", "GiveUp"),
        ]
        assert found.durations is None
        assert found.rates[-1] == analytics.Rate(15, 0, 0)


async def test_a_summary_of_some_tasks_counts_only_these(clock: FakeClock) -> None:
    async with MemoryTracker(clock=clock, retry=Retry(1)) as tracker:
        await ran(tracker, clock, "a/1", 1)
        await ran(tracker, clock, "b/1", 1, "no")
        await tracker.add("b/2")
        found = await analytics.summary(tracker, prefix="b/")
        assert (found.total, found.rates[0].succeeded, found.rates[0].failed) == (2, 0, 1)
        pending = await analytics.summary(tracker, status="pending")
        assert (pending.total, pending.failures, pending.causes, pending.rates[0].failed) == (1, (), (), 0)
        assert pending.oldest is not None
        recent = await analytics.summary(tracker, finished_after=clock.now() + timedelta(seconds=1))
        assert recent.rates[0] == analytics.Rate(1, 0, 0)
        with pytest.raises(InvalidValueError, match="unknown filter"):
            await analytics.summary(tracker, colour="red")  # type: ignore[call-arg]  # that is the test


async def test_rates_of_more_ends_than_are_looked_at_are_of_a_shorter_time(
    clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_summary, "SAMPLE", 50)
    async with MemoryTracker(clock=clock) as tracker:
        for number in range(80):
            await ran(tracker, clock, str(number), 6)
        found = await analytics.summary(tracker)
    assert [round(rate.succeeded, 1) for rate in found.rates] == [11.0, 10.2, 10.2]
    assert found.rates[2].minutes == pytest.approx(4.9)


async def test_an_empty_store_has_a_summary(clock: FakeClock) -> None:
    async with MemoryTracker(clock=clock) as tracker:
        found = await asyncio.wait_for(analytics.summary(tracker), 10)
    assert (found.total, found.oldest, found.running, found.causes) == (0, None, (), ())


async def test_tasks_may_be_left_out(clock: FakeClock) -> None:
    async with MemoryTracker(clock=clock) as tracker:
        await tracker.add_many(["a", "b"])
        found = await analytics.summary(tracker, skip=["a", "nothing"])
        assert (found.total, found.oldest and found.oldest.id) == (1, "b")
        assert (await analytics.summary(tracker, skip=["a"], prefix="b")).total == 1
