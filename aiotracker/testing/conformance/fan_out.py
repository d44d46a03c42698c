"""`work`: fan-out over many tasks, and over many workers."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator

import anyio
import pytest

from ..._core.retry import GiveUp, Postpone, Retry
from ..._core.task import Status, Task
from ...running import RunningTask
from .._clock import FakeClock
from ._base import LEASE, Base, MakeTracker, abandon, held, loaded, needs_scan, until

FAST = Retry(3, delay=0)


class _Counting(Base):
    @pytest.fixture
    def ran(self) -> Counter[str]:
        """How often each body ran."""
        return Counter()


class FanOut(_Counting):
    async def test_every_named_task_is_run_once_and_made_where_there_is_none(
        self, make_tracker: MakeTracker, ran: Counter[str]
    ) -> None:
        async def body(task: RunningTask) -> None:
            ran[task.id] += 1
            task.result = task.id

        ids = [f"job-{index}" for index in range(100)]
        async with make_tracker() as tracker:
            await tracker.add("job-7", 7)
            summary = await tracker.work(body, ids=ids, concurrency=10)
            assert (summary.succeeded, summary.ok, summary.skipped, summary.exhausted) == (100, True, 0, 0)
            assert ran == Counter(ids)
            for task_id in ids:
                assert (await loaded(tracker, task_id)).result == task_id

    async def test_no_more_bodies_than_concurrency_run_at_once(self, make_tracker: MakeTracker) -> None:
        running = most = 0
        full = asyncio.Event()

        async def body(task: RunningTask) -> None:
            nonlocal running, most
            running += 1
            most = max(most, running)
            if running == 7:
                full.set()
            await full.wait()
            await asyncio.sleep(0.001)
            running -= 1

        async with make_tracker() as tracker:
            await tracker.work(body, ids=(f"job-{index}" for index in range(40)), concurrency=7)
        assert most == 7

    @pytest.mark.parametrize("kind", ["sync", "async"])
    async def test_a_million_ids_are_taken_as_there_is_room(self, make_tracker: MakeTracker, kind: str) -> None:
        taken = ended = 0

        def million() -> Iterator[str]:
            nonlocal taken
            for index in range(1_000_000):
                taken += 1
                yield f"job-{index}"

        async def million_async() -> AsyncIterator[str]:
            for task_id in million():
                yield task_id

        async def body(task: RunningTask) -> None:
            nonlocal ended
            await asyncio.sleep(0)
            assert taken <= ended + 2 * 8, "a few ahead, not all"
            ended += 1

        async with make_tracker() as tracker:
            ids = million() if kind == "sync" else million_async()
            summary = await tracker.work(body, ids=ids, concurrency=8, limit=100)
            assert summary.succeeded == 100
            assert taken <= 100 + 2 * 8

    async def test_one_failing_task_never_stops_the_others(self, make_tracker: MakeTracker) -> None:
        async def body(task: RunningTask) -> None:
            if task.id.endswith("3"):
                raise ValueError(task.id)
            if task.id.endswith("5"):
                raise BaseExceptionGroup("g", [ValueError("x")])

        async with make_tracker(retry=FAST) as tracker:
            ids = [f"job-{index}" for index in range(20)]
            summary = await tracker.work(body, ids=ids, concurrency=4)
            assert (summary.succeeded, summary.exhausted, summary.retried, summary.ok) == (16, 4, 8, False)
            assert (await loaded(tracker, "job-13")).attempts == 3

    async def test_a_failing_task_is_retried_until_it_succeeds(
        self, make_tracker: MakeTracker, ran: Counter[str]
    ) -> None:
        async def body(task: RunningTask) -> None:
            ran[task.id] += 1
            if task.attempts < 3:
                raise ValueError("not yet")

        async with make_tracker(retry=Retry(3, delay=0.01)) as tracker:
            summary = await tracker.work(body, ids=["a", "b"])
            assert (summary.succeeded, summary.retried, summary.ok) == (2, 4, True)
            assert ran == {"a": 3, "b": 3}

    async def test_give_up_and_postpone_are_obeyed(self, make_tracker: MakeTracker, ran: Counter[str]) -> None:
        async def body(task: RunningTask) -> None:
            ran[task.id] += 1
            if task.id == "hopeless":
                raise GiveUp("no use")
            if ran[task.id] < 5:
                raise Postpone(0.001)

        async with make_tracker(retry=FAST) as tracker:
            summary = await tracker.work(body, ids=["hopeless", "patient"])
            assert (summary.succeeded, summary.exhausted) == (1, 1)
            assert ran == {"hopeless": 1, "patient": 5}
            assert (await loaded(tracker, "patient")).attempts == 1

    async def test_what_is_final_already_is_skipped_and_makes_it_not_ok_where_it_had_not_succeeded(
        self, make_tracker: MakeTracker, ran: Counter[str]
    ) -> None:
        async def body(task: RunningTask) -> None:
            ran[task.id] += 1

        async with make_tracker(retry=Retry(1)) as tracker:
            await tracker.work(body, ids=["done"])
            summary = await tracker.work(body, ids=["done", "new"])
            assert (summary.succeeded, summary.skipped, summary.ok) == (1, 1, True)
            with pytest.raises(ValueError, match="x"):
                async with tracker.run("exhausted"):
                    raise ValueError("x")
            summary = await tracker.work(body, ids=["done", "exhausted"])
            assert (summary.succeeded, summary.skipped, summary.ok) == (0, 2, False)
            assert ran == {"done": 1, "new": 1}

    async def test_a_task_held_elsewhere_is_waited_for_until_it_is_final(self, make_tracker: MakeTracker) -> None:
        async def body(task: RunningTask) -> None:
            pass

        async with make_tracker() as one, make_tracker() as two, held(one, "held") as holder:
            working = asyncio.create_task(two.work(body, ids=["held", "free"]))

            async def free_is_done() -> bool:
                task = await one.load("free")
                return task is not None and task.status is Status.SUCCEEDED

            await until(free_is_done)
            await asyncio.sleep(0.1)
            assert not working.done()
            await holder.end()
            async with asyncio.timeout(10):
                summary = await working
            assert (summary.succeeded, summary.skipped, summary.ok) == (1, 1, True)

    async def test_a_task_that_its_holder_releases_is_run_here(self, make_tracker: MakeTracker) -> None:
        async def body(task: RunningTask) -> None:
            task.result = "here"

        async with make_tracker() as one, make_tracker() as two, held(one, "held") as holder:
            working = asyncio.create_task(two.work(body, ids=["held"]))
            await asyncio.sleep(0.05)
            await holder.cancel()
            async with asyncio.timeout(10):
                assert (await working).succeeded == 1
            assert (await loaded(one, "held")).result == "here"

    async def test_what_a_dead_worker_held_is_taken_over_when_its_lease_is_over(
        self, make_tracker: MakeTracker, clock: FakeClock
    ) -> None:
        async def body(task: RunningTask) -> None:
            assert task.attempts == 2

        await abandon(make_tracker(clock=clock, lease=LEASE), "job")
        async with make_tracker(clock=clock) as tracker:
            working = asyncio.create_task(tracker.work(body, ids=["job"]))

            async def done() -> bool:
                clock.jump(1)
                return working.done()

            await until(done)
            assert (await working).succeeded == 1

    async def test_with_ids_tasks_added_meanwhile_are_not_taken(
        self, make_tracker: MakeTracker, ran: Counter[str]
    ) -> None:
        async with make_tracker() as tracker:

            async def body(task: RunningTask) -> None:
                ran[task.id] += 1
                await tracker.add(f"more-{task.id}")

            await tracker.work(body, ids=["a", "b"])
            assert ran == {"a": 1, "b": 1}
            assert (await loaded(tracker, "more-a")).status is Status.PENDING

    @pytest.mark.parametrize("event", [asyncio.Event, anyio.Event], ids=["asyncio", "anyio"])
    async def test_stop_drains_what_is_under_way_and_starts_nothing_more(
        self, make_tracker: MakeTracker, event: Callable[[], asyncio.Event]
    ) -> None:
        stop = event()
        started: list[str] = []

        async def body(task: RunningTask) -> None:
            started.append(task.id)
            if len(started) == 4:
                stop.set()
            await stop.wait()
            await asyncio.sleep(0.01)

        async with make_tracker() as tracker:
            ids = [f"job-{index}" for index in range(100)]
            summary = await tracker.work(body, ids=ids, concurrency=4, stop=stop)
            assert (summary.succeeded, summary.released, summary.stopped, summary.ok) == (4, 0, True, False)
            assert len(started) == 4

    async def test_after_the_grace_bodies_are_cancelled_and_released(self, make_tracker: MakeTracker) -> None:
        stop = asyncio.Event()

        async def body(task: RunningTask) -> None:
            if task.id == "job-2":
                stop.set()
            await asyncio.Event().wait()

        async with make_tracker() as tracker:
            ids = [f"job-{index}" for index in range(3)]
            async with asyncio.timeout(10):
                summary = await tracker.work(body, ids=ids, concurrency=3, stop=stop, grace=0.01)
            assert (summary.succeeded, summary.released, summary.ok) == (0, 3, False)
            for task_id in ids:
                task = await loaded(tracker, task_id)
                assert (task.status, task.attempts) == (Status.PENDING, 0)

    async def test_a_cancelled_work_releases_everything(self, make_tracker: MakeTracker) -> None:
        entered = 0
        all_entered = asyncio.Event()

        async def body(task: RunningTask) -> None:
            nonlocal entered
            entered += 1
            if entered == 20:
                all_entered.set()
            await asyncio.Event().wait()

        async with make_tracker() as tracker:
            ids = [f"job-{index}" for index in range(20)]
            working = asyncio.create_task(tracker.work(body, ids=ids, concurrency=20))
            await all_entered.wait()
            working.cancel()
            with pytest.raises(asyncio.CancelledError):
                await working
            for task_id in ids:
                task = await loaded(tracker, task_id)
                assert (task.status, task.attempts, task.lease) == (Status.PENDING, 0, None)

    @pytest.mark.parametrize("kind", ["sync", "async"])
    async def test_on_done_hears_of_every_task_that_became_final_here(
        self, make_tracker: MakeTracker, kind: str
    ) -> None:
        heard: dict[str, Status] = {}

        def report(task: Task) -> None:
            heard[task.id] = task.status
            raise RuntimeError("a bug in on_done stops nothing")

        async def report_async(task: Task) -> None:
            await asyncio.sleep(0)
            report(task)

        async def body(task: RunningTask) -> None:
            if task.id == "b":
                raise ValueError("b")

        async with make_tracker(retry=FAST) as tracker:
            summary = await tracker.work(body, ids=["a", "b", "c"], on_done=report if kind == "sync" else report_async)
        assert summary.succeeded == 2
        assert heard == {"a": Status.SUCCEEDED, "b": Status.EXHAUSTED, "c": Status.SUCCEEDED}

    async def test_no_more_runs_than_limit_are_made(self, make_tracker: MakeTracker, ran: Counter[str]) -> None:
        async def body(task: RunningTask) -> None:
            ran[task.id] += 1

        async with make_tracker() as tracker:
            ids = [f"job-{index}" for index in range(20)]
            assert (await tracker.work(body, ids=ids, limit=5)).succeeded == 5
            assert ran.total() == 5
            assert (await tracker.work(body, ids=ids, limit=5)).succeeded == 5, "what is skipped does not count"

    async def test_two_workers_share_what_there_is(self, make_tracker: MakeTracker, ran: Counter[str]) -> None:
        async def body(task: RunningTask) -> None:
            ran[task.id] += 1
            await asyncio.sleep(0)

        ids = [f"job-{index}" for index in range(200)]
        async with make_tracker() as one, make_tracker() as two:
            first, second = await asyncio.gather(
                one.work(body, ids=ids, concurrency=20), two.work(body, ids=reversed(ids), concurrency=20)
            )
            assert ran == Counter(ids)
            assert first.succeeded + second.succeeded == 200
            assert first.ok
            assert second.ok

    async def test_an_error_in_the_ids_is_raised_and_everything_released(self, make_tracker: MakeTracker) -> None:
        def ids() -> Iterator[str]:
            yield "a"
            raise LookupError("the file of ids")

        async def body(task: RunningTask) -> None:
            await asyncio.Event().wait()

        async with make_tracker() as tracker:
            async with asyncio.timeout(10):
                with pytest.raises(LookupError, match="the file of ids"):
                    await tracker.work(body, ids=ids(), concurrency=2)
            task = await tracker.load("a")
            assert task is None or task.lease is None


@needs_scan
class FanOutOverTheStore(_Counting):
    async def test_everything_that_may_be_run_is_run_also_what_bodies_add(
        self, make_tracker: MakeTracker, ran: Counter[str]
    ) -> None:
        async with make_tracker() as tracker:

            async def body(task: RunningTask) -> None:
                ran[task.id] += 1
                if len(task.id) < 4:
                    await tracker.add_many(task.id + letter for letter in "ab")

            await tracker.add_many(["a", "b"])
            await tracker.add("no")
            await tracker.ignore("no")
            async with asyncio.timeout(30):
                summary = await tracker.work(body, concurrency=8)
            assert summary.succeeded == 2 + 4 + 8 + 16
            assert summary.ok
            assert set(ran.values()) == {1}
            assert "no" not in ran

    async def test_higher_priorities_come_first(self, make_tracker: MakeTracker) -> None:
        order: list[str] = []

        async def body(task: RunningTask) -> None:
            order.append(task.id)

        async with make_tracker() as tracker:
            for task_id, priority in (("low", -1), ("middle", 0), ("high", 10), ("higher", 11)):
                await tracker.add(task_id, priority=priority)
            await tracker.work(body, concurrency=1)
        assert order == ["higher", "high", "middle", "low"]

    async def test_failed_ones_are_retried_to_their_end(self, make_tracker: MakeTracker, ran: Counter[str]) -> None:
        async def body(task: RunningTask) -> None:
            ran[task.id] += 1
            if task.id == "never" or task.attempts == 1:
                raise ValueError("x")

        async with make_tracker(retry=Retry(3, delay=0.01)) as tracker:
            await tracker.add_many(["once", "never"])
            async with asyncio.timeout(20):
                summary = await tracker.work(body)
            assert (summary.succeeded, summary.exhausted, summary.retried) == (1, 1, 3)
            assert ran == {"once": 2, "never": 3}

    async def test_it_ends_when_what_others_hold_is_final_too(self, make_tracker: MakeTracker) -> None:
        async def body(task: RunningTask) -> None:
            pass

        async with make_tracker() as one, make_tracker() as two, held(one, "held") as holder:
            working = asyncio.create_task(two.work(body))
            await asyncio.sleep(0.1)
            assert not working.done()
            await holder.end()
            async with asyncio.timeout(10):
                await working

    async def test_two_workers_share_the_store(self, make_tracker: MakeTracker, ran: Counter[str]) -> None:
        async def body(task: RunningTask) -> None:
            ran[task.id] += 1
            await asyncio.sleep(0)

        async with make_tracker() as one, make_tracker() as two:
            await one.add_many(f"job-{index}" for index in range(200))
            async with asyncio.timeout(60):
                first, second = await asyncio.gather(one.work(body, concurrency=20), two.work(body, concurrency=20))
            assert first.succeeded + second.succeeded == 200
            assert set(ran.values()) == {1}
            assert len(ran) == 200

    async def test_forever_waits_for_more_until_it_is_stopped(
        self, make_tracker: MakeTracker, ran: Counter[str]
    ) -> None:
        stop = asyncio.Event()

        async def body(task: RunningTask) -> None:
            ran[task.id] += 1

        async with make_tracker() as tracker:
            working = asyncio.create_task(tracker.work(body, forever=True, stop=stop))
            for task_id in ("a", "b"):
                await tracker.add(task_id)
                async with asyncio.timeout(10):
                    assert (await tracker.wait(task_id)).status is Status.SUCCEEDED
            assert not working.done()
            stop.set()
            async with asyncio.timeout(10):
                summary = await working
            assert (summary.succeeded, summary.ok) == (2, True)

    async def test_what_is_postponed_is_run_when_it_is_due(self, make_tracker: MakeTracker, ran: Counter[str]) -> None:
        async def body(task: RunningTask) -> None:
            ran[task.id] += 1
            if ran[task.id] == 1:
                raise Postpone(0.05)

        async with make_tracker() as tracker:
            await tracker.add("job")
            async with asyncio.timeout(10):
                assert (await tracker.work(body)).succeeded == 1
            assert ran == {"job": 2}
