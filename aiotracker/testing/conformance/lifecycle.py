"""Opening, closing, and typed data."""

import asyncio
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
from typing_extensions import TypedDict

from ..._core.task import Status
from ...errors import InvalidValueError, StoreError
from ...running import RunningTask
from ._base import Base, MakeTracker, loaded, until


class Lifecycle(Base):
    async def test_open_and_aclose_may_be_awaited_in_two_asyncio_tasks(self, make_tracker: MakeTracker) -> None:
        tracker = make_tracker()
        await asyncio.create_task(tracker.open())
        await asyncio.create_task(tracker.add("job"))
        await asyncio.create_task(tracker.aclose())

    async def test_a_tracker_may_be_opened_again(self, make_tracker: MakeTracker) -> None:
        tracker = make_tracker()
        for attempt in range(3):
            async with tracker:
                assert await tracker.add("job") is (attempt == 0)

    async def test_an_open_tracker_is_not_opened_twice(self, make_tracker: MakeTracker) -> None:
        async with make_tracker() as tracker:
            with pytest.raises(StoreError, match="open already"):
                await tracker.open()

    async def test_closing_twice_is_no_error(self, make_tracker: MakeTracker) -> None:
        tracker = await make_tracker().open()
        await tracker.aclose()
        await tracker.aclose()

    async def test_a_tracker_that_is_not_open_says_so(self, make_tracker: MakeTracker) -> None:
        tracker = make_tracker()
        with pytest.raises(StoreError, match="not open"):
            await tracker.add("job")
        with pytest.raises(StoreError, match="not open"):
            async with tracker.run("job"):
                pass

    async def test_a_run_ends_in_the_asyncio_task_that_entered_it(self, make_tracker: MakeTracker) -> None:
        async with make_tracker() as tracker:
            run = tracker.run("job")

            async def enter() -> RunningTask:
                return await run.__aenter__()

            await asyncio.create_task(enter())
            with pytest.raises(RuntimeError, match="asyncio task that entered it"):
                await run.__aexit__(None, None, None)

            async def is_given_back() -> bool:
                return (await loaded(tracker, "job")).status is Status.PENDING

            await until(is_given_back)

    async def test_a_run_is_entered_once(self, make_tracker: MakeTracker) -> None:
        async with make_tracker() as tracker:
            run = tracker.run("job")
            async with run:
                pass
            with pytest.raises(RuntimeError, match="once"):
                await run.__aenter__()


@dataclass
class Page:
    url: str
    depth: int = 0
    tags: list[str] = field(default_factory=list)


class Struct(msgspec.Struct):
    url: str
    depth: int = 0


class Dict(TypedDict):
    url: str
    depth: int


class Typed(Base):
    @pytest.mark.parametrize(
        ("kind", "value", "stored"),
        [
            (Page, Page("u", 1), {"url": "u", "depth": 1, "tags": []}),
            (Struct, Struct("u", 1), {"url": "u", "depth": 1}),
            (Dict, {"url": "u", "depth": 1}, {"url": "u", "depth": 1}),
            (list[int], [1, 2], [1, 2]),
        ],
        ids=["dataclass", "Struct", "TypedDict", "list"],
    )
    async def test_data_and_results_are_of_the_declared_type_and_stored_as_plain_json(
        self, make_tracker: MakeTracker, kind: Any, value: Any, stored: Any
    ) -> None:
        async with make_tracker(data_type=kind, result_type=kind) as tracker:
            assert await tracker.add("job", value)
            async with tracker.run("job") as task:
                assert task.data == value
                assert type(task.data) is type(value)
                task.result = value
            record = await loaded(tracker, "job")
            assert (record.data, record.result) == (stored, stored)

    async def test_what_does_not_fit_the_type_is_refused_and_at_the_end_recorded_as_a_failure(
        self, make_tracker: MakeTracker
    ) -> None:
        async with make_tracker(data_type=Page, result_type=int) as tracker:
            with pytest.raises(InvalidValueError, match="data does not fit Page"):
                await tracker.add("job", {"url": 7})
            with pytest.raises(InvalidValueError, match="result does not fit int"):
                async with tracker.run("job", data=Page("u")) as task:
                    task.data.depth = 3
                    task.result = "seven"
            record = await loaded(tracker, "job")
            assert (record.status, record.errors[-1].type) == (Status.FAILED, "InvalidValueError")
            assert record.data == {"url": "u", "depth": 3, "tags": []}

    async def test_the_data_of_a_run_is_its_own_copy(self, make_tracker: MakeTracker) -> None:
        given = {"pages": [1]}
        async with make_tracker() as tracker:
            await tracker.add("job", given)
            given["pages"].append(2)
            async with tracker.run("job") as task:
                assert task.data == {"pages": [1]}
                task.data["pages"].append(3)
                assert task.record.data == {"pages": [1]}
            assert (await loaded(tracker, "job")).data == {"pages": [1, 3]}
