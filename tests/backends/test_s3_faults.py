"""Trackers on S3 behind a network and a service that do everything wrong."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from aiotracker import (
    BaseTracker,
    LeaseLostError,
    Retry,
    Status,
    StoreUnavailableError,
)
from aiotracker.backends._aws_requests import Turns
from aiotracker.backends.s3 import S3Tracker
from aiotracker.testing._torture import torture
from tests.services.fault_proxy import FATES, FaultProxy, Plan
from tests.services.s3 import S3Service, ceph_s3, moto_s3, prepared, raw_client

from .on_s3 import copied_facts, loaded, make, prefix, proxy, through

__all__ = ["ceph_s3", "make", "moto_s3", "prefix", "proxy", "through"]  # fixtures

LAYOUTS = ["objects", "log"]


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

    async def test_where_the_client_sends_all_requests_it_is_the_same(
        self, proxy: FaultProxy, through: Callable[..., S3Tracker]
    ) -> None:
        async with through(put_options={"ChecksumAlgorithm": "CRC32"}) as tracker:
            assert tracker._store._direct is None
            for fate in FATES:
                proxy.plan.script(fate)
                async with tracker.run(fate):
                    proxy.plan.script(fate)
            await proxy.settle()
            for fate in FATES:
                task = await loaded(tracker, fate)
                assert (task.status, task.attempts, len(task.ends)) == (Status.SUCCEEDED, 1, 1), fate
        assert all(proxy.fates[fate] == 2 for fate in FATES), proxy.fates
        assert all("x-amz-checksum-crc32" in request.headers for request in proxy.requests if request.method == "PUT")

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
            tracker._store._sender._pace._pause = 0.2  # it has asked before
            proxy.plan.script("slow_down")
            with pytest.raises(StoreUnavailableError, match="SlowDown"):
                await tracker._store.get("one")
            loop = asyncio.get_running_loop()
            began = loop.time()
            await tracker._store.get("another")
            assert loop.time() - began >= 0.19, "twice as long as before, give or take a half"
            assert tracker._store._sender._pace._pause == 0.0, "an answer ends it"

    async def test_a_store_that_is_asked_for_more_than_it_can_answer_in_time_is_asked_for_less(
        self, make: Callable[..., S3Tracker], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        keys, loop = 60, asyncio.get_running_loop()
        free_at = loop.time()

        async def get(name: str) -> dict[str, Any]:
            # One answer after another, also to those who have gone meanwhile.
            nonlocal free_at
            free_at = max(free_at, loop.time()) + 0.01
            await asyncio.sleep(free_at - loop.time())
            return {"ETag": "e", "Body": name.encode(), "ResponseMetadata": {"HTTPHeaders": {}}}

        async with make(lease=1.2) as tracker:
            assert tracker._store.options.request_time == pytest.approx(0.2), "of 60 requests, 20 are answered in that"
            assert tracker._store._direct is not None
            monkeypatch.setattr(tracker._store._direct, "get", get)

            async def read(key: str) -> None:
                while True:
                    try:
                        await tracker._store.get(key)
                        return
                    except StoreUnavailableError:
                        pass

            before = tracker._store.requests["GetObject"]
            async with asyncio.timeout(30):
                await asyncio.gather(*(read(f"key-{number}") for number in range(keys)))
            assert tracker._store.requests["GetObject"] - before < 5 * keys

    async def test_a_request_that_is_cancelled_while_it_waits_for_its_turn_takes_none(self) -> None:
        turns = Turns(1)
        async with turns:
            waiting = [asyncio.create_task(turns.__aenter__()) for _ in range(3)]
            await asyncio.sleep(0)
            waiting[0].cancel()
            await asyncio.sleep(0)
        waiting[1].cancel()  # it has its turn, and has not noticed yet
        async with asyncio.timeout(10):
            await waiting[2]
        assert [one.cancelled() for one in waiting] == [True, True, False]

    async def test_a_store_that_cannot_be_reached_is_unavailable(self, moto_s3: S3Service, prefix: str) -> None:
        async with AsyncExitStack() as stack:
            async with FaultProxy(moto_s3.url) as proxy:
                await asyncio.to_thread(copied_facts, moto_s3, prefix, proxy.url)
                tracker = S3Tracker(moto_s3.bucket, prefix, endpoint_url=proxy.url, lease=0.6)
                await stack.enter_async_context(tracker)
            with pytest.raises(StoreUnavailableError, match="GetObject of"):
                await tracker.load("job")


class TestManyTasks:
    @pytest.mark.parametrize("layout", LAYOUTS)
    async def test_hundreds_through_all_of_them_end_right_and_none_twice(self, moto_s3: S3Service, layout: str) -> None:
        await tracked_through_faults(moto_s3, layout, tasks=200, seed=1)

    @pytest.mark.chaos
    @pytest.mark.parametrize("layout", LAYOUTS)
    async def test_ten_thousand_through_all_of_them_end_right_and_none_twice(
        self, moto_s3: S3Service, layout: str
    ) -> None:
        await tracked_through_faults(moto_s3, layout, tasks=10_000, seed=2)

    @pytest.mark.parametrize("layout", ["objects", pytest.param("log", marks=pytest.mark.chaos)])
    async def test_workers_that_are_killed_behind_all_of_them_keep_every_promise(
        self, moto_s3: S3Service, layout: str, tmp_path: Path
    ) -> None:
        await tortured_through_faults(moto_s3, layout, tmp_path, workers=2, seconds=1, tasks=12, lease=0.9)

    @pytest.mark.chaos
    @pytest.mark.parametrize("layout", LAYOUTS)
    async def test_they_keep_every_promise_for_half_a_minute(
        self, moto_s3: S3Service, layout: str, tmp_path: Path
    ) -> None:
        await tortured_through_faults(moto_s3, layout, tmp_path, workers=6, seconds=30)

    @pytest.mark.chaos
    @pytest.mark.parametrize("layout", LAYOUTS)
    async def test_and_on_ceph(self, ceph_s3: S3Service, layout: str, tmp_path: Path) -> None:
        await tortured_through_faults(ceph_s3, layout, tmp_path, workers=6, seconds=30)


def _prepared(service: S3Service, layout: str) -> str:
    return prepared(service) if layout == "objects" else prepared(service, "log", shards=2)


def _tracker(service: S3Service, layout: str, prefix: str, **options: Any) -> BaseTracker:
    return service.tracker(prefix, **options) if layout == "objects" else service.log_tracker(prefix, **options)


async def tracked_through_faults(service: S3Service, layout: str, *, tasks: int, seed: int) -> None:
    """Two workers on the same ids, and a network that does everything wrong."""
    prefix = _prepared(service, layout)
    ran: Counter[str] = Counter()
    plan = Plan(seed, **dict.fromkeys(FATES, 0.02))
    # A log takes so few requests that not all would be met by chance.
    plan.script(*(fate for name in FATES for fate in (name, "well")), where=lambda request: request.method == "PUT")
    async with FaultProxy(service.url, plan) as proxy:
        # What is known of the service is known of it behind the proxy.
        await asyncio.to_thread(copied_facts, service, prefix, proxy.url)
        behind = S3Service(proxy.url, service.bucket)

        async def body(task: Any) -> None:
            ran[task.id] += 1
            if task.id.endswith("7") and task.attempts == 1:
                raise ValueError("the first time")
            task.result = task.fence

        async with (
            _tracker(behind, layout, prefix, retry=Retry(3, delay=0)) as one,
            _tracker(behind, layout, prefix, retry=Retry(3, delay=0)) as two,
        ):
            ids = [f"job-{index}" for index in range(tasks)]
            summaries = await asyncio.gather(one.work(body, ids=ids), two.work(body, ids=reversed(ids)))
            await proxy.settle()
            assert sum(summary.succeeded for summary in summaries) == tasks
        assert all(proxy.fates[fate] for fate in FATES), proxy.fates
    async with _tracker(service, layout, prefix) as tracker:
        count = 0
        async for task in tracker.find():
            count += 1
            expected = 2 if task.id.endswith("7") else 1
            outcomes = [end.outcome for end in task.ends]
            assert outcomes == ["failed"] * (expected - 1) + ["succeeded"], task
            assert (task.status, task.attempts, task.result) == (Status.SUCCEEDED, expected, task.fence), task
            assert ran[task.id] == expected, task
        assert count == tasks


async def tortured_through_faults(
    service: S3Service, layout: str, folder: Path, *, workers: int, seconds: float, **sizes: Any
) -> None:
    """Processes that are killed, with the same network."""
    prefix = _prepared(service, layout)
    seed = random.randrange(1_000_000)
    async with FaultProxy(service.url) as proxy:
        await asyncio.to_thread(copied_facts, service, prefix, proxy.url)
        behind = S3Service(proxy.url, service.bucket)
        url = behind.store_url(prefix) if layout == "objects" else behind.log_url(prefix)

        def begin(line: str) -> None:  # the tasks have been added
            proxy.plan = Plan(seed, **dict.fromkeys(FATES, 0.01))

        report = await torture(url, workers=workers, seconds=seconds, seed=seed, folder=folder, say=begin, **sizes)
        assert any(proxy.fates[fate] for fate in FATES)
    assert report.ok, f"seed {seed}: {report}"
    assert report.kills > 0
    assert report.events["succeeded"] > 0
