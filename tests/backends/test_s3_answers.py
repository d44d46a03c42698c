"""S3 trackers: unusual answers of the service, and what others do in between."""

import asyncio
import logging
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from aiotracker import (
    ConflictError,
    InvalidValueError,
    Status,
    StoreError,
    StoreUnavailableError,
    StoreUnsafeError,
    SystemClock,
    Task,
)
from aiotracker.backends import _s3_seen, s3
from aiotracker.backends._aws_requests import ServiceTime
from aiotracker.backends.s3 import S3Tracker
from aiotracker.testing import FakeClock
from tests.services.fault_proxy import FaultProxy, Request
from tests.services.s3 import S3Service, ceph_s3, moto_s3, prepared, raw_client

from .on_s3 import copied_facts, loaded, make, prefix, proxy, through

__all__ = ["ceph_s3", "make", "moto_s3", "prefix", "proxy", "through"]  # fixtures

Make = Callable[..., S3Tracker]


def is_of(method: str, part: str) -> Callable[[Request], bool]:
    return lambda request: request.method == method and part in request.key


@pytest.fixture
def known(through: Make, moto_s3: S3Service, prefix: str, proxy: FaultProxy) -> Make:
    """A tracker behind the proxy which knows the store already."""
    copied_facts(moto_s3, prefix, proxy.url)
    return lambda **options: through(prefix, **options)


# -- refusals


REFUSALS: list[tuple[int, str, bool, str]] = [  # whether another try may help, and what is said
    (403, "InvalidAccessKeyId", False, "the credentials were refused"),
    (403, "RequestTimeTooSkewed", False, "this machine's clock"),
    (400, "MalformedXML", False, "MalformedXML"),
    (400, "IncompleteBody", True, "IncompleteBody"),
    (500, "SomethingNew", True, "SomethingNew"),
    (503, "SlowDown", True, "SlowDown"),
]


async def test_errors_are_told_apart_by_their_code(proxy: FaultProxy, known: Make) -> None:
    async with known() as tracker:
        tracker._store.options = tracker._store.options.__class__(endpoint_url=proxy.url, request_time=0.02)
        for status, code, may_pass, said in REFUSALS:
            proxy.refuses = lambda request, refusal=(status, code): refusal  # type: ignore[misc]  # mypy infers no type
            with pytest.raises(StoreError, match=said) as raised:
                await tracker.load("job")
            assert isinstance(raised.value, StoreUnavailableError) is may_pass, code


async def test_a_put_that_is_answered_without_an_etag_is_not_taken_for_a_write(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with make() as tracker:
        store = tracker._store
        write = store._write
        sent: list[dict[str, str]] = []

        async def without(name: str, body: bytes, condition: dict[str, str]) -> Any:
            sent.append(condition)
            answer = await write(name, body, condition)
            return answer if len(sent) > 1 else {**answer, "ETag": ""}

        monkeypatch.setattr(store, "_write", without)
        assert await tracker.add("job")
        assert sent == [{"IfNoneMatch": "*"}] * 2  # the same again: it is our own that is found
        assert await tracker.count() == {Status.PENDING: 1}


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("the second create", "a second If-None-Match"),
        ("every match", "the ETag that is stored was refused"),
        ("a stale read", "a read after a write"),
    ],
)
async def test_a_service_that_fails_the_probe_is_refused_with_what_it_did(
    make: Make, moto_s3: S3Service, monkeypatch: pytest.MonkeyPatch, what: str, said: str
) -> None:
    tracker = moto_s3.tracker(moto_s3.prefix())
    store = tracker._store
    put, get = store.put, store.get
    creates: list[str] = []

    async def odd_put(key: str, body: bytes, *, absent: bool = False, match: str | None = None) -> str:
        if absent:
            creates.append(key)
            if what == "the second create" and len(creates) > 10:
                return await put(key, body)
        if match is not None and what == "every match":
            raise ConflictError("refused")
        return await put(key, body, absent=absent, match=match)

    async def odd_get(key: str) -> Any:
        stored = await get(key)
        return stored._replace(etag="another") if stored is not None and what == "a stale read" else stored

    monkeypatch.setattr(store, "put", odd_put)
    monkeypatch.setattr(store, "get", odd_get)
    with pytest.raises(StoreUnsafeError, match=said):
        await tracker.open()


async def test_a_probe_is_not_misled_by_a_lost_reply_or_a_busy_service(proxy: FaultProxy, through: Make) -> None:
    race = ["slow_down", *["well"] * 10]  # ten at once, of which one is sent again; then once more, then with If-Match
    proxy.plan.script(*race, "well", "lost", where=is_of("PUT", "probe"))
    async with through() as tracker:
        assert await tracker.add("job")
    assert proxy.fates["lost"] == proxy.fates["slow_down"] == 1


async def test_an_endpoint_that_is_no_url_is_refused() -> None:
    with pytest.raises(StoreError, match="the client for s3 cannot be made"):
        await S3Tracker("bucket", endpoint_url="no url", region="here").open()


def test_a_date_that_is_none_tells_no_time() -> None:
    time = ServiceTime(SystemClock())
    time.saw({"date": "yesterday"}, time.local())
    assert (time.date, time.answered, time.uncertainty) == (None, None, 0.0)


async def test_who_opens_a_new_store_at_the_same_time_uses_what_the_other_has_found(
    proxy: FaultProxy, through: Make, moto_s3: S3Service
) -> None:
    place = moto_s3.prefix()
    proxy.plan.script("conflict", "failed_after", where=is_of("PUT", "aiotracker.json"))
    trackers = [through(place) for _ in range(3)]
    await asyncio.gather(*(tracker.open() for tracker in trackers))
    added = [await tracker.add("job") for tracker in trackers]
    assert added == [True, False, False]
    assert proxy.fates["conflict"] == proxy.fates["failed_after"] == 1
    for tracker in trackers:
        await tracker.aclose()


async def test_a_new_store_that_cannot_be_marked_is_an_error_in_time(proxy: FaultProxy, through: Make) -> None:
    proxy.refuses = lambda request: (500, "InternalError") if is_of("PUT", "aiotracker.json")(request) else None
    tracker = through("", lease=0.3)
    tracker._store.options = tracker._store.options.__class__(endpoint_url=proxy.url, request_time=0.3)
    with pytest.raises(StoreUnavailableError, match="InternalError"):
        await tracker.open()


# -- records


async def test_a_record_that_is_no_json_is_refused_and_changes_nothing(make: Make) -> None:
    async with make() as tracker:
        await tracker.add("job")
        task = await loaded(tracker, "job")
        with pytest.raises(InvalidValueError, match="cannot be stored as JSON"):
            await tracker.dump(task.replace(data=object()))
        assert await loaded(tracker, "job") == task
        assert (tracker.bucket, tracker.prefix) == (tracker._store.bucket, tracker._store.prefix)


async def test_to_delete_what_is_believed_absent_is_refused_where_it_is_there(make: Make) -> None:
    async with make() as tracker:
        await tracker.add("job")
        task = await loaded(tracker, "job")
        with pytest.raises(ConflictError) as refused:
            await tracker.delete(task.replace(version=None))
        assert refused.value.current == task
        await tracker.delete(
            Task(id="none", status=Status.PENDING, create_time=task.create_time, update_time=tracker.now())
        )
        assert await loaded(tracker, "job") == task


async def test_to_delete_what_somebody_has_removed_is_a_conflict(
    proxy: FaultProxy, known: Make, clock: FakeClock
) -> None:
    async with known(clock=clock) as tracker:
        await tracker.add("job")
        task = await loaded(tracker, "job")
        clock.jump(3601)
        proxy.refuses = lambda request: (404, "NoSuchKey") if request.method == "DELETE" else None
        with pytest.raises(ConflictError) as refused:
            await tracker.delete(task)
        assert (refused.value.known, refused.value.current) == (True, None)


async def test_what_is_removed_between_the_listing_and_the_read_is_passed_over(proxy: FaultProxy, known: Make) -> None:
    async with known() as writer:
        for task_id in ("gone", "there"):
            await writer.add(task_id)
    async with known() as tracker:
        key = tracker._key("gone")
        proxy.refuses = lambda request: (404, "NoSuchKey") if is_of("GET", key)(request) else None
        assert [task.id async for task in tracker.find()] == ["there"]


async def test_after_a_conflict_that_nothing_more_is_known_of_the_answer_is_the_conflict(
    proxy: FaultProxy, known: Make
) -> None:
    async with known() as tracker:
        await tracker.add("job")
        task = await loaded(tracker, "job")
        await tracker.dump(task.replace(note="newer"))
        tracker._store.options = tracker._store.options.__class__(endpoint_url=proxy.url, request_time=0.02)
        proxy.refuses = lambda request: (500, "InternalError") if request.method == "GET" else None
        with pytest.raises(ConflictError) as refused:
            await tracker.dump(task.replace(note="late"))
        assert not refused.value.known


async def test_what_one_machine_has_written_comes_before_what_the_next_one_makes_of_it(
    make: Make, clock: FakeClock
) -> None:
    async with make(clock=clock) as ahead:
        clock.jump(1.5)
        await ahead.add("job")
        first = await loaded(ahead, "job")
        clock.jump(-1.5)  # another machine, a second or so behind
        async with make(clock=clock) as behind:
            await behind.ignore("job")
            second = await loaded(behind, "job")
    assert second.status is Status.IGNORED
    assert second.update_time >= first.update_time
    assert clock.now() < first.update_time <= clock.now() + timedelta(seconds=2)


# -- looking for work


async def test_of_more_than_are_kept_the_best_are_offered_and_the_rest_later(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "CANDIDATES", 3)
    async with make() as tracker:
        for number in range(10):
            await tracker.add(str(number), priority=number)
        tasks, next_due = await tracker.claimable(3)
        assert [task.id for task in tasks] == ["9", "8", "7"]
        assert next_due is not None
        assert next_due <= tracker.now()
        for task in tasks:
            await tracker.ignore(task.id)
        again = [task.id for _ in range(2) for task in (await tracker.claimable(3)).tasks]
        assert "6" in again


async def test_a_task_that_ends_while_work_is_looked_for_is_not_offered(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with make() as tracker:
        await tracker.add("job", {"status": "pending"})  # its bytes say both
        await tracker.ignore("job")
        assert await tracker.claimable(5) == ([], None)


# -- the snapshot


async def test_a_snapshot_is_written_at_most_once_a_minute_and_its_loss_costs_nothing(
    proxy: FaultProxy, known: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_s3_seen, "WORTH_A_SNAPSHOT", 1)
    caplog.set_level(logging.INFO, "aiotracker")
    async with known() as writer:
        await asyncio.gather(*(writer.add(str(number)) for number in range(3)))
    proxy.plan.script("failed", where=is_of("PUT", "snapshot"))
    async with known() as tracker:
        for _ in range(2):
            assert len([task async for task in tracker.find()]) == 3
            tracker._cache = _s3_seen.Cache(1 << 20)
        assert "was not written" in caplog.text
        assert sum(is_of("PUT", "snapshot")(request) for request in proxy.requests) == 1
    async with known() as later:
        assert len([task async for task in later.find()]) == 3
        assert sum(is_of("PUT", "snapshot")(request) for request in proxy.requests) == 2


async def test_what_has_been_seen_since_is_not_replaced_by_what_a_snapshot_says(
    proxy: FaultProxy, known: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_s3_seen, "WORTH_A_SNAPSHOT", 1)
    async with known() as writer:
        await asyncio.gather(*(writer.add(str(number)) for number in range(3)))
    async with known() as first:
        assert len([task async for task in first.find()]) == 3
    async with known() as second:
        await second.ignore("0")
        assert await second.count() == {Status.PENDING: 2, Status.IGNORED: 1}


# -- the log


@pytest.mark.parametrize("shards", [0, "two", 10_000])
async def test_a_log_with_shards_that_nobody_makes_is_refused(moto_s3: S3Service, shards: Any) -> None:
    prefix = prepared(moto_s3, "log", shards=shards)
    with pytest.raises(StoreError, match="shards, which no release of aiotracker makes"):
        await moto_s3.log_tracker(prefix).open()


async def test_an_object_that_is_no_segment_is_damage(moto_s3: S3Service) -> None:
    prefix = prepared(moto_s3, "log", shards=1)
    async with moto_s3.log_tracker(prefix) as tracker:
        await tracker.add("job")
        assert (tracker.bucket, tracker.prefix) == (moto_s3.bucket, f"{prefix}/")
    client = raw_client(moto_s3.url)
    listed = client.list_objects_v2(Bucket=moto_s3.bucket, Prefix=f"{prefix}/")
    (key,) = [found["Key"] for found in listed["Contents"] if not found["Key"].endswith("aiotracker.json")]
    client.put_object(Bucket=moto_s3.bucket, Key=key, Body=b'{"no":"segment"}\n')
    client.close()
    with pytest.raises(StoreError, match="first line"):
        async with moto_s3.log_tracker(prefix) as tracker:
            await tracker.load("job")
