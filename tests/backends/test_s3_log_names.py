"""The log on S3, object by object: what a segment says of itself, and how the floor moves."""

from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from aiotracker import Status, StoreCorruptedError, Task
from aiotracker.backends._archive import Archive
from aiotracker.backends._log import Wanted
from aiotracker.backends._segments import Times, segment_key, split, write_segment
from tests.services.simulated_s3 import BEGIN, Process, SimulatedClient, SimulatedStore, simulated_time

NOW = datetime.fromtimestamp(BEGIN, UTC)


async def add(process: Process, task_id: str) -> None:
    task = Task(id=task_id, status=Status.PENDING, create_time=NOW, update_time=NOW)
    await process.submit(Wanted(task_id, lambda current, now: task.replace(), f"w-{task_id}"))


@pytest.mark.parametrize("wrong", [{"segment": 2}, {"shard": 1}])
def test_a_segment_that_says_that_it_is_another_one_is_damage(wrong: dict[str, Any]) -> None:
    async def main() -> None:
        store = SimulatedStore()
        process = Process(store)
        for task_id in "abc":
            await add(process, task_id)
        await process.aclose()
        key = segment_key(0, 3)
        whole = store.objects[key]
        about, begin = split(key, whole.body)
        other = write_segment(msgspec.structs.replace(about, **wrong), whole.body[begin:])
        store.objects[key] = whole._replace(body=other)
        reader = Process(store)
        with pytest.raises(StoreCorruptedError, match=f"is segment {wrong.get('segment', 3)} of shard") as caught:
            await reader.submit(Wanted("a", look=lambda index: index.get("a")))
        assert caught.value.path == f"s3://simulated/{key}"

    with simulated_time() as runner:
        runner.run(main())


def test_a_checkpoint_that_comes_late_does_not_lower_the_floor() -> None:
    async def main() -> None:
        objects = SimulatedClient(SimulatedStore())
        early, late = (Archive(objects, 0, writer=name, patience=10.0, times=Times()) for name in "ab")
        assert await early.write(7, "n7", NOW, [])
        assert not await late.write(5, "n5", NOW, [])
        assert not await late.write(7, "n7", NOW, [])
        stood = await late.floor()
        assert stood.floor is not None
        assert (stood.floor.floor, stood.floor.nonce) == (7, "n7")
        assert await late.write(8, "n8", NOW, [])

    with simulated_time() as runner:
        runner.run(main())
