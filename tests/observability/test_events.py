"""What hooks are told, and in what order."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from aiotracker import (
    BaseTracker,
    Claimed,
    Committed,
    Conflicted,
    Ended,
    Exhausted,
    Failed,
    FileTracker,
    FolderTracker,
    GiveUp,
    InvalidValueError,
    LeaseLost,
    LeaseLostError,
    LoopLagged,
    MemoryTracker,
    OutcomeUnknown,
    OutcomeUnknownError,
    Postpone,
    Postponed,
    Refused,
    Released,
    Renewed,
    Retry,
    RunEvent,
    RunningTask,
    SqliteTracker,
    StepFailed,
    StepReused,
    StepStarted,
    StepSucceeded,
    StoreUnavailableError,
    StoreUnreachable,
    Succeeded,
    TaskUnavailableError,
)
from aiotracker.testing import FakeClock, Faults, FaultyTracker, reply_lost, unreachable

from .conftest import Seen, be_cancelled, broken, fail, one, until


@pytest.fixture
async def tracker(seen: Seen, clock: FakeClock) -> AsyncIterator[MemoryTracker]:
    async with MemoryTracker(hooks=[seen], clock=clock, worker="me", retry=Retry(max_attempts=2)) as tracker:
        yield tracker


# -- what is told


async def test_a_success_is_a_claim_and_its_end(tracker: MemoryTracker, seen: Seen, clock: FakeClock) -> None:
    async with tracker.run("job") as task:
        assert seen.names == ["Claimed"]
        clock.jump(3)
    claimed, succeeded = seen
    assert isinstance(claimed, Claimed)
    assert isinstance(succeeded, Succeeded)
    assert (claimed.store, claimed.worker, claimed.task_id) == ("memory", "me", "job")
    assert claimed.time == datetime(2026, 1, 1, tzinfo=UTC)
    assert (claimed.fence, claimed.attempt, claimed.task) == (task.fence, 1, claimed.task)
    assert (claimed.task.status, succeeded.task.status) == ("in_progress", "succeeded")
    assert succeeded.token == claimed.token
    assert succeeded.time - claimed.time == timedelta(seconds=3)
    assert (succeeded.seconds, succeeded.error, succeeded.outcome) == (3, None, "succeeded")


async def give_up(task: RunningTask) -> None:
    raise GiveUp("no use")


async def postpone(task: RunningTask) -> None:
    raise Postpone(5)


async def give_what_cannot_be_stored(task: RunningTask) -> None:
    task.result = {1, 2}


ENDS: list[tuple[Callable[[RunningTask], Awaitable[None]], type[Ended], type[BaseException]]] = [
    (fail, Failed, ValueError),
    (give_up, Exhausted, GiveUp),
    (postpone, Postponed, Postpone),
    (be_cancelled, Released, asyncio.CancelledError),
    (give_what_cannot_be_stored, Failed, InvalidValueError),
]


@pytest.mark.parametrize(("body", "kind", "error"), ENDS, ids=lambda value: getattr(value, "__name__", None))
async def test_each_way_to_end_has_its_event(
    tracker: MemoryTracker,
    seen: Seen,
    body: Callable[[RunningTask], Awaitable[None]],
    kind: type[Ended],
    error: type[BaseException],
) -> None:
    async def run() -> None:
        async with tracker.run("job") as task:
            await body(task)

    await asyncio.gather(asyncio.create_task(run()), return_exceptions=True)
    assert [type(event) for event in seen] == [Claimed, kind]
    event = seen[-1]
    assert isinstance(event, Ended)
    assert isinstance(event.error, error)
    if isinstance(event, Failed | Exhausted):
        assert event.failure is not None
        assert event.failure.type == error.__name__
        assert "Traceback" in event.failure.traceback


async def test_the_last_attempt_ends_exhausted(tracker: MemoryTracker, seen: Seen) -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match="broken"):
            async with tracker.run("job") as task:
                await fail(task)
    assert seen.names == ["Claimed", "Failed", "Claimed", "Exhausted"]
    assert [event.attempt for event in seen if isinstance(event, RunEvent)] == [1, 1, 2, 2]


async def test_the_runs_own_timeout_is_a_failure(tracker: MemoryTracker, seen: Seen, clock: FakeClock) -> None:
    async def run() -> None:
        async with tracker.run("job", timeout=5):
            await asyncio.Event().wait()

    running = asyncio.create_task(run())
    await until(lambda: seen)
    clock.jump(6)
    await asyncio.gather(running, return_exceptions=True)
    assert isinstance(failed := seen.of(Ended)[0], Failed)
    assert isinstance(failed.error, TimeoutError)


async def test_a_lost_lease_is_told_once(tracker: MemoryTracker, seen: Seen) -> None:
    with pytest.raises(LeaseLostError):
        async with tracker.run("job") as task:
            await tracker.reset("job", force=True)
            await task.save()
    assert seen.names == ["Claimed", "LeaseLost"]
    assert isinstance(lost := seen[-1], LeaseLost)
    assert isinstance(lost.error, LeaseLostError)
    assert lost.outcome == "lease_lost"


async def test_a_lease_that_was_taken_before_a_cancelled_body_was_released_is_lost(
    tracker: MemoryTracker, seen: Seen
) -> None:
    async def run() -> None:
        async with tracker.run("job") as task:
            await tracker.reset("job", force=True)
            await be_cancelled(task)

    await asyncio.gather(asyncio.create_task(run()), return_exceptions=True)
    assert seen.names == ["Claimed", "LeaseLost"]


async def test_an_end_that_the_store_does_not_answer_is_unknown(seen: Seen, clock: FakeClock) -> None:
    faults = Faults()
    async with FaultyTracker(MemoryTracker(), faults, hooks=[seen], lease=0.3, worker="me") as tracker:
        with pytest.raises(OutcomeUnknownError):
            async with tracker.run("job"):
                faults.script("dump", *[reply_lost] * 100)
                faults.script("load", *[unreachable] * 100)
    assert [type(event) for event in seen.of(Ended)] == [OutcomeUnknown]
    assert isinstance(unknown := seen.of(Ended)[0], OutcomeUnknown)
    assert isinstance(unknown.error, OutcomeUnknownError)
    assert {event.operation for event in seen.of(StoreUnreachable) if isinstance(event, StoreUnreachable)} >= {"write"}


async def test_a_body_that_is_dropped_ends_unknown(tracker: MemoryTracker, seen: Seen) -> None:
    async def bodies() -> AsyncIterator[None]:
        async with tracker.run("job"):
            yield

    body = bodies().__aiter__()
    await body.__anext__()
    loop = asyncio.get_running_loop()
    loop._asyncgen_firstiter_hook = None  # type: ignore[attr-defined]  # asyncio would close it in a task of its own
    coroutine = body.aclose()  # type: ignore[attr-defined]  # of the generator that it is
    with pytest.raises(StopIteration):
        coroutine.send(None)
    assert seen.names == ["Claimed", "OutcomeUnknown"]
    await until(lambda: tracker.keeper._orphans == {})


REFUSALS: dict[str, Callable[[MemoryTracker], Awaitable[object]]] = {
    "succeeded": lambda tracker: tracker.call("job", asyncio.sleep, 0),
    "ignored": lambda tracker: _ignored(tracker),
    "not_due": lambda tracker: tracker.add("job", not_before=datetime(2027, 1, 1, tzinfo=UTC)),
    "exhausted": lambda tracker: _exhausted(tracker),
}


async def _ignored(tracker: MemoryTracker) -> None:
    await tracker.add("job")
    await tracker.ignore("job")


async def _exhausted(tracker: MemoryTracker) -> None:
    with pytest.raises(GiveUp):
        async with tracker.run("job") as task:
            await give_up(task)


@pytest.mark.parametrize("reason", REFUSALS)
async def test_a_refusal_is_told_with_its_reason(tracker: MemoryTracker, seen: Seen, reason: str) -> None:
    await REFUSALS[reason](tracker)
    seen.clear()
    with pytest.raises(TaskUnavailableError) as caught:
        async with tracker.run("job"):
            pass
    (refused,) = seen
    assert isinstance(refused, Refused)
    assert (refused.task_id, refused.reason, refused.error) == ("job", reason, caught.value)


async def test_a_locked_task_is_refused_and_its_holder_is_not_told(tracker: MemoryTracker, seen: Seen) -> None:
    other = Seen()
    async with tracker.peer(hooks=[other]) as peer, tracker.run("job"):
        with pytest.raises(TaskUnavailableError):
            async with peer.run("job"):
                pass
    assert seen.names == ["Claimed", "Succeeded"]
    assert [event.reason for event in other if isinstance(event, Refused)] == ["locked"]


async def test_a_store_that_does_not_answer_a_claim_is_unreachable(seen: Seen) -> None:
    faults = Faults()
    async with FaultyTracker(MemoryTracker(), faults, hooks=[seen], lease=0.3) as tracker:
        faults.script("dump", *[unreachable] * 1000)
        with pytest.raises(OutcomeUnknownError):
            async with tracker.run("job"):
                pass
    told = [event for event in seen if isinstance(event, StoreUnreachable)]
    assert {event.operation for event in told} == {"write", "claim"}
    assert (told[-1].operation, told[-1].task_id) == ("claim", "job")
    assert seen.of(Claimed) == []


class Gated(MemoryTracker):
    """Answers writes of one kind when a gate is open."""

    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__(**options)
        self.gate = asyncio.Event()
        self.asked = 0
        self._gated = kind

    def update(self, task_id: str, transition: Any, **options: Any) -> Any:
        if type(transition).__name__ != self._gated:
            return super().update(task_id, transition, **options)
        self.asked += 1
        return self._later(task_id, transition, options)

    async def _later(self, task_id: str, transition: Any, options: Any) -> Any:
        await self.gate.wait()
        return await super().update(task_id, transition, **options)


@pytest.mark.parametrize(("rule", "kind"), [("Succeed", Succeeded), ("Fail", Failed)])
async def test_a_cancellation_while_the_end_is_recorded_is_not_what_ended_the_run(
    rule: str, kind: type[Ended], seen: Seen, clock: FakeClock
) -> None:
    async with Gated(rule, hooks=[seen], clock=clock) as tracker:

        async def run() -> None:
            async with tracker.run("job") as task:
                if rule == "Fail":
                    await fail(task)

        running = asyncio.create_task(run())
        await until(lambda: tracker.asked)
        running.cancel()
        tracker.gate.set()
        (raised,) = await asyncio.gather(running, return_exceptions=True)
    assert isinstance(raised, asyncio.CancelledError)
    ended = seen[-1]
    assert isinstance(ended, kind)
    assert isinstance(ended.error, ValueError if rule == "Fail" else type(None))


# -- steps


async def test_steps_are_told_with_their_ends(tracker: MemoryTracker, seen: Seen, clock: FakeClock) -> None:
    async def slow() -> int:
        clock.jump(2)
        return 2

    with pytest.raises(ValueError, match="broken"):
        async with tracker.run("job") as task:
            await task.step("one", slow)
            await task.step("two", broken)
    async with tracker.run("job") as task:
        await task.step("one", slow)
        await task.step("two", one)
    assert seen.names == [
        *("Claimed", "StepStarted", "StepSucceeded", "StepStarted", "StepFailed", "Failed"),
        *("Claimed", "StepReused", "StepStarted", "StepSucceeded", "Succeeded"),
    ]
    assert isinstance(done := seen[2], StepSucceeded)
    assert (done.step.name, done.seconds, done.step.result) == ("one", 2, 2)
    assert isinstance(failed := seen[4], StepFailed)
    assert isinstance(failed.error, ValueError)
    assert failed.step.error is not None
    assert failed.step.error.type == "ValueError"
    assert isinstance(reused := seen[7], StepReused)
    assert reused.step.result == 2
    assert isinstance(again := seen[8], StepStarted)
    assert again.step.attempts == 2


async def test_concurrent_steps_each_have_their_end(tracker: MemoryTracker, seen: Seen) -> None:
    started: list[str] = []

    async def both(name: str) -> str:
        started.append(name)
        await until(lambda: len(started) == 2)
        return name

    async with tracker.run("job") as task:
        await asyncio.gather(*(task.step(name, both, name) for name in "ab"))
    ends = [event for event in seen if isinstance(event, StepSucceeded)]
    assert sorted(event.step.result for event in ends) == ["a", "b"]


async def test_a_step_that_is_refused_is_not_told_and_the_one_of_that_name_goes_on(
    tracker: MemoryTracker, seen: Seen
) -> None:
    async with tracker.run("job") as task:

        async def again() -> int:
            with pytest.raises(InvalidValueError):
                await task.step("one", one)
            return 1

        await task.step("one", again)
        with pytest.raises(TypeError):
            await task.step("plain", len, "x")  # type: ignore[arg-type]  # as somebody without a type checker would
        with pytest.raises(InvalidValueError):
            await task.step([], one)  # type: ignore[arg-type]  # likewise
    assert seen.names == ["Claimed", "StepStarted", "StepSucceeded", "Succeeded"]


async def test_a_step_that_is_cancelled_says_so(tracker: MemoryTracker, seen: Seen) -> None:
    async def run() -> None:
        async with tracker.run("job") as task:
            await task.step("one", be_cancelled, task)

    await asyncio.gather(asyncio.create_task(run()), return_exceptions=True)
    assert seen.names == ["Claimed", "StepStarted", "StepFailed", "Released"]
    assert isinstance(failed := seen[2], StepFailed)
    assert failed.is_cancelled


# -- leases and the loop


async def test_renewals_are_told(tracker: MemoryTracker, seen: Seen, clock: FakeClock) -> None:
    async with tracker.run("job") as task:
        await pass_time(clock, 30)
        await until(lambda: seen.of(Renewed))
        await task.renew()
    renewed = [event for event in seen if isinstance(event, Renewed)]
    assert len(renewed) == 2
    assert renewed[0].token == seen[0].token  # type: ignore[attr-defined]  # of the claim
    assert renewed[0].task.lease is not None


async def pass_time(clock: FakeClock, seconds: int) -> None:
    for _ in range(seconds):
        clock.jump(1)
        for _ in range(5):
            await asyncio.sleep(0)


async def test_a_renewal_that_finds_the_lease_lost_is_none(
    tracker: MemoryTracker, seen: Seen, clock: FakeClock
) -> None:
    async def run() -> None:
        async with tracker.run("job"):
            await tracker.reset("job", force=True)
            await asyncio.Event().wait()

    running = asyncio.create_task(run())
    await until(lambda: seen)
    await pass_time(clock, 30)
    await asyncio.gather(running, return_exceptions=True)
    assert seen.names == ["Claimed", "LeaseLost"]


async def test_a_renewal_that_is_answered_after_the_bodys_end_is_not_told(seen: Seen, clock: FakeClock) -> None:
    async with Gated("Renew", hooks=[seen], clock=clock) as tracker:
        async with tracker.run("job"):
            await until(lambda: clock._sleepers)
            await pass_time(clock, 30)
            assert tracker.asked == 1
            renewing = next(iter(tracker.keeper.held.values())).renewing
            assert renewing is not None
            tracker.gate.set()
            await until(renewing.done)  # its callbacks have not been called yet
        await asyncio.sleep(0)
    assert seen.names == ["Claimed", "Succeeded"]


async def test_a_renewal_that_gets_no_answer_is_told(seen: Seen, clock: FakeClock) -> None:
    class Away(MemoryTracker):
        away = False

        def update(self, *args: Any, **options: Any) -> Any:
            if self.away:
                raise StoreUnavailableError("away")
            return super().update(*args, **options)

    async with Away(hooks=[seen], clock=clock) as tracker, tracker.run("job"):
        tracker.away = True
        await pass_time(clock, 30)
        await until(lambda: seen.of(StoreUnreachable))
        tracker.away = False
    assert isinstance(event := seen.of(StoreUnreachable)[0], StoreUnreachable)
    assert (event.operation, event.task_id) == ("renew", "job")


async def test_the_loops_lag_is_told_while_tasks_run(tracker: MemoryTracker, seen: Seen, clock: FakeClock) -> None:
    async with tracker.run("job"):
        await until(lambda: clock._sleepers)
        clock.jump(5)
        await until(lambda: seen.of(LoopLagged))
        await until(lambda: len([sleeper for sleeper in clock._sleepers if not sleeper[2].done()]) > 0)
        clock.jump(15)
        await until(lambda: len(seen.of(LoopLagged)) > 1)
    lags = [event.seconds for event in seen if isinstance(event, LoopLagged)]
    assert lags == [0, 10]


# -- the store


@pytest.mark.parametrize(
    "make",
    [
        lambda path, hook: FileTracker(path / "file", hooks=[hook]),
        lambda path, hook: SqliteTracker(path / "sqlite.db", hooks=[hook]),
        lambda path, hook: FolderTracker(path / "folder", hooks=[hook]),
    ],
    ids=["file", "sqlite", "folder"],
)
async def test_a_commit_is_told_before_what_it_stored(
    make: Callable[[Path, Seen], BaseTracker], tmp_path: Path, seen: Seen
) -> None:
    async with make(tmp_path, seen) as tracker:
        async with tracker.run("job"):
            pass
        await tracker.load("job")
    assert seen.names == ["Committed", "Claimed", "Committed", "Succeeded"]
    for event in seen.of(Committed):
        assert isinstance(event, Committed)
        assert event.operations == 1
        assert 100 < event.bytes < 2000
        assert 0 < event.seconds < 60


async def test_a_commit_of_many_says_how_many(tmp_path: Path, seen: Seen) -> None:
    async with FileTracker(tmp_path, hooks=[seen]) as tracker:
        await tracker.add_many(f"job-{n}" for n in range(500))
    commits = [event for event in seen if isinstance(event, Committed)]
    assert sum(event.operations for event in commits) == 500
    assert max(event.operations for event in commits) > 1


async def test_a_race_that_was_lost_is_told(tmp_path: Path, seen: Seen) -> None:
    async with FolderTracker(tmp_path) as other, FolderTracker(tmp_path, hooks=[seen]) as tracker:
        await other.add("job")
        async with tracker.run("job"):  # which believes it to be new
            pass
    assert [event.task_id for event in seen if isinstance(event, Conflicted)] == ["job"]


# -- under cancellation


@pytest.mark.parametrize("seed", range(3))
async def test_each_claim_has_one_end_whatever_is_cancelled_when(seed: int, tmp_path: Path, seen: Seen) -> None:
    chance = random.Random(seed)

    async def run(tracker: FileTracker, task_id: str) -> None:
        async with tracker.run(task_id) as task:
            await task.step("one", one)
            if chance.random() < 0.3:
                await fail(task)
            if chance.random() < 0.3:
                await be_cancelled(task)

    async with FileTracker(tmp_path, hooks=[seen], retry=Retry(delay=0, max_attempts=1000)) as tracker:
        running: set[asyncio.Task[None]] = set()
        for n in range(300):
            running.add(asyncio.create_task(run(tracker, f"job-{n % 40}")))
            for _ in range(chance.randrange(4)):
                await asyncio.sleep(0)
            if chance.random() < 0.3:
                chance.choice(sorted(running, key=asyncio.Task.get_name)).cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await tracker.call("last", one)
    claimed = [event.token for event in seen if isinstance(event, Claimed)]
    ended = [event.token for event in seen if isinstance(event, Ended)]
    assert len(claimed) == len(set(claimed)) > 0
    assert sorted(claimed) == sorted(ended)
    started = [(event.token, event.step.name) for event in seen if isinstance(event, StepStarted)]
    done = [(event.token, event.step.name) for event in seen if isinstance(event, StepSucceeded | StepFailed)]
    assert sorted(started) == sorted(done)
