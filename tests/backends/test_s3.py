"""What is particular to S3, and to the tracker with one object a task."""

import asyncio
import itertools
import json
import random
import zlib
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from aiotracker import (
    ConflictError,
    InvalidValueError,
    LeaseLostError,
    Retry,
    Status,
    StoreCorruptedError,
    StoreError,
    StoreUnavailableError,
    StoreUnsafeError,
    SystemClock,
    Task,
    TaskLockedError,
    TaskSucceededError,
)
from aiotracker._core.task import BootTime
from aiotracker.backends import s3 as module
from aiotracker.backends._s3 import S3Store, StoreTime
from aiotracker.backends.s3 import S3Tracker
from aiotracker.testing import FakeClock
from aiotracker.testing._torture import torture
from aiotracker.testing.conformance._base import until
from tests.services.fault_proxy import FATES, FaultProxy, Plan, Request
from tests.services.s3 import S3Service, ceph_s3, client_of, moto_s3, prepared, raw_client

__all__ = ["ceph_s3", "moto_s3"]  # fixtures


@pytest.fixture
def prefix(moto_s3: S3Service) -> str:
    return prepared(moto_s3)


@pytest.fixture
def make(moto_s3: S3Service, prefix: str) -> Callable[..., S3Tracker]:
    return lambda **options: moto_s3.tracker(prefix, **options)


@pytest.fixture
async def proxy(moto_s3: S3Service) -> AsyncIterator[FaultProxy]:
    async with FaultProxy(moto_s3.url) as proxy:
        yield proxy


@pytest.fixture
def through(proxy: FaultProxy, moto_s3: S3Service) -> Callable[..., S3Tracker]:
    """A tracker behind the proxy."""

    def make(prefix: str = "", **options: Any) -> S3Tracker:
        return S3Tracker(moto_s3.bucket, prefix or moto_s3.prefix(), endpoint_url=proxy.url, **options)

    return make


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


async def loaded(tracker: S3Tracker, task_id: str) -> Task:
    task = await tracker.load(task_id)
    assert task is not None
    return task


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
        cache = module._Cache(10 * (module.ENTRY_BYTES + 100))
        for index in range(50):
            cache.keep(f"key-{index}", "etag", b"x" * 100)
            assert cache.get("key-0") is not None  # used all the time
        assert len(cache.all()) == 10
        cache.keep("key-0", "etag", b"x" * 800)
        assert sum(len(seen.body) + module.ENTRY_BYTES for _, seen in cache.all()) <= 10 * (module.ENTRY_BYTES + 100)

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
        monkeypatch.setattr(module, "WORTH_A_SNAPSHOT", 20)
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
        monkeypatch.setattr(module, "WORTH_A_SNAPSHOT", 5)
        client = raw_client(moto_s3.url)
        client.put_object(Bucket=moto_s3.bucket, Key=f"{prefix}/{module.SNAPSHOT}", Body=damage)
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


class TestFaults:
    @pytest.mark.parametrize("write", ["claim", "end", "add"])
    @pytest.mark.parametrize("fate", FATES)
    async def test_a_write_that_meets_one_is_made_once(
        self, proxy: FaultProxy, through: Callable[..., S3Tracker], fate: str, write: str
    ) -> None:
        async with through() as tracker:
            if write == "add":
                proxy.plan.script(fate)
                assert await tracker.add("job"), "it is new"
            if write == "claim":
                proxy.plan.script(fate)
            async with tracker.run("job"):
                if write == "end":
                    proxy.plan.script(fate)
            await proxy.settle()
            assert proxy.fates[fate] == 1
            task = await loaded(tracker, "job")
            assert (task.status, task.attempts, len(task.ends)) == (Status.SUCCEEDED, 1, 1)

    @pytest.mark.parametrize("fate", ["lost", "late", "reset", "delayed", "slow_down", "failed", "error_in_200"])
    async def test_a_read_that_meets_one_is_made_again(
        self, proxy: FaultProxy, through: Callable[..., S3Tracker], fate: str
    ) -> None:
        async with through("reads") as one, through("reads") as two:
            await one.add(f"job {fate}", 7)
            proxy.plan.script(fate, fate, where=lambda request: request.method == "GET")
            await two.count()
            async with two.run(f"job {fate}") as task:
                assert task.data == 7

    async def test_a_record_that_is_removed_under_its_holder_is_a_lost_lease(
        self, make: Callable[..., S3Tracker], moto_s3: S3Service, prefix: str
    ) -> None:
        async with make() as tracker:
            with pytest.raises(LeaseLostError):
                async with tracker.run("job"):
                    client = raw_client(moto_s3.url)
                    client.delete_object(Bucket=moto_s3.bucket, Key=f"{prefix}/{tracker._key('job')}")
                    client.close()
            assert await tracker.load("job") is None, "404 on If-Match makes nothing"

    async def test_all_slow_down_when_the_store_asks_one_to(
        self, proxy: FaultProxy, through: Callable[..., S3Tracker]
    ) -> None:
        async with through() as tracker:
            tracker._store._slow = 0.2  # it has asked before
            proxy.plan.script("slow_down")
            with pytest.raises(StoreUnavailableError, match="SlowDown"):
                await tracker._store.get("one")
            loop = asyncio.get_running_loop()
            began = loop.time()
            await tracker._store.get("another")
            assert loop.time() - began >= 0.19, "twice as long as before, give or take a half"
            assert tracker._store._slow == 0.0, "an answer ends it"

    async def test_a_store_that_cannot_be_reached_is_unavailable(self, make: Callable[..., S3Tracker]) -> None:
        async with make(lease=0.6) as tracker:
            client = tracker._store._client
            client.meta.events.register("before-send.s3", _unreachable)
            with pytest.raises(StoreUnavailableError, match="GetObject of"):
                await tracker.load("job")

    async def test_hundreds_of_tasks_through_all_of_them_end_right_and_none_twice(self, moto_s3: S3Service) -> None:
        await tracked_through_faults(moto_s3, tasks=200, seed=1)

    @pytest.mark.chaos
    async def test_ten_thousand_tasks_through_all_of_them_end_right_and_none_twice(self, moto_s3: S3Service) -> None:
        await tracked_through_faults(moto_s3, tasks=10_000, seed=2)

    async def test_workers_that_are_killed_behind_all_of_them_keep_every_promise(
        self, moto_s3: S3Service, tmp_path: Path
    ) -> None:
        await tortured_through_faults(moto_s3, tmp_path, workers=2, tasks=40, seconds=4)

    @pytest.mark.chaos
    @pytest.mark.parametrize("name", ["moto_s3", "ceph_s3"])
    async def test_they_keep_every_promise_for_longer(
        self, request: pytest.FixtureRequest, name: str, tmp_path: Path
    ) -> None:
        await tortured_through_faults(request.getfixturevalue(name), tmp_path, workers=6, tasks=1500, seconds=90)


async def tortured_through_faults(
    service: S3Service, folder: Path, *, workers: int, tasks: int, seconds: float
) -> None:
    prefix = prepared(service)
    seed = random.randrange(1_000_000)
    async with FaultProxy(service.url) as proxy:
        await asyncio.to_thread(_copy_facts, service, prefix, proxy.url)
        url = S3Service(proxy.url, service.bucket).store_url(prefix)
        # Not while the tasks are added, with a lease of two seconds and no second try.
        proxy.refuses = _after(3 * tasks, lambda: setattr(proxy, "plan", Plan(seed, **dict.fromkeys(FATES, 0.01))))
        report = await torture(url, workers=workers, tasks=tasks, seconds=seconds, seed=seed, folder=folder)
        assert any(proxy.fates[fate] for fate in FATES)
    assert report.ok, f"seed {seed}: {report}"
    assert report.kills > 0
    assert report.events["succeeded"] > 0


def _after(count: int, change: Callable[[], None]) -> Callable[[Request], None]:
    """Looks on, and makes a change when so many requests have arrived."""
    left = itertools.count(count, -1)

    def look(request: Request) -> None:
        if next(left) == 0:
            change()

    return look


def _unreachable(request: Any, **_: Any) -> None:
    raise ConnectionRefusedError("nobody listens")


async def tracked_through_faults(service: S3Service, *, tasks: int, seed: int) -> None:
    """Two workers on the same ids, and a network that does everything wrong."""
    prefix = prepared(service)
    ran: dict[str, int] = {}
    shares = dict.fromkeys(FATES, 0.02)
    async with FaultProxy(service.url, Plan(seed, **shares)) as proxy:
        # What is known of the service is known of it behind the proxy.
        await asyncio.to_thread(_copy_facts, service, prefix, proxy.url)

        async def body(task: Any) -> None:
            ran[task.id] = ran.get(task.id, 0) + 1
            if task.id.endswith("7") and task.attempts == 1:
                raise ValueError("the first time")
            task.result = task.fence

        async with (
            S3Tracker(service.bucket, prefix, endpoint_url=proxy.url, retry=Retry(3, delay=0)) as one,
            S3Tracker(service.bucket, prefix, endpoint_url=proxy.url, retry=Retry(3, delay=0)) as two,
        ):
            ids = [f"job-{index}" for index in range(tasks)]
            summaries = await asyncio.gather(one.work(body, ids=ids), two.work(body, ids=reversed(ids)))
            await proxy.settle()
            assert sum(summary.succeeded for summary in summaries) == tasks
        assert all(proxy.fates[fate] for fate in FATES)
    async with service.tracker(prefix) as tracker:
        count = 0
        async for task in tracker.find():
            count += 1
            expected = 2 if task.id.endswith("7") else 1
            outcomes = [end.outcome for end in task.ends]
            assert outcomes == ["failed"] * (expected - 1) + ["succeeded"], task
            assert (task.status, task.attempts, task.result) == (Status.SUCCEEDED, expected, task.fence), task
            assert ran[task.id] == expected, task
        assert count == tasks


def _copy_facts(service: S3Service, prefix: str, url: str) -> None:
    client = raw_client(service.url)
    where = {"Bucket": service.bucket, "Key": f"{prefix}/aiotracker.json"}
    marker = json.loads(client.get_object(**where)["Body"].read())
    marker["stores"][url] = marker["stores"][service.url]
    client.put_object(**where, Body=json.dumps(marker).encode())
    client.close()


class TestProbe:
    @pytest.mark.parametrize("header", ["if-none-match", "if-match"])
    async def test_a_store_that_ignores_a_condition_on_put_is_refused(
        self, proxy: FaultProxy, through: Callable[..., S3Tracker], header: str
    ) -> None:
        proxy.hides.add(("PUT", header))
        with pytest.raises(StoreUnsafeError, match="does not honour conditional writes"):
            async with through():
                pass
        assert not [
            request for request in proxy.requests if request.key.endswith("aiotracker.json") and request.method == "PUT"
        ]

    async def test_is_remembered_in_the_store(self, proxy: FaultProxy, through: Callable[..., S3Tracker]) -> None:
        async with through("once"):
            assert len(proxy.requests) > 20
        async with through("once") as tracker:
            assert tracker.requests == 1

    async def test_of_a_store_that_takes_quoted_etags_alone_quotes_are_used(
        self, proxy: FaultProxy, through: Callable[..., S3Tracker]
    ) -> None:
        def refuse(request: Request) -> tuple[int, str] | None:
            is_bare = not request.headers.get("if-match", '"').startswith('"')
            return (412, "PreconditionFailed") if is_bare else None

        proxy.refuses = refuse
        async with through() as tracker:
            async with tracker.run("job"):
                pass
            assert (await loaded(tracker, "job")).status is Status.SUCCEEDED

    async def test_on_ceph_etags_go_without_quotes_and_a_purge_leaves_a_tombstone(self, ceph_s3: S3Service) -> None:
        prefix = ceph_s3.prefix()
        async with ceph_s3.tracker(prefix) as tracker:
            assert not tracker._store.facts.quotes
            assert not tracker._store.facts.guards_delete
            await _check_purge(tracker, ceph_s3, prefix, left=1)

    async def test_where_delete_is_guarded_an_old_task_leaves_nothing(
        self, make: Callable[..., S3Tracker], moto_s3: S3Service, prefix: str, clock: FakeClock
    ) -> None:
        async with make(clock=clock) as tracker:
            assert tracker._store.facts.guards_delete
            await tracker.add("old")
            clock.jump(3601)
            assert await tracker.purge("old") == 1
            assert _objects(moto_s3, prefix, tracker._key("old")) == 0

    async def test_a_young_task_leaves_a_tombstone_so_that_a_late_write_is_refused(
        self, make: Callable[..., S3Tracker], moto_s3: S3Service, prefix: str
    ) -> None:
        async with make() as tracker:
            await _check_purge(tracker, moto_s3, prefix, left=1)

    async def test_a_purge_spares_what_was_changed_meanwhile(
        self, make: Callable[..., S3Tracker], clock: FakeClock
    ) -> None:
        async with make(clock=clock) as one, make(clock=clock) as two:
            await one.add("job")
            clock.jump(3601)
            seen = await loaded(one, "job")
            async with two.run("job"):
                with pytest.raises(ConflictError):
                    await one.delete(seen)
            assert (await loaded(one, "job")).status is Status.SUCCEEDED

    async def test_without_the_permission_to_delete_a_purge_leaves_a_tombstone(
        self, proxy: FaultProxy, through: Callable[..., S3Tracker]
    ) -> None:
        proxy.refuses = lambda request: (403, "AccessDenied") if request.method == "DELETE" else None
        async with through() as tracker:
            await tracker.add("job")
            assert await tracker.purge("job", force=True) == 1
            assert await tracker.load("job") is None


async def _check_purge(tracker: S3Tracker, service: S3Service, prefix: str, left: int) -> None:
    async with tracker.run("job") as task:
        fence = task.fence
    assert await tracker.purge("job", force=True) == 1
    assert await tracker.load("job") is None
    assert [task async for task in tracker.find()] == []
    assert (await tracker.count()).total() == 0
    assert _objects(service, prefix, tracker._key("job")) == left
    async with tracker.run("job") as task:
        assert task.fence > fence
        assert task.attempts == 1


def _objects(service: S3Service, prefix: str, key: str) -> int:
    client = raw_client(service.url)
    try:
        return int(client.list_objects_v2(Bucket=service.bucket, Prefix=f"{prefix}/{key}")["KeyCount"])
    finally:
        client.close()


class AnotherMachine(SystemClock):
    """Its wall clock is off."""

    def __init__(self, name: str, seconds: float) -> None:
        self._name = name
        self._off = timedelta(seconds=seconds)

    def now(self) -> datetime:
        return datetime.now(UTC) + self._off

    def boot(self) -> BootTime:
        return BootTime(self._name, super().boot().seconds)


class TestClock:
    async def test_the_stores_own_decides_whatever_the_machines_say(self, make: Callable[..., S3Tracker]) -> None:
        ahead, behind = AnotherMachine("ahead", 3600), AnotherMachine("behind", -3600)
        async with make(clock=behind) as one, make(clock=ahead) as two:
            for tracker in (one, two):
                assert abs(tracker.now() - datetime.now(UTC)) < timedelta(seconds=1.5)
            async with one.run("job"):
                with pytest.raises(TaskLockedError) as refused:
                    async with two.run("job"):
                        pass
                assert refused.value.retry_after is not None
                assert 50 < refused.value.retry_after < 65

    async def test_a_lease_that_another_machine_took_is_spared_for_the_uncertainty_of_both(
        self, make: Callable[..., S3Tracker]
    ) -> None:
        async with make() as tracker:
            assert 2 <= tracker.clock_uncertainty < 4
            assert tracker.judge.margin == tracker.clock_uncertainty

    async def test_times_are_the_stores_where_that_is_off(
        self, proxy: FaultProxy, through: Callable[..., S3Tracker]
    ) -> None:
        proxy.date_shift = 7200
        async with through() as tracker:
            await tracker.add("job")
            off = (await loaded(tracker, "job")).create_time - datetime.now(UTC)
            assert timedelta(seconds=7198) < off < timedelta(seconds=7202)

    async def test_an_answer_from_a_cache_tells_no_time(
        self, proxy: FaultProxy, through: Callable[..., S3Tracker]
    ) -> None:
        proxy.date_shift, proxy.age = -7200, 7200
        async with through() as tracker:
            assert tracker._store.date is None
            assert abs(tracker.now() - datetime.now(UTC)) < timedelta(seconds=1)

    async def test_answers_together_tell_more_than_one_does(self) -> None:
        class Steps(SystemClock):
            seconds = 1000.25

            def boot(self) -> BootTime:
                return BootTime("x", self.seconds)

            def now(self) -> datetime:
                return datetime.fromtimestamp(0, UTC)  # nonsense

        clock = Steps()
        time = StoreTime(clock)
        for second, date in ((1000.25, "Thu, 01 Jan 2026 00:00:00 GMT"), (1000.8, "Thu, 01 Jan 2026 00:00:01 GMT")):
            clock.seconds = second
            time.saw({"date": date}, second)
        # The second began between the two answers, so at the first it was 0.45 s old at the least.
        assert time.now() >= datetime(2026, 1, 1, 0, 0, 1, tzinfo=UTC)
        clock.seconds = 1000.25
        assert (
            datetime(2026, 1, 1, 0, 0, 0, 400_000, tzinfo=UTC) < time.now() < datetime(2026, 1, 1, 0, 0, 1, tzinfo=UTC)
        )


class TestErrors:
    async def test_a_bucket_that_does_not_exist_is_named(self, moto_s3: S3Service) -> None:
        with pytest.raises(StoreError, match="there is no bucket 'no-such-bucket' at http"):
            async with S3Tracker("no-such-bucket", endpoint_url=moto_s3.url):
                pass

    @pytest.mark.parametrize(
        ("method", "action"), [("PUT", "s3:PutObject"), ("GET", "s3:GetObject"), ("LIST", "s3:ListBucket")]
    )
    async def test_a_missing_permission_is_named(
        self, proxy: FaultProxy, through: Callable[..., S3Tracker], method: str, action: str
    ) -> None:
        def refuse(request: Request) -> tuple[int, str] | None:
            kind = "LIST" if "list-type=2" in request.key else request.method
            return (403, "AccessDenied") if kind == method else None

        with pytest.raises(StoreError, match=f"{action} on arn:aws:s3:::tasks.* is needed"):
            proxy.refuses = refuse
            async with through() as tracker:
                await tracker.count()

    @pytest.mark.parametrize("status_and_code", [(301, "PermanentRedirect"), (400, "AuthorizationHeaderMalformed")])
    async def test_a_wrong_region_is_told(
        self, proxy: FaultProxy, through: Callable[..., S3Tracker], status_and_code: tuple[int, str]
    ) -> None:
        # HEAD tells the client which region it is, as AWS does.
        proxy.refuses = lambda request: None if request.method == "HEAD" else status_and_code
        with pytest.raises(StoreError, match="in another region: give region="):
            async with through():
                pass

    async def test_a_service_without_conditions_is_unsafe(
        self, proxy: FaultProxy, through: Callable[..., S3Tracker]
    ) -> None:
        proxy.refuses = lambda request: (501, "NotImplemented") if request.method == "PUT" else None
        with pytest.raises(StoreUnsafeError, match="does not know a request"):
            async with through():
                pass

    async def test_missing_credentials_are_told(self, moto_s3: S3Service, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        with pytest.raises(StoreError, match="there are no credentials"):
            async with S3Tracker(moto_s3.bucket, "any", endpoint_url=moto_s3.url):
                pass

    async def test_an_unknown_profile_is_told(self, moto_s3: S3Service) -> None:
        with pytest.raises(StoreError, match=r"nobody.*profile="):
            async with moto_s3.tracker("any", profile="nobody"):
                pass

    @pytest.mark.parametrize(
        ("change", "error"),
        [
            ({"layout": "log"}, "another kind, 'log'"),
            ({"format": 99}, "has format 99"),
            ({"format": "x"}, "cannot be read"),
        ],
    )
    async def test_a_store_of_another_kind_or_format_is_left_alone(
        self, moto_s3: S3Service, prefix: str, change: dict[str, Any], error: str
    ) -> None:
        client = raw_client(moto_s3.url)
        marker = {"format": 1, "layout": "objects"} | change
        client.put_object(Bucket=moto_s3.bucket, Key=f"{prefix}/aiotracker.json", Body=json.dumps(marker).encode())
        client.close()
        with pytest.raises(StoreError, match=error):
            async with moto_s3.tracker(prefix):
                pass

    @pytest.mark.parametrize(
        "options",
        [
            {"bucket": ""},
            {"bucket": "a/b"},
            {"prefix": "x" * 600},
            {"connections": 0},
            {"put_options": {"Key": "x"}},
            {"client": object(), "region": "x"},
            {"session": object(), "profile": "x"},
        ],
    )
    async def test_an_argument_that_cannot_be_is_refused(self, options: dict[str, Any]) -> None:
        with pytest.raises(InvalidValueError):
            S3Tracker(**({"bucket": "tasks"} | options))


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
        monkeypatch.setattr(module, "WORTH_A_SNAPSHOT", 2)
        async with through("all") as one, through("all") as two:
            await one.add_many(["a", "b", "c"])
            await two.count()
            async with two.run("a"):
                pass
            await two.purge("a", force=True)
        for request in proxy.requests:
            if request.method == "PUT":
                assert {"if-match", "if-none-match"} & request.headers.keys(), request
        assert any(module.SNAPSHOT in request.key for request in proxy.requests)

    async def test_read_only_writes_nothing_and_needs_no_marker(
        self, proxy: FaultProxy, through: Callable[..., S3Tracker], make: Callable[..., S3Tracker], prefix: str
    ) -> None:
        async with make() as writer:
            await writer.add("job")
        async with through(prefix, read_only=True) as tracker, through(read_only=True) as empty:
            assert (await tracker.count())[Status.PENDING] == 1
            assert await empty.load("job") is None
        assert {request.method for request in proxy.requests} == {"GET"}
