"""Stores against a model of them: workers and people do anything, in any order, and time is under control."""

import asyncio
import math
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from aiotracker import (
    BaseTracker,
    FileTracker,
    GiveUp,
    LeaseLostError,
    MemoryTracker,
    OutcomeUnknownError,
    Postpone,
    Retry,
    RunningTask,
    SqliteTracker,
    Status,
    TaskExhaustedError,
    TaskIgnoredError,
    TaskLockedError,
    TaskNotDueError,
    TaskSucceededError,
)
from aiotracker.clock import Moment
from aiotracker.testing import FakeClock
from aiotracker.testing.conformance._base import Holder, check_sound

LEASE = 60.0
RENEWED_AT = LEASE * 0.4  # at the latest: a third, and the next look of the keeper
LOOK = LEASE / 10  # the keeper looks at least this often
PURGE_AGE = 3600.0
MAX_ATTEMPTS = 3
FREE_RELEASES = 10
ENDS_KEPT = 8
WORKERS = 3
IDS = ("a", "b")
SETTLE = 20.0  # seconds, real ones, at the most

numbers_of_workers = st.integers(0, WORKERS - 1)
ids = st.sampled_from("aaab")
churns = st.sampled_from([1, 1, 1, 2, FREE_RELEASES + 1])
Make = Callable[[str, int, FakeClock], BaseTracker[Any, Any]]


class Hold(msgspec.Struct, eq=False):
    """A claim that was made, and whose body runs."""

    task_id: str
    holder: Holder
    worker: int
    fence: int
    token: str
    granted: float  # when its lease was last renewed
    is_stalled: bool = False  # nobody renews it
    is_late: bool = False  # it does not look at the clock before its next write


class Expected(msgspec.Struct, eq=False):
    """What a record must say."""

    fence: int
    status: Status = Status.PENDING
    attempts: int = 0
    releases: int = 0
    data: int | None = None
    result: int | None = None
    last_outcome: str | None = None
    due: float = 0.0
    owner: Hold | None = None  # whose lease stands in it, live or not

    def take_away(self) -> None:
        if self.owner is not None:
            self.owner, self.last_outcome = None, "lease_lost"


class Machine(RuleBasedStateMachine):
    """What is done, and what everybody must be told."""

    make: Make

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.folder = tempfile.mkdtemp(prefix="aiotracker-model-")
        self.clock = FakeClock()
        self.workers: list[BaseTracker[Any, Any]] = []
        self.expected: dict[str, Expected] = {}
        self.last_fences = dict.fromkeys(IDS, 0)
        self.held: list[Hold] = []
        self.runs: list[asyncio.Task[None]] = []
        self.written = 0
        self.loop.run_until_complete(self._open())

    async def _open(self) -> None:
        for number in range(WORKERS):
            tracker = type(self).make(self.folder, number, self.clock)
            if number and isinstance(self.workers[0], MemoryTracker):
                tracker = self.workers[0].peer(worker=f"worker-{number}")
            self.workers.append(await tracker.open())

    def teardown(self) -> None:
        self.loop.run_until_complete(self._close())
        self.loop.close()
        shutil.rmtree(self.folder)

    async def _close(self) -> None:
        for run in self.runs:
            run.cancel()
        await asyncio.gather(*self.runs, return_exceptions=True)
        for tracker in self.workers:
            await tracker.aclose()

    @property
    def now(self) -> float:
        return self.clock.boot().seconds

    def _is_live(self, expected: Expected | None) -> bool:
        return expected is not None and expected.owner is not None and self.now < expected.owner.granted + LEASE

    # -- what workers do

    @rule(worker=numbers_of_workers, task_id=ids, force=st.sampled_from([False, False, False, True]))
    def claim(self, worker: int, task_id: str, force: bool) -> None:
        self.loop.run_until_complete(self._claim(worker, task_id, force))

    @rule(worker=numbers_of_workers, task_id=ids, how=st.sampled_from(["fail", "postpone", "cancel"]), times=churns)
    def claim_and_end(self, worker: int, task_id: str, how: str, times: int) -> None:
        self.loop.run_until_complete(self._claim_and_end(worker, task_id, how, times))

    async def _claim_and_end(self, worker: int, task_id: str, how: str, times: int) -> None:
        for _ in range(times):
            count = len(self.held)
            await self._claim(worker, task_id, force=False)
            if len(self.held) == count:
                return
            await self._end(self.held[-1], how)

    async def _claim(self, worker: int, task_id: str, force: bool) -> None:
        expected = self.expected.get(task_id)
        refusal = None if expected is None else self._refusal(expected, force)
        holder = Holder(self.workers[worker], task_id, {"force": force})
        self.runs.append(holder.run)
        if refusal is not None:
            with pytest.raises(refusal):
                await holder.task()
            await holder.run
            return
        task = await holder.task()
        assert task.record.lease is not None
        if expected is None:
            expected = self.expected[task_id] = Expected(task.fence - 1)
        if expected.status is Status.SUCCEEDED:
            expected.result = None
        expected.take_away()
        expected.status, expected.due = Status.IN_PROGRESS, 0.0
        expected.attempts += 1
        expected.fence += 1
        assert (task.fence, task.attempts) == (expected.fence, expected.attempts)
        assert task.fence > self.last_fences[task_id]
        self.last_fences[task_id] = task.fence
        hold = Hold(task_id, holder, worker, task.fence, task.record.lease.token, self.now)
        expected.owner = hold
        self.held.append(hold)

    def _refusal(self, expected: Expected, force: bool) -> type[Exception] | None:
        if self._is_live(expected):
            return TaskLockedError
        if force:
            return None
        if expected.owner is None:
            match expected.status:
                case Status.SUCCEEDED:
                    return TaskSucceededError
                case Status.IGNORED:
                    return TaskIgnoredError
                case Status.EXHAUSTED:
                    return TaskExhaustedError
            if self.now < expected.due:
                return TaskNotDueError
        if expected.attempts >= MAX_ATTEMPTS:
            expected.take_away()
            expected.status = Status.EXHAUSTED
            return TaskExhaustedError
        return None

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def save(self, data: st.DataObject) -> None:
        """A holder, live or overtaken, writes."""
        self.loop.run_until_complete(self._save(data.draw(st.sampled_from(self.held))))

    async def _save(self, hold: Hold) -> None:
        self.written += 1
        value = self.written

        async def save(task: RunningTask) -> None:
            task.data = value
            await task.save()

        expected = self._expected_of(hold)
        if expected is None:
            with pytest.raises(LeaseLostError):
                await hold.holder.do(save)
            return
        await hold.holder.do(save)
        expected.data, hold.granted, hold.is_late = value, self.now, False

    def _expected_of(self, hold: Hold) -> Expected | None:
        """The record that this holder may still write."""
        expected = self.expected.get(hold.task_id)
        if expected is None or expected.owner is not hold:
            return None
        return expected if hold.is_late or self._is_live(expected) else None

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def succeed(self, data: st.DataObject) -> None:
        """A body, live or overtaken, ends well."""
        self.loop.run_until_complete(self._end(data.draw(st.sampled_from(self.held)), "succeed"))

    @precondition(lambda self: self.held)
    @rule(data=st.data(), how=st.sampled_from(["fail", "fail", "give up", "postpone", "cancel"]))
    def end_otherwise(self, data: st.DataObject, how: str) -> None:
        self.loop.run_until_complete(self._end(data.draw(st.sampled_from(self.held)), how))

    async def _end(self, hold: Hold, how: str) -> None:
        self.written += 1
        value, holder, expected = self.written, hold.holder, self._expected_of(hold)

        async def set_values(task: RunningTask) -> None:
            task.data = task.result = value

        await holder.do(set_values)
        self.held.remove(hold)
        error: Exception | None = None
        match how:
            case "succeed":
                ending = holder.end()
            case "cancel":
                ending = holder.cancel()
            case _:
                error = {"fail": ValueError("no"), "give up": GiveUp("no"), "postpone": Postpone(100)}[how]
                ending = holder.fail(error)
        if expected is None:
            await self._end_lost(hold, ending, how)
            return
        if error is None:
            await ending
        else:
            with pytest.raises(type(error)):
                await ending
        expected.owner, expected.data = None, value
        self._ended(expected, how, value)

    async def _end_lost(self, hold: Hold, ending: Any, how: str) -> None:
        if how == "cancel":
            await ending  # it is cancelled, whatever the store says
            return
        expected = self.expected.get(hold.task_id)
        is_long_ago = expected is not None and expected.fence >= hold.fence + ENDS_KEPT
        with pytest.raises((LeaseLostError, OutcomeUnknownError) if is_long_ago else LeaseLostError):
            await ending

    def _ended(self, expected: Expected, how: str, value: int) -> None:
        releases, expected.releases, expected.last_outcome = expected.releases, 0, None
        match how:
            case "succeed":
                expected.status, expected.result = Status.SUCCEEDED, value
            case "fail":
                expected.status = Status.FAILED if expected.attempts < MAX_ATTEMPTS else Status.EXHAUSTED
                expected.last_outcome = "error"
            case "give up":
                expected.status, expected.last_outcome = Status.EXHAUSTED, "error"
            case "postpone":
                expected.status, expected.due = Status.PENDING, self.now + 100
                expected.attempts -= 1
            case "cancel":
                expected.status, expected.last_outcome = Status.PENDING, "cancelled"
                expected.releases = releases + 1
                expected.attempts -= expected.releases <= FREE_RELEASES

    # -- what happens to them

    @precondition(lambda self: self.held)
    @rule(data=st.data(), worker=numbers_of_workers, then=st.sampled_from(["nothing", "time passes", "reset", "purge"]))
    def stall(self, data: st.DataObject, worker: int, then: str) -> None:
        """As a process that is stopped between its look at the clock and its write: the store alone can refuse that.

        Meanwhile somebody else may claim the task.
        """
        hold = data.draw(st.sampled_from(self.held))
        held = hold.holder._entered.result()._run.held
        self.workers[hold.worker].keeper.leave(held)
        held.end = Moment(math.inf, math.inf, math.inf)
        hold.is_stalled = hold.is_late = True
        if then != "nothing":
            act = data.draw(st.sampled_from(["nothing", "save", "succeed", "fail", "give up", "postpone", "cancel"]))
            self.loop.run_until_complete(self._overtake(hold, worker, then, act))

    async def _overtake(self, hold: Hold, worker: int, then: str, act: str) -> None:
        if then == "time passes":
            await self._wait(LEASE)
        else:
            await self._change(self.workers[worker], hold.task_id, then, force=True)
        await self._claim(worker, hold.task_id, force=False)
        if act == "save":
            await self._save(hold)
        elif act != "nothing":
            await self._end(hold, act)

    @rule(seconds=st.sampled_from([LOOK, 15.0, 30.0, 30.0]))
    def wait(self, seconds: float) -> None:
        self.loop.run_until_complete(self._wait(seconds))

    @rule(how=st.sampled_from(["block", "block", "sleep", "wait"]))
    def wait_long(self, how: str) -> None:
        """A blocked event loop; a machine that sleeps, which its monotonic clock does not tell; a quiet hour."""
        if how == "sleep":
            self.clock.suspend(LEASE)
        else:
            self.loop.run_until_complete(self._wait(LEASE if how == "block" else PURGE_AGE))

    async def _wait(self, seconds: float) -> None:
        self.clock.jump(seconds)
        async with asyncio.timeout(SETTLE):
            while not self._is_quiet():  # noqa: ASYNC110 - keepers tell nobody what they do
                await asyncio.sleep(0)
        for hold in list(self.held):
            if not hold.is_stalled:
                self._look_at(hold)

    def _is_quiet(self) -> bool:
        for tracker in self.workers:
            keeper = tracker.keeper
            if keeper.held and keeper._wake_at <= self.clock.monotonic():
                return False
            if any(held.renewing is not None or held.interrupted for held in keeper.held.values()):
                return False
        return True

    def _look_at(self, hold: Hold) -> None:
        age, run = self.now - hold.granted, hold.holder.run
        expected = self.expected.get(hold.task_id)
        is_owner = expected is not None and expected.owner is hold
        if run.done():
            with pytest.raises(LeaseLostError):
                run.result()
            assert age >= LEASE or not is_owner, "it was interrupted without a reason"
            self.held.remove(hold)
            return
        assert age < LEASE, "the lease is over, and the body runs"
        left = hold.holder._entered.result().lease_left
        if age >= RENEWED_AT:
            assert is_owner, "the lease was taken away long ago, and the body runs"
            assert left == pytest.approx(LEASE, abs=1e-3), "it was not renewed"
        hold.granted = round(self.now - LEASE + left, 3)

    # -- what people do

    @rule(
        worker=numbers_of_workers,
        task_id=ids,
        verb=st.sampled_from(["add", "reset", "reset", "ignore", "purge"]),
        force=st.sampled_from([False, False, True]),
    )
    def change(self, worker: int, task_id: str, verb: str, force: bool) -> None:
        tracker = self.workers[worker]
        what = self._add(tracker, task_id) if verb == "add" else self._change(tracker, task_id, verb, force)
        self.loop.run_until_complete(what)

    async def _add(self, tracker: BaseTracker[Any, Any], task_id: str) -> None:
        self.written += 1
        is_new = await tracker.add(task_id, self.written)
        assert is_new == (task_id not in self.expected)
        if is_new:
            task = await tracker.load(task_id)
            assert task is not None
            assert task.fence >= self.last_fences[task_id]
            self.expected[task_id] = Expected(task.fence, data=self.written)

    async def _change(self, tracker: BaseTracker[Any, Any], task_id: str, verb: str, force: bool) -> None:
        if verb == "purge":
            await self._wait(LOOK)  # fences of records that come back are made of the time
        task = await tracker.load(task_id)
        done = await getattr(tracker, verb)(task_id, force=force)
        expected = self.expected.get(task_id)
        if task is None or expected is None or (self._is_live(expected) and not force):
            assert done == 0
            return
        if verb == "purge":
            is_old = (self.clock.now() - task.update_time).total_seconds() >= PURGE_AGE
            assert done == (force or is_old)
            if done:
                del self.expected[task_id]
            return
        expected.take_away()
        if verb == "reset":
            expected.status, expected.result = Status.PENDING, None
            expected.attempts = expected.releases = 0
        else:
            expected.status, expected.due = Status.IGNORED, 0.0

    # -- what must be so, always

    @invariant()
    def everybody_sees_what_the_model_says(self) -> None:
        self.loop.run_until_complete(self._look())

    async def _look(self) -> None:
        statuses = Counter(expected.status for expected in self.expected.values())
        for tracker in self.workers:
            for task_id in IDS:
                expected, task = self.expected.get(task_id), await tracker.load(task_id)
                if task is None or expected is None:
                    assert task is None
                    assert expected is None
                    continue
                check_sound(task)
                for name in ("status", "attempts", "fence", "releases", "data", "result", "last_outcome"):
                    assert getattr(task, name) == getattr(expected, name), name
                owner = expected.owner
                assert (task.lease and task.lease.token) == (owner and owner.token)
                if task.lease is not None and owner is not None:
                    assert task.lease.boot_expires == pytest.approx(owner.granted + LEASE, abs=1e-3)
            assert await tracker.count() == statuses


def a_memory(folder: str, number: int, clock: FakeClock) -> BaseTracker[Any, Any]:
    return MemoryTracker(clock=clock, lease=LEASE, retry=Retry(MAX_ATTEMPTS, delay=0), worker=f"worker-{number}")


def a_file(folder: str, number: int, clock: FakeClock) -> BaseTracker[Any, Any]:
    retry = Retry(MAX_ATTEMPTS, delay=0)
    return FileTracker(f"{folder}/log", fsync=False, clock=clock, lease=LEASE, retry=retry, worker=f"worker-{number}")


def a_sqlite(folder: str, number: int, clock: FakeClock) -> BaseTracker[Any, Any]:
    retry = Retry(MAX_ATTEMPTS, delay=0)
    return SqliteTracker(f"{folder}/tasks.db", clock=clock, lease=LEASE, retry=retry, worker=f"worker-{number}")


def check(make: Make, examples: int, steps: int, *, is_fixed: bool) -> None:
    machine = type(f"Machine_on_{make.__name__}", (Machine,), {"make": staticmethod(make)})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            derandomize=is_fixed,
            database=None,
            print_blob=True,
            phases=[Phase.generate, Phase.shrink],
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.parametrize(("make", "examples"), [(a_memory, 120), (a_file, 20), (a_sqlite, 15)])
def test_a_store_does_what_the_model_says(make: Make, examples: int) -> None:
    check(make, examples, 30, is_fixed=True)


@pytest.mark.chaos
@pytest.mark.parametrize(("make", "examples"), [(a_memory, 1000), (a_file, 100), (a_sqlite, 100)])
def test_a_store_does_what_the_model_says_for_longer(make: Make, examples: int) -> None:
    check(make, examples, 60, is_fixed=False)
