"""The verbs of those who manage tasks: add, find, count, reset, ignore, purge, wait; and what a store must bear."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest

from ..._core.query import ORDERS, Query, Where
from ..._core.retry import GiveUp, Postpone, Retry
from ..._core.task import Change, Status, Task
from ...errors import InvalidValueError, LeaseLostError, UnsupportedError
from ...tracker import BaseTracker
from .._clock import FakeClock
from ._base import (
    HOSTILE_IDS,
    LEASE,
    MISSING,
    Base,
    MakeTracker,
    abandon,
    check_sound,
    held,
    loaded,
    needs_scan,
    settle,
)


class Adding(Base):
    async def test_add_makes_a_pending_task_and_says_that_it_is_new(
        self, make_tracker: MakeTracker, clock: FakeClock
    ) -> None:
        async with make_tracker(clock=clock) as tracker:
            due = clock.now() + timedelta(hours=1)
            assert await tracker.add("job", {"n": 1}, not_before=due, priority=-3) is True
            task = await loaded(tracker, "job")
            check_sound(task)
            assert (task.id, task.status, task.attempts, task.data) == ("job", Status.PENDING, 0, {"n": 1})
            assert (task.not_before, task.priority, task.lease) == (due, -3, None)

    async def test_a_second_add_changes_nothing_whatever_the_status(self, make_tracker: MakeTracker) -> None:
        async with make_tracker() as tracker:
            await _in_all_states(tracker)
            for task_id in STATES:
                before = await loaded(tracker, task_id)
                assert await tracker.add(task_id, "other", priority=9) is False
                assert await loaded(tracker, task_id) == before

    async def test_of_100_adds_of_one_id_one_is_new(self, make_tracker: MakeTracker) -> None:
        async with make_tracker() as one, make_tracker() as two:
            new = await asyncio.gather(*((one, two)[n % 2].add("job", n) for n in range(100)))
            assert sum(new) == 1
            assert (await loaded(one, "job")).data == new.index(True)

    async def test_add_many_counts_what_is_new(self, make_tracker: MakeTracker) -> None:
        async with make_tracker() as tracker:
            assert await tracker.add_many(["a", "b", "c"]) == 3
            assert await tracker.add_many([("b", 1), ("d", {"n": 2}), ("d", 3)]) == 1
            assert (await loaded(tracker, "b")).data is None
            assert (await loaded(tracker, "d")).data == {"n": 2}
            assert await tracker.add_many(f"e{index}" for index in range(3)) == 3

            async def pages() -> AsyncIterator[tuple[str, Any]]:
                for index in range(5):
                    yield f"e{index}", index

            assert await tracker.add_many(pages()) == 2
            assert await tracker.add_many([]) == 0

    async def test_add_many_of_one_str_is_an_error_and_adds_nothing(self, make_tracker: MakeTracker) -> None:
        async with make_tracker() as tracker:
            with pytest.raises(InvalidValueError, match="list"):
                await tracker.add_many("abc")
            assert await tracker.load("a") is None

    @pytest.mark.parametrize("task_id", HOSTILE_IDS, ids=ascii)
    async def test_any_text_is_an_id(self, make_tracker: MakeTracker, task_id: str) -> None:
        async with make_tracker() as one, make_tracker() as two:
            assert await one.load(task_id) is None
            assert await one.add(task_id, task_id) is True
            stored = await loaded(two, task_id)
            assert (stored.id, stored.data) == (task_id, task_id)
            async with two.run(task_id) as task:
                assert task.id == task_id
                task.result = task_id
            assert (await loaded(one, task_id)).result == task_id

    async def test_all_these_ids_are_kept_apart(self, make_tracker: MakeTracker) -> None:
        async with make_tracker() as tracker:
            assert await tracker.add_many((task_id, index) for index, task_id in enumerate(HOSTILE_IDS)) == len(
                HOSTILE_IDS
            )
            for index, task_id in enumerate(HOSTILE_IDS):
                stored = await loaded(tracker, task_id)
                assert (stored.id, stored.data) == (task_id, index)
            if self.has_scan:
                assert sorted([task.id async for task in tracker.find()]) == sorted(HOSTILE_IDS)

    async def test_what_is_not_there_is_none(self, make_tracker: MakeTracker) -> None:
        async with make_tracker() as tracker:
            assert await tracker.load(MISSING) is None


STATES = ("pending", "planned", "held", "failed", "postponed", "exhausted", "gave up", "succeeded", "ignored")


async def _in_all_states(tracker: BaseTracker[Any, Any]) -> None:
    await tracker.add("pending", {"country": "DE"}, priority=2)
    await tracker.add("planned", {"country": "FR"}, not_before=tracker.now() + timedelta(hours=1))
    for task_id, error, retry in (
        ("failed", ValueError("x"), Retry(3)),
        ("postponed", Postpone(10), Retry(3)),
        ("exhausted", KeyError("y"), Retry(1)),
        ("gave up", GiveUp("z"), Retry(3)),
        ("succeeded", None, Retry(3)),
    ):
        try:
            async with tracker.run(task_id, retry=retry):
                if error is not None:
                    raise error
        except (ValueError, Postpone, KeyError, GiveUp):
            pass
    await tracker.add("ignored")
    await tracker.ignore("ignored")
    await _claim_for_good(tracker, "held")


async def _claim_for_good(tracker: BaseTracker[Any, Any], task_id: str) -> None:
    async def claim() -> None:
        await tracker.run(task_id).__aenter__()

    await asyncio.create_task(claim())
    tracker.keeper.held.clear()


class Changing(Base):
    async def test_reset_makes_everything_pending_again_but_what_is_held(self, make_tracker: MakeTracker) -> None:
        async with make_tracker() as tracker:
            await _in_all_states(tracker)
            errors = (await loaded(tracker, "exhausted")).errors
            states = [task_id for task_id in STATES if task_id != "postponed"]
            changed = await tracker.reset(*states, MISSING)
            assert changed == len(states) - 3, "pending, planned and held ones are not changed"
            for task_id in states:
                task = await loaded(tracker, task_id)
                check_sound(task)
                assert task.status is (Status.IN_PROGRESS if task_id == "held" else Status.PENDING), task_id
                assert task.attempts == (1 if task_id == "held" else 0)
            assert (await loaded(tracker, "exhausted")).errors == errors, "errors of the past stay"
            assert (await loaded(tracker, "planned")).not_before is not None

    async def test_ignore_sets_aside_all_but_what_is_held(self, make_tracker: MakeTracker) -> None:
        async with make_tracker() as tracker:
            await _in_all_states(tracker)
            assert await tracker.ignore(*STATES, MISSING) == len(STATES) - 2
            for task_id in STATES:
                expected = Status.IN_PROGRESS if task_id == "held" else Status.IGNORED
                assert (await loaded(tracker, task_id)).status is expected

    @pytest.mark.usefixtures("delete")
    async def test_purge_spares_what_is_held_and_what_is_younger_than_an_hour(
        self, make_tracker: MakeTracker, clock: FakeClock
    ) -> None:
        async with make_tracker(clock=clock, lease=36_000) as tracker:
            await _in_all_states(tracker)
            assert await tracker.purge(*STATES) == 0
            clock.jump(3600)
            await tracker.add("young")
            assert await tracker.purge(*STATES, "young", MISSING) == len(STATES) - 1
            assert await tracker.load("young") is not None
            assert await tracker.load("held") is not None
            assert await tracker.load("succeeded") is None
            assert await tracker.purge("young", "held", force=True) == 2
            assert await tracker.load("held") is None

    @pytest.mark.parametrize("verb", ["reset", "ignore"])
    async def test_force_takes_a_lease_away(self, make_tracker: MakeTracker, verb: str) -> None:
        async with make_tracker() as one, make_tracker() as two, held(one, "job") as holder:
            assert await getattr(two, verb)("job", force=True) == 1
            task = await loaded(two, "job")
            check_sound(task)
            assert task.lease is None
            with pytest.raises(LeaseLostError):
                await holder.end()
            assert await loaded(two, "job") == task

    async def test_a_change_by_hand_says_who_when_and_why(self, make_tracker: MakeTracker, clock: FakeClock) -> None:
        async with make_tracker(clock=clock, worker="w1") as tracker:
            await tracker.add("job")
            assert await tracker.ignore("job", reason="not today: 'x' é") == 1
            clock.jump(60)
            assert await tracker.reset("job", by="anna@host") == 1
            assert await tracker.reset("job", reason="again") == 0
            now = clock.now()
            assert (await loaded(tracker, "job")).changes == (
                Change("ignore", now - timedelta(seconds=60), "w1", "not today: 'x' é"),
                Change("reset", now, "anna@host"),
            )
            with pytest.raises(InvalidValueError, match="reason takes a line"):
                await tracker.ignore("job", reason="two\nlines")
            assert (await loaded(tracker, "job")).status is Status.PENDING

    async def test_a_task_whose_holder_died_counts_as_free(self, make_tracker: MakeTracker, clock: FakeClock) -> None:
        await abandon(make_tracker(clock=clock, lease=LEASE), "job")
        clock.jump(LEASE)
        async with make_tracker(clock=clock) as tracker:
            assert await tracker.reset("job") == 1
            task = await loaded(tracker, "job")
            check_sound(task)
            assert (task.status, task.attempts) == (Status.PENDING, 0)

    @pytest.mark.usefixtures("scan")
    async def test_filters_choose_what_is_changed(self, make_tracker: MakeTracker) -> None:
        async with make_tracker() as tracker:
            await _in_all_states(tracker)
            assert await tracker.reset(status="exhausted", error_type="KeyError") == 1
            assert (await loaded(tracker, "exhausted")).status is Status.PENDING
            assert (await loaded(tracker, "gave up")).status is Status.EXHAUSTED
            assert await tracker.ignore(prefix="p") == 3
            assert (await loaded(tracker, "planned")).status is Status.IGNORED
            if self.has_delete:
                assert await tracker.purge(status=["succeeded", "exhausted"], force=True) == 2

    async def test_ids_and_filters_together_change_what_both_name(self, make_tracker: MakeTracker) -> None:
        async with make_tracker() as tracker:
            await _in_all_states(tracker)
            assert await tracker.reset("failed", "exhausted", "pending", status="exhausted") == 1
            assert (await loaded(tracker, "failed")).status is Status.FAILED

    @pytest.mark.parametrize("verb", ["reset", "ignore", "purge"])
    async def test_neither_ids_nor_filters_is_an_error(self, make_tracker: MakeTracker, verb: str) -> None:
        async with make_tracker() as tracker:
            with pytest.raises(InvalidValueError, match="ids or filters"):
                await getattr(tracker, verb)()

    async def test_read_only_refuses_every_verb_that_writes(self, make_tracker: MakeTracker) -> None:
        async def body(task: object) -> None:
            pytest.fail("it ran")

        async with make_tracker() as writer, make_tracker(read_only=True) as reader:
            await writer.add("job", 1)
            assert (await loaded(reader, "job")).data == 1
            for write in (
                lambda: reader.add("job-2"),
                lambda: reader.add_many(["job-2"]),
                lambda: reader.work(body, ids=["job"]),
                lambda: reader.call("job", body, None),
                lambda: reader.reset("job"),
                lambda: reader.ignore("job"),
                lambda: reader.purge("job", force=True),
            ):
                with pytest.raises(UnsupportedError, match="read_only"):
                    await write()
            with pytest.raises(UnsupportedError, match="read_only"):
                async with reader.run("job"):
                    pass
            assert (await loaded(writer, "job")).status is Status.PENDING
            assert await writer.load("job-2") is None


class Waiting(Base):
    async def test_wait_gives_the_record_as_soon_as_it_is_final(self, make_tracker: MakeTracker) -> None:
        async with make_tracker() as one, make_tracker() as two:
            waiting = asyncio.create_task(two.wait("job", timeout=20))
            async with one.run("job") as task:
                await settle()
                assert not waiting.done()
                task.result = 1
            done = await waiting
            assert (done.status, done.result) == (Status.SUCCEEDED, 1)
            assert await two.wait("job", timeout=20) == done

    async def test_wait_ends_with_a_timeout_error_that_says_how_it_stands(self, make_tracker: MakeTracker) -> None:
        async with make_tracker() as tracker:
            with pytest.raises(TimeoutError, match="does not exist"):
                await tracker.wait("job", timeout=0.01)
            await tracker.add("job")
            with pytest.raises(TimeoutError, match="pending"):
                await tracker.wait("job", timeout=0.01)


def _filters(tasks: list[Task]) -> list[Where]:
    middle = sorted(task.update_time for task in tasks)[len(tasks) // 2]
    return [
        {},
        {"status": "failed"},
        {"status": ["failed", "exhausted"]},
        {"status": list(Status)},
        {"prefix": "p"},
        {"prefix": "job-1"},
        {"prefix": "no such"},
        {"data": {"country": "DE"}},
        {"data": {"country": "DE", "n": 3}},
        {"data": {"n": True}},
        {"error_type": "ValueError"},
        {"worker": "w1"},
        {"last_outcome": "error"},
        {"last_outcome": "cancelled"},
        {"fingerprint": next(task.errors[-1].fingerprint for task in tasks if task.errors)},
        {"step": "fetch"},
        {"step_status": "failed"},
        {"step": "parse", "step_status": "succeeded"},
        {"min_attempts": 1},
        {"created_before": middle},
        {"created_after": middle},
        {"updated_before": middle},
        {"updated_after": middle, "status": "failed"},
        {"finished_after": middle},
        {"finished_before": middle},
        {"status": "failed", "prefix": "job-", "error_type": "ValueError", "data": {"country": "FR"}},
    ]


@needs_scan
class Finding(Base):
    async def _fill(self, tracker: BaseTracker[Any, Any], clock: FakeClock) -> list[Task]:
        async def fetch() -> int:
            return 1

        async def parse() -> int:
            raise ValueError("in a step")

        await _in_all_states(tracker)
        for index in range(24):
            clock.jump(1)
            task_id = f"job-{index * 7 % 24}"
            await tracker.add(task_id, {"country": "DE" if index % 2 else "FR", "n": index % 4}, priority=index % 3)
            if index % 4 == 1:
                async with tracker.run(task_id) as task:
                    await task.step("fetch", fetch)
            elif index % 4 == 2:
                try:
                    async with tracker.run(task_id) as task:
                        await task.step("parse", parse)
                except ValueError:
                    pass
            elif index % 8 == 3:
                async with held(tracker, task_id) as holder:
                    await holder.cancel()
        ids = [*STATES, *(f"job-{index}" for index in range(24))]
        return [await loaded(tracker, task_id) for task_id in ids]

    async def test_every_filter_finds_what_a_look_at_every_record_finds(
        self, make_tracker: MakeTracker, clock: FakeClock
    ) -> None:
        async with make_tracker(clock=clock, worker="w1") as tracker:
            tasks = await self._fill(tracker, clock)
            for where in _filters(tasks):
                query = Query.build(where)
                expected = {task.id: task for task in tasks if query.matches(task)}
                found = [task async for task in tracker.find(**where)]
                assert len(found) == len(expected), where
                assert {task.id: task for task in found} == expected, where
                counts = await tracker.count(**where)
                assert sum(counts.values()) == len(expected), where
                for status in Status:
                    assert counts[status] == sum(task.status is status for task in expected.values()), where

    @pytest.mark.parametrize("descending", [False, True], ids=["ascending", "descending"])
    @pytest.mark.parametrize("order", ORDERS)
    async def test_every_order_is_kept_with_every_limit(
        self, make_tracker: MakeTracker, clock: FakeClock, order: str, descending: bool
    ) -> None:
        order_by = f"-{order}" if descending else order
        async with make_tracker(clock=clock) as tracker:
            tasks = await self._fill(tracker, clock)
            for where in ({}, {"status": ["failed", "succeeded"]}):
                query = Query.build(where, order_by=order_by)  # type: ignore[arg-type]  # a TypedDict in the making
                expected = [task.id for task in query.sorted(task for task in tasks if query.matches(task))]
                for limit in (None, 0, 1, 7, 1000):
                    found = [
                        task.id
                        async for task in tracker.find(order_by=order_by, limit=limit, **where)  # type: ignore[arg-type]  # likewise
                    ]
                    assert found == expected[:limit]

    async def test_a_limit_without_an_order_gives_so_many_that_match(
        self, make_tracker: MakeTracker, clock: FakeClock
    ) -> None:
        async with make_tracker(clock=clock) as tracker:
            await self._fill(tracker, clock)
            found = [task async for task in tracker.find(status="failed", limit=3)]
            assert len({task.id for task in found}) == 3
            assert all(task.status is Status.FAILED for task in found)

    @pytest.mark.parametrize(
        "where",
        [
            {"status": "done"},
            {"staus": "failed"},
            {"created_before": "yesterday"},
            {"order_by": "size"},
            {"limit": -1},
            {"fingerprint": "ABC"},
            {"status": []},
            {"min_attempts": "3"},
        ],
        ids=str,
    )
    async def test_a_filter_that_cannot_be_is_refused(self, make_tracker: MakeTracker, where: dict[str, Any]) -> None:
        async with make_tracker() as tracker:
            with pytest.raises(InvalidValueError):
                [task async for task in tracker.find(**where)]

    async def test_tasks_changed_meanwhile_are_found_at_most_once(self, make_tracker: MakeTracker) -> None:
        async with make_tracker() as one, make_tracker() as two:
            await one.add_many(f"job-{index:03}" for index in range(300))
            seen: list[str] = []
            async for task in one.find(status="pending"):
                seen.append(task.id)
                await two.ignore(task.id)
            assert sorted(seen) == sorted(set(seen))
            assert len(seen) == 300

    async def test_a_loop_that_is_left_early_holds_nothing(self, make_tracker: MakeTracker) -> None:
        async with make_tracker() as tracker:
            await tracker.add_many(f"job-{index}" for index in range(10))
            async for _ in tracker.find():
                break
            async with tracker.run("job-1"):
                pass

    async def test_claimable_names_what_may_be_claimed_best_first_and_when_more_may(
        self, make_tracker: MakeTracker, clock: FakeClock
    ) -> None:
        async with make_tracker(clock=clock) as tracker:
            await _in_all_states(tracker)
            await tracker.add("urgent", priority=5)
            claimable = await tracker.claimable(100)
            assert {task.id for task in claimable.tasks} >= {"pending", "urgent"}
            assert {task.id for task in claimable.tasks} <= {"pending", "urgent", "failed"}
            assert [task.id for task in claimable.tasks][:2] == ["urgent", "pending"]
            assert claimable.next_due is not None
            assert claimable.next_due <= clock.now() + timedelta(seconds=10)
            assert len((await tracker.claimable(1)).tasks) == 1


class WithoutScan(Base):
    async def test_what_a_backend_does_not_have_is_unsupported_and_named(self, make_tracker: MakeTracker) -> None:
        async with make_tracker() as tracker:
            await tracker.add("job")
            if not self.has_scan:
                with pytest.raises(UnsupportedError, match="scan") as unsupported:
                    await tracker.count()
                assert unsupported.value.method == "scan"
            if not self.has_delete:
                with pytest.raises(UnsupportedError, match="delete") as unsupported:
                    await tracker.purge("job", force=True)
                assert unsupported.value.method == "delete"
