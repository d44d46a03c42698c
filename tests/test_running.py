"""How a run begins and ends, where the plain cases end: cancellations, interrupts, slow stores, odd exceptions."""

import asyncio
import contextlib
import functools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import anyio
import msgspec
import pytest

from aiotracker import (
    BaseTracker,
    FileTracker,
    GiveUp,
    InvalidValueError,
    LeaseLostError,
    MemoryTracker,
    OutcomeUnknownError,
    Postpone,
    RecordTooLargeError,
    Retry,
    RunningTask,
    Status,
    StoreError,
    StoreUnavailableError,
    Task,
    TaskExhaustedError,
    TaskLockedError,
    TaskSucceededError,
)
from aiotracker import running as running_module
from aiotracker._core.transitions import NO_CHANGES
from aiotracker._values import RESERVE, return_type
from aiotracker.testing import FakeClock, Faults, FaultyTracker, reply_lost, unreachable


class Gate:
    """A request that waits in the store until it is let through."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.opened = asyncio.Event()

    async def behave(self, call: Callable[[], Awaitable[Any]]) -> Any:
        self.reached.set()
        await self.opened.wait()
        return await call()

    async def land_first(self, call: Callable[[], Awaitable[Any]]) -> Any:
        """The write lands, and its answer waits."""
        answer = await call()
        self.reached.set()
        await self.opened.wait()
        return answer


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def faults() -> Faults:
    return Faults()


@pytest.fixture
async def memory() -> AsyncIterator[MemoryTracker]:
    async with MemoryTracker() as tracker:
        yield tracker


@pytest.fixture
async def slow(faults: Faults) -> AsyncIterator[FaultyTracker]:
    """A store that is asked over load and dump, which may go wrong."""
    async with FaultyTracker(MemoryTracker(), faults) as tracker:
        yield tracker


@pytest.fixture
async def timed(clock: FakeClock) -> AsyncIterator[MemoryTracker]:
    async with MemoryTracker(clock=clock, lease=60.0) as tracker:
        yield tracker


async def record(tracker: BaseTracker, task_id: str = "job") -> Task:
    task = await tracker.load(task_id)
    assert task is not None
    return task


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(10):
        while not await condition():  # noqa: ASYNC110 - what is waited for happens in the store
            await asyncio.sleep(0.002)


def started(coroutine: Any) -> asyncio.Task[Any]:
    return asyncio.create_task(coroutine)


# -- the claim


async def test_a_claim_that_is_cancelled_while_the_store_works_on_it_is_given_back_before_the_cancellation_goes_on(
    slow: FaultyTracker, faults: Faults, gate: Gate
) -> None:
    faults.script("dump", gate.behave)
    run = started(slow.run("job").__aenter__())
    await gate.reached.wait()
    run.cancel()
    await settle()
    assert not run.done()
    gate.opened.set()
    with pytest.raises(asyncio.CancelledError):
        await run
    task = await record(slow)
    assert (task.status, task.attempts, task.lease, task.releases) == (Status.PENDING, 0, None, 0)


async def test_a_claim_that_is_answered_long_after_its_cancellation_is_given_back_then(
    slow: FaultyTracker, faults: Faults, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running_module, "CLAIM_TIME", 0.01)
    faults.script("dump", gate.behave)
    run = started(slow.run("job").__aenter__())
    await gate.reached.wait()
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    gate.opened.set()
    await until(lambda: _is(slow, Status.PENDING))
    assert (await record(slow)).attempts == 0


async def test_closing_waits_for_a_claim_that_is_under_way_and_gives_it_back(
    faults: Faults, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running_module, "CLAIM_TIME", 0.01)
    async with MemoryTracker() as memory:
        tracker = FaultyTracker(memory.peer(), faults)
        async with tracker:
            faults.script("dump", gate.behave)
            run = started(tracker.run("job").__aenter__())
            await gate.reached.wait()
            run.cancel()
            with pytest.raises(asyncio.CancelledError):
                await run
            asyncio.get_running_loop().call_later(0.02, gate.opened.set)
        assert (await record(memory)).status is Status.PENDING


async def _is(tracker: BaseTracker, status: Status) -> bool:
    task = await tracker.load("job")
    return task is not None and task.status is status


async def test_a_claim_that_is_refused_while_it_is_cancelled_changes_nothing(
    slow: FaultyTracker, faults: Faults, gate: Gate
) -> None:
    async with slow.run("job") as other:
        faults.script("dump", gate.behave)
        run = started(slow.run("job").__aenter__())
        await gate.reached.wait()
        run.cancel()
        gate.opened.set()
        with pytest.raises(asyncio.CancelledError):
            await run
        assert other.lease_left > 0
    assert (await record(slow)).status is Status.SUCCEEDED


async def test_a_run_is_entered_once(memory: MemoryTracker) -> None:
    run = memory.run("job")
    async with run:
        with pytest.raises(RuntimeError, match="entered once"):
            await run.__aenter__()


async def test_data_that_leaves_no_room_for_an_end_is_refused_before_anything_is_written(memory: MemoryTracker) -> None:
    data = "x" * (memory.max_record_bytes - RESERVE)
    for refused in (memory.add("job", data), started(_enter(memory, data))):
        with pytest.raises(RecordTooLargeError):
            await refused
    assert await memory.load("job") is None


async def _enter(tracker: BaseTracker, data: Any) -> None:
    async with tracker.run("job", data=data):
        pass


# -- cancellations


async def test_a_cancel_during_the_final_write_is_raised_after_that_is_recorded(
    slow: FaultyTracker, faults: Faults, gate: Gate
) -> None:
    async def body() -> None:
        async with slow.run("job") as task:
            faults.script("dump", gate.behave)
            task.result = 1

    run = started(body())
    await gate.reached.wait()
    run.cancel()
    await settle()
    assert run.done()
    assert run.cancelled()
    task = await record(slow)
    assert (task.status, task.result) == (Status.SUCCEEDED, 1)


@pytest.mark.parametrize("times", [1, 2, 5])
async def test_however_often_it_is_cancelled_during_its_failure_that_is_recorded_once(
    slow: FaultyTracker, faults: Faults, gate: Gate, times: int
) -> None:
    async def body() -> None:
        async with slow.run("job"):
            faults.script("dump", gate.land_first)
            raise ValueError("bad")

    run = started(body())
    await gate.reached.wait()
    for _ in range(times):
        run.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await run
    assert [error.message for error in (await record(slow)).errors] == ["bad"]


async def test_a_cancel_just_before_the_body_ends_does_not_undo_its_success(slow: FaultyTracker) -> None:
    async def body() -> None:
        async with slow.run("job"):
            me = asyncio.current_task()
            assert me is not None
            me.cancel()  # arrives with the next await, which is ours

    with pytest.raises(asyncio.CancelledError):
        await started(body())
    assert (await record(slow)).status is Status.SUCCEEDED


async def test_under_a_timeout_of_the_caller_a_slow_end_is_recorded_and_a_timeout_raised(
    slow: FaultyTracker, faults: Faults, gate: Gate
) -> None:
    async def body() -> None:
        async with asyncio.timeout(0.01):
            async with slow.run("job"):
                faults.script("dump", gate.behave)

    with pytest.raises(TimeoutError):
        await body()
    me = asyncio.current_task()
    assert me is not None
    assert me.cancelling() == 0
    assert (await record(slow)).status is Status.SUCCEEDED


async def test_while_a_cancellation_is_on_its_way_no_other_error_replaces_it(
    slow: FaultyTracker, faults: Faults, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    async def full(call: Any) -> Any:
        raise StoreError("the disk is full")

    async def body() -> None:
        async with asyncio.timeout(0.01):
            async with slow.run("job"):
                faults.script("dump", gate.behave, full)

    with pytest.raises(TimeoutError):
        await body()
    assert "the disk is full" in caplog.text


async def test_a_release_that_is_not_answered_is_waited_for_within_a_bound_and_then_goes_on_being_tried(
    slow: FaultyTracker, faults: Faults, gate: Gate, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(running_module, "RELEASE_TIME", 0.02)

    async def body() -> None:
        async with slow.run("job"):
            faults.script("dump", gate.behave)
            await asyncio.Event().wait()

    run = started(body())
    await settle()
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert "could not be released in time" in caplog.text
    await until(lambda: _is(slow, Status.PENDING))
    assert (await record(slow)).attempts == 0


@pytest.mark.parametrize("answers_then", [True, False])
async def test_an_end_that_is_not_answered_is_tried_once_more_when_the_lease_is_over_and_then_unknown(
    clock: FakeClock, faults: Faults, gate: Gate, monkeypatch: pytest.MonkeyPatch, answers_then: bool
) -> None:
    monkeypatch.setattr(running_module, "RELEASE_TIME", 5.0 if answers_then else 0.02)
    async with FaultyTracker(MemoryTracker(clock=clock, lease=60.0), faults) as slow:

        async def body() -> None:
            async with slow.run("job"):
                faults.script("dump", gate.behave, None if answers_then else gate.behave)

        run = started(body())
        await gate.reached.wait()
        await settle()
        clock.jump(61)
        if answers_then:
            await run
        else:
            with pytest.raises(OutcomeUnknownError):
                await run
            # It goes on being tried, by the keeper.
            await until(lambda: _is(slow, Status.SUCCEEDED))
        assert run.cancelling() == 0
        assert (await record(slow)).status is Status.SUCCEEDED


async def test_an_end_whose_reply_is_lost_for_good_is_unknown_and_recorded_when_the_store_is_there_again(
    faults: Faults, clock: FakeClock
) -> None:
    async with FaultyTracker(MemoryTracker(clock=clock), faults, lease=0.3) as slow:
        with pytest.raises(OutcomeUnknownError) as raised:
            async with slow.run("job"):
                faults.script("dump", *[unreachable] * 12)
        assert isinstance(raised.value.__cause__, OutcomeUnknownError)
        faults._scripts.clear()

        async def is_recorded() -> bool:
            clock.jump(0.01)
            return await _is(slow, Status.SUCCEEDED)

        await until(is_recorded)


async def test_an_end_that_so_many_claims_have_followed_that_nobody_can_tell_is_unknown_and_not_lost(
    slow: FaultyTracker, faults: Faults
) -> None:
    async def overtaken(call: Any) -> Any:
        await call()
        for _ in range(9):
            async with slow.inner.run("job", force=True):
                pass
        raise StoreUnavailableError("the reply was lost")

    with pytest.raises(OutcomeUnknownError, match="does not remember"):
        async with slow.run("job"):
            faults.script("dump", overtaken)


async def test_a_store_that_is_closed_under_a_run_does_not_hide_its_cancellation(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tracker = await MemoryTracker().open()

    async def body() -> None:
        async with tracker.run("job"):
            await asyncio.Event().wait()

    run = started(body())
    await settle()
    await tracker.aclose()
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert "'job'" in caplog.text


async def test_a_cancelled_scope_of_anyio_releases_and_nothing_is_left_cancelled(slow: FaultyTracker) -> None:
    with anyio.move_on_after(0.01) as scope:
        async with slow.run("job"):
            await anyio.sleep_forever()
    assert scope.cancelled_caught
    me = asyncio.current_task()
    assert me is not None
    assert me.cancelling() == 0
    assert (await record(slow)).last_outcome == "cancelled"


async def test_a_cancelled_scope_of_anyio_does_not_disturb_the_end_of_a_body_that_ended_well(
    slow: FaultyTracker,
) -> None:
    with anyio.CancelScope() as scope:
        async with slow.run("job"):
            scope.cancel()
    assert (await record(slow)).status is Status.SUCCEEDED


async def test_a_scope_of_anyio_around_a_claim_that_hangs_is_left_within_a_bound(
    slow: FaultyTracker, faults: Faults, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running_module, "CLAIM_TIME", 0.02)
    faults.script("dump", gate.behave)
    with anyio.move_on_after(0.01) as scope:
        async with slow.run("job"):
            pass
    assert scope.cancelled_caught
    gate.opened.set()
    await until(lambda: _is(slow, Status.PENDING))


async def test_a_task_group_in_the_body_is_cancelled_with_it(memory: MemoryTracker) -> None:
    async def body() -> None:
        async with memory.run("job"), asyncio.TaskGroup() as group:
            group.create_task(asyncio.Event().wait())

    run = started(body())
    await settle()
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert (await record(memory)).status is Status.PENDING


# -- our own interrupts


async def test_our_timeout_in_a_task_group_is_a_timeout_and_leaves_nothing_cancelled(
    timed: MemoryTracker, clock: FakeClock
) -> None:
    async def body() -> None:
        with pytest.raises(TimeoutError, match="ran longer than its timeout of 10 s"):
            async with timed.run("job", timeout=10), asyncio.TaskGroup() as group:
                group.create_task(asyncio.Event().wait())
        me = asyncio.current_task()
        assert me is not None
        assert me.cancelling() == 0
        async with asyncio.timeout(None):  # whose account must be right
            await asyncio.sleep(0)

    run = started(body())
    await settle()
    clock.jump(10)
    await run
    task = await record(timed)
    assert (task.status, task.last_outcome) == (Status.FAILED, "timeout")


async def test_a_body_that_outlives_our_timeout_has_failed_all_the_same(timed: MemoryTracker, clock: FakeClock) -> None:
    async def body() -> None:
        async with timed.run("job", timeout=10):
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()

    run = started(body())
    await settle()
    clock.jump(10)
    with pytest.raises(TimeoutError):
        await run
    assert run.cancelling() == 0
    assert (await record(timed)).last_outcome == "timeout"


async def test_a_body_that_raises_when_our_timeout_cancels_it_has_that_as_the_cause(
    timed: MemoryTracker, clock: FakeClock
) -> None:
    async def body() -> None:
        async with timed.run("job", timeout=10):
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                raise ValueError("while it cleaned up") from None

    run = started(body())
    await settle()
    clock.jump(10)
    with pytest.raises(TimeoutError) as raised:
        await run
    assert isinstance(raised.value.__cause__, ValueError)
    assert "while it cleaned up" in (await record(timed)).errors[-1].traceback


async def test_a_cancellation_from_outside_wins_over_our_timeout(timed: MemoryTracker, clock: FakeClock) -> None:
    async def body() -> None:
        async with timed.run("job", timeout=10):
            await asyncio.Event().wait()

    run = started(body())
    await settle()
    clock.jump(10)
    await asyncio.sleep(0)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert (await record(timed)).last_outcome == "cancelled"


async def test_a_timeout_of_the_caller_at_the_same_moment_as_ours_is_a_release(
    timed: MemoryTracker, clock: FakeClock
) -> None:
    async def body() -> None:
        async with asyncio.timeout(None) as around:
            async with timed.run("job", timeout=10):
                loop = asyncio.get_running_loop()
                clock.jump(10)
                around.reschedule(loop.time())
                await asyncio.Event().wait()

    with pytest.raises(TimeoutError):
        await body()
    me = asyncio.current_task()
    assert me is not None
    assert me.cancelling() == 0
    assert (await record(timed)).last_outcome == "cancelled"


async def test_nested_runs_that_lose_their_leases_at_once_take_back_their_own_cancellation_each(
    timed: MemoryTracker, clock: FakeClock
) -> None:
    async def body() -> None:
        async with timed.run("outer"), timed.run("inner"):
            await asyncio.Event().wait()

    run = started(body())
    await settle()
    clock.jump(61)
    with pytest.raises(LeaseLostError):
        await run
    assert run.cancelling() == 0


async def test_a_lost_lease_of_another_run_is_an_ordinary_error_of_this_one(timed: MemoryTracker) -> None:
    with pytest.raises(LeaseLostError):
        async with timed.run("job") as task:
            raise LeaseLostError("of another", "other", task.fence)
    assert (await record(timed)).status is Status.FAILED


async def test_a_body_that_blocks_and_ends_at_once_is_named_too(
    timed: MemoryTracker, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with timed.run("job"):
        await settle()
        clock.jump(40)
    assert "the event loop was blocked for 35.000 s" in caplog.text
    assert "'job'" in caplog.text
    assert (await record(timed)).status is Status.SUCCEEDED


# -- odd exceptions


@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt(),
        SystemExit(1),
        BaseExceptionGroup("g", [ValueError(), BaseExceptionGroup("h", [SystemExit()])]),
    ],
    ids=["interrupt", "exit", "in a group"],
)
async def test_the_end_of_the_program_is_a_release(memory: MemoryTracker, error: BaseException) -> None:
    with pytest.raises(type(error)):
        async with memory.run("job"):
            raise error
    task = await record(memory)
    assert (task.status, task.attempts, task.errors) == (Status.PENDING, 0, ())


async def test_a_run_in_an_async_generator_that_is_not_read_to_its_end_is_released(memory: MemoryTracker) -> None:
    async def rows() -> AsyncIterator[int]:
        async with memory.run("job") as task:
            task.data = {"at": 1}
            yield 1

    reading = rows()
    async for _ in reading:
        break
    await reading.aclose()  # type: ignore[attr-defined]  # an async generator
    await until(lambda: _is(memory, Status.PENDING))
    task = await record(memory)
    assert (task.attempts, task.data, task.last_outcome) == (0, {"at": 1}, "cancelled")


def test_a_run_whose_event_loop_is_gone_ends_quietly() -> None:
    async def body(tracker: MemoryTracker) -> None:
        async with tracker.run("job"):
            await asyncio.Event().wait()

    coroutine: Any = None

    async def main() -> None:
        nonlocal coroutine
        tracker = await MemoryTracker().open()
        coroutine = body(tracker)
        task = asyncio.current_task()
        assert task is not None
        coroutine.send(None)
        await tracker.aclose()

    asyncio.run(main())
    coroutine.close()


async def test_a_run_that_ends_in_another_asyncio_task_is_an_error_and_released(memory: MemoryTracker) -> None:
    run = memory.run("job")
    await started(run.__aenter__())
    with pytest.raises(RuntimeError, match="must end in the asyncio task that entered it"):
        await run.__aexit__(None, None, None)
    await until(lambda: _is(memory, Status.PENDING))


async def test_an_error_with_no_text_of_its_own_is_recorded(memory: MemoryTracker) -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no")

    with pytest.raises(Mute):
        async with memory.run("job"):
            raise Mute
    error = (await record(memory)).errors[-1]
    assert (error.type, error.message) == ("Mute", "<Mute without a text: RuntimeError>")


async def test_an_error_is_recorded_within_a_bound_although_all_threads_are_busy(
    memory: MemoryTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running_module, "DESCRIBE_TIME", 0.01)
    stuck: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    monkeypatch.setattr(asyncio.get_running_loop(), "run_in_executor", lambda *_: stuck)
    with pytest.raises(ValueError, match="bad"):
        async with memory.run("job"):
            raise ValueError("bad")
    error = (await record(memory)).errors[-1]
    assert error.message == "bad"
    assert "in test_an_error_is_recorded_within_a_bound" in error.traceback


async def test_a_failed_step_is_recorded_within_a_bound_although_all_threads_are_busy(
    memory: MemoryTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running_module, "DESCRIBE_TIME", 0.01)

    async def bad() -> None:
        raise ValueError("bad")

    async with memory.run("job") as task:
        stuck: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        monkeypatch.setattr(asyncio.get_running_loop(), "run_in_executor", lambda *_: stuck)
        async with asyncio.timeout(5):
            with pytest.raises(ValueError, match="bad"):
                await task.step("s", bad)
        monkeypatch.undo()
    assert (await record(memory)).steps[0].error is not None


async def test_a_lost_lease_is_told_as_this_ones_although_the_body_raised_that_of_another(
    timed: MemoryTracker, clock: FakeClock
) -> None:
    with pytest.raises(LeaseLostError) as raised:
        async with timed.run("job") as task:
            clock.jump(61)
            raise LeaseLostError("of another", "other", task.fence)
    assert raised.value.task_id == "job"


async def test_a_long_note_takes_no_room_from_the_data(memory: MemoryTracker) -> None:
    async with memory.run("job") as task:
        task.note = "\x01" * 2000
        task.data = "x" * (memory.max_record_bytes - RESERVE - 300)
        await task.save()


async def test_a_delay_that_fails_does_not_lose_the_failure(
    memory: MemoryTracker, caplog: pytest.LogCaptureFixture
) -> None:
    def delay(attempts: int) -> float:
        raise ZeroDivisionError

    with pytest.raises(ValueError, match="bad"):
        async with memory.run("job", retry=Retry(delay=delay)):
            raise ValueError("bad")
    task = await record(memory)
    assert task.status is Status.FAILED
    assert task.not_before is not None
    assert "the retry's delay failed" in caplog.text


async def test_somebody_elses_cancelled_task_in_a_group_is_tried_again(memory: MemoryTracker) -> None:
    with pytest.raises(BaseExceptionGroup):
        async with memory.run("job"):
            raise BaseExceptionGroup("g", [asyncio.CancelledError(), ValueError()])
    assert (await record(memory)).status is Status.FAILED


async def test_a_task_without_an_attempt_left_and_one_that_gave_up_say_why(memory: MemoryTracker) -> None:
    for retry, error in ((Retry(1), ValueError("bad")), (Retry(9), GiveUp("no more"))):
        with pytest.raises(type(error)):
            async with memory.run(str(error), retry=retry):
                raise error
        with pytest.raises(TaskExhaustedError, match=f"{type(error).__name__}: {error}"):
            async with memory.run(str(error)):
                pass


async def test_a_postponed_body_whose_data_cannot_be_stored_is_postponed_without(
    memory: MemoryTracker, caplog: pytest.LogCaptureFixture
) -> None:
    await memory.add("job", {"n": 1})
    with pytest.raises(Postpone):
        async with memory.run("job") as task:
            task.data["n"] = {2}
            raise Postpone(5)
    stored = await record(memory)
    assert (stored.data, stored.status, stored.attempts) == ({"n": 1}, Status.PENDING, 0)
    assert "data['n'] is of type set" in caplog.text


# -- what is stored


async def test_what_a_body_changes_without_saving_is_no_other_readers_before_it_ends(memory: MemoryTracker) -> None:
    given = {"list": [1]}
    await memory.add("job", given)
    given["list"].append(99)
    async with memory.run("job") as task:
        task.data["list"].append(2)
        assert task.record.data == {"list": [1]}
        assert (await record(memory)).data == {"list": [1]}
        await task.save()
        task.data["list"].append(3)
        assert (await record(memory)).data == {"list": [1, 2]}
        result = {"deep": [1]}
        task.result = result
    result["deep"].append(2)
    stored = await record(memory)
    assert (stored.data, stored.result) == ({"list": [1, 2, 3]}, {"deep": [1]})


async def test_a_value_that_was_stored_is_not_the_callers_any_more(memory: MemoryTracker) -> None:
    async def give() -> list[int]:
        return mine

    mine = [1]
    async with memory.run("job") as task:
        got = await task.step("s", give)
        got.append(2)
        mine.append(3)
        await task.save()
        assert task.record.steps[0].result == [1]


async def test_data_of_a_declared_type_is_given_and_kept_as_that(memory: MemoryTracker) -> None:
    @dataclass
    class Page:
        depth: int = 0

    async with memory.peer(data_type=Page) as tracker:
        await tracker.add("job", Page(1))
        async with tracker.run("job") as task:
            assert task.data == Page(1)
            task.data.depth = 2
        assert (await record(tracker)).data == {"depth": 2}
    async with memory.peer(data_type=int) as tracker:
        with pytest.raises(InvalidValueError, match="data does not fit int"):
            async with tracker.run("job", force=True) as task:
                assert task.data


@pytest.mark.parametrize("name", ["progress", "note"])
@pytest.mark.parametrize("value", [float("nan"), True, b"x", "\ud800", "x" * 2001, 10**400])
async def test_progress_and_note_are_checked_where_they_are_set(memory: MemoryTracker, name: str, value: Any) -> None:
    async with memory.run("job") as task:
        with pytest.raises(InvalidValueError):
            setattr(task, name, value)
        setattr(task, name, None)
    assert getattr(await record(memory), name) is None


async def test_however_many_attempts_fail_beside_large_data_each_is_recorded(memory: MemoryTracker) -> None:
    retry = Retry(9, delay=0)
    with pytest.raises(LeaseLostError):
        async with memory.run("job", retry=retry) as task:
            task.data = "x" * (memory.max_record_bytes - RESERVE - 300)
            await task.save()
            task.note = "\x01" * 2000
            await task.renew()
            await memory.reset("job", force=True)
    for _ in range(8):
        with pytest.raises(ValueError, match="\x01"):
            async with memory.run("job", retry=retry):
                raise ValueError("\x01" * 10_000)
    assert (await record(memory)).attempts == 8


async def test_a_step_result_that_is_too_large_fails_the_step_and_stays_out_of_the_record(
    memory: MemoryTracker,
) -> None:
    async def big() -> str:
        return "x" * memory.max_record_bytes

    with pytest.raises(RecordTooLargeError):
        async with memory.run("job") as task:
            await task.step("big", big)
    stored = await record(memory)
    assert stored.status is Status.FAILED
    assert (stored.steps[0].status, stored.steps[0].result) == (Status.FAILED, None)
    assert stored.steps[0].error is not None
    assert stored.steps[0].error.type == "RecordTooLargeError"


# -- steps


async def test_a_finished_step_stays_recorded_whatever_is_written_after_it(slow: FaultyTracker, faults: Faults) -> None:
    """Two steps end at once; the write of the second was made before the first was recorded."""
    gates = [Gate(), Gate()]
    go = asyncio.Event()

    async def wait() -> int:
        await go.wait()
        return 1

    async with slow.run("job") as task:
        steps = [started(task.step("a", wait)), started(task.step("b", wait))]
        await settle()
        faults.script("dump", gates[0].behave, gates[1].behave)
        go.set()
        await gates[1].reached.wait()
        gates[0].opened.set()
        await steps[0]
        gates[1].opened.set()
        await steps[1]
        assert {step.name: step.status for step in (await record(slow)).steps} == {"a": "succeeded", "b": "succeeded"}


async def test_of_two_saves_at_once_the_one_that_lands_last_does_not_bring_old_data_back(
    slow: FaultyTracker, faults: Faults
) -> None:
    old, new = Gate(), Gate()
    async with slow.run("job") as task:
        task.data = "old"
        faults.script("dump", old.behave, new.behave)
        first = started(task.save())
        await old.reached.wait()
        task.data = "new"
        second = started(task.save())
        await new.reached.wait()
        new.opened.set()
        await second
        assert (await record(slow)).data == "new"
        old.opened.set()
        await first
        assert (await record(slow)).data == "new"


async def test_a_step_whose_record_is_unknown_is_written_with_what_comes_next(
    slow: FaultyTracker, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slow, "_patience", 0.0)

    async def one() -> int:
        return 1

    async with slow.run("job") as task:
        faults.script("dump", reply_lost)
        with pytest.raises(OutcomeUnknownError):
            await task.step("s", one)
    assert (await record(slow)).steps[0].status is Status.SUCCEEDED


async def test_a_step_that_fails_is_raised_although_it_cannot_be_recorded(
    memory: MemoryTracker, caplog: pytest.LogCaptureFixture
) -> None:
    async def bad() -> None:
        await memory.ignore("job", force=True)
        raise ValueError("bad")

    with pytest.raises(LeaseLostError):
        async with memory.run("job") as task:
            with pytest.raises(ValueError, match="bad"):
                await task.step("s", bad)
    assert "the failed step 's' of 'job' could not be recorded" in caplog.text


async def test_a_step_is_not_begun_when_the_lease_is_over(timed: MemoryTracker, clock: FakeClock) -> None:
    async def effect() -> None:
        pytest.fail("ran without a lease")

    with pytest.raises(LeaseLostError):
        async with timed.run("job") as task:
            clock.jump(61)
            await task.step("s", effect)


async def test_a_step_in_a_thread_takes_the_type_of_what_it_runs(memory: MemoryTracker) -> None:
    def work(x: int) -> Receipt:
        return Receipt(x)

    async with memory.run("job") as task:
        assert await task.step("s", asyncio.to_thread, work, 3) == Receipt(3)
        assert task.record.steps[0].result == {"x": 3}


@pytest.mark.parametrize("name", ["", 3, None, "\ud800"])
async def test_a_step_has_a_name(memory: MemoryTracker, name: Any) -> None:
    async with memory.run("job") as task:
        with pytest.raises(InvalidValueError, match="a step's name"):
            await task.step(name, asyncio.sleep, 0)


# -- leases of another length


async def test_a_longer_lease_that_was_not_granted_is_not_believed(timed: MemoryTracker, monkeypatch: Any) -> None:
    async with timed.run("job") as task:
        monkeypatch.setattr(timed, "update", _unavailable)
        with pytest.raises(StoreUnavailableError):
            await task.renew(3600)
        assert task.lease_left == pytest.approx(60)
        monkeypatch.undo()


async def test_a_shorter_lease_counts_as_soon_as_it_is_asked_for(timed: MemoryTracker, monkeypatch: Any) -> None:
    async with timed.run("job") as task:
        monkeypatch.setattr(timed, "update", _unavailable)
        with pytest.raises(StoreUnavailableError):
            await task.renew(5)
        assert task.lease_left == pytest.approx(5)
        monkeypatch.undo()


async def _unavailable(*_: Any, **__: Any) -> None:
    raise StoreUnavailableError("not there")


async def test_a_renewal_with_the_old_length_that_lands_last_is_followed_by_one_with_the_new(
    clock: FakeClock, faults: Faults, gate: Gate
) -> None:
    inner = MemoryTracker(clock=clock, lease=60.0)
    async with FaultyTracker(inner, faults) as slow, inner.peer() as other, slow.run("job") as task:
        await settle()
        faults.script("dump", gate.behave)
        clock.jump(20)
        await gate.reached.wait()
        await task.renew(3600)
        gate.opened.set()

        async def is_long() -> bool:
            lease = (await record(slow)).lease
            return lease is not None and lease.ttl == 3600

        await until(is_long)
        await settle()
        assert await is_long()
        with pytest.raises(TaskLockedError) as refused:
            async with other.run("job"):
                pass
        assert refused.value.retry_after is not None
        assert refused.value.retry_after > 3000


async def test_a_save_with_the_old_length_that_lands_last_is_followed_by_a_renewal_with_the_new(
    slow: FaultyTracker, faults: Faults, gate: Gate
) -> None:
    async with slow.run("job") as task:
        faults.script("dump", gate.behave)
        saving = started(task.save())
        await gate.reached.wait()
        await task.renew(3600)
        gate.opened.set()
        await saving

        async def is_long() -> bool:
            lease = (await record(slow)).lease
            return lease is not None and lease.ttl == 3600

        await until(is_long)


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), True, "5"])
async def test_a_length_of_time_is_a_positive_number(memory: MemoryTracker, seconds: Any) -> None:
    for options in ({"lease": seconds}, {"timeout": seconds}):
        with pytest.raises(InvalidValueError, match="takes a positive number of seconds"):
            memory.run("job", **options)
    async with memory.run("job") as task:
        with pytest.raises(InvalidValueError):
            await task.renew(seconds)


# -- calls


@dataclass
class Receipt:
    x: int


async def test_what_is_raised_about_another_task_in_a_call_is_not_taken_for_its_own_result(
    memory: MemoryTracker,
) -> None:
    async with memory.run("other") as task:
        task.result = "theirs"

    async def nested() -> str:
        async with memory.run("other"):
            pass
        return "mine"

    with pytest.raises(TaskSucceededError):
        await memory.call("job", nested)
    assert (await record(memory)).status is Status.FAILED


async def test_a_call_has_the_type_of_its_function_whatever_the_trackers_results_are(memory: MemoryTracker) -> None:
    async with memory.peer(result_type=int) as tracker:

        async def typed() -> list[Receipt]:
            return [Receipt(1)]

        async def untyped():  # type: ignore[no-untyped-def]  # that is what is tested
            return "x"

        assert await tracker.call("a", typed) == [Receipt(1)]
        assert await tracker.call("a", typed) == [Receipt(1)]
        with pytest.raises(InvalidValueError, match="result does not fit int"):
            await tracker.call("b", untyped)


async def test_a_call_may_give_nothing(memory: MemoryTracker) -> None:
    calls = 0

    async def nothing() -> Receipt | None:
        nonlocal calls
        calls += 1
        return None

    assert await memory.call("job", nothing) is None
    assert await memory.call("job", nothing) is None
    assert calls == 1


class Callable_:
    async def __call__(self) -> int:
        return 1

    async def method(self) -> "Receipt":
        return Receipt(1)


def test_the_return_type_is_found_wherever_it_stands() -> None:
    async def plain() -> int:
        return 1

    async def quoted(x: "OnlyForTheChecker") -> "Receipt":  # type: ignore[name-defined]  # noqa: F821 - that is tested
        return Receipt(1)

    async def unknown() -> "OnlyForTheChecker":  # type: ignore[name-defined]  # noqa: F821 - that is tested
        return None

    async def none() -> None:
        return None

    @functools.wraps(plain)
    async def wrapped() -> Any:
        return await plain()

    def threaded(x: int) -> Receipt:
        return Receipt(x)

    assert return_type(plain) is int
    assert return_type(quoted) is Receipt
    assert return_type(unknown) is Any
    assert return_type(none) is Any
    assert return_type(wrapped) is int
    assert return_type(functools.partial(plain)) is int
    assert return_type(Callable_()) is int
    assert return_type(Callable_().method) is Receipt
    threading: Any = asyncio.to_thread
    assert return_type(threading) is Any
    assert return_type(threading, threaded, 1) is Receipt
    bound = functools.partial(asyncio.to_thread, threaded)  # type: ignore[call-arg]  # mypy asks for its arguments
    assert return_type(bound, 1) is Receipt
    assert return_type(asyncio.sleep) is Any


async def test_what_is_not_async_is_refused_with_what_to_write(memory: MemoryTracker) -> None:
    def plain() -> None: ...

    for wrong in (plain, functools.partial(plain), Receipt(1)):
        with pytest.raises(TypeError, match="takes an async function"):
            await memory.call("job", wrong)  # type: ignore[arg-type]  # that is what is tested
    with pytest.raises(TypeError, match=r"asyncio\.to_thread"):
        await memory.work(plain)  # type: ignore[arg-type]  # that is what is tested
    assert await memory.call("job", Callable_()) == 1


async def test_a_running_task_says_what_it_is(memory: MemoryTracker) -> None:
    async with memory.run("job") as task:
        assert repr(task) == f"<RunningTask 'job' attempt 1 fence {task.fence}>"
        assert isinstance(task, RunningTask)
        assert task.record.lease is not None


async def test_a_claim_cancelled_in_the_file_store_is_not_held(tmp_path: Any) -> None:
    async with FileTracker(tmp_path / "store") as tracker:
        for _ in range(20):
            run = started(tracker.run("job").__aenter__())
            await asyncio.sleep(0)
            run.cancel()
            with pytest.raises(asyncio.CancelledError):
                await run
        async with tracker.run("job") as task:
            assert task.attempts == 1


async def test_a_load_and_dump_backend_needs_two_requests_for_a_new_lifecycle_and_three_for_a_refusal(
    slow: FaultyTracker, faults: Faults
) -> None:
    async with slow.run("job"):
        pass
    assert [method for method, _, _ in faults.requests] == ["dump", "dump"]
    faults.requests.clear()
    with pytest.raises(TaskSucceededError):
        async with slow.run("job"):
            pass
    assert [method for method, _, _ in faults.requests] == ["dump"]  # the refusal told what is stored


def test_nothing_of_a_run_is_logged_above_debug_when_all_is_well(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with MemoryTracker() as tracker, tracker.run("job") as task:
            await task.step("s", asyncio.sleep, 0)
            await task.save()

    with caplog.at_level(logging.INFO, "aiotracker"):
        asyncio.run(main())
    assert not caplog.records


def test_changes_that_are_empty_are_shared_and_stay_empty() -> None:
    async def main() -> None:
        async with MemoryTracker() as tracker, tracker.run("job") as task:
            task.note = "x"
            await task.step("s", asyncio.sleep, 0)

    asyncio.run(main())
    assert msgspec.structs.asdict(NO_CHANGES) == {"fields": {}, "steps": {}}
