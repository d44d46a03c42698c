"""What an S3 service can do and cannot, its clock, and its errors."""

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from aiotracker import (
    ConflictError,
    InvalidValueError,
    Status,
    StoreError,
    StoreUnsafeError,
    SystemClock,
    TaskLockedError,
)
from aiotracker._core.task import BootTime
from aiotracker.backends._aws_requests import ServiceTime
from aiotracker.backends.s3 import S3Tracker
from aiotracker.testing import FakeClock
from tests.services.fault_proxy import FaultProxy, Request
from tests.services.s3 import S3Service, ceph_s3, moto_s3, prepared, raw_client

from .on_s3 import loaded, make, prefix, proxy, through

__all__ = ["ceph_s3", "make", "moto_s3", "prefix", "proxy", "through"]  # fixtures


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

    async def test_writes_that_something_in_between_sends_twice_are_no_fault_of_the_store(
        self, proxy: FaultProxy, through: Callable[..., S3Tracker]
    ) -> None:
        proxy.plan.script(*["twice"] * 100, where=lambda request: request.method == "PUT")
        async with through("twice") as tracker:
            async with tracker.run("job"):
                pass
            assert (await loaded(tracker, "job")).status is Status.SUCCEEDED

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
            assert _sizes(moto_s3, prefix, tracker._key("old")) == []

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


class TestTombstones:
    async def test_they_go_after_an_hour_when_somebody_looks(
        self, make: Callable[..., S3Tracker], moto_s3: S3Service, prefix: str, clock: FakeClock
    ) -> None:
        async with make(clock=clock) as tracker, make(clock=clock, read_only=True) as reader:
            await tracker.add_many(["job", "other"])
            key = tracker._key("job")
            await tracker.purge("job", force=True)
            clock.jump(3599)
            await tracker.count()
            assert _sizes(moto_s3, prefix, key), "a write that was sent before may still arrive"
            clock.jump(2)
            await reader.count()
            assert _sizes(moto_s3, prefix, key)
            assert (await tracker.count()).total() == 1
            assert _sizes(moto_s3, prefix, key) == []
            assert await tracker.add("job")
            assert (await tracker.count()).total() == 2

    async def test_one_that_was_used_again_between_the_look_and_the_removal_stays(
        self, make: Callable[..., S3Tracker], clock: FakeClock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with make(clock=clock) as one, make(clock=clock) as two:
            await one.add("job")
            await one.purge("job", force=True)
            clock.jump(3601)
            delete = one._store.delete

            async def late(key: str, **options: Any) -> None:
                async with two.run("job"):
                    refused.append(key)
                    with pytest.raises(ConflictError):
                        await delete(key, **options)
                raise ConflictError("refused")

            refused: list[str] = []
            monkeypatch.setattr(one._store, "delete", late)
            assert (await one.count()).total() == 0
            assert refused == [one._key("job")]
            assert (await loaded(one, "job")).status is Status.SUCCEEDED

    async def test_where_delete_is_not_guarded_there_is_one_small_one_for_each_purged_id_for_ever(
        self, ceph_s3: S3Service, clock: FakeClock
    ) -> None:
        prefix = prepared(ceph_s3)
        async with ceph_s3.tracker(prefix, clock=clock) as tracker:
            ids = ["a", "b", "é" * 600]
            for _ in range(3):
                await tracker.add_many([*ids, "stays"])
                assert await tracker.purge(*ids, force=True) == 3
                clock.jump(7200)
                assert (await tracker.count()).total() == 1
                sizes = [size for task_id in ids for size in _sizes(ceph_s3, prefix, tracker._key(task_id))]
                assert len(sizes) == len(ids)
                assert max(sizes) <= 128


async def _check_purge(tracker: S3Tracker, service: S3Service, prefix: str, left: int) -> None:
    async with tracker.run("job") as task:
        fence = task.fence
    assert await tracker.purge("job", force=True) == 1
    assert await tracker.load("job") is None
    assert [task async for task in tracker.find()] == []
    assert (await tracker.count()).total() == 0
    assert len(_sizes(service, prefix, tracker._key("job"))) == left
    async with tracker.run("job") as task:
        assert task.fence > fence
        assert task.attempts == 1


def _sizes(service: S3Service, prefix: str, key: str) -> list[int]:
    """Of what is stored under a key: one, or none."""
    client = raw_client(service.url)
    try:
        found = client.list_objects_v2(Bucket=service.bucket, Prefix=f"{prefix}/{key}")
        return [entry["Size"] for entry in found.get("Contents", ())]
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
        time = ServiceTime(clock)
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
