"""The driver of PostgreSQL, as a tracker uses it: what servers will do, what errors mean. Needs no server."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from aiotracker import (
    InvalidValueError,
    StoreError,
    StoreUnavailableError,
)
from tests.conftest import require_module

asyncpg = require_module("asyncpg")

from aiotracker.backends import _postgres as driver  # noqa: E402 - it cannot be imported without its driver
from aiotracker.backends.postgres import PostgresTracker  # noqa: E402 - the same

FACTS = {
    "version": 160004,
    "encoding": "UTF8",
    "database": "jobs",
    "is_replica": False,
    "is_read_only": False,
    "fsync": "on",
}


# -- what is refused


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"schema": ""}, "schema"),
        ({"schema": "x" * 64}, "schema"),
        ({"schema": "a\0b"}, "schema"),
        ({"max_connections": 0}, "max_connections"),
        ({"max_connections": True}, "max_connections"),
    ],
)
def test_arguments_that_cannot_be_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidValueError, match=said):
        PostgresTracker("postgresql://localhost/db", **options)


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"version": 120020}, "runs version 12; PostgresTracker needs PostgreSQL 13 or later"),
        ({"encoding": "LATIN1"}, "'jobs' is encoded in LATIN1.*ENCODING 'UTF8'"),
        ({"is_replica": True}, "read-only replica"),
        ({"is_read_only": True}, "default_transaction_read_only"),
    ],
)
def test_a_server_that_will_not_do_is_refused_with_what_to_do(facts: dict[str, Any], said: str) -> None:
    with pytest.raises(StoreError, match=said):
        driver.check_server(FACTS | facts, "host:5432/jobs", read_only=False)


@pytest.mark.parametrize(("read_only", "warnings"), [(False, 1), (True, 0)])
def test_who_writes_to_a_server_without_fsync_is_warned(
    caplog: pytest.LogCaptureFixture, read_only: bool, warnings: int
) -> None:
    driver.check_server(FACTS | {"fsync": "off"}, "host:5432/jobs", read_only=read_only)
    assert [record.getMessage().partition(":5432/jobs ")[2] for record in caplog.records] == [
        "runs with fsync = off: what is acknowledged may be lost in a crash"
    ][:warnings]


@pytest.mark.parametrize(
    ("error", "said", "may_pass"),
    [
        (asyncpg.DiskFullError("no space left"), "the disk of h:1/db is full", False),
        (asyncpg.UndefinedColumnError("no column x"), r"no column x \(42703\)", False),
        (asyncpg.DeadlockDetectedError("deadlock"), "DeadlockDetectedError: deadlock", True),
        (asyncpg.AdminShutdownError("going down"), "going down", True),
        (asyncpg.ReadOnlySQLTransactionError("cannot execute INSERT"), "Connect to the primary", True),
        (asyncpg.InterfaceError("connection is closed"), "connection is closed", True),
        (TimeoutError(), "TimeoutError: TimeoutError", True),
    ],
)
def test_what_the_driver_says_is_explained(error: Exception, said: str, may_pass: bool) -> None:
    explained = driver.explained(error, "h:1/db", "aiotracker")
    with pytest.raises(StoreError, match=said):
        raise explained
    assert isinstance(explained, StoreUnavailableError) is may_pass


def test_a_release_of_the_driver_that_reads_a_dsn_in_another_way_is_given_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(asyncpg.connect_utils, "_parse_connect_dsn_and_args")
    assert driver.arguments_of("postgresql://h/db") == {"dsn": "postgresql://h/db"}


# -- the clock


def test_a_quick_answer_about_the_time_counts_more_than_a_slow_one() -> None:
    there = datetime(2026, 1, 1, tzinfo=UTC)
    clock = driver.ServerTime(lambda: 10.0)
    clock.saw(9.0, there, 9.01)
    quick = clock.now()
    clock.saw(9.5, there + timedelta(hours=1), 9.9)
    assert clock.now() == quick
    clock.saw(9.95, there + timedelta(seconds=2), 9.96)
    assert clock.now() != quick


# -- transactions


class Ended:
    """A connection that ends as it is told to."""

    def __init__(self, error: BaseException) -> None:
        self.error = error
        self.terminated = False

    async def execute(self, sql: str, *, timeout: float) -> None:
        raise self.error

    def terminate(self) -> None:
        self.terminated = True


async def test_a_transaction_that_cannot_be_taken_back_ends_its_connection() -> None:
    connection = Ended(ConnectionResetError())
    await driver.give_up(connection)
    assert connection.terminated
    connection = Ended(asyncio.CancelledError())
    with pytest.raises(asyncio.CancelledError):
        await driver.give_up(connection)
    assert connection.terminated
