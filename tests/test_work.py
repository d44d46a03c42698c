"""Fan-out, where its plain cases end."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from typing import Any

import pytest

from aiotracker import (
    GiveUp,
    InvalidValueError,
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
    TaskSucceededError,
    WorkSummary,
)
from aiotracker import work as work_module
from aiotracker.testing import FakeClock, Faults, FaultyTracker, unreachable

FAST = Retry(3, delay=0)


@pytest.fixture
async def memory() -> AsyncIterator[MemoryTracker]:
    async with MemoryTracker(retry=FAST) as tracker:
        yield tracker


@pytest.fixture
async def timed(clock: FakeClock) -> AsyncIterator[MemoryTracker]:
    async with MemoryTracker(clock=clock, retry=FAST) as tracker:
        yield tracker


async def settle() -> None:
    for _ in range(30):
        await asyncio.sleep(0)


async def fine(task: RunningTask) -> None:
    pass


async def test_an_id_that_is_named_twice_is_run_once_and_reported_once(memory: MemoryTracker) -> None:
    ran: Counter[str] = Counter()
    done: list[str] = []

    async def body(task: RunningTask) -> None:
        ran[task.id] += 1
        await asyncio.sleep(0)
        if task.id == "bad":
            raise GiveUp("no")

    ids = ["bad", "good", "bad", "good", "bad"]
    summary = await memory.work(body, ids=ids, concurrency=5, on_done=lambda task: done.append(task.id))
    assert ran == {"bad": 1, "good": 1}
    assert sorted(done) == ["bad", "good"]
    assert (summary.succeeded, summary.exhausted, summary.skipped) == (1, 1, 3)


async def test_what_another_worker_exhausts_meanwhile_is_not_reported_as_ours(memory: MemoryTracker) -> None:
    done: list[Task] = []
    async with memory.peer(worker="two") as other:
        is_held = asyncio.Event()

        async def theirs() -> None:
            with pytest.raises(GiveUp):
                async with other.run("job"):
                    is_held.set()
                    await asyncio.sleep(0.01)
                    raise GiveUp("no")

        running = asyncio.create_task(theirs())
        await is_held.wait()
        summary = await memory.work(fine, ids=["job"], on_done=done.append)
        await running
    assert done == []
    assert (summary.exhausted, summary.skipped, summary.ok) == (0, 1, False)


async def test_a_claim_that_finds_the_attempts_used_up_reports_it(timed: MemoryTracker, clock: FakeClock) -> None:
    done: list[Task] = []
    for _ in range(3):
        await asyncio.create_task(timed.run("job").__aenter__())
        clock.jump(61)
    summary = await timed.work(fine, ids=["job"], on_done=done.append)
    assert [task.status for task in done] == [Status.EXHAUSTED]
    assert (summary.exhausted, summary.ok) == (1, False)


async def test_an_ignored_id_is_skipped_and_not_ok(memory: MemoryTracker) -> None:
    await memory.add("job")
    await memory.ignore("job")
    summary = await memory.work(fine, ids=["job"])
    assert (summary.skipped, summary.unmet, summary.ok) == (1, 1, False)


async def test_what_is_left_unfinished_by_a_limit_is_not_ok(memory: MemoryTracker) -> None:
    async def bad(task: RunningTask) -> None:
        raise ValueError

    summary = await memory.work(bad, ids=["job"], limit=1)
    assert (summary.retried, summary.unmet, summary.ok) == (1, 1, False)
    summary = await memory.work(fine, ids=["job"], limit=1)
    assert (summary.succeeded, summary.unmet, summary.ok) == (1, 0, True)


async def test_refused_ids_do_not_use_up_the_limit(memory: MemoryTracker) -> None:
    await memory.work(fine, ids=["a", "b", "c"])
    summary = await memory.work(fine, ids=["a", "b", "c", "d", "e"], limit=2, concurrency=4)
    assert (summary.succeeded, summary.skipped) == (2, 3)


async def test_due_retries_do_not_wait_for_the_next_id_of_a_slow_source(memory: MemoryTracker) -> None:
    ran: list[str] = []
    more = asyncio.Event()

    async def ids() -> AsyncIterator[str]:
        yield "flaky"
        await more.wait()
        yield "last"

    async def body(task: RunningTask) -> None:
        ran.append(task.id)
        if len(ran) == 1:
            raise ValueError
        more.set()

    async with asyncio.timeout(5):
        await memory.work(body, ids=ids(), concurrency=3)
    assert ran == ["flaky", "flaky", "last"]


async def test_a_source_that_hangs_does_not_hold_up_a_stop(memory: MemoryTracker) -> None:
    stop = asyncio.Event()

    async def ids() -> AsyncIterator[str]:
        yield "one"
        await asyncio.Event().wait()

    async def body(task: RunningTask) -> None:
        stop.set()

    async with asyncio.timeout(5):
        summary = await memory.work(body, ids=ids(), stop=stop)
    assert (summary.succeeded, summary.stopped, summary.ok) == (1, True, False)


async def test_one_asyncio_task_reads_a_source(memory: MemoryTracker) -> None:
    readers: set[Any] = set()

    async def ids() -> AsyncIterator[str]:
        async with asyncio.timeout(60):  # would complain about being left in another task
            for index in range(50):
                readers.add(asyncio.current_task())
                yield f"job-{index}"

    summary = await memory.work(fine, ids=ids(), concurrency=7)
    assert summary.succeeded == 50
    assert len(readers) == 1


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_an_error_of_the_source_is_raised(memory: MemoryTracker, kind: str) -> None:
    def broken() -> Iterator[str]:
        yield "one"
        raise OSError("the file of ids is gone")

    async def broken_async() -> AsyncIterator[str]:
        for task_id in broken():
            yield task_id

    with pytest.raises(OSError, match="ids is gone"):
        await memory.work(fine, ids=broken() if kind == "sync" else broken_async())


async def test_nothing_is_claimed_once_stop_is_set(memory: MemoryTracker) -> None:
    stop = asyncio.Event()
    stop.set()
    summary = await memory.work(fine, ids=["a", "b"], stop=stop)
    assert (summary.succeeded, summary.stopped) == (0, True)
    assert await memory.load("a") is None


async def test_a_store_that_never_waits_lets_a_stop_through(memory: MemoryTracker) -> None:
    stop = asyncio.Event()
    ran = 0

    async def body(task: RunningTask) -> None:
        nonlocal ran
        ran += 1
        if ran == 3:
            stop.set()

    summary = await memory.work(body, ids=(f"job-{index}" for index in range(1000)), concurrency=1, stop=stop)
    assert summary.succeeded == ran == 3


async def test_a_stop_after_everything_is_done_is_no_stop(memory: MemoryTracker) -> None:
    stop = asyncio.Event()

    async def body(task: RunningTask) -> None:
        stop.set()

    summary = await memory.work(body, ids=["a"], stop=stop)
    assert (summary.succeeded, summary.stopped, summary.ok) == (1, False, True)


async def test_the_grace_is_measured_by_the_trackers_clock(timed: MemoryTracker, clock: FakeClock) -> None:
    stop = asyncio.Event()

    async def body(task: RunningTask) -> None:
        await asyncio.Event().wait()

    working = asyncio.create_task(timed.work(body, ids=["a"], stop=stop, grace=30))
    await settle()
    stop.set()
    await settle()
    clock.jump(29)
    await settle()
    assert not working.done()
    clock.jump(1)
    async with asyncio.timeout(5):
        summary = await working
    assert (summary.released, summary.ok) == (1, False)


async def test_a_body_that_succeeds_while_it_is_stopped_has_succeeded(memory: MemoryTracker) -> None:
    done: list[str] = []
    stop = asyncio.Event()

    async def body(task: RunningTask) -> None:
        stop.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            task.result = "in time"

    summary = await memory.work(body, ids=["a"], stop=stop, grace=0, on_done=lambda task: done.append(task.id))
    assert (summary.succeeded, summary.released) == (1, 0)
    assert done == ["a"]


async def test_an_end_that_is_recorded_while_it_is_cancelled_is_counted_as_it_is() -> None:
    faults = Faults()
    reached, opened = asyncio.Event(), asyncio.Event()

    async def slow(call: Any) -> Any:
        answer = await call()
        reached.set()
        await opened.wait()
        return answer

    async with FaultyTracker(MemoryTracker(), faults) as tracker:
        stop = asyncio.Event()

        async def body(task: RunningTask) -> None:
            faults.script("dump", slow)

        working = asyncio.create_task(tracker.work(body, ids=["a"], stop=stop, grace=0))
        await reached.wait()
        stop.set()
        summary = await working
        assert (summary.succeeded, summary.released) == (1, 0)


async def test_when_work_is_cancelled_twice_every_body_is_released(memory: MemoryTracker) -> None:
    async def body(task: RunningTask) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.005)

    working = asyncio.create_task(memory.work(body, ids=[f"job-{index}" for index in range(20)]))
    await settle()
    working.cancel()
    await asyncio.sleep(0)
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working
    assert await memory.count() == {Status.PENDING: 20}


async def test_a_body_that_raises_our_own_errors_about_others_has_failed(memory: MemoryTracker) -> None:
    async with memory.run("other"):
        pass
    errors = [
        TaskSucceededError("other", await _record(memory, "other"), None),
        StoreUnavailableError("another store"),
        OutcomeUnknownError("another store", "other"),
        StoreError("another store"),
    ]

    async def body(task: RunningTask) -> None:
        raise errors[int(task.id)]

    summary = await memory.work(body, ids=[str(index) for index in range(len(errors))], retry=Retry(1))
    assert summary.exhausted == len(errors)


async def _record(tracker: MemoryTracker, task_id: str) -> Task:
    task = await tracker.load(task_id)
    assert task is not None
    return task


async def test_a_store_that_cannot_be_used_ends_the_work_and_releases_the_others(memory: MemoryTracker) -> None:
    async def body(task: RunningTask) -> None:
        if task.id == "full":
            raise _Full
        await asyncio.Event().wait()

    class _Full(BaseException):
        pass

    with pytest.raises(_Full):
        await memory.work(body, ids=["a", "b", "full"])
    assert await memory.count(status="pending") == {Status.PENDING: 2}


async def test_a_store_that_is_away_for_a_moment_is_waited_for(memory: MemoryTracker) -> None:
    faults = Faults()
    async with FaultyTracker(memory.peer(), faults, lease=0.03) as tracker:
        await tracker.add("job")
        faults.script("dump", *[unreachable] * 3)
        summary = await tracker.work(fine, ids=["job"])
        assert (summary.succeeded, summary.ok) == (1, True)


async def test_a_store_that_is_away_while_it_is_asked_for_work_is_waited_for(
    memory: MemoryTracker, monkeypatch: Any
) -> None:
    await memory.add("job")
    claimable, asked = memory.claimable, 0

    async def away(limit: int) -> Any:
        nonlocal asked
        asked += 1
        if asked < 3:
            raise StoreUnavailableError("away")
        return await claimable(limit)

    monkeypatch.setattr(memory, "claimable", away)
    summary = await memory.work(fine)
    assert (summary.succeeded, asked > 2) == (1, True)


async def test_a_store_that_stays_away_ends_the_work(timed: MemoryTracker, clock: FakeClock, monkeypatch: Any) -> None:
    async def away(limit: int) -> Any:
        raise StoreUnavailableError("away")

    monkeypatch.setattr(timed, "claimable", away)
    working = asyncio.create_task(timed.work(fine))
    for _ in range(100):
        await settle()
        clock.jump(1)
        if working.done():
            break
    with pytest.raises(StoreUnavailableError, match="away"):
        await working


async def test_a_record_that_is_too_large_to_be_claimed_does_not_stop_the_others(
    memory: MemoryTracker, monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    update = memory.update

    def refuse(task_id: str, *args: Any, **options: Any) -> Any:
        if task_id == "large":
            raise RecordTooLargeError("too large", task_id, 2, 1)
        return update(task_id, *args, **options)

    monkeypatch.setattr(memory, "update", refuse)
    summary = await memory.work(fine, ids=["large", "a"])
    assert (summary.succeeded, summary.unmet, summary.ok) == (1, 1, False)
    assert "'large' cannot be claimed, and is left alone" in caplog.text


async def test_it_sleeps_until_the_next_due_time(timed: MemoryTracker, clock: FakeClock, monkeypatch: Any) -> None:
    asked = 0
    update = timed.update

    def count(*args: Any, **options: Any) -> Any:
        nonlocal asked
        asked += 1
        return update(*args, **options)

    await timed.add("job", not_before=clock.now() + timedelta(hours=1))
    monkeypatch.setattr(timed, "update", count)
    working = asyncio.create_task(timed.work(fine, ids=["job"]))
    await settle()
    for _ in range(59):
        clock.jump(60)
        await settle()
    assert asked == 1
    clock.jump(60)
    summary = await working
    assert summary.succeeded == 1


async def test_a_retry_knows_the_record_and_spares_a_request() -> None:
    faults = Faults()
    async with FaultyTracker(MemoryTracker(), faults, retry=Retry(2, delay=0)) as tracker:

        async def body(task: RunningTask) -> None:
            if task.attempts == 1:
                raise ValueError

        await tracker.work(body, ids=["job"])
        assert [method for method, _, _ in faults.requests] == ["dump"] * 4


async def test_one_task_held_elsewhere_is_looked_at_with_a_pause_of_its_own(memory: MemoryTracker) -> None:
    async with memory.peer() as other:
        runs = [other.run(f"job-{index}") for index in range(30)]
        for run in runs:
            await run.__aenter__()

        async def soon() -> None:
            await asyncio.sleep(0.02)
            for run in runs:
                await run.__aexit__(None, None, None)

        me = asyncio.create_task(memory.work(fine, ids=[run.task_id for run in runs]))
        async with asyncio.timeout(1):
            await soon()
            assert (await me).skipped == 30


async def test_a_postponed_task_is_run_when_it_is_due_and_no_retry(timed: MemoryTracker, clock: FakeClock) -> None:
    times = []

    async def body(task: RunningTask) -> None:
        times.append(clock.now())
        if len(times) == 1:
            raise Postpone(100)

    working = asyncio.create_task(timed.work(body, ids=["job"]))
    await settle()
    clock.jump(99)
    await settle()
    assert len(times) == 1
    clock.jump(1)
    summary = await working
    assert times[1] - times[0] == timedelta(seconds=100)
    assert (summary.succeeded, summary.retried, summary.ok) == (1, 0, True)


async def test_on_done_may_be_async_and_may_fail(memory: MemoryTracker, caplog: pytest.LogCaptureFixture) -> None:
    heard: list[str] = []

    async def hear(task: Task) -> None:
        await asyncio.sleep(0)
        heard.append(task.id)
        raise ValueError("of the listener")

    summary = await memory.work(fine, ids=["a", "b"], on_done=hear)
    assert (summary.succeeded, sorted(heard)) == (2, ["a", "b"])
    assert "on_done failed for 'a'" in caplog.text


async def test_work_over_the_store_takes_what_bodies_add_and_ends(memory: MemoryTracker) -> None:
    async def body(task: RunningTask) -> None:
        if len(task.id) < 5:
            await memory.add_many([task.id + "a", task.id + "b"])

    await memory.add("x")
    summary = await memory.work(body, concurrency=3)
    assert summary.succeeded == 31
    assert summary.ok


async def test_forever_ends_with_the_stop_and_that_is_ok(memory: MemoryTracker) -> None:
    stop = asyncio.Event()

    async def body(task: RunningTask) -> None:
        if task.id == "last":
            stop.set()

    working = asyncio.create_task(memory.work(body, forever=True, stop=stop))
    await settle()
    await memory.add("first")
    await memory.add("last")
    async with asyncio.timeout(5):
        summary = await working
    assert (summary.succeeded, summary.stopped, summary.ok) == (2, False, True)


@pytest.mark.parametrize(
    "options",
    [
        {"concurrency": 0},
        {"concurrency": True},
        {"limit": 0},
        {"limit": 1.5},
        {"grace": -1},
        {"grace": float("nan")},
        {"ids": "one"},
        {"ids": ["a"], "forever": True},
        {"retry": 3},
    ],
)
async def test_what_makes_no_sense_is_refused(memory: MemoryTracker, options: Any) -> None:
    with pytest.raises(InvalidValueError):
        await memory.work(fine, **options)


def test_a_summary_reads_well() -> None:
    summary = WorkSummary(succeeded=1200, retried=3, seconds=2.0, stopped=True)
    assert str(summary) == "1,200 succeeded, 3 retried in 2.0 s (600/s), stopped"
    assert WorkSummary().rate == 0.0
    assert WorkSummary().ok


def test_the_first_look_at_what_others_hold_comes_soon() -> None:
    assert work_module.MIN_POLL <= 0.1
