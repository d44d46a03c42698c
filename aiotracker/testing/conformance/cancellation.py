"""Guarantee 6: cancellation is not failure, wherever it strikes."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from typing import Any

import anyio
import pytest

from ..._core.retry import Retry
from ..._core.task import Status
from ...errors import LeaseLostError
from ...tracker import BaseTracker
from .._cancel import Waits
from .._clock import FakeClock
from .._faults import Call, Faults, FaultyTracker
from .._processes import Child
from ._base import Base, MakeTracker, check_sound, held, loaded, until

MAX_WAITS = 500  # of one run; more would mean that it never ends
SECOND = 6  # a second cancel at each of so many waits after the first one


class Cancellation(Base):
    async def test_a_cancelled_body_releases_at_once_and_gives_the_attempt_back(
        self, make_tracker: MakeTracker
    ) -> None:
        async with make_tracker() as tracker, held(tracker, "job") as holder:
            await holder.cancel()
            task = await loaded(tracker, "job")
            check_sound(task)
            assert (task.status, task.attempts, task.last_outcome) == (Status.PENDING, 0, "cancelled")
            assert (task.releases, task.errors, task.not_before) == (1, (), None)
            async with tracker.run("job") as again:
                assert again.attempts == 1

    async def test_ten_releases_in_a_row_are_free_and_the_next_one_counts(self, make_tracker: MakeTracker) -> None:
        async with make_tracker(retry=Retry(3)) as tracker:
            for number in range(1, 12):
                async with held(tracker, "job") as holder:
                    assert (await holder.task()).attempts == 1
                    await holder.cancel()
                task = await loaded(tracker, "job")
                check_sound(task)
                assert (task.status, task.releases) == (Status.PENDING, number)
                assert task.attempts == (1 if number > 10 else 0)
                assert (task.not_before is not None) == (number > 1), "from the second on, work waits"

    async def test_an_end_of_another_kind_starts_the_count_anew(self, make_tracker: MakeTracker) -> None:
        async with make_tracker(retry=Retry(100)) as tracker:
            for _ in range(10):
                async with held(tracker, "job") as holder:
                    await holder.cancel()
            with pytest.raises(ValueError, match="x"):
                async with tracker.run("job"):
                    raise ValueError("x")
            assert (await loaded(tracker, "job")).releases == 0
            async with held(tracker, "job") as holder:
                await holder.cancel()
            assert (await loaded(tracker, "job")).attempts == 1

    async def test_somebody_elses_cancelled_task_is_a_failure(self, make_tracker: MakeTracker) -> None:
        async with make_tracker() as tracker:
            with pytest.raises(asyncio.CancelledError):
                async with tracker.run("job"):
                    other = asyncio.create_task(asyncio.sleep(60))
                    other.cancel()
                    await other
            task = await loaded(tracker, "job")
            assert (task.status, task.attempts) == (Status.FAILED, 1)
            assert task.errors[-1].type == "CancelledError"

    @pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
    async def test_an_exit_of_the_program_is_a_release(
        self, make_tracker: MakeTracker, error: type[BaseException]
    ) -> None:
        async with make_tracker() as tracker:
            try:
                async with tracker.run("job"):
                    raise error
            except BaseException as exc:
                assert type(exc) is error  # noqa: PT017 - pytest.raises would need the event loop's leave
            task = await loaded(tracker, "job")
            assert (task.status, task.attempts) == (Status.PENDING, 0)

    async def test_a_body_that_ends_normally_although_it_was_cancelled_has_succeeded(
        self, make_tracker: MakeTracker
    ) -> None:
        async with make_tracker() as tracker:

            async def body() -> None:
                async with tracker.run("job") as task:
                    entered.set()
                    try:
                        await asyncio.Event().wait()
                    except asyncio.CancelledError:
                        task.result = "finished first"

            entered = asyncio.Event()
            running = asyncio.create_task(body())
            await entered.wait()
            running.cancel()
            await asyncio.wait({running})
            task = await loaded(tracker, "job")
            assert (task.status, task.result) == (Status.SUCCEEDED, "finished first")

    async def test_a_store_that_does_not_answer_holds_a_cancellation_up_for_a_bounded_time(
        self, make_tracker: MakeTracker
    ) -> None:
        async def never(call: Call) -> None:
            await asyncio.Event().wait()

        faults = Faults()
        async with asyncio.timeout(3):
            async with FaultyTracker(make_tracker(), faults, lease=0.6) as tracker, held(tracker, "job") as holder:
                faults.script("dump", *[never] * 100)
                await holder.cancel()
                assert holder.run.cancelled()

    @pytest.mark.parametrize("seconds", [0.0, 0.001, 0.003, 0.01, 0.05])
    async def test_the_end_of_asyncio_run_leaves_nothing_claimed(
        self, make_tracker: MakeTracker, processes: None, store_url: str, seconds: float
    ) -> None:
        count = 30
        child = await asyncio.to_thread(Child, "leave", store_url, str(count), str(seconds))
        try:
            await asyncio.to_thread(child.read)

            async def free() -> bool:
                tasks = [await tracker.load(f"job-{index}") for index in range(count)]
                return all(task is None or task.lease is None for task in tasks)

            async with make_tracker() as tracker:
                await until(free)
        finally:
            await asyncio.to_thread(child.kill)

    @pytest.mark.parametrize("late", [False, True], ids=["while waiting", "with the answer there"])
    @pytest.mark.parametrize("second", range(SECOND), ids=lambda n: f"then {n} later" if n else "once")
    @pytest.mark.parametrize("world", ["asyncio", "anyio", "timeout"])
    async def test_a_cancel_at_every_await_leaves_it_released_or_its_outcome_recorded_once(
        self, make_tracker: MakeTracker, world: str, second: int, late: bool
    ) -> None:
        async with make_tracker(lease=30.0) as tracker:
            assert await _cancel_everywhere(tracker, world, second, late) >= 3, "the body alone waits so often"

    @pytest.mark.parametrize("late", [False, True], ids=["while waiting", "with the answer there"])
    @pytest.mark.parametrize("second", [0, 1, 2], ids=lambda n: f"then {n} later" if n else "once")
    @pytest.mark.parametrize("world", ["asyncio", "anyio", "timeout"])
    async def test_the_same_where_each_request_to_the_store_is_a_wait_of_its_own(
        self, make_tracker: MakeTracker, world: str, second: int, late: bool
    ) -> None:
        async with FaultyTracker(make_tracker(lease=30.0), Faults(delay=0.0001)) as tracker:
            assert await _cancel_everywhere(tracker, world, second, late) >= 5


async def _cancel_everywhere(tracker: BaseTracker[Any, Any], world: str, second: int, late: bool) -> int:
    """Runs that are cancelled at their first, second, ... wait, until there is none left; at how many."""
    for wait in range(1, MAX_WAITS):
        task_id = f"job-{wait}"
        waits, raised, bodies = await _run_and_cancel(tracker, task_id, world, wait, second, late)
        if not waits.acted:
            assert not raised
            assert bodies == 1
            return wait - 1
        await _check(tracker, task_id, bodies)
    pytest.fail("it never ends")


async def _run_and_cancel(
    tracker: BaseTracker[Any, Any], task_id: str, world: str, wait: int, second: int, late: bool
) -> tuple[Waits, bool, int]:
    """One run that is cancelled at its n-th wait, and perhaps again; whether it was, and how many bodies finished."""
    finished = 0
    at = (wait, wait + second) if second else (wait,)
    act: Callable[[], object] | None = None
    around: AbstractAsyncContextManager[Any] = nullcontext()
    if world == "anyio":
        scope = anyio.CancelScope()
        act, around = scope.cancel, _scope(scope)
    elif world == "timeout":
        timeout = asyncio.timeout(None)
        act = lambda: timeout.reschedule(asyncio.get_running_loop().time())  # noqa: E731 - a name would say less
        around = timeout
    waits = Waits(*at, act=act, late=late)
    expired = False
    outside = False

    async def fetch() -> int:
        await asyncio.sleep(0)
        return 1

    async def body() -> None:
        nonlocal finished
        async with tracker.run(task_id, data={"n": 0}) as task:
            await asyncio.sleep(0)
            task.data["n"] = 1
            await task.save()
            task.result = await task.step("fetch", fetch)
            await asyncio.sleep(0)
            finished += 1

    async def run() -> None:
        nonlocal expired, outside
        try:
            async with around:
                await waits.watch(body())
        except TimeoutError:
            expired = True
        if world == "anyio":
            outside = scope.cancelled_caught

    running = asyncio.create_task(run())
    async with asyncio.timeout(30):
        await asyncio.wait({running})
    if not running.cancelled() and (exc := running.exception()) is not None:
        raise exc  # nothing but a cancellation may come out
    return waits, running.cancelled() or expired or outside, finished


@asynccontextmanager
async def _scope(scope: anyio.CancelScope) -> AsyncIterator[None]:
    with scope:
        yield


async def _check(tracker: BaseTracker[Any, Any], task_id: str, bodies: int) -> None:
    async def free() -> bool:
        task = await tracker.load(task_id)
        return task is None or task.lease is None

    await until(free)
    task = await tracker.load(task_id)
    if task is not None:
        check_sound(task)
        outcomes = [end.outcome for end in task.ends]
        if task.status is Status.SUCCEEDED:
            assert outcomes == ["succeeded"]
            assert (bodies, task.attempts, task.result, task.data) == (1, 1, 1, {"n": 1})
            return
        assert (task.status, task.attempts, outcomes) == (Status.PENDING, 0, ["released"])
        assert task.errors == ()
    async with tracker.run(task_id) as again:
        assert again.attempts == 1


class InAnyio(Base):
    async def test_a_run_ends_well_in_a_cancelled_scope(self, make_tracker: MakeTracker) -> None:
        async with make_tracker() as tracker:
            with anyio.CancelScope() as scope:
                async with tracker.run("job"):
                    scope.cancel()
                    await anyio.sleep_forever()
            assert scope.cancelled_caught
            task = await loaded(tracker, "job")
            assert (task.status, task.attempts) == (Status.PENDING, 0)

    async def test_a_task_group_whose_sibling_fails_releases_the_others(self, make_tracker: MakeTracker) -> None:
        async with make_tracker() as tracker:

            async def holds(task_id: str) -> None:
                async with tracker.run(task_id):
                    await anyio.sleep_forever()

            async def fails() -> None:
                async def all_held() -> bool:
                    tasks = [await tracker.load(f"job-{index}") for index in range(5)]
                    return all(task is not None for task in tasks)

                await until(all_held)
                raise ValueError("the sibling")

            with pytest.raises(ExceptionGroup):
                async with anyio.create_task_group() as group:
                    for index in range(5):
                        group.start_soon(holds, f"job-{index}")
                    group.start_soon(fails)
            for index in range(5):
                task = await loaded(tracker, f"job-{index}")
                assert (task.status, task.attempts) == (Status.PENDING, 0)

    async def test_what_a_released_body_left_behind_cannot_record_anything(
        self, make_tracker: MakeTracker, clock: FakeClock
    ) -> None:
        async with make_tracker(clock=clock) as tracker, held(tracker, "job") as holder:
            task = await holder.task()
            await holder.cancel()
            before = await loaded(tracker, "job")
            with pytest.raises(LeaseLostError):
                await task.save()
            assert await loaded(tracker, "job") == before
