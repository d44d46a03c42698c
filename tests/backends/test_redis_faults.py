"""RedisTracker when something goes wrong: on the way, at the server, or in what is stored there."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from redis.exceptions import ResponseError

from aiotracker import (
    InvalidValueError,
    OutcomeUnknownError,
    StoreCorruptedError,
    StoreError,
    StoreUnavailableError,
    Task,
)
from aiotracker.backends import _redis as driver
from aiotracker.backends import redis as backend
from aiotracker.backends.redis import RedisTracker
from tests.backends.test_redis import KEY, Proxy, cli, server, shared, started, succeed, until
from tests.services.redis import RedisServer

__all__ = ["server", "shared"]  # fixtures

ALLOWED = (
    "+@read",
    "+@write",
    "+@scripting",
    "+@connection",
    "+info",
    "+time",
    "+wait",
    "+cluster|nodes",
    "+config|get",
)


@pytest.fixture
async def proxy(server: RedisServer) -> AsyncIterator[Proxy]:
    async with Proxy(server.port) as proxy:
        yield proxy


# -- opening


@pytest.mark.parametrize(
    ("url", "said"),
    [("redis://localhost:port", "url cannot be"), ("redis://localhost?decode_responses=true", "decode_responses")],
)
async def test_a_url_that_cannot_be_used_is_refused(url: str, said: str) -> None:
    with pytest.raises(InvalidValueError, match=said):
        await RedisTracker(url).open()


@pytest.mark.parametrize("word", [b"CLUSTER", b"INFO", b"HSETNX", b"HGETALL", b"TIME"])
async def test_a_connection_that_ends_while_it_is_opened_is_told(proxy: Proxy, word: bytes) -> None:
    proxy.cuts[word] = 1_000_000
    opening = RedisTracker(proxy.url, lease=0.6)
    if word == b"CLUSTER":  # it need not know
        async with opening as tracker:
            await succeed(tracker, "job")
    else:
        with pytest.raises(StoreUnavailableError, match=r"no answer from Redis at 127\.0\.0\.1"):
            await opening.open()


async def test_a_user_who_may_not_see_the_servers_settings_is_warned(
    server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    await cli(server, "acl", "setuser", "shy", "on", ">s", "resetkeys", "~{aiotracker:default}:*", *ALLOWED, "-info")
    async with RedisTracker(server.url.replace("//", "//shy:s@")) as tracker:
        await succeed(tracker, "job")
    assert "does not let us look at its settings" in caplog.text


async def test_a_user_who_may_not_see_the_servers_clock_is_refused(server: RedisServer) -> None:
    await cli(server, "acl", "setuser", "late", "on", ">l", "resetkeys", "~{aiotracker:default}:*", *ALLOWED, "-time")
    with pytest.raises(StoreError, match="permissions"):
        await RedisTracker(server.url.replace("//", "//late:l@")).open()


# -- on the way


async def test_a_question_that_is_cancelled_ends_and_the_next_one_is_answered(proxy: Proxy) -> None:
    async with RedisTracker(proxy.url) as tracker:
        await tracker.add("job")
        proxy.is_silent = True
        counting = asyncio.create_task(tracker.count())
        await asyncio.sleep(0.01)
        counting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await counting
        proxy.is_silent = False
        assert await tracker.count() == Counter(pending=1)


async def test_a_task_of_the_drivers_that_is_cancelled_cancels_no_commit(server: RedisServer) -> None:
    async with RedisTracker(server.url) as tracker:
        assert tracker._server is not None
        send = tracker._server._send
        lost: list[Any] = []

        async def cancelled(commands: list[driver.Command]) -> list[Any]:
            replies = await send(commands)
            if len(lost) < 2:
                lost.append(replies)
                raise asyncio.CancelledError  # as the end of `asyncio.run` does it to a task that is not ours
            return replies

        tracker._server._send = cancelled  # type: ignore[method-assign]  # where the driver is called
        await succeed(tracker, "job")
        assert len(lost) == 2
        task = await tracker.load("job")
        assert task is not None
        assert (task.attempts, len(task.ends)) == (1, 1)


async def test_scripts_are_sent_until_the_server_has_them(server: RedisServer, proxy: Proxy) -> None:
    async with RedisTracker(proxy.url) as tracker:
        await cli(server, "script", "flush", "sync")
        proxy.cuts[b"SCRIPT"] = 2
        await succeed(tracker, "job")
        assert proxy.cuts[b"SCRIPT"] == 0


async def test_who_only_reads_in_a_commit_whose_reply_is_lost_is_told_of_no_write(proxy: Proxy) -> None:
    async with RedisTracker(proxy.url) as tracker:
        await succeed(tracker, "first")
        assert tracker._server is not None
        tracker._server._patience = 0.05  # so that it gives up before those who wait
        proxy.lose_reply = 1_000_000
        writing, reading = await asyncio.gather(tracker.add("job"), tracker.load("first"), return_exceptions=True)
        assert isinstance(writing, OutcomeUnknownError)
        assert isinstance(reading, StoreUnavailableError)
        proxy.lose_reply = 0
        assert await tracker.load("job") is not None


# -- the server's clock


async def test_the_servers_clock_is_looked_at_again_and_stands_as_it_was_without_an_answer(
    server: RedisServer, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with RedisTracker(proxy.url) as tracker:
        await cli(server, "config", "resetstat")
        await succeed(tracker, "early")
        assert "cmdstat_time" not in await cli(server, "info", "commandstats")
        monkeypatch.setattr(driver, "MEASURE_EVERY", -1.0)  # it is always long ago
        await succeed(tracker, "job")
        assert "cmdstat_time:calls=2" in await cli(server, "info", "commandstats")
        proxy.cuts[b"TIME"] = 2
        await succeed(tracker, "late")
        assert proxy.cuts[b"TIME"] == 0
        assert abs(tracker.now() - datetime.now(UTC)) < timedelta(seconds=5)


# -- what the server says


async def test_a_server_that_cannot_write_to_its_disk_says_so() -> None:
    async with started(save="3600 1") as server, RedisTracker(server.url) as tracker:
        (server.folder / "dump.rdb" / "in the way").mkdir(parents=True)
        await cli(server, "bgsave")

        async def failed() -> bool:
            return "rdb_last_bgsave_status:err" in await cli(server, "info", "persistence")

        await until(failed)
        with pytest.raises(StoreError, match="cannot write to its disk"):
            await tracker.add("job")


async def test_keys_of_another_kind_under_our_names_are_told_and_left_alone(server: RedisServer) -> None:
    async with RedisTracker(server.url) as tracker:
        await cli(server, "set", KEY + "task:job", "mine")
        await cli(server, "set", KEY + "ready", "mine")
        with pytest.raises(StoreError, match=r"refused: .*WRONGTYPE|refused: .*wrong kind"):
            await tracker.load("job")
        with pytest.raises(StoreError, match=r"refused: .*WRONGTYPE|refused: .*wrong kind"):
            await tracker.claimable(5)
        with pytest.raises(StoreError, match=r"refused: .*WRONGTYPE|refused: .*wrong kind"):
            await tracker.add("job")
        assert await cli(server, "get", KEY + "task:job") == "mine"


async def test_one_record_that_cannot_be_read_leaves_no_other_question_unanswered(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "MAX_READS", 2)
    async with RedisTracker(server.url) as tracker:
        await tracker.add_many([f"job-{number}" for number in range(7)])
        await cli(server, "hset", KEY + "task:job-0", "record", "{nonsense")
        with pytest.raises(StoreCorruptedError, match="task:job-0"):
            [task async for task in tracker.find()]
        found = await asyncio.gather(*(tracker.load(f"job-{number}") for number in range(1, 7)))
        assert [task.id for task in found if task is not None] == [f"job-{number}" for number in range(1, 7)]


async def test_what_has_changed_since_it_was_found_is_not_taken_for_what_was_asked(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with RedisTracker(server.url) as tracker:
        await tracker.add_many(["changed", "removed", "same"])
        load = tracker._load_all

        async def late(ids: Any) -> list[Task]:
            monkeypatch.undo()
            await tracker.ignore("changed")
            await tracker.purge("removed", force=True)
            return await load(ids)

        monkeypatch.setattr(tracker, "_load_all", late)
        assert [task.id async for task in tracker.find(status="pending")] == ["same"]


@pytest.mark.parametrize(
    ("said", "node"),
    [
        ("MOVED 12 10.0.0.7:7001", ("10.0.0.7", 7001)),
        ("MOVED 12 :7001", ("", 7001)),  # a node that does not know its own address
        ("MOVED 12 fe80::1:7001", ("fe80::1", 7001)),
        ("MOVED on", None),
        ("ERR MOVED 12", None),
    ],
)
def test_where_keys_have_moved_is_read_from_the_error(said: str, node: tuple[str, int] | None) -> None:
    assert driver._moved(ResponseError(said)) == node


async def test_a_node_without_an_address_of_its_own_is_on_the_host_that_we_know(server: RedisServer) -> None:
    async with RedisTracker(server.url) as tracker:
        assert tracker._server is not None
        send = tracker._server._send
        told: list[Any] = []

        async def moved(commands: list[driver.Command]) -> list[Any]:
            if not told:
                told.append(commands)
                return [ResponseError(f"MOVED 12 :{server.port}") for _ in commands]
            return await send(commands)

        tracker._server._send = moved  # type: ignore[method-assign]  # what a node of a cluster would say
        await succeed(tracker, "job")
        assert str(tracker._server) == f"127.0.0.1:{server.port}"


def test_nodes_that_have_left_a_cluster_are_not_asked() -> None:
    nodes = (
        "07c3 127.0.0.1:30004@31004,host slave e7d1 0 1426238317239 4 connected\n"
        "67ed :0@0 master,noaddr - 1426238316232 2 disconnected 5461-10922\n"
        "292f 127.0.0.1:30003@31003 master - 0 1426238318243 3 connected 10923-16383\n"
    )
    assert driver._addresses(nodes) == [("127.0.0.1", 30004), ("127.0.0.1", 30003)]
