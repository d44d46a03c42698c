"""The tracker with one object a task: requests, keys, what it remembers, what it may be given."""

import asyncio
import json
import zlib
from collections.abc import Callable
from typing import Any

import pytest

from aiotracker import (
    Retry,
    Status,
    StoreCorruptedError,
    TaskLockedError,
    TaskSucceededError,
)
from aiotracker.backends import _s3_seen
from aiotracker.backends._s3 import S3Store
from aiotracker.backends.s3 import S3Tracker
from aiotracker.testing import FakeClock
from aiotracker.testing.conformance._base import until
from tests.services.fault_proxy import FaultProxy
from tests.services.s3 import S3Service, ceph_s3, client_of, moto_s3, raw_client

from .on_s3 import make, prefix, proxy, through

__all__ = ["ceph_s3", "make", "moto_s3", "prefix", "proxy", "through"]  # fixtures


class Counted:
    """Requests within a `with`, by operation."""

    def __init__(self, tracker: S3Tracker) -> None:
        self._tracker = tracker
        self._before = dict[str, int]()

    def __enter__(self) -> "dict[str, int]":
        self._before = dict(self._tracker.requests_by_operation)
        self._counts: dict[str, int] = {}
        return self._counts

    def __exit__(self, *_: object) -> None:
        for name, count in self._tracker.requests_by_operation.items():
            if more := count - self._before.get(name, 0):
                self._counts[name] = more


async def _is_true(value: bool) -> bool:
    return value


class TestRequests:
    async def test_a_lifecycle_on_a_new_id_takes_two(self, make: Callable[..., S3Tracker]) -> None:
        async with make() as tracker:
            with Counted(tracker) as counts:
                async with tracker.run("job"):
                    pass
            assert counts == {"PutObject": 2}
            assert tracker.requests == sum(tracker.requests_by_operation.values())

    async def test_on_an_id_that_this_tracker_added_before_it_takes_two(self, make: Callable[..., S3Tracker]) -> None:
        async with make() as tracker:
            await tracker.add("job", {"n": 1})
            with Counted(tracker) as counts:
                async with tracker.run("job") as task:
                    assert task.data == {"n": 1}
            assert counts == {"PutObject": 2}

    async def test_on_ids_that_another_one_added_it_takes_three_once_that_is_noticed(
        self, make: Callable[..., S3Tracker]
    ) -> None:
        async with make() as one, make() as two:
            await one.add_many(f"job-{index}" for index in range(4))
            async with two.run("job-0"):
                pass
            with Counted(two) as counts:
                for index in range(1, 4):
                    async with two.run(f"job-{index}"):
                        pass
            assert counts == {"GetObject": 3, "PutObject": 6}
            async with two.run("new-1"):  # read, and found missing: the next one is believed to be new
                pass
            with Counted(two) as counts:
                async with two.run("new-2"):
                    pass
            assert counts == {"PutObject": 2}

    async def test_what_another_one_added_is_worked_off_with_three_each(self, make: Callable[..., S3Tracker]) -> None:
        async def body(task: Any) -> None:
            pass

        async with make() as one, make() as two:
            await one.add_many(f"job-{index}" for index in range(20))
            with Counted(two) as counts:
                assert (await two.work(body, concurrency=1)).succeeded == 20
            assert (counts["GetObject"], counts["PutObject"]) == (20, 40)

    async def test_a_refusal_takes_two(self, make: Callable[..., S3Tracker]) -> None:
        async with make() as one, make() as two, one.run("job"):
            with Counted(two) as counts, pytest.raises(TaskLockedError):
                async with two.run("job"):
                    pass
            assert counts == {"PutObject": 1, "GetObject": 1}

    async def test_a_renewal_takes_one_and_a_short_task_none(
        self, make: Callable[..., S3Tracker], clock: FakeClock
    ) -> None:
        async with make(clock=clock, lease=60) as tracker:
            with Counted(tracker) as counts:
                async with tracker.run("job") as task:
                    clock.jump(15)
                    await asyncio.sleep(0.05)
                    before = task.lease_left
                    clock.jump(6)
                    await until(lambda: _is_true(task.lease_left > before))
            assert counts == {"PutObject": 3}

    async def test_coroutines_that_meet_on_one_new_id_share_one_write_and_one_read(
        self, make: Callable[..., S3Tracker]
    ) -> None:
        async with make() as tracker:

            async def contend() -> bool:
                try:
                    async with tracker.run("job"):
                        await done.wait()
                except TaskLockedError:
                    refused.append(1)
                    if len(refused) == 49:
                        done.set()
                    return False
                return True

            refused: list[int] = []
            done = asyncio.Event()
            with Counted(tracker) as counts:
                assert sum(await asyncio.gather(*(contend() for _ in range(50)))) == 1
            assert counts == {"PutObject": 2, "GetObject": 1}  # one reads for all who asked before


class TestWhatWasSeenBefore:
    async def test_starts_an_update_and_a_wrong_guess_costs_one_refused_write(
        self, make: Callable[..., S3Tracker]
    ) -> None:
        async with make() as one, make() as two:
            await one.add("job")
            async with two.run("job", retry=Retry(5)) as task:
                task.data = "by two"
            await two.reset("job")
            with Counted(one) as counts:
                async with one.run("job") as task:
                    assert task.data == "by two"
            assert counts == {"PutObject": 3, "GetObject": 1}

    async def test_never_refuses(self, make: Callable[..., S3Tracker]) -> None:
        async with make() as one, make() as two:
            async with one.run("job"):
                pass
            await two.reset("job")
            async with one.run("job") as task:  # it had seen a success
                assert task.attempts == 1
            with pytest.raises(TaskSucceededError):
                async with one.run("job"):
                    pass

    async def test_is_bounded_in_memory(self) -> None:
        cache = _s3_seen.Cache(10 * (_s3_seen.ENTRY_BYTES + 100))
        for index in range(50):
            cache.keep(f"key-{index}", "etag", b"x" * 100)
            assert cache.get("key-0") is not None  # used all the time
        assert len(cache.all()) == 10
        cache.keep("key-0", "etag", b"x" * 800)
        assert sum(len(seen.body) + _s3_seen.ENTRY_BYTES for _, seen in cache.all()) <= 10 * (
            _s3_seen.ENTRY_BYTES + 100
        )

    async def test_a_second_count_reads_what_has_changed_alone(self, make: Callable[..., S3Tracker]) -> None:
        async with make() as one, make() as two:
            await one.add_many(f"job-{index}" for index in range(60))
            assert (await two.count())[Status.PENDING] == 60
            await one.ignore(*(f"job-{index}" for index in range(5)))
            with Counted(two) as counts:
                found = await two.count()
            assert (found[Status.PENDING], found[Status.IGNORED]) == (55, 5)
            assert counts == {"ListObjectsV2": 1, "GetObject": 5}

    async def test_a_snapshot_lets_a_new_process_start_from_the_look_of_another(
        self, make: Callable[..., S3Tracker], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_s3_seen, "WORTH_A_SNAPSHOT", 20)
        async with make() as one:
            await one.add_many(f"job-{index}" for index in range(30))
        async with make() as two:
            await two.count()
            await two.ignore("job-3")
        async with make() as three:
            with Counted(three) as counts:
                found = await three.count()
            assert (found[Status.PENDING], found[Status.IGNORED]) == (29, 1)
            assert counts == {"ListObjectsV2": 1, "GetObject": 2}  # the snapshot, and what has changed since

    @pytest.mark.parametrize("damage", [b"{}", zlib.compress(b'{"format":1}\n[]'), zlib.compress(b'{"format":9}\nx')])
    async def test_a_snapshot_that_cannot_be_read_does_no_harm(
        self,
        make: Callable[..., S3Tracker],
        moto_s3: S3Service,
        prefix: str,
        monkeypatch: pytest.MonkeyPatch,
        damage: bytes,
    ) -> None:
        monkeypatch.setattr(_s3_seen, "WORTH_A_SNAPSHOT", 5)
        client = raw_client(moto_s3.url)
        client.put_object(Bucket=moto_s3.bucket, Key=f"{prefix}/{_s3_seen.SNAPSHOT}", Body=damage)
        client.close()
        async with make() as one, make() as two:
            await one.add_many(f"job-{index}" for index in range(10))
            assert (await two.count())[Status.PENDING] == 10


class TestListing:
    async def test_many_pages_are_listed_in_parallel_and_each_task_is_found_once(
        self, make: Callable[..., S3Tracker], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        page = S3Store.page
        under_way = most = 0

        async def short(self: S3Store, prefix: str, **options: Any) -> Any:
            nonlocal under_way, most
            under_way += 1
            most = max(most, under_way)
            try:
                return await page(self, prefix, **options, limit=7)
            finally:
                under_way -= 1

        monkeypatch.setattr(S3Store, "page", short)
        async with make() as one, make() as two:
            await one.add_many(f"job-{index}" for index in range(150))
            found = [task.id async for task in two.find()]
            assert sorted(found) == sorted(f"job-{index}" for index in range(150))
            assert most > 5
            assert len({task.id async for task in two.find(prefix="job-1")}) == 61

    async def test_workers_that_share_a_store_spread_out(self, make: Callable[..., S3Tracker]) -> None:
        async with make(worker="one") as one, make(worker="two") as two, make(worker="three") as three:
            await one.add_many(f"job-{index:02}" for index in range(50))
            await one.add("urgent", priority=1)
            alone = [task.id for task in (await two.claimable(100)).tasks]
            first, *others = alone
            assert first == "urgent"
            assert sorted(others) == [f"job-{index:02}" for index in range(50)]
            async with one.run("job-07"):
                beside = [task.id for task in (await two.claimable(100)).tasks]
                elsewhere = [task.id for task in (await three.claimable(100)).tasks]
            assert beside[0] == elsewhere[0] == "urgent"
            assert beside[1:21] != elsewhere[1:21]

    async def test_a_look_at_a_large_store_serves_several_questions(self, make: Callable[..., S3Tracker]) -> None:
        async with make() as tracker:
            await tracker.add_many(f"job-{index}" for index in range(30))
            with Counted(tracker) as counts:
                seen = [await tracker.claimable(10) for _ in range(3)]
            assert len({task.id for claimable in seen for task in claimable.tasks}) == 30
            assert counts == {"ListObjectsV2": 1}


class TestKeys:
    async def test_a_person_finds_them(self, make: Callable[..., S3Tracker], moto_s3: S3Service, prefix: str) -> None:
        async with make() as tracker:
            await tracker.add("a/b c")
            await tracker.add("é" * 600)
            client = raw_client(moto_s3.url)
            keys = [
                entry["Key"]
                for entry in client.list_objects_v2(Bucket=moto_s3.bucket, Prefix=f"{prefix}/tasks/")["Contents"]
            ]
            (readable,) = [key for key in keys if "=" not in key]
            assert readable.removeprefix(f"{prefix}/tasks/")[3:] == "a%2Fb%20c.json"
            body = client.get_object(Bucket=moto_s3.bucket, Key=readable)["Body"].read()
            client.close()
            assert json.loads(body)["id"] == "a/b c"
            (hashed,) = [key for key in keys if "=" in key]
            assert len(hashed) < 1024
            assert sorted([task.id async for task in tracker.find(prefix="é")]) == ["é" * 600]

    async def test_nothing_outside_the_prefix_is_touched(
        self, proxy: FaultProxy, through: Callable[..., S3Tracker], moto_s3: S3Service
    ) -> None:
        async def body(task: Any) -> None:
            pass

        inner, outer = "deep/jobs", "deep"
        async with through(inner) as one, through(outer) as two:
            await one.add_many(["../x", "/", "a"])
            await two.add("b")
            await one.work(body)
            assert [task.id async for task in two.find()] == ["b"]
            await one.purge(status="succeeded", force=True)
            assert (await two.count())[Status.PENDING] == 1
        for request in proxy.requests:
            assert request.key.startswith(f"{moto_s3.bucket}/deep/") or "prefix=deep%2F" in request.key, request

    async def test_a_record_under_another_key_is_damage(
        self, make: Callable[..., S3Tracker], moto_s3: S3Service, prefix: str
    ) -> None:
        client = raw_client(moto_s3.url)
        async with make() as tracker:
            await tracker.add("a")
            await tracker.add("b")
            source = {"Bucket": moto_s3.bucket, "Key": f"{prefix}/{tracker._key('a')}"}
            client.copy_object(CopySource=source, Bucket=moto_s3.bucket, Key=f"{prefix}/{tracker._key('b')}")
            with pytest.raises(StoreCorruptedError, match=r"b\.json holds the task 'a'"):
                await tracker.load("b")
            client.delete_object(Bucket=moto_s3.bucket, Key=f"{prefix}/{tracker._key('b')}")
            client.put_object(Bucket=moto_s3.bucket, Key=f"{prefix}/{tracker._key('a')}", Body=b"\xff")
            with pytest.raises(StoreCorruptedError, match=r"a\.json is damaged"):
                [task async for task in tracker.find()]
        client.close()


class TestOptions:
    async def test_a_client_that_is_given_is_used_and_not_closed(self, moto_s3: S3Service, prefix: str) -> None:
        async with client_of(moto_s3) as client:
            for _ in range(2):
                async with S3Tracker(moto_s3.bucket, prefix, client=client) as tracker:
                    await tracker.add("job")
            found = await client.list_objects_v2(Bucket=moto_s3.bucket, Prefix=f"{prefix}/tasks/")
            assert found["KeyCount"] == 1

    async def test_put_options_go_with_every_write(self, proxy: FaultProxy, through: Callable[..., S3Tracker]) -> None:
        async with through(put_options={"ServerSideEncryption": "AES256"}) as tracker, tracker.run("job"):
            pass
        writes = [request for request in proxy.requests if request.method == "PUT"]
        assert len(writes) > 20
        assert {request.headers.get("x-amz-server-side-encryption") for request in writes} == {"AES256"}

    async def test_every_put_has_a_condition_so_that_a_bucket_policy_can_demand_one(
        self, proxy: FaultProxy, through: Callable[..., S3Tracker], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_s3_seen, "WORTH_A_SNAPSHOT", 2)
        async with through("all") as one, through("all") as two:
            await one.add_many(["a", "b", "c"])
            await two.count()
            async with two.run("a"):
                pass
            await two.purge("a", force=True)
        for request in proxy.requests:
            if request.method == "PUT":
                assert {"if-match", "if-none-match"} & request.headers.keys(), request
        assert any(_s3_seen.SNAPSHOT in request.key for request in proxy.requests)

    async def test_read_only_writes_nothing_and_needs_no_marker(
        self, proxy: FaultProxy, through: Callable[..., S3Tracker], make: Callable[..., S3Tracker], prefix: str
    ) -> None:
        async with make() as writer:
            await writer.add("job")
        async with through(prefix, read_only=True) as tracker, through(read_only=True) as empty:
            assert (await tracker.count())[Status.PENDING] == 1
            assert await empty.load("job") is None
        assert {request.method for request in proxy.requests} == {"GET"}
