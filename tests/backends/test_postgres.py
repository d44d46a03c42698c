"""What is particular to PostgreSQL: its service life, its clock, its transactions, and what people see in it."""

import asyncio
import contextlib
import json
import os
import random
import re
import time
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from aiotracker import (
    InvalidValueError,
    OutcomeUnknownError,
    RunningTask,
    Status,
    StoreCorruptedError,
    StoreError,
    StoreUnavailableError,
    SystemClock,
    Task,
    TrackerError,
    UnsupportedError,
)
from aiotracker.testing._torture import Rates, torture
from tests.conftest import require, require_module
from tests.services.postgres import Server, has_pgbouncer, has_postgres, pgbouncer, postgres_server

asyncpg = require_module("asyncpg")

from aiotracker.backends import _postgres  # noqa: E402 - it cannot be imported without its driver
from aiotracker.backends.postgres import PostgresTracker  # noqa: E402 - it cannot be imported without its driver

ROLES = """
CREATE ROLE careful LOGIN PASSWORD 'right';
CREATE ROLE crowded LOGIN CONNECTION LIMIT 0;
CREATE ROLE poor LOGIN;
CREATE ROLE hasty LOGIN SUPERUSER;
ALTER ROLE hasty SET synchronous_commit = off;
CREATE ROLE reader LOGIN SUPERUSER;
ALTER ROLE reader SET default_transaction_read_only = on;
"""

DOCS = Path(__file__).parents[2] / "docs" / "reference" / "postgres.md"

Make = Callable[..., PostgresTracker[Any, Any]]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    require(has_postgres(), "no PostgreSQL")
    with postgres_server() as found:
        asyncio.run(PostgresTracker(found.dsn).init())
        asyncio.run(execute(found.dsn, ROLES))
        yield found


@pytest.fixture
def make(server: Server) -> Make:
    namespace = uuid4().hex
    return lambda **options: PostgresTracker(server.dsn, **{"namespace": namespace} | options)


async def execute(dsn: str, sql: str, *values: Any) -> list[Any]:
    async with connection(dsn) as found:
        if not values:
            await found.execute(sql)
            return []
        rows: list[Any] = await found.fetch(sql, *values)
        return rows


@asynccontextmanager
async def connection(dsn: str) -> AsyncIterator[Any]:
    # In a task of its own: what asyncpg reads when it connects is not aiotracker's.
    found = await asyncio.create_task(asyncpg.connect(dsn))
    try:
        yield found
    finally:
        await found.close()


def as_user(server: Server, user: str) -> str:
    return server.dsn.replace("postgres@", f"{user}@")


# -- opening


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("postgres@", "careful:wrong@"), "refuses this user.*password"),
        (("/postgres", "/nowhere"), "does not exist.*createdb"),
        (("postgres@", "poor@"), "permission denied.*GRANT"),
    ],
)
async def test_what_is_wrong_with_the_dsn_is_said_at_once(server: Server, change: tuple[str, str], said: str) -> None:
    head, _, tail = server.dsn.rpartition(change[0])
    with pytest.raises(StoreError, match=said) as caught:
        await PostgresTracker(head + change[1] + tail).open()
    assert not isinstance(caught.value, StoreUnavailableError)
    assert "wrong" not in str(caught.value), "passwords are not told"


@pytest.mark.parametrize("dsn", ["postgresql://h:port/db", "mysql://h/db", "postgresql://h/db?sslmode=perhaps"])
async def test_a_dsn_that_cannot_be_used_is_refused(dsn: str) -> None:
    with pytest.raises(InvalidValueError, match="dsn"):
        await PostgresTracker(dsn).open()


@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql://postgres@/postgres?host={folder}&port={port}",
        "postgresql://postgres@127.0.0.1:1,127.0.0.1:{port}/postgres?target_session_attrs=read-write",
        "postgresql://postgres@127.0.0.1:{port}/postgres?sslmode=disable",
    ],
    ids=["a socket", "several hosts", "without TLS"],
)
async def test_a_dsn_is_understood_as_asyncpg_does(server: Server, dsn: str) -> None:
    url = dsn.format(folder=server.folder, port=server.port)
    async with PostgresTracker(url, namespace=uuid4().hex) as tracker:
        assert await tracker.add("job")


async def test_tls_that_is_required_is_not_given_up(server: Server) -> None:
    with pytest.raises(StoreUnavailableError, match="SSL"):
        await PostgresTracker(f"{server.dsn}?sslmode=require").open()


async def test_a_server_that_is_not_there_is_an_error_soon() -> None:
    began = time.monotonic()
    with pytest.raises(StoreUnavailableError, match=r"127\.0\.0\.1:1/"):
        await PostgresTracker("postgresql://postgres@127.0.0.1:1/postgres").open()
    assert time.monotonic() - began < 5


async def test_too_many_connections_is_an_error_that_says_what_to_do(server: Server) -> None:
    with pytest.raises(StoreUnavailableError, match=r"too many connections.*Raise max_connections"):
        await PostgresTracker(as_user(server, "crowded"), lease=0.9).open()


async def test_a_place_that_becomes_free_is_waited_for(server: Server) -> None:
    opening = asyncio.create_task(PostgresTracker(as_user(server, "crowded"), namespace=uuid4().hex).open())
    try:
        await asyncio.wait({opening}, timeout=0.1)
        assert not opening.done()
        await execute(server.dsn, "GRANT ALL ON SCHEMA aiotracker TO crowded")
        await execute(server.dsn, "GRANT ALL ON ALL TABLES IN SCHEMA aiotracker TO crowded")
        await execute(server.dsn, "ALTER ROLE crowded CONNECTION LIMIT 5")
        tracker = await opening
        assert await tracker.add("job")
        await tracker.aclose()
    finally:
        await execute(server.dsn, "ALTER ROLE crowded CONNECTION LIMIT 0")


async def test_a_database_in_another_encoding_is_refused(server: Server) -> None:
    await execute(server.dsn, "CREATE DATABASE latin ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0")
    with pytest.raises(StoreError, match="'latin' is encoded in LATIN1"):
        await PostgresTracker(server.dsn.removesuffix("postgres") + "latin").open()


async def test_a_connection_that_ends_while_it_is_opened_is_told(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    async def prepare(*args: Any, **options: Any) -> Any:
        raise asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation")

    monkeypatch.setattr(_postgres.OwnConnection, "prepare", prepare)
    with pytest.raises(StoreUnavailableError, match="closed in the middle"):
        await make().open()


async def test_a_database_without_the_tables_says_how_they_are_made(server: Server) -> None:
    tracker = PostgresTracker(server.dsn, schema="elsewhere")
    with pytest.raises(StoreError, match=r"no tables of aiotracker in the schema 'elsewhere'.*aiotracker init"):
        await tracker.open()
    await tracker.init()
    async with tracker:
        assert await tracker.add("job")


async def test_init_changes_nothing_that_is_there(make: Make) -> None:
    async with make() as tracker:
        await tracker.add("job")
    await asyncio.gather(*(make().init() for _ in range(4)))
    async with make() as tracker:
        assert await tracker.load("job") is not None


async def test_many_may_init_at_once(server: Server) -> None:
    await asyncio.gather(*(PostgresTracker(server.dsn, schema="crowd").init() for _ in range(5)))
    assert (await execute(server.dsn, "SELECT count(*) FROM crowd.store WHERE $1", True))[0][0] == 1


async def test_tables_of_another_release_are_left_alone(server: Server) -> None:
    tracker = PostgresTracker(server.dsn, schema="later")
    await tracker.init()
    await execute(server.dsn, "UPDATE later.store SET format = 2")
    with pytest.raises(StoreError, match="has format 2, and this release of aiotracker knows format 1"):
        await tracker.open()
    with pytest.raises(StoreError, match="nothing was changed"):
        await tracker.init()


@pytest.mark.parametrize("schema", ['Wei"rd; DROP SCHEMA aiotracker; --', "{schema}", "ä ö", "select", "$1"])
async def test_a_schema_may_have_any_name(server: Server, schema: str) -> None:
    tracker = PostgresTracker(server.dsn, schema=schema)
    await tracker.init()
    async with tracker:
        async with tracker.run("job"):
            pass
        assert await tracker.count() == {Status.SUCCEEDED: 1}
        assert [task.id async for task in tracker.find(order_by="-update_time")] == ["job"]
        assert await tracker.purge("job", force=True) == 1


async def test_a_read_only_replica_is_refused_for_writing_and_good_for_reading(server: Server, make: Make) -> None:
    async with make() as tracker:
        await tracker.add("job")
        with postgres_server(replica_of=server) as replica:
            with pytest.raises(StoreError, match=r"read-only replica.*primary"):
                await PostgresTracker(replica.dsn).open()
            reading = PostgresTracker(replica.dsn, namespace=tracker._namespace, read_only=True)
            async with reading:
                assert [task.id async for task in reading.find(status="pending")] == ["job"]
                assert [task.id for task in (await reading.claimable(10)).tasks] == ["job"]
                with pytest.raises(UnsupportedError):
                    await reading.add("other")


async def test_a_user_who_is_read_only_is_refused_for_writing(server: Server) -> None:
    with pytest.raises(StoreError, match="default_transaction_read_only"):
        await PostgresTracker(as_user(server, "reader")).open()


async def test_a_commit_is_durable_although_the_user_is_hasty(server: Server) -> None:
    seen: list[str] = []
    tracker = PostgresTracker(as_user(server, "hasty"), namespace=uuid4().hex)
    async with tracker:
        watch(tracker, lambda sql, inner: seen.append(sql))
        await tracker.add("job")
    assert any("SET LOCAL synchronous_commit = on" in sql for sql in seen)


async def test_a_pool_that_is_passed_in_is_used_and_not_closed(server: Server) -> None:
    pool = await asyncio.create_task(make_pool(server.dsn))
    try:
        for _ in range(2):
            async with PostgresTracker(pool=pool, namespace=uuid4().hex) as tracker, tracker.run("job"):
                pass
        assert await pool.fetchval("SELECT 1") == 1
    finally:
        await pool.close()


async def make_pool(dsn: str) -> Any:
    return await asyncpg.create_pool(dsn, min_size=2, max_size=2)


def test_a_dsn_or_a_pool_is_needed() -> None:
    with pytest.raises(InvalidValueError, match="a dsn or a pool"):
        PostgresTracker()
    with pytest.raises(InvalidValueError, match="namespace"):
        PostgresTracker("postgresql://", namespace="a/b")


# -- what is stored


async def test_a_nul_is_kept_and_poisons_neither_the_batch_nor_a_query(server: Server, make: Make) -> None:
    value = {"a\0b": ["\0", "\x01", "\\u0000", "\\\0", "\x01\x02", "\\u0001\\u0001"], "error_type": "\0"}
    async with make() as tracker:
        await tracker.add_many([("with \0 in it", value), ("with \x01 in it", value), ("plain", {"n": 1})])
        task = await tracker.load("with \0 in it")
        assert task is not None
        assert task.data == value
        ids = ["plain", "with \0 in it", "with \x01 in it"]
        assert [task.id async for task in tracker.find(order_by="id")] == ids
        assert [task.id async for task in tracker.find(prefix="with \0")] == ["with \0 in it"]
    rows = await execute(
        server.dsn, "SELECT data ->> 'n' FROM aiotracker.tasks WHERE namespace = $1 ORDER BY 1", tracker._namespace
    )
    assert [row[0] for row in rows] == ["1", None, None]


async def test_numbers_come_back_as_they_were(make: Make) -> None:
    values = [1e22, -0.0, 1.0, 1, 2**64 - 1, 5e-324, 1.7976931348623157e308]
    async with make() as tracker:
        await tracker.add("job", values)
        task = await tracker.load("job")
        assert task is not None
        assert json.dumps(task.data) == json.dumps(values)


async def test_a_record_that_the_server_does_not_take_fails_alone(make: Make) -> None:
    def poison(task: Task | None, now: datetime) -> Task | None:
        return Task(id="poison", status=Status.PENDING, attempts=2**63, create_time=now, update_time=now)

    async with make() as tracker:

        async def poisoned() -> Task | None:
            return await tracker.update("poison", poison)

        results = await asyncio.gather(
            *(tracker.add(f"job-{index}") for index in range(20)),
            poisoned(),
            *(tracker.add(f"other-{index}") for index in range(20)),
            return_exceptions=True,
        )
        assert [result for result in results if result is not True] == [results[20]]
        assert isinstance(results[20], StoreError)
        assert "takes no such record" in str(results[20])
        assert await tracker.load("poison") is None


async def test_two_batches_in_opposite_order_do_not_deadlock(server: Server, make: Make) -> None:
    ids = [f"job-{index:03}" for index in range(300)]
    async with make() as one, make() as two:
        for round_ in range(10):
            some = [f"{task_id}/{round_}" for task_id in ids]
            added = await asyncio.gather(one.add_many(some), two.add_many(list(reversed(some))))
            assert sum(added) == len(some)
    ((deadlocks,),) = await execute(server.dsn, "SELECT deadlocks FROM pg_stat_database WHERE datname = $1", "postgres")
    assert deadlocks == 0


async def test_what_was_purged_is_not_brought_back_by_a_late_write(make: Make) -> None:
    async with make() as one, make() as two:
        await one.add("job")
        await one.add("other")
        seen = await one.load("job")
        assert seen is not None
        assert await two.purge("job", force=True) == 1

        def change(task: Task | None, now: datetime) -> Task | None:
            return None if task is None else task.replace(note="late", update_time=now)

        late, _ = await asyncio.gather(one.update("job", change, known=seen), one.add("third"))
        assert late is None
        assert await one.load("job") is None
        assert await one.load("third") is not None


async def test_people_see_what_failed_today_by_error_type(server: Server, make: Make) -> None:
    async def body(task: RunningTask[Any, Any]) -> None:
        raise (ValueError if task.id < "job-2" else KeyError)("no good")

    async with make() as tracker:
        await tracker.work(body, ids=[f"job-{index}" for index in range(5)], retry=tracker.retry.__class__(1))
        rows = await execute(
            server.dsn,
            "SELECT error_type, count(*), min(error_message) FROM aiotracker.tasks WHERE namespace = $1 "
            "AND status IN ('failed', 'exhausted') AND finish_time >= current_date GROUP BY 1 ORDER BY 2",
            tracker._namespace,
        )
    assert [tuple(row) for row in rows] == [("ValueError", 2, "no good"), ("KeyError", 3, "'no good'")]


async def test_the_sql_of_the_documentation_runs(server: Server) -> None:
    page = await asyncio.to_thread(DOCS.read_text)
    blocks = re.findall(r"^```text\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    await execute(server.dsn, "CREATE ROLE app LOGIN")
    for block in blocks:
        await execute(server.dsn, block)
    async with PostgresTracker(as_user(server, "app"), namespace=uuid4().hex) as tracker:
        async with tracker.run("job"):
            pass
        assert await tracker.purge("job", force=True) == 1


@pytest.mark.parametrize("sql", ["DELETE FROM aiotracker.tasks", "UPDATE aiotracker.tasks SET status = 'pending'"])
async def test_the_view_is_read_only(server: Server, sql: str) -> None:
    with pytest.raises(asyncpg.PostgresError, match=r"cannot (delete from|update) view"):
        await execute(server.dsn, sql)


async def test_nothing_outside_the_namespace_is_touched(make: Make) -> None:
    async with make() as one, make(namespace=uuid4().hex) as other:
        for tracker in (one, other):
            await tracker.add("job")
            await tracker.add("more")
        async with one.run("job"):
            pass
        await one.purge(status=list(Status), force=True)
        assert await one.count() == {}
        assert await other.count() == {Status.PENDING: 2}
        assert [task.id for task in (await other.claimable(5)).tasks] == ["job", "more"]
        assert (await one.claimable(5)) == ([], None)


# -- transactions


def watch(tracker: PostgresTracker[Any, Any], seen: Callable[[str, Any], object]) -> None:
    """Is told each statement before it is sent, with the connection."""
    lent = tracker._lent

    class Watched:
        def __init__(self, inner: Any) -> None:
            self._inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inner, name)

        async def execute(self, sql: str, *values: Any, **options: Any) -> Any:
            answer = seen(sql, self._inner)
            if asyncio.iscoroutine(answer):
                await answer
            return await self._inner.execute(sql, *values, **options)

    @asynccontextmanager
    async def watched() -> AsyncIterator[Any]:
        async with lent() as inner:
            yield Watched(inner)

    tracker._lent = watched  # type: ignore[method-assign]  # seen from outside


@pytest.mark.parametrize("landed", [True, False], ids=["it landed", "it did not"])
async def test_a_commit_without_an_answer_is_asked_after(make: Make, landed: bool) -> None:
    lost: list[str] = []

    async def lose(sql: str, inner: Any) -> None:
        if sql == "COMMIT" and len(lost) < 3:
            lost.append(sql)
            if landed:
                await inner.execute("COMMIT")
            inner.terminate()
            raise ConnectionResetError("the reply was lost")

    async with make() as tracker:
        real, asked = tracker._is_under_way, []

        async def under_way(inner: Any, xid: str) -> bool:
            asked.append(xid)
            return await real(inner, xid)

        tracker._is_under_way = under_way  # type: ignore[method-assign,assignment]  # seen from outside
        watch(tracker, lambda sql, inner: lose(sql, inner))
        assert await tracker.add("job", {"n": 1}) is True
        async with tracker.run("job") as task:
            task.result = "once"
        record = await tracker.load("job")
    assert len(lost) == len(set(asked)) == 3
    assert record is not None
    assert (record.status, record.attempts, record.result) == (Status.SUCCEEDED, 1, "once")


async def test_a_commit_that_cannot_be_asked_after_in_time_is_an_unknown_outcome(make: Make) -> None:
    async with make(lease=0.9) as tracker:
        real, lost = tracker._is_under_way, asyncio.Event()

        async def under_way(inner: Any, xid: str) -> bool:
            assert await real(inner, xid) is False
            return True

        tracker._is_under_way = under_way  # type: ignore[method-assign,assignment]  # a server that is not done with it

        async def lose(sql: str, inner: Any) -> None:
            if sql == "COMMIT" and not lost.is_set():
                lost.set()
                await inner.execute("COMMIT")
                inner.terminate()
                raise ConnectionResetError("the reply was lost")

        watch(tracker, lambda sql, inner: lose(sql, inner))
        with pytest.raises((OutcomeUnknownError, StoreUnavailableError)):
            await tracker.add("job")


async def test_whether_a_transaction_is_under_way_is_asked_of_the_server(server: Server, make: Make) -> None:
    async with make() as tracker, connection(server.dsn) as other, connection(server.dsn) as asking:
        await other.execute("BEGIN")
        xid = await other.fetchval("SELECT pg_current_xact_id()::text")
        assert await tracker._is_under_way(asking, xid)
        await other.execute("COMMIT")
        assert not await tracker._is_under_way(asking, xid)
        assert not await tracker._is_under_way(asking, str(int(xid) + 1_000_000)), "a crash took it back"


async def test_a_commit_that_the_server_turned_into_a_rollback_is_not_taken_for_one(make: Make) -> None:
    async with make() as tracker:
        turned: list[str] = []

        async def turn(sql: str, inner: Any) -> None:
            if sql == "COMMIT" and not turned:
                turned.append(sql)
                with pytest.raises(asyncpg.PostgresError):
                    await inner.execute("SELECT 1/0")  # what is committed then says ROLLBACK, and is no error

        watch(tracker, turn)
        assert await tracker.add("job", {"n": 1})
        assert turned
        task = await tracker.load("job")
        assert task is not None
        assert task.data == {"n": 1}


async def test_a_commit_whose_fate_cannot_be_asked_is_an_unknown_outcome(make: Make) -> None:
    async with make(lease=0.9) as tracker:
        silent = asyncio.Event()

        async def lose(sql: str, inner: Any) -> None:
            if sql == "COMMIT":
                silent.set()
                inner.terminate()
                raise ConnectionResetError("the reply was lost")

        async def silence(connection: Any, xid: str) -> bool:
            raise asyncpg.UndefinedFunctionError("pg_xact_status does not exist")

        tracker._is_under_way = silence  # type: ignore[method-assign]  # a server that does not tell
        watch(tracker, lose)
        with pytest.raises(OutcomeUnknownError, match="the reply was lost") as caught:
            await tracker.add("job")
        assert caught.value.task_id == "job"
        assert silent.is_set()


async def test_what_the_server_says_of_a_transaction_is_not_taken_for_an_answer_if_it_is_an_error(
    server: Server, make: Make
) -> None:
    async with make() as tracker, connection(server.dsn) as asking:
        await asking.execute("BEGIN")
        with pytest.raises(asyncpg.DivisionByZeroError):
            await asking.execute("SELECT 1/0")
        with pytest.raises(asyncpg.InFailedSQLTransactionError):
            await tracker._is_under_way(asking, "7")


async def test_a_row_that_somebody_has_locked_is_waited_for_within_the_lease(server: Server, make: Make) -> None:
    async with make(lease=1.5) as tracker:
        await tracker.add("job")
        async with connection(server.dsn) as other:
            await other.execute("BEGIN")
            await other.fetch(
                "SELECT 1 FROM aiotracker.task WHERE namespace = $1 AND id = 'job' FOR UPDATE", tracker._namespace
            )
            began = time.monotonic()
            with pytest.raises((StoreUnavailableError, OutcomeUnknownError)):
                await tracker.ignore("job")
            assert time.monotonic() - began < 1.5
            await other.execute("ROLLBACK")
        await tracker.ignore("job")
        task = await tracker.load("job")
        assert task is not None
        assert task.status is Status.IGNORED
        ((open_,),) = await execute(
            server.dsn,
            "SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in transaction%' AND datname = $1",
            "postgres",
        )
        assert open_ == 0


async def test_each_transaction_bounds_itself_below_a_third_of_the_lease(make: Make) -> None:
    limits: list[float] = []

    async def look(sql: str, inner: Any) -> None:
        if sql == "COMMIT":
            for name in ("lock_timeout", "statement_timeout", "idle_in_transaction_session_timeout"):
                limits.append(await inner.fetchval("SELECT setting::float FROM pg_settings WHERE name = $1", name))

    async with make(lease=30) as tracker:
        watch(tracker, lambda sql, inner: look(sql, inner))
        await tracker.add("job")
    assert len(limits) == 3
    assert all(0 < limit < 10_000 for limit in limits)


async def test_work_is_found_although_somebody_is_writing_on_it(server: Server, make: Make) -> None:
    async with make() as tracker:
        await tracker.add("busy")
        async with connection(server.dsn) as other:
            await other.execute("BEGIN")
            await other.fetch("SELECT 1 FROM aiotracker.task WHERE namespace = $1 FOR UPDATE", tracker._namespace)
            tasks, next_due = await tracker.claimable(10)
            assert tasks == []
            assert next_due is not None, "a task that is locked for a moment is not final"
            await tracker.add("free", priority=-1)
            tasks, _ = await tracker.claimable(10)
            assert [task.id for task in tasks] == ["free"]
            await other.execute("ROLLBACK")


# -- the clock


class WrongClock(SystemClock):
    def now(self) -> datetime:
        return super().now() + timedelta(hours=1)


async def test_the_servers_clock_decides_not_the_machines(make: Make) -> None:
    async with make(clock=WrongClock()) as early, make() as right:
        assert abs(early.now() - datetime.now(UTC)) < timedelta(seconds=5)
        assert 0 < early.clock_uncertainty < 2
        await early.add("job")
        task = await right.load("job")
        assert task is not None
        assert abs(task.create_time - datetime.now(UTC)) < timedelta(seconds=5)


async def test_the_servers_clock_is_looked_at_again_after_a_while(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    async with make() as tracker:
        assert tracker._time is not None
        await tracker.add("early")
        seen = tracker._time._seen_at
        monkeypatch.setattr(_postgres, "MEASURE_EVERY", -1.0)  # it is always long ago
        await tracker.add("late")
        assert tracker._time._seen_at > seen


# -- service life


async def test_connections_that_are_cut_are_made_anew(server: Server, make: Make) -> None:
    async with make() as tracker:
        for number in range(5):
            await tracker.add(f"job-{number}")
            await execute(
                server.dsn,
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND $1 "
                "AND backend_type = 'client backend'",
                True,
            )
        assert await tracker.count() == {Status.PENDING: 5}


async def test_a_server_killed_under_load_and_started_again_loses_nothing_acknowledged() -> None:
    require(has_postgres(), "no PostgreSQL")
    with postgres_server() as server:
        await PostgresTracker(server.dsn).init()
        acknowledged: dict[str, int] = {}
        bodies: dict[str, list[int]] = {}
        errors: list[Exception] = []
        stop = asyncio.Event()
        async with PostgresTracker(server.dsn, lease=30.0) as tracker:

            async def load(worker: int) -> None:
                number = 0
                while not stop.is_set():
                    number += 1
                    task_id = f"{worker}/{number}"
                    try:
                        async with tracker.run(task_id) as task:
                            bodies.setdefault(task_id, []).append(task.fence)
                        acknowledged[task_id] = task.fence
                    except TrackerError as exc:
                        errors.append(exc)

            workers = [asyncio.create_task(load(worker)) for worker in range(50)]
            for _ in range(2):
                goal = len(acknowledged) + 200
                await until(lambda: len(acknowledged) > goal)  # noqa: B023 - it is awaited here
                await asyncio.to_thread(server.kill)
                await asyncio.to_thread(server.start)
            goal = len(acknowledged) + 200
            await until(lambda: len(acknowledged) > goal)
            stop.set()
            await asyncio.gather(*workers)
            assert errors == [], "it was back within a third of the lease: nobody need notice"
            found = {task.id: task async for task in tracker.find()}
            assert acknowledged.keys() <= found.keys()
            for task_id, fence in acknowledged.items():
                task = found[task_id]
                assert (task.status, task.fence, task.attempts) == (Status.SUCCEEDED, fence, 1)
                assert bodies[task_id] == [fence]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - what it looks at sets no event
            await asyncio.sleep(0.005)


async def test_a_server_that_stays_away_is_a_clear_error_and_the_tracker_goes_on_when_it_is_back() -> None:
    require(has_postgres(), "no PostgreSQL")
    with postgres_server() as server:
        await PostgresTracker(server.dsn).init()
        async with PostgresTracker(server.dsn, lease=3.0) as tracker:
            await tracker.add("before")
            await asyncio.to_thread(server.kill)
            began = time.monotonic()
            with pytest.raises((StoreUnavailableError, OutcomeUnknownError), match=r"127\.0\.0\.1"):
                await tracker.add("while away")
            with pytest.raises(StoreUnavailableError, match=r"127\.0\.0\.1"):
                [task async for task in tracker.find()]
            assert time.monotonic() - began < 4
            await asyncio.to_thread(server.start)
            assert await tracker.add("after")
            assert [task.id async for task in tracker.find(order_by="id")] in (
                ["after", "before"],
                ["after", "before", "while away"],
            )


async def test_a_server_that_hangs_is_an_error_in_time_and_the_tracker_goes_on_when_it_answers_again() -> None:
    require(has_postgres(), "no PostgreSQL")
    with postgres_server() as server:
        await PostgresTracker(server.dsn).init()
        async with PostgresTracker(server.dsn, lease=3.0) as tracker:
            await tracker.add("before")
            await asyncio.to_thread(server.pause)
            began = time.monotonic()
            results = await asyncio.gather(
                tracker.add("one"),
                tracker.load("before"),
                tracker.count(),
                tracker.claimable(1),
                return_exceptions=True,
            )
            assert all(isinstance(result, StoreUnavailableError | OutcomeUnknownError) for result in results), results
            assert time.monotonic() - began < 3
            await asyncio.to_thread(server.resume)
            assert await tracker.add("after")
            await asyncio.to_thread(server.pause)
            began = time.monotonic()
        assert time.monotonic() - began < 5, "closing is bounded"
        await asyncio.to_thread(server.resume)


async def test_a_primary_that_became_a_replica_is_left_for_the_one_that_takes_writes(
    server: Server, make: Make
) -> None:
    async with make() as tracker:
        begin, tried = tracker._begin, []

        async def demote(sql: str, inner: Any) -> None:
            if sql == begin:
                tried.append(inner.get_server_pid())
                if len(tried) == 1:
                    raise asyncpg.FeatureNotSupportedError("cannot set transaction read-write mode during recovery")

        watch(tracker, lambda sql, inner: demote(sql, inner))
        assert await tracker.add("job")
        assert len(set(tried)) == 2, "on another connection"


async def test_a_forked_child_does_not_use_its_parents_connections(make: Make) -> None:
    async with make() as tracker:
        await tracker.add("job")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads, from Python 3.12 on
            pid = os.fork()
        if pid == 0:
            status = 1
            try:
                for question in (tracker.count, lambda: tracker.load("job")):
                    try:
                        asyncio.run(question())
                    except StoreError as exc:
                        status = 0 if "before a fork" in str(exc) else 2
            finally:
                os._exit(status)
        assert (await asyncio.to_thread(os.waitpid, pid, 0))[1] == 0
        assert await tracker.count() == {Status.PENDING: 1}


def test_a_tracker_whose_loop_has_ended_can_be_closed_and_opened_in_another_one(make: Make) -> None:
    tracker = make()
    asyncio.run(add(tracker, "early"))
    began = time.monotonic()
    asyncio.run(tracker.aclose())
    assert time.monotonic() - began < 2

    async def again() -> None:
        async with tracker:
            await tracker.add("late")
            assert await tracker.count() == {Status.PENDING: 2}

    asyncio.run(again())


async def add(tracker: PostgresTracker[Any, Any], task_id: str) -> None:
    await tracker.open()
    await tracker.add(task_id)


# -- queries

WHEN = datetime(2026, 11, 20, tzinfo=UTC)
MANY = """
INSERT INTO aiotracker.task (
    namespace, id, status, attempts, priority, create_time, update_time, start_time, finish_time, not_before,
    lease_expires_at, worker, error_type, fingerprint, last_outcome, step, write_id, record
)
SELECT
    'many', 'job-' || n, (ARRAY['failed', 'pending', 'succeeded'])[least(n % 50, 2) + 1], 1 + (n % 1000 = 0)::int, 0,
    t, t, t, t, CASE WHEN n % 100 = 1 THEN t END, CASE WHEN n % 1000 = 7 THEN t END,
    CASE WHEN n % 50 = 0 THEN 'host-' || n % 7 END, CASE WHEN n % 50 = 0 THEN 'Error' || n % 7 END,
    CASE WHEN n % 50 = 0 THEN '00000000cab' || n % 7 END, CASE WHEN n % 50 = 0 THEN 'error' END,
    CASE WHEN n % 50 = 0 THEN 'parse' END, n, json_build_object('id', 'job-' || n, 'data', repeat('x', 600))
FROM (SELECT n, timestamptz '2026-11-20' + n * interval '1 second' AS t FROM generate_series(1, 20000) AS n) AS made
"""


@pytest.fixture(scope="module")
def many(server: Server) -> str:
    """A namespace with enough tasks for an index to be worth its while."""
    asyncio.run(execute(server.dsn, MANY))
    asyncio.run(execute(server.dsn, "VACUUM ANALYZE aiotracker.task"))
    return "many"


async def plan_of(tracker: PostgresTracker[Any, Any], asks: Callable[[], Awaitable[Any]], dsn: str) -> str:
    """How the server answers what is asked meanwhile."""
    asked: list[tuple[Any, ...]] = []
    rows = tracker._rows

    async def watch(connection: Any, sql: str, *values: Any) -> list[Any]:
        asked.append((sql, *values))
        return await rows(connection, sql, *values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracker, "_rows", watch)
        with contextlib.suppress(StoreCorruptedError):  # these records are not whole
            await asks()
    lines = [line for sql, *values in asked for line in await execute(dsn, f"EXPLAIN {sql}", *values)]
    return "\n".join(line[0] for line in lines)


async def listed(found: AsyncIterator[Any]) -> list[Any]:
    return [one async for one in found]


async def test_what_is_removed_while_it_is_scanned_is_passed_over(make: Make) -> None:
    async with make() as tracker:
        for task_id in ("1", "2", "3"):
            await tracker.add(task_id)
        read = tracker._read_many

        async def late(ids: list[str]) -> dict[str, Task]:
            tracker._read_many = read  # type: ignore[method-assign]  # only between the ids and their records
            await tracker.purge("2", force=True)
            return await read(ids)

        tracker._read_many = late  # type: ignore[method-assign,assignment]  # the same
        assert [task.id async for task in tracker.find(order_by="-create_time")] == ["3", "1"]


@pytest.mark.parametrize(
    ("index", "where"),
    [
        ("task_pkey", {"prefix": "job-77"}),
        ("task_status", {"status": "failed"}),
        ("task_status", {"status": {"failed", "exhausted"}}),
        ("task_attempts", {"min_attempts": 2}),
        ("task_attempts", {"min_attempts": 5}),
        ("task_create_time", {"created_before": WHEN + timedelta(minutes=1)}),
        ("task_update_time", {"updated_before": WHEN + timedelta(minutes=1)}),
        ("task_finish_time", {"finished_before": WHEN + timedelta(minutes=1)}),
        ("task_worker", {"worker": "host-3"}),
        ("task_error_type", {"error_type": "Error3"}),
        ("task_fingerprint", {"fingerprint": "00000000cab3"}),
        ("task_last_outcome", {"last_outcome": "error"}),
        ("task_step", {"step": "parse"}),
        ("task_update_time", {"order_by": "-update_time"}),
    ],
)
async def test_each_filter_has_an_index(server: Server, make: Make, many: str, index: str, where: Any) -> None:
    async with make(namespace=many) as tracker:
        plan = await plan_of(tracker, lambda: listed(tracker.find(**where, limit=100)), server.dsn)
    assert re.search(rf"\b{index}\b", plan), plan
    assert "Seq Scan" not in plan


async def test_claimable_is_answered_from_indexes(server: Server, make: Make, many: str) -> None:
    async with make(namespace=many) as tracker:
        plan = await plan_of(tracker, lambda: tracker.claimable(10), server.dsn)
        plan += "\n".join(
            line[0] for line in await execute(server.dsn, f"EXPLAIN {tracker._sql['next_due']}", many, WHEN)
        )
    for index in ("task_ready", "task_not_before", "task_lease_expires_at"):
        assert re.search(rf"\b{index}\b", plan), plan
    assert "Seq Scan" not in plan


@pytest.mark.parametrize("by", ["status", "error_type", "fingerprint", "worker", "last_outcome", "step"])
async def test_what_is_counted_is_counted_in_an_index_alone(server: Server, make: Make, many: str, by: Any) -> None:
    async with make(namespace=many) as tracker:
        plan = await plan_of(tracker, lambda: tracker.count(by=by), server.dsn)
        assert (await tracker.count(by=by)).total() == 20_000
    assert re.search(rf"Index Only Scan using task_{by}\b", plan), plan
    assert "Seq Scan" not in plan


# -- PgBouncer


@pytest.fixture(scope="module")
def pooled(server: Server) -> Iterator[str]:
    require(has_pgbouncer(), "no PgBouncer")
    with pgbouncer(server, pool_size=2) as dsn:
        yield dsn


async def test_pgbouncer_in_transaction_mode_is_noticed_and_everything_works(pooled: str) -> None:
    namespace = uuid4().hex
    trackers = [PostgresTracker(pooled, namespace=namespace, worker=f"worker-{number}") for number in range(4)]
    ran: list[str] = []

    async def body(task: RunningTask[Any, Any]) -> None:
        ran.append(task.id)
        await task.step("step", asyncio.sleep, 0, "done")
        if random.random() < 0.1:
            raise ValueError("again")

    async with contextlib.AsyncExitStack() as stack:
        for tracker in trackers:
            await stack.enter_async_context(tracker)
            assert tracker._is_pooled
        await trackers[0].add_many(f"job-{number}" for number in range(300))
        retry = trackers[0].retry.__class__(20, delay=0.0)
        summaries = await asyncio.gather(*(tracker.work(body, retry=retry) for tracker in trackers))
        assert sum(summary.succeeded for summary in summaries) == 300
        counts = await asyncio.gather(*(tracker.count() for tracker in trackers for _ in range(5)))
        assert all(count == {Status.SUCCEEDED: 300} for count in counts)
        assert len([task async for task in trackers[1].find(order_by="-finish_time")]) == 300
        assert await trackers[2].reset(prefix="job-1") == 111
        assert await trackers[3].purge(status=list(Status), force=True) == 300
    assert len(set(ran)) == 300


@pytest.mark.chaos
def test_every_promise_is_kept_through_pgbouncer_while_everything_bad_happens(tmp_path: Path) -> None:
    require(has_postgres() and has_pgbouncer(), "no PostgreSQL, or no PgBouncer")
    with postgres_server() as server, pgbouncer(server, pool_size=3) as dsn:

        def restart() -> None:
            server.kill()
            server.start()

        asyncio.run(PostgresTracker(server.dsn).init())
        report = asyncio.run(
            torture(
                f"{dsn}?namespace=torture",
                workers=4,
                tasks=100,
                seconds=15,
                folder=tmp_path,
                rates=Rates(blocks=1, shifts=2, cuts=1, restarts=0.3),
                restart=restart,
                lease=1.0,
            )
        )
    assert report.ok, str(report)
    assert report.kills > 0


async def test_a_question_through_a_pooler_that_fails_leaves_no_transaction_open(server: Server, make: Make) -> None:
    async with make(max_connections=1) as tracker:
        tracker._is_pooled = True
        with pytest.raises(StoreError, match="division by zero"):
            await tracker._fetch("SELECT 1/0")
        assert (await tracker._fetch("SELECT 1"))[0][0] == 1
        async with tracker._lent() as connection:
            assert not connection.is_in_transaction()


async def test_a_direct_connection_is_not_taken_for_a_pooler(make: Make) -> None:
    async with make() as tracker:
        assert not tracker._is_pooled


async def test_a_commit_leaves_nothing_in_the_session(make: Make) -> None:
    async with make(max_connections=1) as tracker:
        async with tracker._lent() as inner:
            before = await inner.fetch("SELECT name, setting FROM pg_settings WHERE name LIKE '%timeout%'")
        async with tracker.run("job"):
            pass
        await tracker.claimable(5)
        async with tracker._lent() as inner:
            assert await inner.fetch("SELECT name, setting FROM pg_settings WHERE name LIKE '%timeout%'") == before
            assert await inner.fetchval("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == 0
