"""S3LogTracker on a server: what is stored where, which requests that takes, and what is refused."""

import asyncio
import gzip
import json
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from typing import Any

import pytest

from aiotracker import (
    InvalidValueError,
    S3LogTracker,
    Status,
    StoreCorruptedError,
    StoreError,
    StoreUnavailableError,
    TaskSucceededError,
    open_tracker,
)
from aiotracker.backends import _shard as module
from aiotracker.backends._segments import floor_key, segment_key, shard_of
from tests.backends.on_s3 import copied_facts
from tests.services.fault_proxy import FaultProxy, Plan, Request
from tests.services.s3 import S3Service, moto_s3, prepared, raw_client

__all__ = ["moto_s3"]  # a fixture

Make = Callable[..., S3LogTracker]


@pytest.fixture
def prefix(moto_s3: S3Service) -> str:
    return prepared(moto_s3, "log", shards=2)


@pytest.fixture
def make(moto_s3: S3Service, prefix: str) -> Make:
    return lambda **options: moto_s3.log_tracker(prefix, **options)


@pytest.fixture
async def proxy(moto_s3: S3Service, prefix: str) -> AsyncIterator[FaultProxy]:
    async with FaultProxy(moto_s3.url) as proxy:
        await asyncio.to_thread(copied_facts, moto_s3, prefix, proxy.url)
        yield proxy


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint every ten segments or so."""
    monkeypatch.setattr(module, "WORTH", 2)


class Objects:
    """What is under a prefix, as somebody else sees it."""

    def __init__(self, service: S3Service, prefix: str) -> None:
        self._client = raw_client(service.url)
        self._where = {"Bucket": service.bucket}
        self._prefix = f"{prefix}/"

    async def keys(self) -> list[str]:
        def look() -> list[str]:
            pages = self._client.get_paginator("list_objects_v2").paginate(**self._where, Prefix=self._prefix)
            return [found["Key"].removeprefix(self._prefix) for page in pages for found in page.get("Contents", ())]

        return await asyncio.to_thread(look)

    async def get(self, key: str) -> bytes:
        def read() -> Any:
            return self._client.get_object(**self._where, Key=self._prefix + key)["Body"].read()

        return bytes(await asyncio.to_thread(read))

    async def put(self, key: str, body: bytes) -> None:
        await asyncio.to_thread(self._client.put_object, **self._where, Key=self._prefix + key, Body=body)


@pytest.fixture
def objects(moto_s3: S3Service, prefix: str) -> Objects:
    return Objects(moto_s3, prefix)


async def lives(tracker: S3LogTracker, *ids: str) -> None:
    async def one(task_id: str) -> None:
        async with tracker.run(task_id):
            pass

    await asyncio.gather(*map(one, ids))


def ids_in(shard: int, count: int, shards: int = 2) -> list[str]:
    """Ids of tasks that are in one shard."""
    found = (f"job-{number}" for number in range(100 * count))
    return [task_id for task_id in found if shard_of(task_id, shards) == shard][:count]


async def until_checkpoint(tracker: S3LogTracker, objects: Objects, task_id: str) -> None:
    """Writes until a shard has another checkpoint."""
    key = floor_key(shard_of(task_id, tracker.shards))
    before = await objects.get(key) if key in await objects.keys() else b""
    for _ in range(100):
        await tracker.reset(task_id)
        await lives(tracker, task_id)
        if key in await objects.keys() and await objects.get(key) != before:
            return
    raise AssertionError("no checkpoint was written")


class TestRequests:
    async def test_of_a_thousand_lifecycles_at_once_are_a_handful(self, make: Make) -> None:
        async with make() as tracker:
            await lives(tracker, "job-0", "job-1")
            before = tracker.requests
            await lives(tracker, *(f"task-{number}" for number in range(1000)))
            assert tracker.requests - before <= 20
            assert tracker.requests == sum(tracker.requests_by_operation.values())
            assert await tracker.count() == {Status.SUCCEEDED: 1002}

    async def test_of_a_lifecycle_alone_are_two(self, make: Make) -> None:
        first, second = ids_in(0, 2)
        async with make() as tracker:
            await lives(tracker, first)
            before = tracker.requests
            await lives(tracker, second)
            assert tracker.requests - before == 2

    async def test_whoever_starts_for_one_task_reads_its_shard_alone(
        self, make: Make, objects: Objects, often: None
    ) -> None:
        mine, other = ids_in(0, 1)[0], ids_in(1, 1)[0]
        async with make() as tracker:
            await until_checkpoint(tracker, objects, mine)
            await until_checkpoint(tracker, objects, other)
        keys = []
        async with make() as tracker:
            get = tracker._store.get

            async def recorded(key: str) -> Any:
                keys.append(key)
                return await get(key)

            tracker._store.get = recorded  # type: ignore[method-assign]  # to look at what is asked
            with pytest.raises(TaskSucceededError):
                async with tracker.run(mine):
                    pass
        assert {key.split("/")[1].removesuffix(".json") for key in keys} == {"00"}
        assert [key.split("/")[0] for key in keys[:3]] == ["floor", "checkpoints", "log"]
        assert len(keys) < 20

    async def test_looks_at_the_same_time_are_one_look(self, make: Make) -> None:
        async with make() as tracker:
            await lives(tracker, *ids_in(0, 2))
            before = tracker.requests
            await asyncio.gather(*(tracker.load(task_id) for task_id in ids_in(0, 100)))
            assert tracker.requests - before == 1


class TestLayout:
    async def test_segments_are_lines_of_json_that_name_themselves_and_what_they_follow(
        self, make: Make, objects: Objects
    ) -> None:
        (task_id,) = ids_in(1, 1)
        async with make() as tracker:
            await lives(tracker, task_id)
        assert sorted(await objects.keys()) == ["aiotracker.json", segment_key(1, 1), segment_key(1, 2)]
        (first, claimed, _), (second, done, mark) = [
            [json.loads(line) for line in (await objects.get(segment_key(1, number))).splitlines()] for number in (1, 2)
        ]
        assert (first["segment"], first["shard"], first["before"]) == (1, 1, "")
        assert (second["segment"], second["before"]) == (2, first["nonce"])
        assert (claimed["id"], claimed["status"], done["status"]) == (task_id, "in_progress", "succeeded")
        assert mark["mark"] == 1

    async def test_a_checkpoint_is_the_latest_line_of_each_task_and_the_floor_names_it(
        self, make: Make, objects: Objects, often: None
    ) -> None:
        ids = ids_in(0, 5)
        async with make() as tracker:
            await lives(tracker, *ids)
            await until_checkpoint(tracker, objects, ids[0])
        floor = json.loads(await objects.get(floor_key(0)))
        (key,) = [key for key in await objects.keys() if key.startswith("checkpoints/00/")]
        assert key == f"checkpoints/00/{floor['checkpoint']}/0000.jsonl.gz"
        assert floor["checkpoint"].startswith(f"{floor['floor']:012}-")
        lines = [json.loads(line) for line in gzip.decompress(await objects.get(key)).splitlines()]
        assert sorted(line["id"] for line in lines if "id" in line) == sorted(ids)

    async def test_nothing_is_touched_outside_of_the_prefix(self, moto_s3: S3Service, often: None) -> None:
        outside, prefix = moto_s3.prefix(), ""
        theirs = Objects(moto_s3, outside)
        for name in ("aiotracker.json", "log/00/000000000001.jsonl", "floor/00.json", "inner-b", "inner0"):
            await theirs.put(name, b"theirs")
        prefix = f"{outside}/inner"
        seen = Objects(moto_s3, prefix)
        async with moto_s3.log_tracker(prefix, shards=1) as tracker:
            await until_checkpoint(tracker, seen, "job")
            await tracker.purge("job", force=True)
        for key in await theirs.keys():
            assert key.startswith("inner/") or await theirs.get(key) == b"theirs"
        assert len([key for key in await theirs.keys() if not key.startswith("inner/")]) == 5

    async def test_shards_are_fixed_when_the_store_is_made(self, moto_s3: S3Service) -> None:
        prefix = moto_s3.prefix()
        async with moto_s3.log_tracker(prefix, shards=3) as tracker:
            assert tracker.shards == 3
            await lives(tracker, *(f"job-{number}" for number in range(20)))
        async with moto_s3.log_tracker(prefix) as tracker:
            assert tracker.shards == 3
            assert await tracker.count() == {Status.SUCCEEDED: 20}
        with pytest.raises(StoreError, match="was made with shards=3, which cannot be changed"):
            await moto_s3.log_tracker(prefix, shards=4).open()

    async def test_a_store_of_the_other_layout_is_refused_both_ways(self, moto_s3: S3Service, prefix: str) -> None:
        with pytest.raises(StoreError, match="another kind, 'log'"):
            await moto_s3.tracker(prefix).open()
        with pytest.raises(StoreError, match="another kind, 'objects'"):
            await moto_s3.log_tracker(prepared(moto_s3)).open()

    async def test_another_format_is_refused_and_nothing_written(
        self, make: Make, objects: Objects, moto_s3: S3Service
    ) -> None:
        marker = json.loads(await objects.get("aiotracker.json"))
        await objects.put("aiotracker.json", json.dumps(marker | {"format": 2}).encode())
        with pytest.raises(StoreError, match="has format 2"):
            await make().open()
        assert await objects.keys() == ["aiotracker.json"]

    @pytest.mark.parametrize("shards", [0, 65, True, "4", 2.0])
    def test_shards_that_cannot_be_are_refused(self, shards: Any) -> None:
        with pytest.raises(InvalidValueError, match="shards takes an int from 1 to 64"):
            S3LogTracker("bucket", shards=shards)

    async def test_the_url_gives_all_of_it(self, moto_s3: S3Service) -> None:
        url = f"s3+log://{moto_s3.bucket}/{moto_s3.prefix()}?endpoint_url={moto_s3.url}&shards=5&region=us-east-1"
        tracker = open_tracker(url)
        assert isinstance(tracker, S3LogTracker)
        async with tracker:
            assert tracker.shards == 5


class TestReadOnly:
    async def test_needs_no_permission_to_write(self, make: Make, proxy: FaultProxy, prefix: str) -> None:
        async with make() as tracker:
            await lives(tracker, "job-0", "job-1", "job-2")
        proxy.refuses = lambda request: None if request.method == "GET" else (403, "AccessDenied")
        async with make(endpoint_url=proxy.url, read_only=True) as tracker:
            assert await tracker.count() == {Status.SUCCEEDED: 3}
            assert [task.id async for task in tracker.find(order_by="-id", limit=2)] == ["job-2", "job-1"]
        assert {request.method for request in proxy.requests} == {"GET"}

    async def test_makes_no_store(self, moto_s3: S3Service) -> None:
        prefix = moto_s3.prefix()
        with pytest.raises(StoreError, match="nothing is created with read_only=True"):
            await moto_s3.log_tracker(prefix, read_only=True).open()
        assert await Objects(moto_s3, prefix).keys() == []


class TestFaults:
    async def test_a_lost_answer_is_no_lost_race(self, make: Make, proxy: FaultProxy, objects: Objects) -> None:
        (task_id,) = ids_in(0, 1)
        async with make(endpoint_url=proxy.url) as tracker:
            proxy.plan.script("lost", "lost", "failed_after", where=_is_segment)
            await lives(tracker, task_id)
            task = await tracker.load(task_id)
        assert task is not None
        assert (task.status, task.attempts) == (Status.SUCCEEDED, 1)
        assert len(await objects.keys()) == 3

    async def test_of_another_batch_nothing_is_sent_before_it_is_known(
        self, make: Make, proxy: FaultProxy, objects: Objects
    ) -> None:
        first, second = ids_in(0, 2)
        async with make(endpoint_url=proxy.url, lease=3.0) as tracker:
            await tracker.load(first)
            proxy.plan.script(*["reset"] * 1000, where=_is_segment)
            with pytest.raises(StoreUnavailableError):
                await tracker.add(first)
            proxy.plan = Plan()
            assert await tracker.add(second)
            assert await tracker.load(first) is not None
        lines = (await objects.get(segment_key(0, 1))).splitlines()
        assert [json.loads(line)["id"] for line in lines[1:-1]] == [first]

    async def test_without_the_permission_to_write_the_error_names_it(self, make: Make, proxy: FaultProxy) -> None:
        async with make(endpoint_url=proxy.url) as tracker:
            proxy.refuses = lambda request: (403, "AccessDenied") if request.method == "PUT" else None
            with pytest.raises(StoreError, match="s3:PutObject"):
                await tracker.add("job")
            proxy.refuses = lambda request: None
            assert await tracker.add("job")

    async def test_after_a_long_sleep_the_floor_is_asked(
        self, make: Make, proxy: FaultProxy, objects: Objects, often: None
    ) -> None:
        """By the service's clock, which is moved here."""
        (task_id,) = ids_in(0, 1)
        async with make() as busy, make(endpoint_url=proxy.url) as sleeper:
            await lives(sleeper, task_id)
            await until_checkpoint(busy, objects, task_id)
            await busy.ignore(task_id)
            proxy.date_shift = 660.0
            task = await sleeper.load(task_id)
            assert task is not None
            assert task.status is Status.IGNORED
            asked = [request.key for request in proxy.requests if floor_key(0) in request.key]
            assert len(asked) == 3  # when it was opened, whether what it knew counts, and where to start again

    async def test_old_segments_are_deleted_an_hour_later(
        self, make: Make, proxy: FaultProxy, objects: Objects, often: None
    ) -> None:
        (task_id,) = ids_in(0, 1)
        async with make(endpoint_url=proxy.url) as tracker:
            for _ in range(3):
                await until_checkpoint(tracker, objects, task_id)
                proxy.date_shift += 3700.0
        floor = json.loads(await objects.get(floor_key(0)))
        left = [key for key in await objects.keys() if key.startswith("log/00/")]
        assert left[0] > segment_key(0, 1)
        assert len([key for key in await objects.keys() if key.startswith("checkpoints/00/")]) == 2
        async with make() as tracker:
            task = await tracker.load(task_id)
        assert task is not None
        assert floor["floor"] > 20

    @pytest.mark.parametrize("damage", [b"", b"{}\n", b"not json"])
    async def test_a_damaged_segment_is_named(self, make: Make, objects: Objects, damage: bytes) -> None:
        (task_id,) = ids_in(0, 1)
        async with make() as tracker:
            await lives(tracker, task_id)
        whole = await objects.get(segment_key(0, 2))
        await objects.put(segment_key(0, 2), damage or whole[:-1])
        async with make() as tracker:
            with pytest.raises(StoreCorruptedError, match=segment_key(0, 2)):
                await tracker.load(task_id)
            await objects.put(segment_key(0, 2), whole)
            assert await tracker.load(task_id) is not None  # once it is repaired, it goes on


async def test_work_is_taken_by_priority_over_all_shards(make: Make) -> None:
    order = []

    async def body(task: Any) -> None:
        order.append(task.record.priority)

    async with make() as tracker:
        for number in range(20):
            await tracker.add(f"job-{number}", priority=number % 5)
        summary = await tracker.work(body, concurrency=1)
    assert summary.succeeded == 20
    assert order == sorted(order, reverse=True)


async def test_two_that_look_for_work_do_not_begin_with_the_same_tasks(make: Make) -> None:
    async with make() as one, make() as two:
        await one.add_many(f"job-{number}" for number in range(400))
        await two.add("theirs")
        await asyncio.gather(one.add("a"), one.add("b"), two.add("c"), two.add("d"))
        found = [{task.id for task in (await tracker.claimable(20)).tasks} for tracker in (one, two)]
        assert len(found[0] & found[1]) < 20


async def test_the_time_never_goes_back_from_one_write_to_the_next(make: Make) -> None:
    async with make() as ahead, make() as behind:
        now = ahead.now
        ahead.now = lambda: now() + timedelta(seconds=3)  # type: ignore[method-assign]  # a machine with another view
        for shard in ahead._pumps:
            shard._commit.__self__._now = ahead.now  # type: ignore[attr-defined]  # a bound method of the shard
        await ahead.add("job")
        await ahead.purge("job", force=True)
        await behind.add("job")
        first, again = await ahead.load("job"), await behind.load("job")
        assert first == again is not None


def _is_segment(request: Request) -> bool:
    return request.method == "PUT" and "/log/" in request.key
