"""Guarantee 7: backoff is for the machine."""

import asyncio
from datetime import timedelta

import pytest

from ..._core.retry import Retry
from ..._core.task import Status
from ...errors import TaskNotDueError
from ...running import RunningTask
from .._clock import FakeClock
from .._faults import Faults, FaultyTracker
from ._base import Base, MakeTracker, loaded, settle, until


class Backoff(Base):
    async def test_work_waits_out_a_failed_tasks_delay_and_an_explicit_run_does_not(
        self, make_tracker: MakeTracker, clock: FakeClock
    ) -> None:
        tries: list[int] = []

        async def body(task: RunningTask) -> None:
            tries.append(task.attempts)
            if task.attempts == 1:
                raise ValueError("once")

        retry = Retry(5, delay=lambda attempts: 10.0 * attempts)
        async with make_tracker(clock=clock, retry=retry) as tracker:
            working = asyncio.create_task(tracker.work(body, ids=["waits", "asked for"]))

            async def failed() -> bool:
                tasks = [await tracker.load(task_id) for task_id in ("waits", "asked for")]
                return all(task is not None and task.status is Status.FAILED for task in tasks)

            await until(failed)
            due = (await loaded(tracker, "waits")).not_before
            assert due == clock.now() + timedelta(seconds=10)
            clock.jump(9)
            await settle()
            async with tracker.run("asked for") as task:
                assert task.attempts == 2
            assert tries == [1, 1]
            clock.jump(1)

            async def done() -> bool:
                clock.jump(0.1)
                return working.done()

            await until(done)
            assert tries == [1, 1, 2]
            assert (await working).succeeded == 1

    async def test_a_not_before_of_add_binds_everybody(self, make_tracker: MakeTracker, clock: FakeClock) -> None:
        async def body(task: RunningTask) -> None:
            pass

        async with make_tracker(clock=clock) as tracker:
            await tracker.add("job", not_before=clock.now() + timedelta(seconds=100))
            with pytest.raises(TaskNotDueError) as refused:
                async with tracker.run("job"):
                    pass
            assert refused.value.retry_after == 100
            working = asyncio.create_task(tracker.work(body, ids=["job"]))
            for _ in range(9):
                await settle()
                clock.jump(11)
            assert (await loaded(tracker, "job")).status is Status.PENDING
            clock.jump(1)

            async def done() -> bool:
                clock.jump(0.1)
                return working.done()

            await until(done)
            assert (await loaded(tracker, "job")).status is Status.SUCCEEDED

    async def test_force_overrides_a_due_time(self, make_tracker: MakeTracker, clock: FakeClock) -> None:
        async with make_tracker(clock=clock) as tracker:
            await tracker.add("job", not_before=clock.now() + timedelta(seconds=100))
            async with tracker.run("job", force=True):
                pass
            assert (await loaded(tracker, "job")).status is Status.SUCCEEDED

    async def test_reset_ends_a_backoff_and_keeps_a_due_time_of_add(
        self, make_tracker: MakeTracker, clock: FakeClock
    ) -> None:
        async with make_tracker(clock=clock, retry=Retry(5, delay=lambda _: 50.0)) as tracker:
            with pytest.raises(ValueError, match="x"):
                async with tracker.run("failed"):
                    raise ValueError("x")
            due = clock.now() + timedelta(seconds=100)
            await tracker.add("planned", not_before=due)
            await tracker.ignore("planned")
            await tracker.reset("failed", "planned")
            assert (await loaded(tracker, "failed")).not_before is None

    async def test_work_sleeps_until_the_next_due_time_and_asks_the_store_nothing_meanwhile(
        self, make_tracker: MakeTracker, clock: FakeClock
    ) -> None:
        async def body(task: RunningTask) -> None:
            if task.attempts == 1:
                raise ValueError("once")

        faults = Faults()
        options = {"clock": clock, "retry": Retry(2, delay=lambda _: 200.0)}
        async with FaultyTracker(make_tracker(**options), faults) as tracker:
            working = asyncio.create_task(tracker.work(body, ids=[f"job-{index}" for index in range(20)]))

            async def all_failed() -> bool:
                tasks = [await tracker.inner.load(f"job-{index}") for index in range(20)]
                return all(task is not None and task.status is Status.FAILED for task in tasks)

            await until(all_failed)
            await settle()
            requests = len(faults.requests)
            for _ in range(19):
                clock.jump(10)
                await settle()
            assert len(faults.requests) == requests
            clock.jump(10)
            async with asyncio.timeout(20):
                assert (await working).succeeded == 20

    async def test_the_delay_is_drawn_between_0_and_its_double_each_time(
        self, make_tracker: MakeTracker, clock: FakeClock
    ) -> None:
        async with make_tracker(clock=clock, retry=Retry(9, delay=4.0, max_delay=10.0)) as tracker:
            for most in (4.0, 8.0, 10.0, 10.0):
                with pytest.raises(ValueError, match="x"):
                    async with tracker.run("job"):
                        raise ValueError("x")
                due = (await loaded(tracker, "job")).not_before
                if due is not None:
                    assert clock.now() < due <= clock.now() + timedelta(seconds=most)
