"""PostgresTracker: one row a task in PostgreSQL, through asyncpg.

A commit is three requests for all who wait: BEGIN with its time-outs, one statement of guarded writes, COMMIT. A row
is written only over the version that it was decided on, so nothing is locked while rules run; rows are written in the
order of their ids, so no two transactions wait for each other. Nothing depends on the session: a pooler may give each
transaction another one.
"""

import asyncio
import contextlib
import logging
import os
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import datetime
from typing import Any, Final

from typing_extensions import TypeVar, Unpack

from .._core.codec import FORMAT
from .._core.query import GroupBy, Query
from .._core.task import Task
from ..clock import SystemClock
from ..contract import Claimable
from ..errors import (
    InvalidValueError,
    OutcomeUnknownError,
    StoreCorruptedError,
    StoreError,
    StoreUnavailableError,
    TrackerError,
)
from ..tracker import Options
from ._postgres import (
    DRIVER_ERRORS,
    MAX_PAUSE,
    NO_WRITES,
    Connection,
    Pause,
    PoisonError,
    Pool,
    PostgresError,
    RevivedError,
    ServerTime,
    UnknownError,
    arguments_of,
    at_the_end_of_the_loop,
    check_server,
    explained,
    give_up,
    is_poison,
    make_pool,
    place_of,
    quoted,
    said_by,
    state_of,
    with_nul,
    without_nul,
)
from ._pump import PumpTracker, Write
from ._sql import COLUMNS, check_namespace, conditions, escaped, is_all_sql, ordering, row, statements, unescaped

__all__ = ["PostgresTracker"]

logger = logging.getLogger("aiotracker")

D = TypeVar("D", default=Any)
R = TypeVar("R", default=Any)
T = TypeVar("T")

PAGE: Final = 500  # records that a scan reads at once
CLOSE_TIME: Final = 2.0  # seconds that closing waits for idle connections to say goodbye


class PostgresTracker(PumpTracker[D, R]):
    """Keeps tasks in PostgreSQL 13 or later, shared by any number of machines; directly, or through PgBouncer.

    Its tables must be there: `await PostgresTracker(dsn).init()`, or `aiotracker init URL`, makes them once.

    A write that was acknowledged survives a crash of the server unless that is configured otherwise (`fsync = off`);
    `synchronous_commit = off` is overridden. A standby that is promoted has what was replicated to it: use synchronous
    replication where nothing acknowledged may be lost then.

    Args:
        dsn: `postgresql://user:password@host:port/database`; everything that asyncpg takes.
        namespace: Several jobs may share one database; nothing outside the namespace is ever touched.
        schema: In which the tables are.
        pool: An asyncpg pool to use instead of one of our own; it is not closed. Behind a pooler that gives each
            transaction another session it needs `statement_cache_size=0`.
        max_connections: Of our own pool. One is enough for all writes.
        **options: As for `BaseTracker`.
    """

    def __init__(
        self,
        dsn: str | None = None,
        *,
        namespace: str = "default",
        schema: str = "aiotracker",
        pool: Pool | None = None,
        max_connections: int = 3,
        **options: Unpack[Options[D, R]],
    ) -> None:
        super().__init__(**options)
        if (dsn is None) == (pool is None):
            raise InvalidValueError("PostgresTracker takes a dsn or a pool, one of them")
        if not isinstance(schema, str) or not 1 <= len(schema.encode()) <= 63 or "\0" in schema:
            raise InvalidValueError(f"schema takes a str of 1 to 63 bytes, not {schema!r}")
        if isinstance(max_connections, bool) or not isinstance(max_connections, int) or max_connections < 1:
            raise InvalidValueError(f"max_connections takes an int of 1 or more, not {max_connections!r}")
        self._dsn = dsn
        self._namespace = check_namespace(namespace)
        self._schema = schema
        self._given = pool
        self._max_connections = max_connections
        self._pool: Pool | None = None
        self._last: AsyncGenerator[None, None] | None = None
        self._sql: dict[str, str] = {}
        self._is_pooled = False  # each transaction may have another session
        self._time: ServerTime | None = None  # None: a clock that was passed in is taken for the server's
        self._trouble = "it has said nothing yet"
        lock, statement = (max(1, int(self._patience * 1000 * part)) for part in (0.3, 0.5))
        self._limits = (
            f"SET LOCAL lock_timeout = {lock}; SET LOCAL statement_timeout = {statement}; "
            f"SET LOCAL idle_in_transaction_session_timeout = {statement}"
        )
        self._begin = ""
        self._pid = 0

    # -- opening

    async def connect(self, stack: AsyncExitStack) -> None:
        await self._prepare(stack)
        found = await self._patiently(lambda connection: self._rows(connection, self._sql["format"]))
        self._check_format([record["format"] for record in found])
        if isinstance(self.clock, SystemClock):
            self._time = ServerTime(self._seconds)
            for _ in range(3):
                await self._patiently(self._measure)
            self.clock_uncertainty = self._time.uncertainty
        self._start_pumps(stack, "aiotracker postgresql")

    async def init(self) -> None:
        """Creates the schema, its tables and indexes where they are not there yet. Not on an open tracker.

        Raises:
            StoreError: It cannot be done, or the schema holds the tables of another release; nothing was changed.
        """
        async with AsyncExitStack() as stack:
            await self._prepare(stack)
            await self._patiently(self._create)

    async def _create(self, connection: Connection) -> None:
        await connection.execute("BEGIN", timeout=self._patience)
        try:
            # Two who do this at once would both find nothing.
            await connection.execute(
                "SELECT pg_advisory_xact_lock(hashtext('aiotracker init'))", timeout=self._patience
            )
            there = await connection.fetchval("SELECT to_regclass($1)::text", f"{quoted(self._schema)}.store")
            if there is None:
                await connection.execute(self._sql["schema"], timeout=self._patience)
            else:
                found = await connection.fetch(self._sql["format"])
                self._check_format([record["format"] for record in found])
            await connection.execute("COMMIT", timeout=self._patience)
        except BaseException:
            await give_up(connection)
            raise

    async def _prepare(self, stack: AsyncExitStack) -> None:
        """Opens the pool, and looks at what kind of server this is."""
        texts = await asyncio.to_thread(statements, "postgres.sql")
        self._sql = {name: text.replace("{schema}", quoted(self._schema)) for name, text in texts.items()}
        if self.read_only:
            self._sql["claimable"] = self._sql["claimable"].replace("FOR UPDATE SKIP LOCKED", "")
        self._pid = os.getpid()
        stack.push_async_callback(self._close)
        arguments: dict[str, Any] = {}
        if self._given is not None:
            self._pool = self._given
        else:
            arguments = await asyncio.to_thread(arguments_of, self._dsn)
            arguments["timeout"] = self._patience * 0.6
            await self._make_pool(arguments)
        facts = await self._first_look()
        if facts["is_pooled"] and self._given is None:
            await self._close()
            await self._make_pool(arguments | {"statement_cache_size": 0})
        self._check_facts(facts)

    async def _make_pool(self, arguments: dict[str, Any]) -> None:
        self._pool = await make_pool(self._max_connections, arguments)
        self._last = at_the_end_of_the_loop(self._pool)
        await anext(self._last)

    async def _first_look(self) -> dict[str, Any]:
        until, pause = time.monotonic() + 0.9 * self._patience, 0.02
        while True:
            try:
                async with self._lent() as connection:
                    return await self._facts(connection)
            except DRIVER_ERRORS as exc:
                error = self._explain(exc)
                # A server that starts, or has no room now, may have it soon; one that is not there is told at once.
                if state_of(exc) not in ("53300", "57P03") or time.monotonic() + pause > until:
                    raise error from exc
            await asyncio.sleep(pause)
            pause = min(MAX_PAUSE, pause * 2)

    async def _facts(self, connection: Connection) -> dict[str, Any]:
        limit = self._patience * 0.6
        try:
            await connection.execute("BEGIN", timeout=limit)
            # Without a name, a prepared statement leaves nothing in a session that may be a pooler's.
            asked = await connection.prepare(self._sql["facts"], name="", timeout=limit)
            facts = dict(await asked.fetchrow(timeout=limit))
            await connection.execute("COMMIT", timeout=limit)
        except BaseException:
            await give_up(connection)
            raise
        # A pooler has to make up the process id that it tells when somebody connects.
        facts["is_pooled"] = facts["pid"] != connection.get_server_pid()
        return facts

    def _check_facts(self, facts: Mapping[str, Any]) -> None:
        self._is_pooled = facts["is_pooled"]
        check_server(facts, self._where, read_only=self.read_only)
        self._begin = f"BEGIN ISOLATION LEVEL READ COMMITTED, READ WRITE; {self._limits}"
        if facts["synchronous_commit"] == "off":
            self._begin += "; SET LOCAL synchronous_commit = on"

    def _check_format(self, found: Sequence[int]) -> None:
        if list(found) != [FORMAT]:
            raise StoreError(
                f"the schema {self._schema!r} of {self._where} has format {', '.join(map(str, found)) or 'none'}, and "
                f"this release of aiotracker knows format {FORMAT}: use the release that made it, or another schema; "
                "nothing was changed"
            )

    async def _close(self) -> None:
        pool, self._pool, self._time = self._pool, None, None
        if pool is None or pool is self._given:
            return
        if pool.is_closing():
            return  # its loop has ended before
        try:
            async with asyncio.timeout(CLOSE_TIME):
                await pool.close()
        except DRIVER_ERRORS:
            pool.terminate()
        finally:
            if self._last is not None:
                await self._last.aclose()

    # -- the server's clock

    def now(self) -> datetime:
        return self.clock.now() if self._time is None else self._time.now()

    def _seconds(self) -> float:
        """By a clock that nobody can set."""
        return self._boot().seconds or self.clock.monotonic()

    async def _measure(self, connection: Connection) -> None:
        assert self._time is not None
        before = self._seconds()
        (found,) = await self._rows(connection, self._sql["time"])
        self._time.saw(before, found[0], self._seconds())

    # -- reading and writing

    async def _read_many(self, task_ids: list[str]) -> dict[str, Task]:
        ids = [escaped(task_id) for task_id in task_ids]
        rows = await self._patiently(
            lambda connection: self._rows(connection, self._sql["read"], self._namespace, ids),
        )
        return {unescaped(task_id): self._task(version, record) for task_id, version, record in rows}

    def _task(self, version: str, record: str) -> Task:
        try:
            return Task.decode(with_nul(record), version=version)
        except ValueError as exc:
            raise StoreCorruptedError(f"a record in {self._where} cannot be read: {exc}", self._schema) from exc

    async def _write_many(self, writes: Mapping[str, Write]) -> tuple[Collection[str], Mapping[str, Exception]]:
        until = time.monotonic() + 0.9 * self._patience  # so that waiters are told why before they give up
        landed: set[str] = set()
        errors: dict[str, Exception] = {}
        # In two transactions, each of which takes its rows in the order of ids.
        await self._write_some("write", [write for write in writes.values() if write.task], until, landed, errors)
        await self._write_some("delete", [write for write in writes.values() if not write.task], until, landed, errors)
        return landed, errors

    async def _write_some(
        self, kind: str, writes: list[Write], until: float, landed: set[str], errors: dict[str, Exception]
    ) -> None:
        if not writes:
            return
        try:
            landed |= await self._guarded(kind, writes, until)
        except PoisonError as exc:
            if len(writes) == 1:
                errors[writes[0].task_id] = StoreError(f"the server takes no such record: {exc.__cause__}")
                return
            # One of them is to blame, and fails alone.
            half = len(writes) // 2
            for some in (writes[:half], writes[half:]):
                await self._write_some(kind, some, until, landed, errors)
        except (StoreError, OutcomeUnknownError) as exc:
            errors.update(dict.fromkeys([write.task_id for write in writes], exc))

    async def _guarded(self, kind: str, writes: list[Write], until: float) -> set[str]:
        """The ids that were written; the others' rows had another version."""
        pause = Pause(until)
        lost: set[str] = set()
        while True:
            some = [write for write in writes if write.task_id not in lost] if lost else writes
            if not some:
                return set()
            try:
                return await self._transaction(kind, some)
            except RevivedError as exc:
                lost |= exc.ids
            except UnknownError as exc:
                if exc.__cause__ is not None:
                    self._explain(exc.__cause__)
                return await self._resolve(exc, some, until)
            except DRIVER_ERRORS as exc:
                if is_poison(exc):
                    raise PoisonError from exc
                error = self._explain(exc)
                if not isinstance(error, StoreUnavailableError) or not await pause.wait():
                    raise error from exc

    async def _transaction(self, kind: str, writes: list[Write]) -> set[str]:
        ids = {escaped(write.task_id): write.task_id for write in writes}
        rows = [
            self._row(write, write.task) if write.task else (task_id, write.expected)
            for task_id, write in zip(ids, writes, strict=True)
        ]
        columns = list(map(list, zip(*rows, strict=True)))
        limit = self._patience * 0.6
        async with self._lent() as connection:
            if self._time is not None and self._time.is_old:
                await self._measure(connection)
            xid = None
            try:
                await connection.execute(self._begin, timeout=limit)
                done = await connection.fetchrow(self._sql[kind], self._namespace, *columns, timeout=limit)
                if done["revived"]:
                    raise RevivedError({ids[found] for found in done["revived"]})
                xid = done["xid"]
                said = await connection.execute("COMMIT", timeout=limit)
                if said != "COMMIT":
                    raise UnknownError(xid)
            except BaseException as exc:
                if state_of(exc) in NO_WRITES:
                    connection.terminate()  # the primary has become a replica: the next connection may find the new one
                else:
                    await give_up(connection)
                if xid is not None and isinstance(exc, DRIVER_ERRORS):
                    raise UnknownError(xid) from exc
                raise
        return {ids[found] for found in done["ids"]}

    def _row(self, write: Write, task: Task) -> tuple[Any, ...]:
        _, *values = row(task, without_nul(write.raw.decode()), self._namespace, _same)
        return (*values, *[None] * (len(COLUMNS) - 1 - len(values)), write.expected)

    async def _resolve(self, unknown: "UnknownError", writes: list[Write], until: float) -> set[str]:
        """After a COMMIT without an answer: which writes are stored."""
        pause = Pause(until)
        mine = {escaped(write.task_id): write for write in writes}
        why = unknown.__cause__

        async def ask(connection: Connection) -> set[str] | None:
            if await self._is_under_way(connection, unknown.xid):
                return None
            rows = await self._rows(connection, self._sql["versions"], self._namespace, list(mine))
            there = dict(rows)
            # What was overtaken meanwhile, or never stored, is decided again on what is stored now.
            return {
                write.task_id
                for task_id, write in mine.items()
                if there.get(task_id) == (None if write.task is None else write.task.write_id)
            }

        while True:
            try:
                landed = await self._patiently(ask, until)
            except StoreError as exc:
                raise OutcomeUnknownError(f"whether it was committed is not known: {why or exc}", "") from exc
            if landed is not None:
                return landed
            if not await pause.wait():
                raise OutcomeUnknownError(f"a commit is under way for {self._patience:.3g} s: {why}", "") from why

    async def _is_under_way(self, connection: Connection, xid: str) -> bool:
        try:
            (status,) = await self._rows(connection, self._sql["status"], xid)
        except PostgresError as exc:
            if state_of(exc) == "22023":  # a crash has thrown away that this number was ever given
                return False
            raise
        return bool(status[0] == "in progress")

    # -- queries

    async def scan(self, query: Query) -> AsyncIterator[Task]:
        if query.order_by in (None, "id"):
            async for found in self._scan_by_id(query):
                yield found
            return
        # A change in the middle may move a task to where the scan has been: so all ids are taken first.
        values: list[Any] = [self._namespace]
        where = self._where_clause(query, values)
        limit = f" LIMIT {query.limit}" if query.limit is not None and is_all_sql(query) else ""
        sql = f"SELECT id FROM {self._table} WHERE {where} ORDER BY {ordering(query)}{limit}"
        ids = [unescaped(task_id) for (task_id,) in await self._fetch(sql, *values)]
        for first in range(0, len(ids), PAGE):
            page = ids[first : first + PAGE]
            tasks = await self._read_many(page)
            for task_id in page:
                if (task := tasks.get(task_id)) is not None:
                    yield task

    async def _scan_by_id(self, query: Query) -> AsyncIterator[Task]:
        direction, after = ("DESC", "<") if query.descending else ("ASC", ">")
        size = PAGE if query.limit is None or not is_all_sql(query) else min(PAGE, max(1, query.limit))
        last: str | None = None
        while True:
            values: list[Any] = [self._namespace]
            where = self._where_clause(query, values)
            if last is not None:
                values.append(last)
                where += f" AND id {after} ${len(values)}"
            rows = await self._fetch(
                f"SELECT id, write_id, record FROM {self._table} WHERE {where} ORDER BY id {direction} LIMIT {size}",
                *values,
            )
            for _, version, record in rows:
                yield self._task(version, record)
            if len(rows) < size:
                return
            last = rows[-1][0]

    def _where_clause(self, query: Query, values: list[Any]) -> str:
        def put(value: Any) -> str:
            values.append(value)
            return f"${len(values)}"

        return " AND ".join(["namespace = $1", *conditions(query, put)])

    async def tally(self, query: Query, by: GroupBy) -> Counter[str]:
        if not is_all_sql(query):
            return await super().tally(query, by)
        values: list[Any] = [self._namespace]
        where = f"FROM {self._table} WHERE {self._where_clause(query, values)}"
        sql = f"SELECT {by}, count(*) {where} AND {by} IS NOT NULL GROUP BY {by}"
        if by != "status":
            # The indexes have only tasks with something to be counted by.
            sql += f" UNION ALL SELECT NULL, count(*) {where}"
        found = dict(await self._fetch(sql, *values))
        total = found.pop(None, 0)
        counts = Counter({unescaped(name): number for name, number in found.items()})
        if (rest := total - counts.total()) > 0:
            counts[""] += rest
        return counts

    async def claimable(self, limit: int) -> Claimable:
        now = self.now()
        rows = await self._patiently(
            lambda connection: self._rows(connection, self._sql["claimable"], self._namespace, now, limit)
        )
        tasks = [self._task(version, record) for _, version, record in rows]
        if len(tasks) >= limit:
            return Claimable(tasks, now)
        ((due, is_work_left),) = await self._fetch(self._sql["next_due"], self._namespace, now)
        # What is left and was not found is being written by somebody.
        return Claimable(tasks, now if due is None and is_work_left and not tasks else due)

    @property
    def _table(self) -> str:
        return f"{quoted(self._schema)}.task"

    async def _fetch(self, sql: str, *values: Any) -> list[Any]:
        return await self._patiently(lambda connection: self._rows(connection, sql, *values))

    async def _rows(self, connection: Connection, sql: str, *values: Any) -> list[Any]:
        limit = self._patience * 0.6
        if not self._is_pooled:
            rows: list[Any] = await connection.fetch(sql, *values, timeout=limit)
            return rows
        # Preparing and running are two requests, which only a transaction keeps in one session.
        try:
            await connection.execute(f"BEGIN; {self._limits}", timeout=limit)
            rows = await connection.fetch(sql, *values, timeout=limit)
            await connection.execute("COMMIT", timeout=limit)
        except BaseException:
            await give_up(connection)
            raise
        return rows

    # -- connections

    async def _patiently(self, use: Callable[[Connection], Awaitable[T]], until: float | None = None) -> T:
        """Does something that may be done twice, again until it works or the time is over."""
        pause = Pause(time.monotonic() + 0.9 * self._patience if until is None else until)
        while True:
            try:
                async with self._lent() as connection:
                    return await use(connection)
            except DRIVER_ERRORS as exc:
                error = self._explain(exc)
                if not isinstance(error, StoreUnavailableError) or not await pause.wait():
                    raise error from exc

    @asynccontextmanager
    async def _lent(self) -> AsyncIterator[Connection]:
        pool = self._pool
        if pool is None:
            raise StoreError("this PostgresTracker is not open; use `async with`, or await open()")
        if self._pid != os.getpid():
            raise StoreError("this tracker was opened before a fork; open another one in the child process")
        connection = await pool.acquire(timeout=self._patience * 0.6)
        try:
            yield connection
        finally:
            with contextlib.suppress(*DRIVER_ERRORS):  # a connection that is lost need not be given back
                await pool.release(connection, timeout=self._patience * 0.6)

    # -- errors

    @property
    def _where(self) -> str:
        return place_of(self._dsn)

    def _blame(self) -> str:
        return f"{self._where} does not answer in time; {self._trouble}"

    def _explain(self, exc: BaseException) -> TrackerError:
        """What a driver's error means; `StoreUnavailableError` where trying again may help."""
        self._trouble = f"last it said: {said_by(exc)}"
        return explained(exc, self._where, self._schema)


def _same(value: datetime) -> datetime:
    return value
