"""Guarantees 9 and 10: a lost reply is not a lost race, and no refusal is decided on stale knowledge.

Here each backend is used through its `load`, `dump` and `delete` alone, with faults in between.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest

from ..._core.query import Query
from ..._core.retry import Postpone
from ..._core.task import Status, Task
from ...errors import (
    ConflictError,
    LeaseLostError,
    OutcomeUnknownError,
    StoreUnavailableError,
    TaskLockedError,
    TaskUnavailableError,
    TrackerError,
)
from .._clock import FakeClock
from .._faults import Call, Faults, FaultyTracker, reply_lost, unreachable
from ._base import LEASE, MISSING, Base, Holder, MakeTracker, abandon, check_sound, held, loaded, until

ENDS: dict[str, tuple[Callable[[Holder], Awaitable[None]], Status]] = {
    "succeed": (Holder.end, Status.SUCCEEDED),
    "fail": (lambda holder: holder.fail(ValueError("failed")), Status.FAILED),
    "postpone": (lambda holder: holder.fail(Postpone(1)), Status.PENDING),
    "release": (Holder.cancel, Status.PENDING),
}


class LostReplies(Base):
    @pytest.fixture
    def faults(self) -> Faults:
        return Faults()

    @pytest.fixture(params=["reply lost", "reply lost twice", "unreachable"])
    def trouble(self, request: pytest.FixtureRequest, faults: Faults) -> Callable[[], None]:
        plan = {"reply lost": [reply_lost], "reply lost twice": [reply_lost] * 2, "unreachable": [unreachable]}
        return lambda: faults.script("dump", *plan[request.param])

    async def test_a_claim_is_recognised(
        self, make_tracker: MakeTracker, faults: Faults, trouble: Callable[[], None]
    ) -> None:
        async with FaultyTracker(make_tracker(), faults) as tracker:
            trouble()
            async with tracker.run("new") as task:
                assert task.attempts == 1
            await tracker.add("known")
            trouble()
            async with tracker.run("known") as task:
                assert task.attempts == 1
            for task_id in ("new", "known"):
                stored = await loaded(tracker, task_id)
                check_sound(stored)
                assert (stored.status, stored.attempts, len(stored.ends)) == (Status.SUCCEEDED, 1, 1)

    async def test_a_save_and_a_renewal_are_recognised(
        self, make_tracker: MakeTracker, faults: Faults, trouble: Callable[[], None]
    ) -> None:
        async with FaultyTracker(make_tracker(), faults) as tracker, tracker.run("job") as task:
            task.data = {"page": 1}
            trouble()
            await task.save()
            trouble()
            await task.renew()
            assert (await loaded(tracker, "job")).data == {"page": 1}

    @pytest.mark.parametrize("end", ENDS)
    async def test_an_end_is_recognised(
        self, make_tracker: MakeTracker, faults: Faults, trouble: Callable[[], None], end: str
    ) -> None:
        act, status = ENDS[end]
        async with FaultyTracker(make_tracker(), faults) as tracker, held(tracker, "job") as holder:
            trouble()
            with suppress(ValueError, Postpone):
                await act(holder)
            stored = await loaded(tracker, "job")
            check_sound(stored)
            assert (stored.status, len(stored.ends)) == (status, 1)
            assert stored.attempts == (0 if status is Status.PENDING else 1)

    async def test_an_add_is_recognised_and_counted_as_new(
        self, make_tracker: MakeTracker, faults: Faults, trouble: Callable[[], None]
    ) -> None:
        async with FaultyTracker(make_tracker(), faults) as tracker:
            trouble()
            assert await tracker.add("job", 1) is True
            trouble()
            assert await tracker.add("job", 2) is False
            assert (await loaded(tracker, "job")).data == 1

    @pytest.mark.usefixtures("delete")
    async def test_a_purge_is_recognised(self, make_tracker: MakeTracker, faults: Faults) -> None:
        async with FaultyTracker(make_tracker(), faults) as tracker:
            await tracker.add("job")
            faults.script("delete", reply_lost)
            assert await tracker.purge("job", force=True) == 1
            assert await tracker.load("job") is None

    async def test_a_reset_is_recognised(
        self, make_tracker: MakeTracker, faults: Faults, trouble: Callable[[], None]
    ) -> None:
        async with FaultyTracker(make_tracker(), faults) as tracker:
            async with tracker.run("job"):
                pass
            trouble()
            assert await tracker.reset("job") == 1
            stored = await loaded(tracker, "job")
            assert (stored.status, stored.attempts) == (Status.PENDING, 0)

    @pytest.mark.parametrize("end", [end for end in ENDS if end != "succeed"])
    async def test_an_end_that_landed_and_was_overtaken_by_another_claim_counts_as_done(
        self, make_tracker: MakeTracker, faults: Faults, end: str
    ) -> None:
        act, _ = ENDS[end]
        async with (
            FaultyTracker(make_tracker(), faults) as one,
            make_tracker() as two,
            held(one, "job") as holder,
        ):

            async def overtaken(call: Call) -> Any:
                await call()
                async with two.run("job", force=True) as task:
                    task.result = "by two"
                raise StoreUnavailableError("injected: the reply was lost, and time passed")

            faults.script("dump", overtaken)
            with suppress(ValueError, Postpone):
                await act(holder)  # no LeaseLostError: it was recorded
            assert holder.run.done()
            stored = await loaded(two, "job")
            assert (stored.status, stored.result) == (Status.SUCCEEDED, "by two")

    async def test_a_success_that_landed_and_was_overtaken_by_a_forced_run_counts_as_done(
        self, make_tracker: MakeTracker, faults: Faults
    ) -> None:
        async with FaultyTracker(make_tracker(), faults) as one, make_tracker() as two:

            async def overtaken(call: Call) -> Any:
                await call()
                async with two.run("job", force=True) as task:
                    task.result = "by two"
                raise StoreUnavailableError("injected: the reply was lost, and time passed")

            async with one.run("job") as task:
                task.result = "by one"
                faults.script("dump", overtaken)
            stored = await loaded(two, "job")
            assert [end.outcome for end in stored.ends] == ["succeeded", "succeeded"]

    async def test_an_add_that_landed_and_was_claimed_by_somebody_counts_as_new(
        self, make_tracker: MakeTracker, faults: Faults
    ) -> None:
        async with FaultyTracker(make_tracker(), faults) as one, make_tracker() as two:

            async def overtaken(call: Call) -> Any:
                await call()
                async with two.run("job"):
                    pass
                raise StoreUnavailableError("injected: the reply was lost, and time passed")

            faults.script("dump", overtaken)
            assert await one.add("job") is True

    async def test_a_claim_that_landed_and_was_overtaken_is_not_made_a_second_time(
        self, make_tracker: MakeTracker, faults: Faults
    ) -> None:
        async with FaultyTracker(make_tracker(), faults) as one, make_tracker() as two:

            async def overtaken(call: Call) -> Any:
                await call()
                await two.reset("job", force=True)
                with suppress(ValueError):
                    async with two.run("job"):
                        raise ValueError("by two")
                raise StoreUnavailableError("injected: the reply was lost, and time passed")

            faults.script("dump", overtaken)
            with pytest.raises(LeaseLostError):
                async with one.run("job"):
                    pytest.fail("entered although its claim was over")
            stored = await loaded(two, "job")
            assert [end.outcome for end in stored.ends] == ["lease_lost", "failed"]
            assert (stored.status, stored.attempts) == (Status.FAILED, 1)

    async def test_a_write_that_never_landed_while_somebody_else_claimed_is_a_lost_lease(
        self, make_tracker: MakeTracker, faults: Faults
    ) -> None:
        async with FaultyTracker(make_tracker(), faults) as one, make_tracker() as two:

            async def taken_away(call: Call) -> Any:
                await two.reset("job", force=True)
                async with two.run("job"):
                    pass
                raise StoreUnavailableError("injected: it never arrived, and time passed")

            with pytest.raises(LeaseLostError):
                async with one.run("job"):
                    faults.script("dump", taken_away)
            assert (await loaded(two, "job")).status is Status.SUCCEEDED

    @pytest.mark.parametrize("how", [reply_lost, unreachable])
    async def test_what_cannot_be_found_out_is_an_unknown_outcome_and_never_a_lost_lease(
        self, make_tracker: MakeTracker, how: Any
    ) -> None:
        faults = Faults()
        async with FaultyTracker(make_tracker(), faults, lease=1.5) as tracker:
            with pytest.raises(OutcomeUnknownError) as unknown:
                async with tracker.run("job") as task:
                    task.result = 1
                    for method in ("dump", "load"):
                        faults.script(method, *[how] * 1000)
            assert unknown.value.task_id == "job"

    async def test_a_claim_whose_outcome_is_unknown_is_not_entered_and_given_back_when_the_store_is_there_again(
        self, make_tracker: MakeTracker
    ) -> None:
        faults = Faults()
        back = asyncio.Event()

        async def away(call: Call) -> Any:
            return await (call() if back.is_set() else reply_lost(call))

        async with FaultyTracker(make_tracker(), faults, lease=1.5) as tracker:
            faults.script("dump", *[away] * 1000)
            with pytest.raises((OutcomeUnknownError, StoreUnavailableError)):
                async with tracker.run("job"):
                    pytest.fail("entered without knowing")
            back.set()

            async def free() -> bool:
                task = await tracker.inner.load("job")
                return task is None or task.lease is None

            await until(free)
            async with tracker.run("job") as task:
                assert task.attempts == 1

    async def test_a_claim_that_is_answered_after_its_own_deadline_is_released_and_not_entered(
        self, make_tracker: MakeTracker, clock: FakeClock
    ) -> None:
        faults = Faults()

        async def late(call: Call) -> Any:
            answer = await call()
            clock.jump(LEASE)
            return answer

        async with FaultyTracker(make_tracker(clock=clock, lease=LEASE), faults) as tracker:
            faults.script("dump", late)
            with pytest.raises(TrackerError):
                async with tracker.run("job"):
                    pytest.fail("entered after its lease was over")

            async def free() -> bool:
                return (await loaded(tracker, "job")).lease is None

            await until(free)
            async with tracker.run("job") as task:
                assert task.attempts == 1

    async def test_while_a_cancellation_is_on_its_way_out_a_store_error_does_not_replace_it(
        self, make_tracker: MakeTracker
    ) -> None:
        faults = Faults()
        async with FaultyTracker(make_tracker(), faults, lease=1.5) as tracker, held(tracker, "job") as holder:
            for method in ("dump", "load"):
                faults.script(method, *[unreachable] * 1000)
            holder.run.cancel()
            async with asyncio.timeout(10):
                with pytest.raises(asyncio.CancelledError):
                    await holder.run

    async def test_attempts_lost_to_a_store_that_could_not_be_reached_are_given_back(
        self, make_tracker: MakeTracker, clock: FakeClock
    ) -> None:
        faults = Faults()
        back = asyncio.Event()

        async def away(call: Call) -> Any:
            if not back.is_set():
                raise StoreUnavailableError("injected: the store has gone")
            return await call()

        async with (
            FaultyTracker(make_tracker(clock=clock, lease=LEASE), faults) as tracker,
            held(tracker, "job") as holder,
        ):
            faults.script("dump", *[away] * 1000)

            async def over() -> bool:
                clock.jump(1)
                return holder.run.done()

            await until(over)
            with pytest.raises(LeaseLostError):
                await holder.run
            back.set()

            async def free() -> bool:
                return (await loaded(tracker, "job")).lease is None

            await until(free)
            stored = await loaded(tracker, "job")
            assert (stored.status, stored.attempts) == (Status.PENDING, 0)

    @pytest.mark.parametrize("seed", range(5))
    async def test_under_random_faults_each_task_has_one_outcome_and_nothing_acknowledged_is_lost(
        self, make_tracker: MakeTracker, seed: int
    ) -> None:
        faults = Faults(seed, reply_lost=0.15, unreachable=0.1, delay=0.002)
        bodies: dict[str, int] = {}
        ids = [f"job-{index}" for index in range(40)]

        async def work(tracker: FaultyTracker) -> None:
            for task_id in ids:
                try:
                    async with tracker.run(task_id) as task:
                        await asyncio.sleep(0)
                        task.result = task.fence
                    bodies[task_id] = bodies.get(task_id, 0) + 1
                except TaskUnavailableError:
                    pass

        async with (
            FaultyTracker(make_tracker(), faults) as one,
            FaultyTracker(make_tracker(), faults) as two,
        ):
            await asyncio.gather(work(one), work(two))
            assert bodies == dict.fromkeys(ids, 1)
            for task_id in ids:
                task = await loaded(two.inner, task_id)
                check_sound(task)
                assert (task.status, task.attempts, task.result) == (Status.SUCCEEDED, 1, task.fence)


class StaleKnowledge(Base):
    async def test_a_task_believed_absent_is_refused_on_what_is_stored(
        self, make_tracker: MakeTracker, clock: FakeClock
    ) -> None:
        async with make_tracker(worker="one") as one, make_tracker() as two, held(one, "job"):
            with pytest.raises(TaskLockedError) as refused:
                async with two._run("job", known=None):
                    pass
            assert refused.value.task.lease is not None
            assert refused.value.task.lease.worker == "one"

    async def test_a_task_seen_held_that_is_free_by_now_is_claimed(self, make_tracker: MakeTracker) -> None:
        async with make_tracker() as one, make_tracker() as two:
            async with held(one, "job") as holder:
                seen = await loaded(two, "job")
                await holder.cancel()
            async with two._run("job", known=seen, explicit=True) as task:
                assert task.attempts == 1

    async def test_a_task_seen_succeeded_that_was_reset_by_now_is_run(self, make_tracker: MakeTracker) -> None:
        async with make_tracker() as one, make_tracker() as two:
            async with one.run("job"):
                pass
            seen = await loaded(two, "job")
            await one.reset("job")
            async with two._run("job", known=seen, explicit=True) as task:
                assert task.attempts == 1

    async def test_an_add_of_what_was_believed_absent_tells_the_truth(self, make_tracker: MakeTracker) -> None:
        async with make_tracker() as one, make_tracker() as two:
            assert await one.add("job", 1)
            assert not await two.add("job", 2)
            assert (await loaded(two, "job")).data == 1


class GuardedWrites(Base):
    """`load`, `dump` and `delete`, as the contract says."""

    async def test_dump_stores_a_new_record_once(self, make_tracker: MakeTracker) -> None:
        async with make_tracker() as one, make_tracker() as two:
            stored = await one.dump(_record(one, "job", 1))
            assert stored.version is not None
            assert await one.load("job") == stored
            with pytest.raises(ConflictError) as refused:
                await two.dump(_record(two, "job", 2))
            if refused.value.known:
                assert refused.value.current == stored
            assert await two.load("job") == stored

    async def test_dump_replaces_only_the_version_that_it_was_made_for(self, make_tracker: MakeTracker) -> None:
        async with make_tracker() as one, make_tracker() as two:
            first = await one.dump(_record(one, "job", 1))
            second = await two.dump(first.replace(data=2, write_id=two.new_id()))
            assert second.version != first.version
            with pytest.raises(ConflictError):
                await one.dump(first.replace(data=3, write_id=one.new_id()))
            assert await one.load("job") == second

    async def test_of_100_dumps_of_one_version_one_lands(self, make_tracker: MakeTracker) -> None:
        async with make_tracker() as one, make_tracker() as two:
            first = await one.dump(_record(one, "job", -1))

            unknown: set[int] = set()

            async def write(number: int) -> int | None:
                tracker = (one, two)[number % 2]
                try:
                    stored = await tracker.dump(first.replace(data=number, write_id=tracker.new_id()))
                except ConflictError:
                    return None
                except StoreUnavailableError:
                    unknown.add(number)
                    return None
                assert stored.data == number
                return number

            landed = [n for n in await asyncio.gather(*(write(n) for n in range(100))) if n is not None]
            last = (await loaded(two, "job")).data
            assert landed == [last] or (not landed and last in unknown)

    async def test_a_version_never_comes_back_with_the_same_content(self, make_tracker: MakeTracker) -> None:
        async with make_tracker() as tracker:
            first = await tracker.dump(_record(tracker, "job", 1))
            second = await tracker.dump(first.replace(data=2, write_id=tracker.new_id()))
            third = await tracker.dump(second.replace(data=1, write_id=tracker.new_id()))
            assert len({first.version, second.version, third.version}) == 3

    @pytest.mark.usefixtures("delete")
    async def test_delete_removes_only_the_version_that_it_was_made_for(self, make_tracker: MakeTracker) -> None:
        async with make_tracker() as one, make_tracker() as two:
            first = await one.dump(_record(one, "job", 1))
            second = await two.dump(first.replace(data=2, write_id=two.new_id()))
            with pytest.raises(ConflictError):
                await one.delete(first)
            assert await one.load("job") == second
            await one.delete(second)
            assert await two.load("job") is None

    @pytest.mark.usefixtures("delete")
    async def test_a_record_that_was_deleted_is_not_written_and_one_that_came_after_it_is_another(
        self, make_tracker: MakeTracker
    ) -> None:
        async with make_tracker() as one, make_tracker() as two:
            first = await one.dump(_record(one, "job", 1))
            await one.delete(first)
            with pytest.raises(ConflictError):
                await two.dump(first.replace(data=2, write_id=two.new_id()))
            assert await one.load("job") is None
            again = await one.dump(_record(one, "job", 1))
            with pytest.raises(ConflictError):
                await two.dump(first.replace(data=2, write_id=two.new_id()))
            with pytest.raises(ConflictError):
                await two.delete(first)
            assert await one.load("job") == again

    async def test_update_deletes_nothing_and_writes_nothing_when_the_rule_gives_the_record_back(
        self, make_tracker: MakeTracker
    ) -> None:
        async with make_tracker() as tracker:
            assert await tracker.update(MISSING, lambda task, now: task) is None
            stored = await tracker.dump(_record(tracker, "job", 1))
            assert await tracker.update("job", lambda task, now: task) == stored
            assert await tracker.load("job") == stored

    async def test_a_rule_that_fails_fails_alone(self, make_tracker: MakeTracker) -> None:
        def broken(task: Task | None, now: object) -> Task | None:
            raise ZeroDivisionError("a bug in a rule")

        async with make_tracker() as tracker:
            answers = await asyncio.gather(
                tracker.add("a"), tracker.update("a", broken), tracker.add("b"), return_exceptions=True
            )
            assert (answers[0], type(answers[1]), answers[2]) == (True, ZeroDivisionError, True)

    async def test_scan_and_find_hold_nothing_while_the_loop_body_runs(
        self, make_tracker: MakeTracker, scan: None
    ) -> None:
        async with make_tracker() as one, make_tracker() as two:
            await one.add_many(f"job-{index}" for index in range(10))
            async with asyncio.timeout(30):
                async for task in one.scan(Query()):
                    await two.ignore(task.id)
                    await one.add(f"new-{task.id}")

    async def test_a_late_request_of_a_dead_worker_changes_nothing(
        self, make_tracker: MakeTracker, clock: FakeClock
    ) -> None:
        await abandon(make_tracker(clock=clock, lease=LEASE), "job")
        clock.jump(LEASE)
        async with make_tracker(clock=clock) as tracker:
            stale = await loaded(tracker, "job")
            async with tracker.run("job"):
                pass
            before = await loaded(tracker, "job")
            with pytest.raises(ConflictError):
                await tracker.dump(stale.replace(data="late", write_id=tracker.new_id()))
            assert await loaded(tracker, "job") == before


def _record(tracker: Any, task_id: str, data: Any) -> Task:
    now = tracker.now()
    return Task(
        id=task_id, status=Status.PENDING, data=data, create_time=now, update_time=now, write_id=tracker.new_id()
    )
