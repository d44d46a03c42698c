"""Steps of a pipeline: each is done once, and recorded before the next one starts."""

import asyncio
import math
from datetime import timedelta
from typing import Any

import pytest

from ..._core.task import Status
from ...errors import InvalidValueError
from ...running import RunningTask
from .._clock import FakeClock
from ._base import Base, MakeTracker, held, loaded, until
from .outcomes import Receipt


class Steps(Base):
    @pytest.fixture
    def calls(self) -> list[str]:
        return []

    async def test_a_finished_step_is_not_run_again_after_a_failure(
        self, make_tracker: MakeTracker, calls: list[str]
    ) -> None:
        async def fetch() -> str:
            calls.append("fetch")
            return "path"

        async def parse(path: str) -> int:
            calls.append("parse")
            if calls.count("parse") == 1:
                raise ValueError("broken row")
            return len(path)

        async def pipeline(task: RunningTask) -> None:
            path = await task.step("fetch", fetch)
            task.result = await task.step("parse", parse, path)

        async with make_tracker() as one, make_tracker() as two:
            with pytest.raises(ValueError, match="broken row"):
                async with one.run("job") as task:
                    await pipeline(task)
            fetched, parsed = (await loaded(one, "job")).steps
            assert (fetched.name, fetched.status, fetched.result, fetched.attempts) == (
                "fetch",
                Status.SUCCEEDED,
                "path",
                1,
            )
            assert (parsed.status, parsed.attempts) == (Status.FAILED, 1)
            assert parsed.error is not None
            assert (parsed.error.type, parsed.error.message) == ("ValueError", "broken row")
            async with two.run("job") as task:
                await pipeline(task)
            assert calls == ["fetch", "parse", "parse"]
            done = await loaded(one, "job")
            assert done.result == 4
            assert [(step.name, step.status, step.attempts, step.error) for step in done.steps] == [
                ("fetch", Status.SUCCEEDED, 1, None),
                ("parse", Status.SUCCEEDED, 2, None),
            ]

    async def test_a_finished_step_is_recorded_before_the_next_one_starts(self, make_tracker: MakeTracker) -> None:
        seen: list[list[tuple[str, str]]] = []

        async with make_tracker() as tracker, make_tracker() as other:

            async def look() -> None:
                seen.append([(step.name, step.status) for step in (await loaded(other, "job")).steps])

            async with tracker.run("job") as task:
                await task.step("one", look)
                await task.step("two", look)
                await look()
        assert [name for name, status in seen[1] if status == "succeeded"] == ["one"]
        assert seen[2] == [("one", "succeeded"), ("two", "succeeded")]

    async def test_a_step_has_its_times_and_renews_the_lease(self, make_tracker: MakeTracker, clock: FakeClock) -> None:
        async def slow() -> None:
            clock.jump(5)

        async with make_tracker(clock=clock, lease=60.0) as tracker, tracker.run("job") as task:
            began = clock.now()
            await task.step("slow", slow)
            (step,) = (await loaded(tracker, "job")).steps
            assert (step.start_time, step.finish_time) == (began, began + timedelta(seconds=5))
            assert step.seconds == 5
            assert task.lease_left == 60.0

    async def test_steps_may_run_concurrently(self, make_tracker: MakeTracker) -> None:
        barrier = asyncio.Barrier(10)

        async def wait(number: int) -> int:
            await barrier.wait()
            return number

        async with make_tracker() as tracker:
            async with tracker.run("job") as task:
                task.result = await asyncio.gather(*(task.step(f"s{n}", wait, n) for n in range(10)))
            stored = await loaded(tracker, "job")
            assert stored.result == list(range(10))
            assert {step.name: step.result for step in stored.steps} == {f"s{n}": n for n in range(10)}
            assert all(step.status is Status.SUCCEEDED for step in stored.steps)

    async def test_a_name_used_twice_in_one_run_is_an_error(self, make_tracker: MakeTracker, calls: list[str]) -> None:
        async def note() -> None:
            calls.append("x")

        async with make_tracker() as tracker:
            with pytest.raises(InvalidValueError, match="'same'"):
                async with tracker.run("job") as task:
                    await task.step("same", note)
                    await task.step("same", note)
            assert calls == ["x"]

    async def test_a_crash_loses_the_step_that_ran_and_no_other(
        self, make_tracker: MakeTracker, clock: FakeClock, other_clock: FakeClock, calls: list[str]
    ) -> None:
        async def note(name: str) -> str:
            calls.append(name)
            return name

        async def hang() -> None:
            await asyncio.Event().wait()

        async with make_tracker(clock=clock) as one, make_tracker(clock=other_clock) as two:
            async with held(one, "job") as holder:
                await holder.do(lambda task: task.step("first", note, "first"))
                other_clock.jump(61 + two.clock_uncertainty)  # for the other machine this one is dead
                async with two.run("job") as task:
                    assert await task.step("first", note, "first") == "first"
                    await task.step("second", note, "second")
            assert calls == ["first", "second"]
            assert [step.name for step in (await loaded(two, "job")).steps] == ["first", "second"]

    async def test_a_cancelled_step_is_run_again(self, make_tracker: MakeTracker, calls: list[str]) -> None:
        async def begun() -> bool:
            return bool(calls)

        async def hang() -> None:
            calls.append("hang")
            if len(calls) == 1:
                await asyncio.Event().wait()

        async with make_tracker() as tracker:

            async def body() -> None:
                async with tracker.run("job") as task:
                    await task.step("hang", hang)

            running = asyncio.create_task(body())
            await until(begun)
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            await body()
            (step,) = (await loaded(tracker, "job")).steps
            assert (step.status, step.attempts) == (Status.SUCCEEDED, 2)

    async def test_reset_from_a_step_forgets_it_and_those_after_it(
        self, make_tracker: MakeTracker, calls: list[str]
    ) -> None:
        async def note(name: str) -> str:
            calls.append(name)
            return name

        async with make_tracker() as tracker:

            async def body() -> None:
                async with tracker.run("job") as task:
                    for name in ("a", "b", "c"):
                        await task.step(name, note, name)

            await body()
            assert await tracker.reset("job", from_step="b") == 1
            assert [step.name for step in (await loaded(tracker, "job")).steps] == ["a"]
            await body()
            assert calls == ["a", "b", "c", "b", "c"]

    async def test_reset_keeps_the_finished_steps_of_what_had_failed(
        self, make_tracker: MakeTracker, calls: list[str]
    ) -> None:
        async def note(name: str) -> str:
            calls.append(name)
            return name

        async with make_tracker() as tracker:
            with pytest.raises(ValueError, match="x"):
                async with tracker.run("job") as task:
                    await task.step("a", note, "a")
                    raise ValueError("x")
            await tracker.reset("job")
            async with tracker.run("job") as task:
                await task.step("a", note, "a")
            assert calls == ["a"]
            await tracker.reset("job")
            async with tracker.run("job") as task:
                await task.step("a", note, "a")
            assert calls == ["a", "a"], "the steps of a task that succeeded are forgotten"

    async def test_a_result_takes_the_annotated_type_the_first_time_and_when_resumed(
        self, make_tracker: MakeTracker
    ) -> None:
        async def charge() -> Receipt:
            return Receipt("R-1", 5)

        got: list[Any] = []
        async with make_tracker() as tracker:
            for error in (ValueError("x"), None):
                try:
                    async with tracker.run("job") as task:
                        got.append(await task.step("charge", charge))
                        if error is not None:
                            raise error
                except ValueError:
                    pass
        assert got == [Receipt("R-1", 5), Receipt("R-1", 5)]

    async def test_a_result_that_json_cannot_hold_fails_the_step_with_the_path(self, make_tracker: MakeTracker) -> None:
        async def bad() -> Any:
            return {"rows": [math.nan]}

        async with make_tracker() as tracker:
            with pytest.raises(InvalidValueError, match=r"step 'bad'\['rows'\]\[0\] is nan"):
                async with tracker.run("job") as task:
                    await task.step("bad", bad)
            (step,) = (await loaded(tracker, "job")).steps
            assert step.status is Status.FAILED

    async def test_a_plain_function_as_a_step_is_a_type_error_that_shows_to_thread(
        self, make_tracker: MakeTracker
    ) -> None:
        def parse() -> int:
            return 3

        async with make_tracker() as tracker, tracker.run("job") as task:
            with pytest.raises(TypeError, match=r'task\.step\("parse", asyncio\.to_thread, parse'):
                await task.step("parse", parse)  # type: ignore[arg-type]  # what is tested
            assert await task.step("parse", asyncio.to_thread, parse) == 3
