"""RedisTracker: what it has beyond the conformance suite, on real servers."""

import asyncio
import contextlib
import logging
import signal
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from redis.asyncio import Redis

from aiotracker import (
    ConflictError,
    InvalidValueError,
    OutcomeUnknownError,
    Query,
    Status,
    StoreCorruptedError,
    StoreError,
    StoreUnavailableError,
    SystemClock,
    Task,
    TaskLockedError,
    TaskSucceededError,
)
from aiotracker.backends import _redis as driver
from aiotracker.backends import redis as backend
from aiotracker.backends._pump import Operation, Write
from aiotracker.backends.redis import RedisTracker
from tests.conftest import require
from tests.services.redis import RedisServer, free_port, is_installed, redis_cluster, redis_server

KEY = "{aiotracker:default}:"


@pytest.fixture(scope="module")
def shared() -> Iterator[RedisServer]:
    require(is_installed(), "redis-server and redis-cli")
    with redis_server() as server:
        yield server


@pytest.fixture
def server(shared: RedisServer) -> RedisServer:
    """An empty one."""
    shared.cli("flushall")
    return shared


async def cli(server: RedisServer, *args: str) -> str:
    return await asyncio.to_thread(server.cli, *args)


@contextlib.asynccontextmanager
async def started(**settings: str) -> AsyncIterator[RedisServer]:
    """A server of its own."""
    with contextlib.ExitStack() as stack:
        require(is_installed(), "redis-server and redis-cli")
        yield await asyncio.to_thread(stack.enter_context, redis_server(**settings))


async def succeed(tracker: RedisTracker, *ids: str) -> None:
    async def one(task_id: str) -> None:
        async with tracker.run(task_id) as task:
            task.result = task_id

    await asyncio.gather(*map(one, ids))


async def until(condition: Callable[[], Awaitable[object]], seconds: float = 30.0) -> None:
    async with asyncio.timeout(seconds):
        while not await condition():  # noqa: ASYNC110 - of another process, which sets no event
            await asyncio.sleep(0.005)


async def follows(replica: RedisServer) -> bool:
    return "master_link_status:up" in await cli(replica, "info", "replication")


class Proxy:
    """Between a tracker and its server.

    Attributes:
        lose_reply: How many times the reply to a script is cut off, with the connection.
        is_silent: Replies do not come through.
        cuts: How many times a connection ends that is asked for something with this word, before it is done.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._tasks: set[asyncio.Task[None]] = set()
        self.lose_reply = 0
        self.is_silent = False
        self.cuts: Counter[bytes] = Counter()
        self.url = ""

    async def __aenter__(self) -> "Proxy":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._port)
        asked = False

        async def there() -> None:
            nonlocal asked
            while data := await reader.read(1 << 20):
                asked = asked or b"EVALSHA" in data
                if word := next((word for word, left in self.cuts.items() if left and word in data), b""):
                    self.cuts[word] -= 1
                    up_writer.close()
                    return
                up_writer.write(data)

        forward = asyncio.create_task(there())
        try:
            while reply := await up_reader.read(1 << 20):
                if asked and self.lose_reply and b"NOSCRIPT" not in reply:
                    self.lose_reply -= 1
                    return
                asked = False
                if not self.is_silent:
                    writer.write(reply)
        finally:
            forward.cancel()
            writer.close()
            up_writer.close()


def counted(tracker: RedisTracker) -> list[int]:
    """The lengths of its pipelines, from now on."""
    server = tracker._server
    assert server is not None
    send, lengths = server._send, []

    async def counting(commands: list[driver.Command]) -> list[Any]:
        lengths.append(len(commands))
        return await send(commands)

    server._send = counting  # type: ignore[method-assign]  # counted where they are sent
    return lengths


# -- what is written


async def test_a_new_lifecycle_takes_two_pipelines_however_many_share_them(server: RedisServer) -> None:
    async with RedisTracker(server.url) as tracker:
        await succeed(tracker, "first")
        pipelines = counted(tracker)
        await succeed(tracker, *(f"job-{index}" for index in range(50)))
        assert pipelines == [50, 50]


async def test_a_task_that_is_there_is_claimed_with_the_record_that_the_refusal_gave_back(server: RedisServer) -> None:
    async with RedisTracker(server.url) as tracker:
        await tracker.add("job", {"n": 1})
        pipelines = counted(tracker)
        async with tracker.run("job") as task:
            assert task.data == {"n": 1}
            assert pipelines == [1, 1]
        assert pipelines == [1, 1, 1]
        with pytest.raises(TaskSucceededError):
            await succeed(tracker, "job")
        assert pipelines == [1, 1, 1, 1]


async def test_an_operator_reads_records_and_indexes_with_redis_cli(server: RedisServer) -> None:
    async with RedisTracker(server.url) as tracker:
        await succeed(tracker, "done")
        await tracker.add("early", priority=5)
        await tracker.add("late", not_before=datetime(2100, 1, 1, tzinfo=UTC))
        async with tracker.run("held") as task:
            assert await cli(server, "zrange", KEY + "status:in_progress", "0", "-1") == "held"
            score = float(await cli(server, "zscore", KEY + "scheduled", "held"))
            assert task.record.lease is not None
            assert score == task.record.lease.expires_at.timestamp() * 1e6
        record = await tracker.load("done")
        assert record is not None
        assert Task.decode(await cli(server, "hget", KEY + "task:done", "record"), version=record.version) == record
        assert await cli(server, "hget", KEY + "task:done", "version") == record.version
        assert await cli(server, "zcard", KEY + "status:succeeded") == "2"
        (ready,) = (await cli(server, "zrange", KEY + "ready", "0", "-1")).splitlines()
        assert ready.endswith(":early")
        assert await cli(server, "zrange", KEY + "scheduled", "0", "-1") == "late"


async def test_indexes_follow_every_change_of_a_record(server: RedisServer) -> None:
    async with RedisTracker(server.url) as tracker:
        for task_id in ("a", "b", "c"):
            await tracker.add(task_id)
        await tracker.ignore("a")
        with pytest.raises(ValueError, match="broken"):
            async with tracker.run("b"):
                raise ValueError("broken")
        await succeed(tracker, "c")
        assert await tracker.count() == Counter(ignored=1, failed=1, succeeded=1)
        assert await cli(server, "zrange", KEY + "scheduled", "0", "-1") == "b"
        await tracker.reset(status=["ignored", "failed", "succeeded"])
        assert await tracker.count() == Counter(pending=3)
        assert await cli(server, "zcard", KEY + "ready") == "3"
        task = await tracker.load("a")
        assert task is not None
        await tracker.dump(task.replace(create_time=task.create_time - timedelta(days=1), priority=3))
        assert await cli(server, "zcard", KEY + "ready") == "3"
        assert [task.id for task in (await tracker.claimable(1)).tasks] == ["a"]
        await tracker.purge("a", "b", "c", force=True)
        assert await cli(server, "keys", "*") == KEY + "store"


async def test_namespaces_see_nothing_of_each_other_nor_of_other_keys(server: RedisServer) -> None:
    await cli(server, "set", "mine", "kept")
    async with RedisTracker(server.url, namespace="a") as a, RedisTracker(server.url, namespace="a.b") as b:
        await succeed(a, "job")
        await succeed(b, "job", "other")
        assert [task.id async for task in a.find()] == ["job"]
        await a.purge("job", force=True)
        assert await b.count() == Counter(succeeded=2)
    assert await cli(server, "get", "mine") == "kept"


async def test_a_scan_pages_in_the_order_of_ids_and_misses_none_that_changes_meanwhile(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "PAGE", 7)
    ids = sorted([f"id-{n:03}" for n in range(50)] + ["é", "😀", "\U0010ffff"])
    async with RedisTracker(server.url) as tracker:
        await tracker.add_many(ids)
        seen = []
        query = Query(statuses=frozenset({Status.PENDING, Status.IGNORED}), order_by="id")
        async for task in tracker.scan(query):
            seen.append(task.id)
            if task.id == "id-010":
                await tracker.ignore(*ids[::2])  # from a status that sorts after to one that sorts before
        assert seen == ids
        assert [task.id async for task in tracker.find(prefix="id-01", order_by="-id")] == ids[19:9:-1]
        assert [task.id async for task in tracker.find(prefix="\U0010ffff")] == ["\U0010ffff"]


async def test_what_is_no_record_of_ours_is_named(server: RedisServer) -> None:
    async with RedisTracker(server.url) as tracker:
        await succeed(tracker, "job", "fine")
        await cli(server, "hset", KEY + "task:job", "record", "{nonsense")
        with pytest.raises(StoreCorruptedError, match="task:job"):
            await tracker.load("job")
        assert await tracker.load("fine") is not None


# -- the server's clock


class Shifted(SystemClock):
    """A machine whose clock somebody has set wrong."""

    def __init__(self, seconds: float) -> None:
        self._shift = timedelta(seconds=seconds)

    def now(self) -> datetime:
        return super().now() + self._shift


async def test_now_is_the_servers_time_whatever_our_clock_shows(server: RedisServer) -> None:
    async with RedisTracker(server.url, clock=Shifted(7200)) as tracker:
        seconds, micros = (await cli(server, "time")).split()
        shown = datetime.fromtimestamp(int(seconds) + int(micros) / 1e6, UTC)
        assert abs((tracker.now() - shown).total_seconds()) < 2
        assert 0 < tracker.clock_uncertainty < 5
        async with tracker.run("job") as task:
            start = task.record.start_time
            assert start is not None
            assert abs((start - shown).total_seconds()) < 5


def test_a_better_look_at_the_servers_clock_counts_and_a_worse_one_only_when_the_old_is_stale() -> None:
    time = driver.ServerTime(SystemClock())
    now = time.ticks()
    time.take(now, now + 0.002, 1000.0)
    offset = time._offset
    time.take(now + 1, now + 1.5, 2000.0)
    assert time._offset == offset
    time.take(now + 1, now + 1.001, 1001.0)
    assert time._offset != offset
    assert time.uncertainty >= 0.001
    offset = time._offset
    time.take(now + 10_000, now + 10_000.5, 11_000.0)
    assert time._offset != offset


# -- opening


async def test_settings_that_keep_the_guarantees_cause_no_warning(
    server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with RedisTracker(server.url):
        pass
    assert caplog.records == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"appendfsync": "everysec"}, "appendfsync everysec"),
        ({"appendonly": "no"}, "appendonly no"),
        ({"maxmemory_policy": "allkeys-lru"}, "allkeys-lru"),
    ],
)
async def test_settings_that_do_not_are_told(
    settings: dict[str, str], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with started(**settings) as server, RedisTracker(server.url) as tracker:
        await succeed(tracker, "job")
    assert said in caplog.text


async def test_a_replica_is_refused_with_the_address_of_its_primary_and_read_with_read_only(
    server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with RedisTracker(server.url) as tracker:
        await succeed(tracker, "job")
    async with started(replicaof=f"127.0.0.1 {server.port}") as replica:
        await until(lambda: follows(replica))
        with pytest.raises(StoreError, match=f"read-only replica.*127.0.0.1:{server.port}"):
            await RedisTracker(replica.url).open()
        async with RedisTracker(replica.url, read_only=True) as reader:
            assert await reader.count() == Counter(succeeded=1)
        caplog.clear()
        async with RedisTracker(server.url):
            assert "has replicas" in caplog.text
        # It becomes a replica under us.
        async with RedisTracker(replica.url.replace(str(replica.port), str(server.port)), lease=1.5) as tracker:
            await cli(server, "replicaof", "127.0.0.1", str(replica.port))
            with pytest.raises(StoreError, match="read-only replica"):
                await tracker.add("new")
            await cli(server, "replicaof", "no", "one")


async def test_a_wrong_password_and_missing_permissions_are_clear_errors() -> None:
    async with started(requirepass="secret") as server:
        with pytest.raises(StoreError, match="password"):
            await RedisTracker(server.url).open()
        with pytest.raises(StoreError, match="password"):
            await RedisTracker(server.url.replace("//", "//:wrong@")).open()
        right = server.url.replace("//", "//:secret@")
        async with RedisTracker(right) as tracker:
            await succeed(tracker, "job")
        async with Redis.from_url(right) as admin:
            await admin.execute_command("ACL", "SETUSER", "bob", "on", ">b", "~other*", "+@all")
        with pytest.raises(StoreError, match="permissions"):
            await RedisTracker(server.url.replace("//", "//bob:b@")).open()


async def test_a_user_needs_no_more_than_the_docs_say(caplog: pytest.LogCaptureFixture) -> None:
    allowed = ("+@read", "+@write", "+@scripting", "+@connection", "+info", "+time", "+wait")
    async with started() as server:
        await cli(server, "acl", "setuser", "bob", "on", ">b", "~{aiotracker:default}:*", *allowed)
        url = server.url.replace("//", "//bob:b@")
        async with RedisTracker(url) as tracker:
            await succeed(tracker, "job")
            assert await tracker.count() == Counter(succeeded=1)
        assert "does not tell its appendfsync" in caplog.text
        caplog.clear()
        await cli(server, "acl", "setuser", "bob", "+cluster|nodes", "+config|get")
        async with RedisTracker(url):
            assert caplog.records == []


async def test_a_server_that_is_not_there_is_told_at_once() -> None:
    with pytest.raises(StoreUnavailableError, match=r"127\.0\.0\.1"):
        await RedisTracker(f"redis://127.0.0.1:{free_port()}").open()


@pytest.mark.parametrize(("field", "value"), [("format", "99"), ("layout", "other")])
async def test_a_store_of_another_format_is_refused_and_left_alone(server: RedisServer, field: str, value: str) -> None:
    async with RedisTracker(server.url):
        pass
    await cli(server, "hset", KEY + "store", field, value)
    with pytest.raises(StoreError, match=f"{value}.*"):
        await RedisTracker(server.url).open()
    assert await cli(server, "hget", KEY + "store", field) == value


async def test_read_only_creates_nothing(server: RedisServer) -> None:
    with pytest.raises(StoreError, match="no namespace"):
        await RedisTracker(server.url, read_only=True).open()
    assert await cli(server, "dbsize") == "0"


async def test_a_client_that_is_passed_in_is_used_and_not_closed(server: RedisServer) -> None:
    async with Redis(port=server.port) as client:
        async with RedisTracker(client=client) as tracker:
            await succeed(tracker, "job")
        assert await client.exists(KEY + "task:job")
        assert await client.get("nothing") is None


async def test_the_newer_protocol_does_as_well(server: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    async with RedisTracker(server.url + "?protocol=3") as tracker:
        await succeed(tracker, "job")
        await tracker.add("new")
        assert await tracker.count() == Counter(succeeded=1, pending=1)
        assert [task.id for task in (await tracker.claimable(5)).tasks] == ["new"]
    assert caplog.records == []


async def test_a_machine_without_hiredis_does_without(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "pack", None)
    async with RedisTracker(server.url) as tracker:
        await succeed(tracker, "é", "😀")
        assert {task.id async for task in tracker.find()} == {"é", "😀"}


@pytest.mark.parametrize(
    "make",
    [
        lambda: RedisTracker(),
        lambda: RedisTracker("http://localhost"),
        lambda: RedisTracker("redis://localhost", namespace="a:b"),
        lambda: RedisTracker("redis://localhost", wait_replicas=-1),
        lambda: RedisTracker("redis://localhost", wait_time=0),
        lambda: RedisTracker(client=Redis(decode_responses=True)),
        lambda: RedisTracker("redis://localhost", client=Redis()),
    ],
)
def test_arguments_that_cannot_be_are_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(InvalidValueError):
        make()


# -- service life


async def test_a_reply_that_is_cut_off_after_the_write_landed_is_no_lost_race(server: RedisServer) -> None:
    async with Proxy(server.port) as proxy, RedisTracker(proxy.url) as tracker:
        await succeed(tracker, "first")
        proxy.lose_reply = 1
        async with tracker.run("job") as task:
            assert proxy.lose_reply == 0
            assert task.attempts == 1
            proxy.lose_reply = 2
        assert proxy.lose_reply == 0
        record = await tracker.load("job")
        assert record is not None
        assert (record.status, record.attempts, len(record.ends)) == (Status.SUCCEEDED, 1, 1)
        proxy.lose_reply = 1
        assert await tracker.add("new")
        proxy.lose_reply = 1
        assert await tracker.purge("new", force=True) in (0, 1)  # the record does not remember who removed it
        assert await tracker.load("new") is None


async def test_a_guarded_write_whose_reply_was_lost_is_not_refused(server: RedisServer) -> None:
    async with Proxy(server.port) as proxy, RedisTracker(proxy.url) as tracker:
        await tracker.add("job")
        task = await tracker.load("job")
        assert task is not None
        proxy.lose_reply = 1
        stored = await tracker.dump(task.replace(note="mine"))
        assert await tracker.load("job") == stored
        with pytest.raises(ConflictError):
            await tracker.dump(task.replace(note="late"))


async def test_a_server_that_never_answers_is_told_within_the_patience(server: RedisServer) -> None:
    async with Proxy(server.port) as proxy, RedisTracker(proxy.url, lease=1.5) as tracker:
        await succeed(tracker, "first")
        proxy.is_silent = True
        async with asyncio.timeout(5):
            with pytest.raises((StoreUnavailableError, OutcomeUnknownError), match=r"127\.0\.0\.1"):
                await tracker.add("job")
            with pytest.raises(StoreUnavailableError):
                await tracker.load("job")
            proxy.is_silent = False


async def test_nothing_acknowledged_is_lost_when_the_server_is_killed_under_load() -> None:
    async with started() as server, RedisTracker(server.url, lease=30) as tracker:
        done: list[str] = []
        runs: Counter[str] = Counter()
        numbers = iter(range(3000))
        enough = {1: asyncio.Event(), 2: asyncio.Event()}

        async def work() -> None:
            for number in numbers:
                async with tracker.run(f"job-{number}") as task:
                    runs[task.id] += 1
                    task.result = number
                done.append(f"job-{number}")
                if event := enough.get(len(done) // 700):
                    event.set()

        workers = asyncio.gather(*(work() for _ in range(50)))
        for kills in (1, 2):
            await enough[kills].wait()
            await asyncio.to_thread(server.kill)
            await asyncio.to_thread(server.start)
        async with asyncio.timeout(60):
            await workers
        assert len(done) == 3000
        assert set(runs.values()) == {1}
        assert await tracker.count() == Counter(succeeded=3000)
        async for task in tracker.find():
            assert (task.attempts, f"job-{task.result}") == (1, task.id)


async def test_a_server_that_stands_still_for_a_while_is_waited_for(server: RedisServer) -> None:
    async with RedisTracker(server.url, lease=9) as tracker:
        await succeed(tracker, "first")
        server.signal(signal.SIGSTOP)
        try:
            running = asyncio.create_task(succeed(tracker, "job"))
            await asyncio.sleep(1.2)  # longer than the tracker waits for an answer
            assert not running.done()
        finally:
            server.signal(signal.SIGCONT)
        await running
        task = await tracker.load("job")
        assert task is not None
        assert (task.status, task.attempts, len(task.ends)) == (Status.SUCCEEDED, 1, 1)


async def test_a_server_without_memory_changes_nothing_and_says_so() -> None:
    async with started() as server, RedisTracker(server.url) as tracker:
        await tracker.add("there", "x" * 1000)
        async with tracker.run("held"):
            await cli(server, "config", "set", "maxmemory", "1mb")
            before = await cli(server, "debug", "digest")
            with pytest.raises(StoreError, match="no memory left"):
                await tracker.add("new", "x" * 1000)
            with pytest.raises(StoreError, match="no memory left"):
                await succeed(tracker, "there")
            assert await cli(server, "debug", "digest") == before
            assert await tracker.purge("there", force=True) == 1  # makes room
            await cli(server, "config", "set", "maxmemory", "0")
        assert await tracker.count() == Counter(succeeded=1)


async def test_too_many_connections_are_waited_for() -> None:
    async with started(maxclients="10") as server, RedisTracker(server.url) as tracker:
        await succeed(tracker, "first")
        others = [Redis.from_url(server.url) for _ in range(9)]
        with contextlib.suppress(Exception):
            await asyncio.gather(*(other.ping() for other in others))
        await tracker._server._redis.connection_pool.disconnect()  # type: ignore[union-attr]  # it is open
        extra = Redis.from_url(server.url)
        with contextlib.suppress(Exception):
            await extra.ping()
        running = asyncio.create_task(succeed(tracker, "job"))
        await asyncio.sleep(0.05)
        for other in (*others, extra):
            await other.aclose()
        await running
        assert await tracker.count() == Counter(succeeded=2)


async def test_scripts_that_the_server_has_forgotten_are_sent_again(server: RedisServer) -> None:
    async with RedisTracker(server.url) as tracker:
        await succeed(tracker, "first")
        await cli(server, "script", "flush", "sync")
        await succeed(tracker, "a", "b")
        await cli(server, "script", "flush", "sync")
        assert await tracker.count() == Counter(succeeded=3)


async def test_a_wait_that_falls_short_is_an_unknown_outcome(server: RedisServer) -> None:
    async with RedisTracker(server.url, wait_replicas=1, wait_time=0.1) as tracker:
        with pytest.raises(OutcomeUnknownError, match="0 of 1 replicas"):
            await tracker.add("job")
        assert await tracker.load("job") is not None
        async with started(replicaof=f"127.0.0.1 {server.port}") as replica:
            await until(lambda: follows(replica))
            tracker._wait_time = 10.0
            await succeed(tracker, "job", "new")
            assert await cli(replica, "zcard", KEY + "status:succeeded") == "2"


async def test_a_write_that_is_sent_again_is_written_again_so_that_a_wait_covers_it(server: RedisServer) -> None:
    async with RedisTracker(server.url) as tracker:
        await tracker.add("job")
        task = await tracker.load("job")
        assert task is not None
        new = task.replace(write_id="mine")
        command = tracker._writing(Write("job", task.version, new, new.encode()), task)
        assert tracker._server is not None
        assert await tracker._server.talk([command]) == [1]
        before = await cli(server, "config", "resetstat")
        assert before == "OK"
        assert await tracker._server.talk([command]) == [1]
        assert "cmdstat_hset:calls=1" in await cli(server, "info", "commandstats")
        assert (await tracker.load("job")) == new.replace(version="mine")


# -- contention


async def test_many_that_change_one_task_all_get_their_turn(server: RedisServer) -> None:
    async with RedisTracker(server.url) as one, RedisTracker(server.url) as two:
        await one.add("job", 0)

        def plus_one(task: Task | None, now: datetime) -> Task | None:
            assert task is not None
            return task.replace(data=task.data + 1, update_time=now)

        await asyncio.gather(*(tracker.update("job", plus_one) for tracker in (one, two) for _ in range(200)))
        task = await one.load("job")
        assert task is not None
        assert task.data == 400


async def test_a_refusal_is_never_decided_on_what_was_known_before(server: RedisServer) -> None:
    async with RedisTracker(server.url) as one, RedisTracker(server.url) as two:
        async with one.run("job") as task:
            held = task.record
            with pytest.raises(TaskLockedError):
                await succeed(two, "job")
        # `held` would refuse it.
        async with two._run("job", known=held, force=True) as again:
            assert again.attempts == 2


async def test_a_refusal_is_not_decided_on_what_another_operation_was_told_earlier(server: RedisServer) -> None:
    async with RedisTracker(server.url) as tracker:
        async with tracker.run("job") as task:
            told = backend._Told(task.record)

        def claimed(found: Task | None, now: datetime) -> Task | None:
            return (
                found
                if found is not None and found.lease is not None
                else Task(id="job", status=Status.PENDING, create_time=now, update_time=now)
            )

        early = Operation("job", claimed, "early", told)
        late = Operation("job", claimed, "late", None)
        await tracker._commit([early, late])
        assert early.answer == told.record
        assert late.again is not None
        late.again = None
        await tracker._commit([late])
        assert late.answer.write_id == "late"


# -- cluster


async def test_a_namespace_lives_on_one_node_of_a_cluster_which_is_found_from_any(
    caplog: pytest.LogCaptureFixture,
) -> None:
    require(is_installed(), "redis-server and redis-cli")
    with contextlib.ExitStack() as stack:
        servers = await asyncio.to_thread(stack.enter_context, redis_cluster())
        for server in servers:
            async with RedisTracker(server.url) as tracker:
                await succeed(tracker, *(f"{server.port}-{index}" for index in range(20)))
                assert (await tracker.count())[Status.SUCCEEDED] % 20 == 0
        async with RedisTracker(servers[0].url) as tracker:
            assert await tracker.count() == Counter(succeeded=60)
        sizes = [int(await cli(server, "dbsize")) for server in servers]
        assert sorted(sizes) == [0, 0, 62]  # 60 tasks, the marker, one status
        names = [f"job-{index}" for index in range(12)]
        async with contextlib.AsyncExitStack() as trackers:
            opened = [
                await trackers.enter_async_context(RedisTracker(servers[0].url, namespace=name)) for name in names
            ]
            await asyncio.gather(*(succeed(tracker, "one", "two") for tracker in opened))
        for server in servers:
            assert int(await cli(server, "dbsize")) > 0
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_a_replica_that_takes_over_in_a_cluster_is_found() -> None:
    require(is_installed(), "redis-server and redis-cli")
    with contextlib.ExitStack() as stack:
        servers = await asyncio.to_thread(stack.enter_context, redis_cluster())
        async with RedisTracker(servers[0].url) as tracker:
            await succeed(tracker, "before")
            sizes = [int(await cli(server, "dbsize")) for server in servers]
            primary = servers[sizes.index(max(sizes))]
            spare = RedisServer(primary.folder / "spare", free_port(10_000), **servers[0].settings)
            spare.folder.mkdir()
            stack.callback(spare.kill)
            await asyncio.to_thread(spare.start)
            add = ("--cluster", "add-node", f"127.0.0.1:{spare.port}", f"127.0.0.1:{primary.port}", "--cluster-slave")
            await cli(primary, *add, "--cluster-master-id", await cli(primary, "cluster", "myid"))
            await until(lambda: follows(spare))
            await asyncio.to_thread(primary.kill)
            async with asyncio.timeout(20):
                await succeed(tracker, "after")
            assert await tracker.count() == Counter(succeeded=2)
            assert await cli(spare, "zcard", KEY + "status:succeeded") == "2"


async def test_a_slot_that_moves_to_another_node_is_followed() -> None:
    require(is_installed(), "redis-server and redis-cli")
    with contextlib.ExitStack() as stack:
        servers = await asyncio.to_thread(stack.enter_context, redis_cluster())
        async with RedisTracker(servers[0].url) as tracker:
            await succeed(tracker, "before")
            slot = await cli(servers[0], "cluster", "keyslot", KEY)
            sizes = [int(await cli(server, "dbsize")) for server in servers]
            source = servers[sizes.index(max(sizes))]
            target = servers[sizes.index(min(sizes))]
            source_id, target_id = await cli(source, "cluster", "myid"), await cli(target, "cluster", "myid")
            await cli(target, "cluster", "setslot", slot, "importing", source_id)
            await cli(source, "cluster", "setslot", slot, "migrating", target_id)
            running = asyncio.create_task(succeed(tracker, "meanwhile"))
            keys = (await cli(source, "cluster", "getkeysinslot", slot, "100")).splitlines()
            await cli(source, "migrate", "127.0.0.1", str(target.port), "", "0", "5000", "keys", *keys)
            for server in (target, source):
                await cli(server, "cluster", "setslot", slot, "node", target_id)
            # What was written before the move was over, at the old node, has moved with it.
            await running
            await succeed(tracker, "after")
            assert {task.id async for task in tracker.find()} == {"before", "meanwhile", "after"}
            assert int(await cli(target, "dbsize")) > 0
