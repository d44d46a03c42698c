"""Guarantees 5 and 8: crashes count, and nothing acknowledged is lost."""

import asyncio

import pytest

from ..._core.retry import Retry
from ..._core.task import Status, Task
from ...errors import TaskExhaustedError, TaskLockedError
from ...running import RunningTask
from .._clock import FakeClock
from .._processes import Child
from ._base import LEASE, Base, MakeTracker, abandon, check_sound, held, loaded, until


class Crashes(Base):
    async def test_an_expired_lease_is_claimed_by_the_ordinary_claim(
        self, make_tracker: MakeTracker, clock: FakeClock
    ) -> None:
        await abandon(make_tracker(clock=clock, lease=LEASE, worker="dead"), "job")
        clock.jump(LEASE)
        async with make_tracker(clock=clock, lease=LEASE) as tracker:
            async with tracker.run("job") as task:
                assert task.attempts == 2
                during = await loaded(tracker, "job")
                assert [end.outcome for end in during.ends] == ["lease_lost"]
                assert (during.errors[-1].type, during.errors[-1].worker) == ("LeaseLostError", "dead")
            assert (await loaded(tracker, "job")).status is Status.SUCCEEDED

    async def test_a_task_whose_workers_die_again_and_again_ends_exhausted(
        self, make_tracker: MakeTracker, clock: FakeClock
    ) -> None:
        for _ in range(3):
            await abandon(make_tracker(clock=clock, lease=LEASE, retry=Retry(3)), "job")
            clock.jump(LEASE)
        async with make_tracker(clock=clock, retry=Retry(3)) as tracker:
            with pytest.raises(TaskExhaustedError):
                async with tracker.run("job"):
                    pytest.fail("it ran a fourth time")
            task = await loaded(tracker, "job")
            check_sound(task)
            assert (task.status, task.attempts, task.last_outcome) == (Status.EXHAUSTED, 3, "lease_lost")
            assert len(task.errors) == 3

    async def test_the_last_error_is_there_however_a_task_became_exhausted(
        self, make_tracker: MakeTracker, clock: FakeClock
    ) -> None:
        async with make_tracker(clock=clock, retry=Retry(3)) as tracker:
            for _ in range(20):
                try:
                    async with held(tracker, "cancelled") as holder:
                        await holder.cancel()
                except TaskExhaustedError:
                    break
            else:
                pytest.fail("cancelled 20 times and never exhausted")
        await abandon(make_tracker(clock=clock, lease=LEASE), "fewer attempts")
        clock.jump(LEASE)
        async with make_tracker(clock=clock, retry=Retry(1)) as tracker:
            with pytest.raises(TaskExhaustedError):
                async with tracker.run("fewer attempts"):
                    pass
            for task_id in ("cancelled", "fewer attempts"):
                task = await loaded(tracker, task_id)
                assert task.status is Status.EXHAUSTED
                assert task.errors[-1].message
                check_sound(task)

    @pytest.mark.usefixtures("scan")
    async def test_work_takes_over_what_the_dead_left_and_reports_what_that_exhausted(
        self, make_tracker: MakeTracker, clock: FakeClock
    ) -> None:
        await abandon(make_tracker(clock=clock, lease=LEASE, retry=Retry(1)), "used up")
        await abandon(make_tracker(clock=clock, lease=LEASE, retry=Retry(2)), "one left")
        clock.jump(LEASE)
        seen: dict[str, Status] = {}

        async with make_tracker(clock=clock) as tracker:

            async def body(task: RunningTask) -> None:
                pass

            def done(task: Task) -> None:
                seen[task.id] = task.status

            async with asyncio.timeout(20):
                summary = await tracker.work(body, ids=["used up"], retry=Retry(1), on_done=done)
                summary = await tracker.work(body, on_done=done)
        assert seen == {"used up": Status.EXHAUSTED, "one left": Status.SUCCEEDED}
        assert summary.succeeded == 1


class Durability(Base):
    async def test_a_new_tracker_sees_everything_that_was_acknowledged(self, make_tracker: MakeTracker) -> None:
        async with make_tracker() as tracker:
            await tracker.add("added", {"n": 1}, priority=3)
            async with tracker.run("done") as task:
                task.result = [1]
            with pytest.raises(ValueError, match="x"):
                async with tracker.run("failed"):
                    raise ValueError("x")
            before = [await loaded(tracker, task_id) for task_id in ("added", "done", "failed")]
        async with make_tracker() as another:
            assert [await loaded(another, task.id) for task in before] == before

    async def test_another_worker_sees_every_write_that_was_acknowledged_before_it_asked(
        self, make_tracker: MakeTracker
    ) -> None:
        async with make_tracker() as one, make_tracker() as two:
            for index in range(20):
                await one.add(f"job-{index}", index)
                assert (await loaded(two, f"job-{index}")).data == index
                async with two.run(f"job-{index}"):
                    assert (await loaded(one, f"job-{index}")).status is Status.IN_PROGRESS
                assert (await loaded(one, f"job-{index}")).status is Status.SUCCEEDED

    @pytest.mark.usefixtures("processes")
    async def test_what_a_process_had_acknowledged_survives_its_sigkill(
        self, make_tracker: MakeTracker, store_url: str
    ) -> None:
        child = await asyncio.to_thread(Child, "hold", store_url, "2")
        try:
            fence = (await asyncio.to_thread(child.read))["fence"]
        finally:
            await asyncio.to_thread(child.kill)
        async with make_tracker() as tracker:
            assert (await loaded(tracker, "added")).data == {"by": "it"}
            assert (await loaded(tracker, "done")).result == "acknowledged"
            task = await loaded(tracker, "held")
            assert (task.status, task.fence, task.data) == (Status.IN_PROGRESS, fence, {"page": 7})

            async def claimed() -> bool:
                try:
                    async with tracker.run("held") as running:
                        assert running.fence > fence
                        assert running.attempts == 2
                        assert running.data == {"page": 7}
                except TaskLockedError:
                    return False
                return True

            await until(claimed)
