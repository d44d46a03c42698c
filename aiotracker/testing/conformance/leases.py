"""Guarantees 1 and 4: one live lease, and what becomes of a holder that loses it."""

import asyncio
import logging
from contextlib import AsyncExitStack
from datetime import timedelta
from typing import Any

import pytest

from ..._core.task import Status, Task
from ...errors import LeaseLostError, TaskLockedError, TaskSucceededError
from ...running import RunningTask
from .._clock import FakeClock
from .._processes import race
from ._base import LEASE, Base, MakeTracker, abandon, check_sound, held, loaded, settle, until

TICK = 2.0**-10  # seconds; sums of it are exact


class OneLiveLease(Base):
    async def test_of_100_coroutines_on_one_key_one_wins_and_99_are_told_who_holds_it(
        self, make_tracker: MakeTracker
    ) -> None:
        refused: list[TaskLockedError] = []
        all_refused = asyncio.Event()
        async with make_tracker(worker="a") as a, make_tracker(worker="b") as b:

            async def contend(index: int) -> bool:
                try:
                    async with (a, b)[index % 2].run("job"):
                        await all_refused.wait()
                except TaskLockedError as exc:
                    refused.append(exc)
                    if len(refused) == 99:
                        all_refused.set()
                    return False
                return True

            async with asyncio.timeout(60):
                won = await asyncio.gather(*(contend(index) for index in range(100)))
            assert sum(won) == 1
            for exc in refused:
                assert exc.task.lease is not None
                assert exc.task.lease.worker in ("a", "b")
                assert exc.retry_after is not None
                assert 0 < exc.retry_after <= LEASE
            task = await loaded(a, "job")
            assert (task.status, task.attempts) == (Status.SUCCEEDED, 1)

    async def test_of_100_coroutines_that_come_as_they_like_one_body_runs(self, make_tracker: MakeTracker) -> None:
        ran = 0
        async with make_tracker() as a, make_tracker() as b:

            async def contend(index: int) -> str:
                nonlocal ran
                try:
                    async with (a, b)[index % 2].run("job"):
                        ran += 1
                        await asyncio.sleep(0)
                except (TaskLockedError, TaskSucceededError) as exc:
                    return type(exc).__name__
                return "won"

            outcomes = await asyncio.gather(*(contend(index) for index in range(100)))
            assert (ran, outcomes.count("won")) == (1, 1)
            assert (await loaded(a, "job")).attempts == 1

    @pytest.mark.usefixtures("processes")
    async def test_of_4_processes_on_one_key_one_wins(self, make_tracker: MakeTracker, store_url: str) -> None:
        async with make_tracker() as tracker:
            answers = await race(store_url, processes=4, keys=1)
            assert sorted(name for answer in answers for name in answer["outcomes"].values()).count("succeeded") == 1
            assert {name for answer in answers for name in answer["outcomes"].values()} <= {
                "succeeded",
                "TaskLockedError",
                "TaskSucceededError",
            }
            task = await loaded(tracker, "key-0")
            assert (task.status, task.attempts) == (Status.SUCCEEDED, 1)

    @pytest.mark.usefixtures("processes")
    async def test_4_processes_on_200_keys_record_one_success_of_each(
        self, make_tracker: MakeTracker, store_url: str
    ) -> None:
        async with make_tracker() as tracker:
            answers = await race(store_url, processes=4, keys=200)
            for index in range(200):
                key = f"key-{index}"
                winners = [answer for answer in answers if answer["outcomes"][key] == "succeeded"]
                assert len(winners) == 1, f"{len(winners)} processes won {key}"
                task = await loaded(tracker, key)
                assert (task.status, task.attempts, len(task.ends)) == (Status.SUCCEEDED, 1, 1)
                assert task.result == winners[0]["pid"]

    async def test_500_contended_updates_of_one_record_lose_none(self, make_tracker: MakeTracker) -> None:
        def increment(task: Task | None, now: object) -> Task | None:
            assert task is not None
            return task.replace(data=task.data + 1)

        async with make_tracker() as a, make_tracker() as b:
            await a.add("counter", 0)

            async def count(index: int) -> None:
                for _ in range(10):
                    await (a, b)[index % 2].update("counter", increment)

            await asyncio.gather(*(count(index) for index in range(50)))
            assert (await loaded(a, "counter")).data == 500

    async def test_a_dead_workers_lease_holds_until_its_last_moment_and_not_longer(
        self, make_tracker: MakeTracker, clock: FakeClock
    ) -> None:
        await abandon(make_tracker(clock=clock, lease=LEASE), "before", "at", "after")
        async with make_tracker(clock=clock, lease=LEASE) as tracker:
            clock.jump(LEASE - TICK)
            with pytest.raises(TaskLockedError) as refused:
                async with tracker.run("before"):
                    pass
            assert refused.value.retry_after == pytest.approx(TICK, abs=1e-5)
            clock.jump(TICK)
            async with tracker.run("at") as task:
                assert task.attempts == 2
            clock.jump(TICK)
            async with tracker.run("after") as task:
                assert task.attempts == 2

    async def test_on_another_machine_it_holds_as_much_longer_as_clocks_may_differ(
        self, make_tracker: MakeTracker, clock: FakeClock, other_clock: FakeClock
    ) -> None:
        await abandon(make_tracker(clock=clock, lease=LEASE), "job")
        async with make_tracker(clock=other_clock, lease=LEASE, clock_skew=5.0) as tracker:
            margin = 5.0 + tracker.clock_uncertainty
            other_clock.jump(LEASE + margin - TICK)
            with pytest.raises(TaskLockedError):
                async with tracker.run("job"):
                    pass
            other_clock.jump(2 * TICK)
            async with tracker.run("job") as task:
                assert task.attempts == 2

    async def test_a_wall_clock_that_jumps_on_one_machine_expires_nothing(
        self, make_tracker: MakeTracker, clock: FakeClock
    ) -> None:
        await abandon(make_tracker(clock=clock, lease=LEASE), "job")
        async with make_tracker(clock=clock, lease=LEASE) as tracker:
            clock.shift(3600)
            with pytest.raises(TaskLockedError):
                async with tracker.run("job"):
                    pass
            clock.shift(-7200)
            clock.jump(LEASE)
            async with tracker.run("job") as task:
                assert task.attempts == 2

    async def test_a_machine_that_sleeps_does_not_stop_the_lease(
        self, make_tracker: MakeTracker, clock: FakeClock
    ) -> None:
        await abandon(make_tracker(clock=clock, lease=LEASE), "job")
        async with make_tracker(clock=clock, lease=LEASE) as tracker:
            clock.suspend(LEASE)
            async with tracker.run("job") as task:
                assert task.attempts == 2

    async def test_after_a_reboot_the_wall_clock_decides(self, make_tracker: MakeTracker, clock: FakeClock) -> None:
        await abandon(make_tracker(clock=clock, lease=LEASE), "job")
        clock.reboot()
        async with make_tracker(clock=clock, lease=LEASE) as tracker:
            with pytest.raises(TaskLockedError):
                async with tracker.run("job"):
                    pass
            clock.jump(LEASE + tracker.clock_uncertainty)
            async with tracker.run("job") as task:
                assert task.attempts == 2

    async def test_a_run_may_take_a_lease_of_another_length(self, make_tracker: MakeTracker, clock: FakeClock) -> None:
        await abandon(make_tracker(clock=clock, lease=LEASE), "job", lease=10 * LEASE)
        async with make_tracker(clock=clock, lease=LEASE) as tracker:
            clock.jump(9 * LEASE)
            with pytest.raises(TaskLockedError):
                async with tracker.run("job"):
                    pass
            clock.jump(LEASE)
            async with tracker.run("job") as task:
                assert task.attempts == 2

    async def test_a_lease_is_renewed_for_as_long_as_the_body_runs(
        self, make_tracker: MakeTracker, clock: FakeClock
    ) -> None:
        async with make_tracker(clock=clock, lease=LEASE) as one, make_tracker(clock=clock, lease=LEASE) as two:
            async with held(one, "job") as holder:
                for _ in range(10):
                    before = await loaded(two, "job")
                    clock.jump(LEASE / 3)

                    async def renewed(before: Task = before) -> bool:
                        lease, old = (await loaded(two, "job")).lease, before.lease
                        return lease is not None and old is not None and lease.expires_at > old.expires_at

                    await until(renewed)
                    with pytest.raises(TaskLockedError):
                        async with two.run("job"):
                            pass
                task = await holder.task()
                assert task.lease_left == LEASE
                await holder.end()
            done = await loaded(two, "job")
            assert (done.status, done.attempts) == (Status.SUCCEEDED, 1)

    async def test_all_leases_of_a_tracker_are_renewed_together_at_a_third_of_their_length(
        self, make_tracker: MakeTracker, clock: FakeClock
    ) -> None:
        ids = [f"job-{index}" for index in range(30)]
        async with make_tracker(clock=clock, lease=LEASE) as tracker, AsyncExitStack() as stack:
            for task_id in ids:
                await stack.enter_async_context(held(tracker, task_id))
            await settle()
            taken = clock.now()
            clock.jump(LEASE / 3)

            async def renewed() -> bool:
                leases = [(await loaded(tracker, task_id)).lease for task_id in ids]
                assert all(lease is not None and lease.acquired_at == taken for lease in leases)
                return all(
                    lease is not None and lease.expires_at == clock.now() + timedelta(seconds=LEASE) for lease in leases
                )

            await until(renewed)

    async def test_renew_in_the_body_grants_a_full_term_or_the_one_that_is_asked_for(
        self, make_tracker: MakeTracker, clock: FakeClock
    ) -> None:
        async with make_tracker(clock=clock, lease=LEASE) as tracker, tracker.run("job") as task:
            clock.jump(10)
            assert task.lease_left <= LEASE
            await task.renew()
            assert task.lease_left == LEASE
            await task.renew(7 * LEASE)
            assert task.lease_left == 7 * LEASE
            stored = await loaded(tracker, "job")
            assert stored.lease is not None
            assert stored.lease.expires_at == clock.now() + timedelta(seconds=7 * LEASE)


class ALostLeaseStopsTheWork(Base):
    @pytest.mark.parametrize("pause", ["process", "machine", "wall clock"])
    async def test_a_paused_holder_is_cancelled_and_told(
        self, make_tracker: MakeTracker, clock: FakeClock, pause: str
    ) -> None:
        async with make_tracker(clock=clock, lease=LEASE) as tracker, held(tracker, "job") as holder:
            await settle()
            if pause == "process":
                clock.jump(LEASE)
            elif pause == "machine":
                clock.suspend(LEASE)
            else:
                clock.shift(LEASE)
            clock.jump(LEASE / 3 - TICK)  # within which the keeper looks at its clocks
            with pytest.raises(LeaseLostError) as lost:
                await holder.run
            assert (lost.value.task_id, lost.value.fence) == ("job", (await holder.task()).fence)
            task = await loaded(tracker, "job")
            assert (task.status, task.attempts, task.result) == (Status.IN_PROGRESS, 1, None)

    @pytest.mark.parametrize("verb", ["reset", "ignore"])
    async def test_a_holder_whose_lease_was_taken_away_is_cancelled_at_its_next_renewal(
        self, make_tracker: MakeTracker, clock: FakeClock, verb: str
    ) -> None:
        async with make_tracker(clock=clock, lease=LEASE) as tracker, held(tracker, "job") as holder:
            await settle()
            assert await getattr(tracker, verb)("job") == 0, "a held task is passed over"
            assert await getattr(tracker, verb)("job", force=True) == 1
            after = await loaded(tracker, "job")
            check_sound(after)
            clock.jump(LEASE / 3)
            async with asyncio.timeout(10):
                with pytest.raises(LeaseLostError):
                    await holder.run
            assert await loaded(tracker, "job") == after

    async def test_a_body_that_ends_after_its_lease_is_over_records_nothing(
        self, make_tracker: MakeTracker, clock: FakeClock
    ) -> None:
        async with make_tracker(clock=clock, lease=LEASE) as tracker:
            with pytest.raises(LeaseLostError):
                async with tracker.run("job") as task:
                    task.result = "late"
                    clock.jump(LEASE)
            task_now = await loaded(tracker, "job")
            assert (task_now.status, task_now.result) == (Status.IN_PROGRESS, None)

    async def test_a_body_that_fails_after_its_lease_is_over_raises_lease_lost_with_its_error_as_the_cause(
        self, make_tracker: MakeTracker, clock: FakeClock
    ) -> None:
        async with make_tracker(clock=clock, lease=LEASE) as tracker:
            with pytest.raises(LeaseLostError) as lost:
                async with tracker.run("job"):
                    clock.jump(LEASE)
                    raise ValueError("late")
            assert isinstance(lost.value.__cause__, ValueError)

    async def test_a_body_that_swallows_our_cancellation_records_nothing_all_the_same(
        self, make_tracker: MakeTracker, clock: FakeClock
    ) -> None:
        async with make_tracker(clock=clock, lease=LEASE) as tracker:

            async def body() -> None:
                async with tracker.run("job") as task:
                    entered.set()
                    try:
                        await asyncio.Event().wait()
                    except asyncio.CancelledError:
                        task.result = "never mind"

            entered = asyncio.Event()
            running = asyncio.create_task(body())
            await entered.wait()
            await settle()
            clock.jump(LEASE)
            with pytest.raises(LeaseLostError):
                await running
            assert (await loaded(tracker, "job")).result is None

    async def test_a_cancellation_from_outside_wins_over_a_lost_lease(
        self, make_tracker: MakeTracker, clock: FakeClock
    ) -> None:
        async with make_tracker(clock=clock, lease=LEASE) as tracker, held(tracker, "job") as holder:
            await settle()
            clock.jump(LEASE)
            holder.run.cancel()
            with pytest.raises(asyncio.CancelledError):
                await holder.run

    async def test_after_a_lost_lease_the_asyncio_task_is_not_left_cancelled(
        self, make_tracker: MakeTracker, clock: FakeClock
    ) -> None:
        async with make_tracker(clock=clock, lease=LEASE) as tracker:

            async def body() -> int:
                try:
                    async with tracker.run("job"):
                        entered.set()
                        await asyncio.Event().wait()
                except LeaseLostError:
                    await asyncio.sleep(0)
                task = asyncio.current_task()
                assert task is not None
                return task.cancelling()

            entered = asyncio.Event()
            running = asyncio.create_task(body())
            await entered.wait()
            await settle()
            clock.jump(LEASE)
            assert await running == 0

    async def test_what_the_lost_run_did_meanwhile_is_not_recorded_by_the_takeover(
        self, make_tracker: MakeTracker, clock: FakeClock, other_clock: FakeClock
    ) -> None:
        async def change(task: RunningTask[Any]) -> None:
            task.data["n"] = 1
            task.progress = 0.5

        async with (
            make_tracker(clock=clock) as one,
            make_tracker(clock=other_clock) as two,
            held(one, "job", data={"n": 0}) as holder,
        ):
            await holder.do(change)
            other_clock.jump(LEASE + 1 + two.clock_uncertainty)
            async with two.run("job") as task:
                assert task.data == {"n": 0}

    async def test_a_body_that_blocks_the_event_loop_is_named(
        self, make_tracker: MakeTracker, clock: FakeClock, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with make_tracker(clock=clock, lease=LEASE) as tracker, held(tracker, "the slow one") as holder:
            await settle()
            with caplog.at_level(logging.WARNING, "aiotracker"):
                clock.jump(LEASE / 2)  # all at once, as if nothing else had had a turn

                async def named() -> bool:
                    return "'the slow one'" in caplog.text and "blocked" in caplog.text

                await until(named)
            await holder.end()
