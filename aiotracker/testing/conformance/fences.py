"""Guarantee 3: fences grow, and a holder that was overtaken changes nothing."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import pytest

from ..._core.retry import GiveUp, Postpone
from ...errors import LeaseLostError
from ...running import RunningTask
from .._clock import FakeClock
from ._base import LEASE, Base, MakeTracker, held, loaded


async def _step(task: RunningTask[Any]) -> None:
    async def fetch() -> int:
        return 1

    await task.step("fetch", fetch)


async def _save(task: RunningTask[Any]) -> None:
    task.data = {"page": 2}
    await task.save()


WRITES: dict[str, Callable[[RunningTask[Any]], Awaitable[Any]]] = {
    "save": _save,
    "renew": lambda task: task.renew(),
    "step": _step,
}
ENDS: dict[str, Exception | None] = {
    "succeed": None,
    "fail": ValueError("the work failed"),
    "give up": GiveUp("no use"),
    "postpone": Postpone(1),
}


class Fences(Base):
    async def test_every_claim_gets_a_larger_fence_however_the_one_before_it_ended(
        self, make_tracker: MakeTracker, clock: FakeClock
    ) -> None:
        fences: list[int] = []
        async with make_tracker(clock=clock) as tracker:
            for error in (ValueError("failed"), Postpone(0), asyncio.CancelledError(), None, GiveUp("no use"), None):
                with pytest.raises(type(error)) if error else nullcontext():
                    async with tracker.run("job", force=True) as task:
                        fences.append(task.fence)
                        assert task.fence == (await loaded(tracker, "job")).fence
                        if error is not None:
                            raise error
            with pytest.raises(LeaseLostError):
                async with tracker.run("job", force=True) as task:
                    fences.append(task.fence)
                    clock.jump(LEASE)
            async with tracker.run("job", force=True) as task:
                fences.append(task.fence)
        assert fences == sorted(set(fences))

    @pytest.mark.usefixtures("delete")
    async def test_a_purged_and_re_added_task_gets_larger_fences_than_before(self, make_tracker: MakeTracker) -> None:
        fences: list[int] = []
        async with make_tracker() as tracker:
            for _ in range(5):
                await tracker.add("job")
                for _ in range(20):
                    async with tracker.run("job", force=True) as task:
                        fences.append(task.fence)
                assert await tracker.purge("job", force=True) == 1
        assert fences == sorted(set(fences))

    @pytest.mark.usefixtures("delete")
    async def test_a_task_that_was_purged_and_claimed_anew_within_a_moment_gets_a_larger_fence(
        self, make_tracker: MakeTracker
    ) -> None:
        fences: list[int] = []
        async with make_tracker() as tracker:
            for _ in range(50):
                async with tracker.run("job") as task:
                    fences.append(task.fence)
                await tracker.purge("job", force=True)
        assert fences == sorted(set(fences))


class AHolderThatWasOvertaken(Base):
    """Its own clock has not moved, so that it believes in its lease; the successor's machine is ahead."""

    @pytest.fixture
    def ahead(self, clock: FakeClock) -> FakeClock:
        return FakeClock(clock.now() + timedelta(seconds=LEASE + 10))

    @pytest.mark.parametrize("successor", ["holds", "succeeded", "failed", "released"])
    @pytest.mark.parametrize("write", [*WRITES, *ENDS, "release"])
    async def test_an_overtaken_holder_writes_nothing_more_and_is_told(
        self, make_tracker: MakeTracker, clock: FakeClock, ahead: FakeClock, write: str, successor: str
    ) -> None:
        async with (
            make_tracker(clock=clock, worker="one") as one,
            make_tracker(clock=ahead, worker="two") as two,
            held(one, "job") as first,
            held(two, "job") as second,
        ):
            assert (await second.task()).fence > (await first.task()).fence
            if successor == "succeeded":
                await second.end()
            elif successor == "failed":
                with pytest.raises(ZeroDivisionError):
                    await second.fail(ZeroDivisionError())
            elif successor == "released":
                await second.cancel()
            before = await loaded(two, "job")
            if write in WRITES:
                with pytest.raises(LeaseLostError) as lost:
                    await first.do(WRITES[write])
                assert lost.value.fence == (await first.task()).fence
            elif write == "release":
                first.run.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await first.run
            else:
                error = ENDS[write]
                with pytest.raises(LeaseLostError) as lost:
                    await (first.end() if error is None else first.fail(error))
                assert lost.value.task_id == "job"
            assert await loaded(two, "job") == before

    @pytest.mark.usefixtures("delete")
    @pytest.mark.parametrize("write", [*WRITES, *ENDS])
    async def test_an_overtaken_holder_brings_no_purged_record_back(
        self, make_tracker: MakeTracker, write: str
    ) -> None:
        async with make_tracker() as tracker, held(tracker, "job") as holder:
            assert await tracker.purge("job", force=True) == 1
            with pytest.raises(LeaseLostError):
                if write in WRITES:
                    await holder.do(WRITES[write])
                elif (error := ENDS[write]) is not None:
                    await holder.fail(error)
                else:
                    await holder.end()
            assert await tracker.load("job") is None

    @pytest.mark.usefixtures("delete")
    async def test_an_overtaken_holder_does_not_end_a_record_that_was_purged_and_claimed_anew(
        self, make_tracker: MakeTracker
    ) -> None:
        async with make_tracker() as tracker, held(tracker, "job") as first:
            await tracker.purge("job", force=True)
            async with held(tracker, "job"):
                before = await loaded(tracker, "job")
                with pytest.raises(LeaseLostError):
                    await first.end()
                assert await loaded(tracker, "job") == before
