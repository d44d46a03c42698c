"""The tracker against a model of it: several workers on one store, and time under control."""

import asyncio
import shutil
import tempfile
from collections.abc import Callable
from datetime import datetime
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from aiotracker import (
    BaseTracker,
    FileTracker,
    LeaseLostError,
    MemoryTracker,
    Retry,
    SqliteTracker,
    Status,
    TaskExhaustedError,
    TaskIgnoredError,
    TaskLockedError,
    TaskSucceededError,
)
from aiotracker.testing import FakeClock
from aiotracker.testing.conformance._base import Holder

LEASE = 60.0
MAX_ATTEMPTS = 3
FREE_RELEASES = 10
WORKERS = 3
IDS = ("a", "b", "c")
SETTLE = 5.0  # seconds, real ones, at the most
FINAL = {
    Status.SUCCEEDED: TaskSucceededError,
    Status.EXHAUSTED: TaskExhaustedError,
    Status.IGNORED: TaskIgnoredError,
}


class Expected(msgspec.Struct):
    """What a record must say."""

    status: Status = Status.PENDING
    attempts: int = 0
    fence: int = 0
    releases: int = 0
    successes: int = 0  # since the last reset
    owner: Holder | None = None  # whose lease stands in it, live or not


class Machine(RuleBasedStateMachine):
    """Workers claim, end, stall and come back; the model says what each of them must be told."""

    make: Callable[[str, int, FakeClock], BaseTracker[Any, Any]]

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.folder = tempfile.mkdtemp(prefix="aiotracker-model-")
        self.clock = FakeClock()
        self.workers: list[BaseTracker[Any, Any]] = []
        self.expected: dict[str, Expected] = {}
        self.held: list[tuple[str, Holder]] = []
        self.stalled: set[int] = set()  # by id(): nobody renews these
        self.until: dict[int, datetime] = {}
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
        for _, holder in self.held:
            holder.run.cancel()
        if self.held:
            await asyncio.wait({holder.run for _, holder in self.held})
        for _, holder in self.held:
            if not holder.run.cancelled():
                holder.run.exception()
        for tracker in self.workers:
            await tracker.aclose()

    def _is_live(self, expected: Expected) -> bool:
        return expected.owner is not None and self.clock.now() < self.until[id(expected.owner)]

    def _grant(self, holder: Holder) -> None:
        self.until[id(holder)] = self.clock.now() + LEASE * (datetime.resolution * 1_000_000)

    # -- what workers do

    @rule(worker=st.integers(0, WORKERS - 1), task_id=st.sampled_from(IDS))
    def claim(self, worker: int, task_id: str) -> None:
        self.loop.run_until_complete(self._claim(worker, task_id))

    async def _claim(self, worker: int, task_id: str) -> None:
        expected = self.expected.get(task_id)
        refusal = None if expected is None else self._refusal(expected)
        holder = Holder(self.workers[worker], task_id, {})
        if refusal is not None:
            with pytest.raises(refusal):
                await holder.task()
            await asyncio.wait({holder.run})
            return
        task = await holder.task()
        if expected is None:
            expected = self.expected[task_id] = Expected(fence=task.fence - 1)
        expected.status, expected.owner = Status.IN_PROGRESS, holder
        expected.attempts += 1
        expected.fence += 1
        assert (task.fence, task.attempts) == (expected.fence, expected.attempts)
        self._grant(holder)
        self.stalled.discard(id(holder))  # of an earlier one that is gone
        self.held.append((task_id, holder))

    def _refusal(self, expected: Expected) -> type[Exception] | None:
        if self._is_live(expected):
            return TaskLockedError
        if expected.owner is None and expected.status in FINAL:
            return FINAL[expected.status]
        if expected.attempts >= MAX_ATTEMPTS:
            expected.status, expected.owner = Status.EXHAUSTED, None
            return TaskExhaustedError
        return None

    @precondition(lambda self: self.held)
    @rule(data=st.data(), how=st.sampled_from(["succeed", "fail", "cancel", "save"]))
    def go_on(self, data: st.DataObject, how: str) -> None:
        """A holder, live or overtaken, writes something."""
        task_id, holder = data.draw(st.sampled_from(self.held), label="holder")
        self.loop.run_until_complete(self._go_on(task_id, holder, how))

    async def _go_on(self, task_id: str, holder: Holder, how: str) -> None:
        expected = self.expected[task_id]
        is_live = expected.owner is holder and self._is_live(expected)
        if how == "save":
            if is_live:
                await holder.do(lambda task: task.save())
                self._grant(holder)
            else:
                with pytest.raises(LeaseLostError):
                    await holder.do(lambda task: task.save())
            return
        self.held.remove((task_id, holder))
        end = {
            "succeed": holder.end,
            "fail": lambda: holder.fail(ValueError("as the model says")),
            "cancel": holder.cancel,
        }[how]
        if not is_live:
            if how == "cancel":
                await end()
            else:
                with pytest.raises(LeaseLostError):
                    await end()
            return
        if how == "fail":
            with pytest.raises(ValueError, match="as the model says"):
                await end()
        else:
            await end()
        expected.owner = None
        if how == "succeed":
            expected.status, expected.releases = Status.SUCCEEDED, 0
            expected.successes += 1
        elif how == "fail":
            expected.status = Status.FAILED if expected.attempts < MAX_ATTEMPTS else Status.EXHAUSTED
            expected.releases = 0
        else:
            expected.status = Status.PENDING
            expected.releases += 1
            expected.attempts -= expected.releases <= FREE_RELEASES

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def stall(self, data: st.DataObject) -> None:
        """As a process that is stopped: its leases are not renewed, and it does not know."""
        _, holder = data.draw(st.sampled_from(self.held), label="holder")
        for tracker in self.workers:
            token = holder._entered.result().record.lease.token  # type: ignore[union-attr]  # it was claimed
            if (held := tracker.keeper.held.get(token)) is not None:
                tracker.keeper.leave(held)
        self.stalled.add(id(holder))

    @rule(seconds=st.sampled_from([15.0, 30.0, 61.0, 300.0]))
    def wait(self, seconds: float) -> None:
        self.loop.run_until_complete(self._wait(seconds))

    async def _wait(self, seconds: float) -> None:
        self.clock.jump(seconds)
        now = self.clock.now()
        async with asyncio.timeout(SETTLE):
            for task_id, holder in list(self.held):
                if id(holder) in self.stalled:
                    continue
                if now >= self.until[id(holder)]:
                    await asyncio.wait({holder.run})  # it is interrupted
                    with pytest.raises(LeaseLostError):
                        holder.run.result()
                    self.held.remove((task_id, holder))
                    continue
                task = holder._entered.result()
                if (self.until[id(holder)] - now).total_seconds() <= LEASE * 0.6:
                    while task.lease_left <= LEASE * 0.6:  # noqa: ASYNC110 - the keeper tells nobody of a renewal
                        await asyncio.sleep(0.001)
                self.until[id(holder)] = now + task.lease_left * (datetime.resolution * 1_000_000)

    # -- what people do

    @rule(worker=st.integers(0, WORKERS - 1), task_id=st.sampled_from(IDS))
    def reset(self, worker: int, task_id: str) -> None:
        done = self.loop.run_until_complete(self.workers[worker].reset(task_id))
        expected = self.expected.get(task_id)
        if expected is None or self._is_live(expected):
            assert done == 0
            return
        expected.status, expected.owner = Status.PENDING, None
        expected.attempts = expected.releases = expected.successes = 0

    @rule(worker=st.integers(0, WORKERS - 1), task_id=st.sampled_from(IDS))
    def ignore(self, worker: int, task_id: str) -> None:
        self.loop.run_until_complete(self.workers[worker].ignore(task_id))
        expected = self.expected.get(task_id)
        if expected is not None and not self._is_live(expected):
            expected.status, expected.owner = Status.IGNORED, None

    # -- what must be so, always

    @invariant()
    def every_worker_sees_what_the_model_says(self) -> None:
        self.loop.run_until_complete(self._look())

    async def _look(self) -> None:
        for task_id in IDS:
            expected = self.expected.get(task_id)
            for tracker in self.workers:
                task = await tracker.load(task_id)
                if expected is None:
                    assert task is None
                    continue
                assert task is not None
                assert (task.status, task.attempts, task.fence) == (
                    expected.status,
                    expected.attempts,
                    expected.fence,
                )
                assert (task.lease is None) == (expected.owner is None)
                assert expected.successes <= 1
                if task.lease is not None and expected.owner is not None:
                    claim = expected.owner._entered.result().record
                    assert claim.lease is not None
                    assert task.lease.token == claim.lease.token


def a_memory(folder: str, number: int, clock: FakeClock) -> BaseTracker[Any, Any]:
    return MemoryTracker(clock=clock, lease=LEASE, retry=Retry(MAX_ATTEMPTS, delay=0), worker=f"worker-{number}")


def a_file(folder: str, number: int, clock: FakeClock) -> BaseTracker[Any, Any]:
    retry = Retry(MAX_ATTEMPTS, delay=0)
    return FileTracker(f"{folder}/log", fsync=False, clock=clock, lease=LEASE, retry=retry, worker=f"worker-{number}")


def a_sqlite(folder: str, number: int, clock: FakeClock) -> BaseTracker[Any, Any]:
    retry = Retry(MAX_ATTEMPTS, delay=0)
    return SqliteTracker(f"{folder}/tasks.db", clock=clock, lease=LEASE, retry=retry, worker=f"worker-{number}")


def check(make: Callable[[str, int, FakeClock], BaseTracker[Any, Any]], examples: int, steps: int) -> None:
    machine = type("Machine", (Machine,), {"make": staticmethod(make)})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.chaos
@pytest.mark.parametrize(("make", "examples"), [(a_memory, 100), (a_file, 20), (a_sqlite, 20)])
def test_a_store_does_what_the_model_says(make: Any, examples: int) -> None:
    check(make, examples, 25)


@pytest.mark.chaos
@pytest.mark.parametrize(("make", "examples"), [(a_memory, 1500), (a_file, 200), (a_sqlite, 200)])
def test_a_store_does_what_the_model_says_for_longer(make: Any, examples: int) -> None:
    check(make, examples, 60)
