"""The keeper: what it does when the store, the clock or a body misbehaves."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import anyio
import pytest

from aiotracker import LeaseLostError, MemoryTracker, Status, StoreUnavailableError, Task
from aiotracker import leases as leases_module
from aiotracker._core.transitions import NO_CHANGES, Claim, Release, Terms
from aiotracker.clock import Clock, Moment, SystemClock, wait_until
from aiotracker.leases import Held, Keeper
from aiotracker.testing import FakeClock

NOW = datetime(2026, 1, 1, tzinfo=UTC)


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


class Store(MemoryTracker):
    """Answers renewals as a test says."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.answer: Callable[[str], Awaitable[None]] | None = None
        self.asked: list[str] = []

    def update(self, task_id: str, transition: Any, **options: Any) -> Any:
        self.asked.append(f"{type(transition).__name__} {task_id}")
        answer = super().update(task_id, transition, **options)
        if self.answer is None:
            return answer
        return self._answered(task_id, answer)

    async def _answered(self, task_id: str, answer: Any) -> Any:
        assert self.answer is not None
        await self.answer(task_id)
        return await answer


@pytest.fixture
async def store(clock: FakeClock) -> AsyncIterator[Store]:
    async with Store(clock=clock, lease=60.0) as tracker:
        yield tracker


async def hold(tracker: MemoryTracker, task_id: str) -> asyncio.Task[None]:
    async def body() -> None:
        async with tracker.run(task_id):
            await asyncio.Event().wait()

    run = asyncio.create_task(body())
    await settle()
    return run


async def end(*runs: asyncio.Task[None]) -> None:
    for run in runs:
        run.cancel()
    await asyncio.wait(runs)


async def test_a_renewal_that_fails_is_tried_again_inside_what_is_left(store: Store, clock: FakeClock) -> None:
    run = await hold(store, "job")
    failures = 0

    async def fail(task_id: str) -> None:
        nonlocal failures
        failures += 1
        raise StoreUnavailableError("away")

    store.answer = fail
    for _ in range(57):
        clock.jump(1)
        await settle()
    assert not run.done()
    assert failures > 3, "at a third, and then again and again"
    store.answer = None
    for _ in range(100):
        clock.jump(0.5)
        await settle()
    assert not run.done(), "the last try came through, just in time"
    await end(run)


async def test_attempts_that_are_lost_since_the_store_could_not_be_reached_do_not_exhaust_a_task(
    store: Store, clock: FakeClock
) -> None:
    async def away(task_id: str) -> None:
        raise StoreUnavailableError("away")

    for _ in range(store.retry.max_attempts + 1):
        run = await hold(store, "job")
        store.answer = away
        for _ in range(65):
            clock.jump(1)
            await settle()
        with pytest.raises(LeaseLostError):
            await run
        store.answer = None
        for _ in range(5):
            clock.jump(1)
            await settle()
        task = await store.load("job")
        assert task is not None
        assert (task.status, task.attempts, task.last_outcome) == (Status.PENDING, 0, "lease_lost")


async def test_an_unanswered_renewal_does_not_hold_up_those_of_others(store: Store, clock: FakeClock) -> None:
    runs = [await hold(store, name) for name in ("stuck", "fine")]

    async def hang(task_id: str) -> None:
        if task_id == "stuck":
            await asyncio.Event().wait()

    store.answer = hang
    for _ in range(130):
        clock.jump(1)
        await settle()
    assert not runs[1].done()
    assert store.asked.count("Renew stuck") > 1, "it is asked again inside what is left"
    with pytest.raises(LeaseLostError):
        await runs[0]
    store.answer = None
    await end(runs[1])


async def test_a_store_that_raises_at_once_for_one_lease_does_not_stop_the_others(
    store: Store, clock: FakeClock, monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    runs = [await hold(store, name) for name in ("broken", "fine")]
    update = store.update

    def broken(task_id: str, *args: Any, **options: Any) -> Any:
        if task_id == "broken":
            raise ZeroDivisionError
        return update(task_id, *args, **options)

    monkeypatch.setattr(store, "update", broken)
    for _ in range(130):
        clock.jump(1)
        await settle()
    assert not runs[1].done()
    assert "the lease keeper failed" not in caplog.text
    with pytest.raises(LeaseLostError):
        await runs[0]
    await end(runs[1])


async def test_many_failed_renewals_are_one_line_of_the_log(
    store: Store, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    runs = [await hold(store, f"job-{index}") for index in range(30)]

    async def fail(task_id: str) -> None:
        raise StoreUnavailableError("away")

    store.answer = fail
    clock.jump(20)
    await settle()
    lines = [line.getMessage() for line in caplog.records if "could not be renewed" in line.getMessage()]
    assert len(lines) == 1
    assert "30 of them" in lines[0]
    assert "away" in lines[0]
    store.answer = None
    await end(*runs)


async def test_what_is_due_a_little_later_is_renewed_in_the_same_go(store: Store, clock: FakeClock) -> None:
    runs = []
    for index in range(10):
        runs.append(await hold(store, f"job-{index}"))
        clock.jump(0.1)
    store.asked.clear()
    clock.jump(19.5)
    await settle()
    assert len(store.asked) == 10
    await end(*runs)


@pytest.mark.parametrize("how", ["jump", "suspend", "shift"])
async def test_the_deadline_is_over_as_soon_as_one_of_the_clocks_says_so(
    store: Store, clock: FakeClock, how: str
) -> None:
    with pytest.raises(LeaseLostError):
        async with store.run("job"):
            getattr(clock, how)(60)


async def test_a_wall_clock_that_is_set_back_shortens_and_lengthens_nothing(store: Store, clock: FakeClock) -> None:
    async with store.run("job") as task:
        clock.shift(-3600)
        assert task.lease_left == 60
        clock.jump(30)
        assert task.lease_left == 30
        await task.save()
        assert task.lease_left == 60


async def test_a_blocked_loop_is_told_once_with_the_tasks_that_ran(
    store: Store, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    runs = [await hold(store, f"job-{index}") for index in range(7)]
    clock.jump(30)
    await settle()
    (line,) = [line for line in caplog.records if "the event loop was blocked" in line.getMessage()]
    assert "'job-0'" in line.getMessage()
    assert "and 2 more" in line.getMessage()
    assert line.__dict__["task_ids"] == [f"job-{index}" for index in range(7)]
    assert line.__dict__["lag"] == pytest.approx(25)
    await end(*runs)


async def test_a_loop_that_lags_a_little_is_not_told(
    store: Store, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    run = await hold(store, "job")
    for _ in range(6):
        clock.jump(20)
        await settle()
    assert not caplog.records
    await end(run)


@pytest.mark.parametrize("turns", range(8))
async def test_a_loop_that_was_blocked_at_any_moment_of_the_keepers_turn_renews_as_soon_as_it_goes_on(
    store: Store, clock: FakeClock, turns: int
) -> None:
    run = await hold(store, "job")
    clock.jump(5)
    for _ in range(turns):  # the keeper looks, finds nothing due, and begins to wait
        await asyncio.sleep(0)
    clock.jump(50)
    await settle()
    assert "Renew job" in store.asked
    clock.jump(30)
    await settle()
    assert not run.done()
    await end(run)


async def test_a_lease_whose_asyncio_task_is_gone_is_not_renewed(store: Store, clock: FakeClock) -> None:
    await asyncio.create_task(store.run("job").__aenter__())
    store.asked.clear()
    for _ in range(4):
        clock.jump(20)
        await settle()
    assert store.asked == []
    async with store.run("job") as task:
        assert task.attempts == 2


async def test_closing_ends_the_keepers_task_and_names_what_still_ran(caplog: pytest.LogCaptureFixture) -> None:
    tracker = await MemoryTracker().open()
    run = await hold(tracker, "job")
    await tracker.aclose()
    assert "the tracker was closed while tasks ran; their leases run out: 'job'" in caplog.text
    assert not [task for task in asyncio.all_tasks() if "keeper" in task.get_name()]
    await end(run)


async def test_closing_closes_the_store_although_it_is_cancelled_again_and_again() -> None:
    closed = asyncio.Event()
    closing = asyncio.Event()

    class Slow(MemoryTracker):
        async def connect(self, stack: Any) -> None:
            async def close() -> None:
                closing.set()
                await asyncio.sleep(0)
                closed.set()

            stack.push_async_callback(close)

    with anyio.CancelScope() as scope:
        async with Slow():
            scope.cancel()
    assert closed.is_set()


def held_by(keeper_clock: Clock) -> Held:
    task = Task(id="job", status=Status.IN_PROGRESS, create_time=NOW, update_time=NOW)
    terms = Terms("t", "w", 60.0, keeper_clock.boot)
    return Held(keeper_clock, task, terms, keeper_clock.moment(), NO_CHANGES)


def test_answers_that_come_in_the_wrong_order_leave_the_latest_record(clock: FakeClock) -> None:
    held = held_by(clock)
    new = held.record.replace(note="new", update_time=datetime(2026, 1, 2, tzinfo=UTC))
    held.saw(new)
    held.saw(held.record.replace(note="old", update_time=NOW))
    assert held.record is new


async def test_a_claim_that_nobody_uses_is_given_back_as_soon_as_the_store_answers(clock: FakeClock) -> None:
    async with MemoryTracker(clock=clock) as tracker:
        task = await tracker.update("job", _claim(tracker, "t"))
        assert task is not None
        is_away = True
        tries = 0

        async def update(task_id: str, rule: Any, known: Any) -> Task | None:
            nonlocal tries
            tries += 1
            if is_away:
                raise StoreUnavailableError("away")
            return await tracker.update(task_id, rule)

        keeper = Keeper(clock, update)
        keeper.give_back("job", "t", Release("t", NO_CHANGES), 60.0)
        await settle()
        for _ in range(10):
            clock.jump(1)
            await settle()
        assert 3 <= tries <= 6, "with growing pauses"
        is_away = False
        clock.jump(10)
        await settle()
        stored = await tracker.load("job")
        assert stored is not None
        assert stored.status is Status.PENDING
        await keeper.aclose()


async def test_a_claim_that_has_not_landed_yet_is_looked_for_until_its_lease_would_be_over(
    clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with MemoryTracker(clock=clock) as tracker:
        keeper = Keeper(clock, lambda task_id, rule, known: tracker.update(task_id, rule))
        keeper.give_back("job", "t", Release("t", NO_CHANGES), 60.0)
        await settle()
        clock.jump(1)
        await settle()
        await tracker.update("job", _claim(tracker, "t"))  # it arrives late
        clock.jump(10)
        await settle()
        stored = await tracker.load("job")
        assert stored is not None
        assert stored.status is Status.PENDING
        keeper.give_back("other", "never landed", Release("never landed", NO_CHANGES), 5.0)
        for _ in range(10):
            clock.jump(1)
            await settle()
        await keeper.aclose()
        assert not caplog.records


async def test_one_try_at_a_time_is_made_to_give_a_claim_back(clock: FakeClock) -> None:
    tries = 0

    async def update(task_id: str, rule: Any, known: Any) -> Task | None:
        nonlocal tries
        tries += 1
        await asyncio.Event().wait()
        return None

    keeper = Keeper(clock, update)
    keeper.give_back("job", "t", Release("t", NO_CHANGES), 60.0)
    for _ in range(20):
        await settle()
        clock.jump(1)
    assert tries == 1


async def test_closing_tries_to_give_back_within_a_bound_and_says_what_could_not_be(
    clock: FakeClock, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases_module, "CLOSE_TIME", 0.01)

    async def update(task_id: str, rule: Any, known: Any) -> Task | None:
        await asyncio.Event().wait()
        return None

    keeper = Keeper(clock, update)
    keeper.give_back("job", "t", Release("t", NO_CHANGES), 60.0)
    await keeper.aclose()
    assert "claims could not be ended, and run out: 'job'" in caplog.text
    keeper.give_back("late", "t", Release("t", NO_CHANGES), 60.0)
    assert not keeper._orphans


async def test_a_keeper_that_fails_goes_on(
    clock: FakeClock, caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    monkeypatch.setattr(asyncio, "sleep", _no_sleep)
    async with MemoryTracker(clock=clock, lease=60.0) as tracker:
        run = await hold(tracker, "job")
        monkeypatch.setattr(tracker.keeper, "_tend", _broken)
        clock.jump(6)
        for _ in range(20):
            await _real_sleep(0)
        assert "the lease keeper failed, and goes on" in caplog.text
        monkeypatch.undo()
        caplog.set_level(logging.CRITICAL)
        for _ in range(100):
            clock.jump(1)
            await settle()
        assert not run.done()
        await end(run)


def _broken() -> float:
    raise ZeroDivisionError


_real_sleep = asyncio.sleep


async def _no_sleep(seconds: float) -> None:
    await _real_sleep(0)


def _claim(tracker: MemoryTracker, token: str) -> Any:
    return Claim("job", Terms(token, "w", 60.0, tracker.clock.boot), tracker.judge, 3)


# -- clocks


async def test_waiting_ends_with_the_event_or_with_the_time(clock: FakeClock) -> None:
    event = asyncio.Event()
    waiting = asyncio.create_task(wait_until(clock, event, 10.0))
    await settle()
    clock.jump(10)
    assert await waiting
    waiting = asyncio.create_task(wait_until(clock, event, 10.0))
    forever = asyncio.create_task(wait_until(clock, event, None))
    await settle()
    event.set()
    assert not await waiting
    assert not await forever
    assert not await wait_until(clock, event, 10.0)


async def test_a_wait_is_over_in_time_although_the_loop_was_blocked_before_its_sleep_began(clock: FakeClock) -> None:
    waiting = asyncio.create_task(wait_until(clock, asyncio.Event(), 10.0))
    await asyncio.sleep(0)
    clock.jump(10)
    await settle()
    assert waiting.done()
    assert waiting.result()


async def test_the_systems_clocks_agree_with_themselves() -> None:
    clock = SystemClock()
    one, two = clock.moment(), clock.moment()
    assert one.monotonic <= two.monotonic
    assert one.boot <= two.boot
    assert abs(clock.now().timestamp() - two.wall) < 5
    assert clock.now().tzinfo is UTC
    await clock.sleep(0)


def test_a_clock_without_a_boot_time_has_moments_all_the_same() -> None:
    class Plain(Clock):
        def now(self) -> datetime:
            return NOW

        def monotonic(self) -> float:
            return 1.0

        async def sleep(self, seconds: float) -> None: ...

    assert Plain().moment() == Moment(1.0, 0.0, NOW.timestamp())
