"""Group commit on the event loop: what any store with an asyncio driver is built on."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from typing import Any

import pytest

from aiotracker import (
    BaseTracker,
    ConflictError,
    InvalidValueError,
    OutcomeUnknownError,
    RecordTooLargeError,
    Status,
    StoreError,
    StoreUnavailableError,
    Task,
)
from aiotracker._core.transitions import Add
from aiotracker.backends import _pump
from aiotracker.backends._pump import Operation, Pump, PumpTracker, Round, Write


class Toy(PumpTracker[Any, Any]):
    """A store in memory. Its commits wait at `gate`, and are counted."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.rows: dict[str, tuple[str | None, bytes]] = {}
        self.gate = asyncio.Event()
        self.gate.set()
        self.commits: list[list[str]] = []
        self.under_way = asyncio.Event()
        self.error: Exception | None = None
        self.reply_is_lost = False

    async def connect(self, stack: AsyncExitStack) -> None:
        self._start_pumps(stack, "toy")

    async def _read_many(self, task_ids: list[str]) -> dict[str, Task]:
        await asyncio.sleep(0)
        return {
            task_id: Task.decode(row[1], version=row[0])
            for task_id in task_ids
            if (row := self.rows.get(task_id)) is not None
        }

    async def _write_many(self, writes: Mapping[str, Write]) -> tuple[set[str], dict[str, Exception]]:
        self.commits.append(list(writes))
        self.under_way.set()
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        landed = set()
        for task_id, write in writes.items():
            row = self.rows.get(task_id)
            if (None if row is None else row[0]) == write.expected:
                landed.add(task_id)
                if write.task is None:
                    del self.rows[task_id]
                else:
                    self.rows[task_id] = (write.task.version, write.raw)
        await asyncio.sleep(0)
        if self.reply_is_lost:
            raise OutcomeUnknownError("the reply was lost", "")
        return landed, {}

    def _blame(self) -> str:
        return "the toy is stuck"

    async def scan(self, query: Any) -> AsyncIterator[Task]:
        for version, raw in list(self.rows.values()):
            yield Task.decode(raw, version=version)


async def test_what_waits_while_a_commit_is_in_flight_goes_into_the_next_one() -> None:
    async with Toy() as tracker:
        tracker.gate.clear()
        first = asyncio.create_task(tracker.add("first"))
        await tracker.under_way.wait()
        others = [asyncio.create_task(tracker.add(f"job-{index}")) for index in range(100)]
        await asyncio.sleep(0)
        tracker.gate.set()
        assert await first
        assert all(await asyncio.gather(*others))
        assert [len(commit) for commit in tracker.commits] == [1, 100]


async def test_several_operations_on_one_record_are_one_write() -> None:
    async with Toy() as tracker:
        added = await asyncio.gather(*(tracker.add("one") for _ in range(100)))
        assert added.count(True) == 1
        assert tracker.commits == [["one"]]


async def claim_and_cancel_in_flight(tracker: Toy) -> None:
    """The commit stays under way until the gate is opened."""
    tracker.gate.clear()
    claiming = asyncio.create_task(tracker.run("job").__aenter__())
    await tracker.under_way.wait()
    claiming.cancel()
    with pytest.raises(asyncio.CancelledError):
        await claiming


async def test_a_claim_cancelled_while_its_commit_is_in_flight_is_undone() -> None:
    async with Toy() as tracker:
        await claim_and_cancel_in_flight(tracker)
        tracker.gate.set()
        task = await tracker.load("job")
        assert task is not None
        assert task.status is Status.PENDING
        assert task.attempts == 0


def test_the_end_of_asyncio_run_lets_a_commit_in_flight_finish_and_undoes_its_claims() -> None:
    trackers: list[Toy] = []

    async def main() -> None:
        tracker = await Toy().open()
        trackers.append(tracker)
        tracker.gate.clear()
        tasks = [asyncio.create_task(tracker.run(f"job-{index}").__aenter__()) for index in range(5)]
        await tracker.under_way.wait()
        asyncio.get_running_loop().call_later(0.02, tracker.gate.set)
        assert tasks

    asyncio.run(main())
    (tracker,) = trackers
    tasks = [Task.decode(raw) for _, raw in tracker.rows.values()]
    assert len(tasks) == 5, "the commit was broken off"
    assert all(task.lease is None for task in tasks)


async def test_whoever_cancels_all_tasks_does_not_break_a_commit_off() -> None:
    async with Toy() as tracker:
        tracker.gate.clear()
        adding = asyncio.create_task(tracker.add("job"))
        await tracker.under_way.wait()
        for task in asyncio.all_tasks() - {asyncio.current_task(), adding}:
            task.cancel()
        await asyncio.sleep(0)
        tracker.gate.set()
        assert await adding


async def test_a_waiter_gives_up_after_a_third_of_the_lease_and_says_why() -> None:
    async with Toy(lease=0.15) as tracker:
        tracker.gate.clear()
        with pytest.raises(StoreUnavailableError, match="the toy is stuck"):
            await tracker.add("job")
        tracker.gate.set()


async def test_closing_does_not_wait_for_ever_for_a_commit_that_is_stuck(caplog: pytest.LogCaptureFixture) -> None:
    tracker = await Toy(lease=0.3).open()
    tracker.gate.clear()
    adding = asyncio.create_task(tracker.add("job"))
    await tracker.under_way.wait()
    async with asyncio.timeout(5):
        await tracker.aclose()
    with pytest.raises(StoreUnavailableError):
        await adding
    assert "the toy is stuck" in caplog.text


async def test_closing_commits_what_waits() -> None:
    tracker = await Toy().open()
    adding = [asyncio.create_task(tracker.add(f"job-{index}")) for index in range(10)]
    await asyncio.sleep(0)
    await tracker.aclose()
    assert all(await asyncio.gather(*adding))
    with pytest.raises(StoreError, match="not open"):
        await tracker.add("late")


async def test_renewals_go_first() -> None:
    order: list[str] = []

    async def commit(operations: list[Operation]) -> None:
        order.extend(operation.task_id for operation in operations)

    pump: Pump[Operation] = Pump(
        commit, orphaned=lambda item: None, blame=lambda: "", patience=5, name="test", max_items=1
    )
    await asyncio.gather(
        pump.submit(Operation("claim 1")), pump.submit(Operation("claim 2")), pump.submit(Operation("r"), urgent=True)
    )
    assert order == ["r", "claim 1", "claim 2"]
    await pump.aclose()


async def test_an_error_of_the_store_reaches_everybody_who_waited_and_nobody_after(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with Toy() as tracker:
        tracker.error = StoreError("the disk is full")
        results = await asyncio.gather(*(tracker.add(f"job-{n}") for n in range(3)), return_exceptions=True)
        assert [str(result) for result in results] == ["the disk is full"] * 3
        assert len(set(map(id, results))) == 3, "one exception for all would collect their tracebacks"
        tracker.error = None
        assert await tracker.add("job-0")


async def test_nobody_is_refused_on_a_guess() -> None:
    async with Toy() as tracker:
        async with tracker.run("job"):
            pass
        stale = await tracker.load("job")
        assert stale is not None
        await tracker.reset("job")
        # By what is believed, it has succeeded; by what is stored, it is pending.
        async with tracker._run("job", known=stale) as task:
            assert task.attempts == 1


async def test_a_lost_race_is_run_again_on_what_is_stored_then() -> None:
    async with Toy() as tracker:
        await tracker.add("job", {"n": 0})
        seen = await tracker.load("job")
        assert seen is not None
        await tracker.dump(seen.replace(data={"n": 1}))

        def more(task: Task | None, now: Any) -> Task | None:
            assert task is not None
            return task.replace(data={"n": task.data["n"] + 1})

        task = await tracker.update("job", more, known=seen)
        assert task is not None
        assert task.data == {"n": 2}
        with pytest.raises(ConflictError):
            await tracker.dump(seen)


def test_one_operation_that_fails_in_a_round_fails_alone() -> None:
    def broken(task: Task | None, now: Any) -> Task | None:
        raise LookupError("broken")

    now = BaseTracker.clock.now()
    bad = Operation("a", broken, "w1")
    good = Operation("b", Add("b", "c"), "w2")
    huge = Operation("c", Add("c", "c", data="x" * 2000), "w3")
    work = Round([bad, good, huge], 1000)
    assert sorted(work.missing()) == ["a", "b", "c"]
    work.found({})
    assert list(work.decide(now)) == ["b"]
    work.settle({"b"})
    assert isinstance(bad.error, LookupError)
    assert good.error is None
    assert good.answer.id == "b"
    assert isinstance(huge.error, RecordTooLargeError)


def test_one_operation_that_fails_in_a_lost_race_keeps_its_own_error() -> None:
    bad, good = Operation("a", lambda task, now: [][0], "w1"), Operation("a", Add("a", "c"), "w2")
    work = Round([bad, good], 1000)
    work.found({})
    assert list(work.decide(BaseTracker.clock.now())) == ["a"]
    work.settle((), {"a": StoreError("full")})
    assert isinstance(bad.error, IndexError)
    assert str(good.error) == "full"


def test_a_commit_takes_no_more_than_its_bytes_and_the_rest_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_pump, "MAX_BYTES", 2500)
    operations = [Operation(str(n), Add(str(n), "c", data="x" * 1000), "w") for n in range(5)]
    work = Round(operations, 10_000)
    work.found({})
    assert list(work.decide(BaseTracker.clock.now())) == ["0", "1", "2"]
    assert [operation.again for operation in operations] == [None, None, None, 0.0, 0.0]


@pytest.mark.parametrize("landed", [True, False], ids=["it landed", "it did not"])
async def test_a_claim_that_may_have_landed_is_undone_where_nobody_waits_for_it(landed: bool) -> None:
    async with Toy() as tracker:
        await claim_and_cancel_in_flight(tracker)
        tracker.reply_is_lost, tracker.error = landed, None if landed else StoreUnavailableError("no answer")
        tracker.gate.set()
        await asyncio.sleep(0)
        while tracker._pump is not None and tracker._pump._in_flight:  # noqa: ASYNC110 - a few turns of the loop
            await asyncio.sleep(0)
        tracker.reply_is_lost, tracker.error = False, None
        task = await tracker.load("job")
        assert (task is not None) is landed
        if task is not None:
            assert (task.status, task.attempts, task.lease) == (Status.PENDING, 0, None)


async def test_a_claim_that_was_refused_or_failed_leaves_nothing_to_undo() -> None:
    async with Toy() as tracker:
        async with tracker.run("job") as held:
            tracker.gate.clear()
            claiming = asyncio.create_task(tracker.run("job").__aenter__())
            adding = asyncio.create_task(tracker.add("other"))
            await asyncio.sleep(0)
            claiming.cancel()
            with pytest.raises(asyncio.CancelledError):
                await claiming
            tracker.gate.set()
            await adding
            await held.save()
        commits = len(tracker.commits)
        tracker.gate.clear()
        tracker.under_way.clear()
        claiming = asyncio.create_task(tracker.run("new").__aenter__())
        await tracker.under_way.wait()
        claiming.cancel()
        with pytest.raises(asyncio.CancelledError):
            await claiming
        tracker.error = StoreError("the disk is full")
        tracker.gate.set()
        assert await tracker.load("new") is None
        assert len(tracker.commits) == commits + 1


async def test_a_guarded_write_says_what_became_of_it() -> None:
    async with Toy() as tracker:
        await tracker.add("job")
        task = await tracker.load("job")
        assert task is not None
        with pytest.raises(InvalidValueError, match="object"):
            await tracker.dump(task.replace(data=object()))
        tracker.reply_is_lost = True
        with pytest.raises(StoreUnavailableError, match="the reply was lost"):
            await tracker.dump(task.replace(note="x"))


class Plain:
    """A pump whose commits do what they are told."""

    def __init__(self, **options: Any) -> None:
        self.errors: list[Exception] = []
        self.again: list[float] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.begun = asyncio.Event()
        self.pump: Pump[Operation] = Pump(
            self.commit, orphaned=lambda item: None, blame=lambda: "stuck", name="commits", **{"patience": 30} | options
        )

    async def commit(self, operations: list[Operation]) -> None:
        self.begun.set()
        await self.gate.wait()
        if self.errors:
            raise self.errors.pop()
        for operation in operations:
            operation.answer = operation.task_id
            operation.again = self.again.pop() if self.again else None


async def test_what_comes_after_closing_is_refused() -> None:
    pump = Plain().pump
    assert await pump.submit(Operation("a")) == "a"
    assert await pump.aclose()
    with pytest.raises(StoreError, match="closed"):
        await pump.submit(Operation("b"))


async def test_closing_waits_for_those_who_lost_a_race_and_are_about_to_try_again() -> None:
    plain = Plain()
    plain.again = [0.02]
    answer = plain.pump.submit(Operation("a"))
    await plain.begun.wait()
    await asyncio.sleep(0)
    assert await plain.pump.aclose()
    assert await answer == "a"


async def test_closing_does_not_wait_for_ever_for_those_who_lose_every_race(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_pump, "CLOSE_TIME", 0.05)
    plain = Plain()
    plain.again = [60.0]
    answer = plain.pump.submit(Operation("a"))
    await plain.begun.wait()
    assert not await plain.pump.aclose()
    with pytest.raises(StoreUnavailableError, match="the tracker was closed: stuck"):
        await answer


async def test_nobody_is_left_waiting_when_closing_gives_a_commit_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_pump, "CLOSE_TIME", 0.05)
    plain = Plain()
    plain.gate.clear()
    first = plain.pump.submit(Operation("a"))
    await plain.begun.wait()
    second = plain.pump.submit(Operation("b"))
    assert not await plain.pump.aclose()
    for answer in (first, second):
        with pytest.raises(StoreUnavailableError, match="closed"):
            await answer


async def test_a_fault_of_ours_fails_its_commit_is_logged_and_does_not_stop_the_next(
    caplog: pytest.LogCaptureFixture,
) -> None:
    plain = Plain()
    plain.errors = [ZeroDivisionError("ours")]
    first = plain.pump.submit(Operation("a"))
    with pytest.raises(ZeroDivisionError):
        await first
    assert "a commit failed" in caplog.text
    assert await plain.pump.submit(Operation("b")) == "b"
    await plain.pump.aclose()


async def test_commits_that_stop_for_a_fault_of_ours_begin_anew_and_lose_nobody(
    caplog: pytest.LogCaptureFixture,
) -> None:
    faults = [ZeroDivisionError("ours")]

    async def pace() -> None:
        if faults:
            raise faults.pop()

    plain = Plain(pace=pace)
    assert await plain.pump.submit(Operation("a")) == "a"
    assert "begin anew" in caplog.text
    await plain.pump.aclose()
