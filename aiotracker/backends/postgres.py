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
import random
import re
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import datetime, timedelta
from inspect import signature
from typing import Any, Final
from urllib.parse import urlsplit

from typing_extensions import TypeVar, Unpack

from .._core.codec import FORMAT
from .._core.query import Query, Where
from .._core.task import Status, Task
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
from ._pump import PumpTracker, Write
from ._sql import check_namespace, conditions, escaped, is_all_sql, ordering, row, statements, unescaped

try:
    import asyncpg  # type: ignore[import-untyped]  # ships no types
    from asyncpg.exceptions import (  # type: ignore[import-untyped]  # ships no types
        InterfaceError,
        InternalClientError,
        PostgresError,
    )
except ModuleNotFoundError as exc:
    raise ModuleNotFoundError(
        f'PostgresTracker needs {exc.name}: pip install "aiotracker[postgres]"', name=exc.name, path=exc.path
    ) from exc

__all__ = ["PostgresTracker"]

logger = logging.getLogger("aiotracker")

D = TypeVar("D", default=Any)
R = TypeVar("R", default=Any)
T = TypeVar("T")

OLDEST: Final = 130000  # the server's version that has pg_xact_status() for 64-bit ids
PAGE: Final = 500  # records that a scan reads at once
MEASURE_EVERY: Final = 10.0  # seconds between two looks at the server's clock
DRIFT: Final = 0.05  # seconds by which a clock may drift between two of them, the slower answers included
MAX_PAUSE: Final = 0.5  # seconds between two tries
CLOSE_TIME: Final = 2.0  # seconds that closing waits for idle connections to say goodbye

_DRIVER_ERRORS: Final = (
    PostgresError,
    InterfaceError,
    InternalClientError,
    OSError,
    TimeoutError,
    asyncio.TimeoutError,
)
_NO_WRITES: Final = ("25006", "0A000")  # what a replica says to a write, and to BEGIN READ WRITE
_NUL: Final = re.compile(r"\\(?:u000([01])|.)", re.DOTALL)
_ESCAPED_NUL: Final = re.compile(r"\\(?:u0001\\u000([12])|.)", re.DOTALL)
_ESCAPES: Final = {"0": r"\u0001\u0001", "1": r"\u0001\u0002"}
_UNESCAPES: Final = {"1": r"\u0000", "2": r"\u0001"}

Connection = Any  # asyncpg.Connection, or what a pool lends in its place
Pool = Any  # asyncpg.Pool


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
        self._time: _ServerTime | None = None  # None: a clock that was passed in is taken for the server's
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
            self._time = _ServerTime(self._seconds)
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
            there = await connection.fetchval("SELECT to_regclass($1)::text", f"{_quoted(self._schema)}.store")
            if there is None:
                await connection.execute(self._sql["schema"], timeout=self._patience)
            else:
                found = await connection.fetch(self._sql["format"])
                self._check_format([record["format"] for record in found])
            await connection.execute("COMMIT", timeout=self._patience)
        except BaseException:
            await _give_up(connection)
            raise

    async def _prepare(self, stack: AsyncExitStack) -> None:
        """Opens the pool, and looks at what kind of server this is."""
        texts = await asyncio.to_thread(statements, "postgres.sql")
        self._sql = {name: text.replace("{schema}", _quoted(self._schema)) for name, text in texts.items()}
        if self.read_only:
            self._sql["claimable"] = self._sql["claimable"].replace("FOR UPDATE SKIP LOCKED", "")
        self._pid = os.getpid()
        stack.push_async_callback(self._close)
        arguments: dict[str, Any] = {}
        if self._given is not None:
            self._pool = self._given
        else:
            try:
                arguments = await asyncio.to_thread(_arguments, self._dsn)
            except (InterfaceError, InternalClientError, ValueError, OSError) as exc:
                raise InvalidValueError(f"the dsn cannot be used: {exc}") from exc
            arguments["timeout"] = self._patience * 0.6
            await self._make_pool(arguments)
        facts = await self._first_look()
        if facts["is_pooled"] and self._given is None:
            await self._close()
            await self._make_pool(arguments | {"statement_cache_size": 0})
        self._check_facts(facts)

    async def _make_pool(self, arguments: dict[str, Any]) -> None:
        self._pool = await asyncpg.create_pool(
            min_size=0, max_size=self._max_connections, connection_class=_Connection, **arguments
        )
        self._last = _at_the_end_of_the_loop(self._pool)
        await anext(self._last)

    async def _first_look(self) -> dict[str, Any]:
        until, pause = time.monotonic() + 0.9 * self._patience, 0.02
        while True:
            try:
                async with self._lent() as connection:
                    return await self._facts(connection)
            except _DRIVER_ERRORS as exc:
                error = self._explain(exc)
                # A server that starts, or has no room now, may have it soon; one that is not there is told at once.
                if _state(exc) not in ("53300", "57P03") or time.monotonic() + pause > until:
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
            await _give_up(connection)
            raise
        # A pooler has to make up the process id that it tells when somebody connects.
        facts["is_pooled"] = facts["pid"] != connection.get_server_pid()
        return facts

    def _check_facts(self, facts: Mapping[str, Any]) -> None:
        self._is_pooled = facts["is_pooled"]
        if facts["version"] < OLDEST:
            raise StoreError(
                f"{self._where} runs version {facts['version'] // 10000}; PostgresTracker needs "
                f"PostgreSQL {OLDEST // 10000} or later"
            )
        if facts["encoding"] != "UTF8":
            raise StoreError(
                f"the database {facts['database']!r} is encoded in {facts['encoding']}, which does not hold any text: "
                "create one with ENCODING 'UTF8' TEMPLATE template0"
            )
        if not self.read_only and (facts["is_replica"] or facts["is_read_only"]):
            what = "a read-only replica" if facts["is_replica"] else "read-only (default_transaction_read_only = on)"
            raise StoreError(
                f"{self._where} is {what}: connect to the primary (target_session_attrs=read-write finds it among "
                "several hosts), or open the tracker with read_only=True"
            )
        if facts["fsync"] == "off" and not self.read_only:
            logger.warning("%s runs with fsync = off: what is acknowledged may be lost in a crash", self._where)
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
        except _DRIVER_ERRORS:
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
        if "\\u0001" in record:
            record = _ESCAPED_NUL.sub(lambda found: _UNESCAPES[found[1]] if found[1] else found[0], record)
        try:
            return Task.decode(record, version=version)
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
        except _PoisonError as exc:
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
        pause = _Pause(until)
        lost: set[str] = set()
        while True:
            some = [write for write in writes if write.task_id not in lost] if lost else writes
            if not some:
                return set()
            try:
                return await self._transaction(kind, some)
            except _RevivedError as exc:
                lost |= exc.ids
            except _UnknownError as exc:
                if exc.__cause__ is not None:
                    self._explain(exc.__cause__)
                return await self._resolve(exc, some, until)
            except _DRIVER_ERRORS as exc:
                if _is_poison(exc):
                    raise _PoisonError from exc
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
                    raise _RevivedError({ids[found] for found in done["revived"]})
                xid = done["xid"]
                said = await connection.execute("COMMIT", timeout=limit)
                if said != "COMMIT":
                    raise _UnknownError(xid)
            except BaseException as exc:
                if _state(exc) in _NO_WRITES:
                    connection.terminate()  # the primary has become a replica: the next connection may find the new one
                else:
                    await _give_up(connection)
                if xid is not None and isinstance(exc, _DRIVER_ERRORS):
                    raise _UnknownError(xid) from exc
                raise
        return {ids[found] for found in done["ids"]}

    def _row(self, write: Write, task: Task) -> tuple[Any, ...]:
        record = write.raw.decode()
        if "\\u000" in record:
            record = _NUL.sub(lambda found: _ESCAPES[found[1]] if found[1] else found[0], record)
        _, *values, _ = row(task, b"", self._namespace, _same)
        return (*values, record, write.expected)

    async def _resolve(self, unknown: "_UnknownError", writes: list[Write], until: float) -> set[str]:
        """After a COMMIT without an answer: which writes are stored."""
        pause = _Pause(until)
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
            if _state(exc) == "22023":  # a crash has thrown away that this number was ever given
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

    async def count(self, **where: Unpack[Where]) -> Counter[str]:
        query = self._query(where)
        if not is_all_sql(query):
            return await super().count(**where)
        values: list[Any] = [self._namespace]
        clause = self._where_clause(query, values)
        rows = await self._fetch(f"SELECT status, count(*) FROM {self._table} WHERE {clause} GROUP BY status", *values)
        return Counter({Status(status): number for status, number in rows})

    async def claimable(self, limit: int) -> Claimable:
        now = self.now()
        rows = await self._fetch(self._sql["claimable"], self._namespace, now, limit)
        tasks = [self._task(version, record) for _, version, record in rows]
        if len(tasks) >= limit:
            return Claimable(tasks, now)
        ((due, is_work_left),) = await self._fetch(self._sql["next_due"], self._namespace, now)
        # What is left and was not found is being written by somebody.
        return Claimable(tasks, now if due is None and is_work_left and not tasks else due)

    @property
    def _table(self) -> str:
        return f"{_quoted(self._schema)}.task"

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
            await _give_up(connection)
            raise
        return rows

    # -- connections

    async def _patiently(self, use: Callable[[Connection], Awaitable[T]], until: float | None = None) -> T:
        """Does something that may be done twice, again until it works or the time is over."""
        pause = _Pause(time.monotonic() + 0.9 * self._patience if until is None else until)
        while True:
            try:
                async with self._lent() as connection:
                    return await use(connection)
            except _DRIVER_ERRORS as exc:
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
            with contextlib.suppress(*_DRIVER_ERRORS):  # a connection that is lost need not be given back
                await pool.release(connection, timeout=self._patience * 0.6)

    # -- errors

    @property
    def _where(self) -> str:
        if self._dsn is None:
            return "the server of the pool"
        try:
            parts = urlsplit(self._dsn)
            return f"{parts.hostname or 'localhost'}:{parts.port or 5432}{parts.path}"
        except ValueError:
            return "the server"

    def _blame(self) -> str:
        return f"{self._where} does not answer in time; {self._trouble}"

    def _explain(self, exc: BaseException) -> TrackerError:
        """What a driver's error means; `StoreUnavailableError` where trying again may help."""
        state, where, said = _state(exc), self._where, str(exc) or type(exc).__name__
        self._trouble = f"last it said: {said}"
        if state in ("28P01", "28000"):
            return StoreError(f"{where} refuses this user: {said}. Check user, password and pg_hba.conf")
        if state == "3D000":
            return StoreError(f"{where}: {said}. Create it (createdb), or correct the dsn")
        if state in ("3F000", "42P01"):
            return StoreError(
                f"{where} has no tables of aiotracker in the schema {self._schema!r}: run `aiotracker init URL`, or "
                "await tracker.init(), once"
            )
        if state == "42501":
            return StoreError(
                f"{where}: {said}. GRANT USAGE ON SCHEMA {_quoted(self._schema)} and SELECT, INSERT, UPDATE, DELETE ON "
                f"ALL TABLES IN SCHEMA {_quoted(self._schema)} to this user"
            )
        if state in _NO_WRITES:
            return StoreUnavailableError(
                f"{where} takes no writes, as a replica does not: {said}. Connect to the primary"
            )
        if state == "53100":
            return StoreError(f"the disk of {where} is full: {said}")
        if state == "53300":
            return StoreUnavailableError(
                f"{where} takes no more connections: {said}. Raise max_connections, put PgBouncer before it, or give "
                "trackers a smaller max_connections or one shared pool"
            )
        if isinstance(exc, PostgresError) and state[:2] not in ("08", "40", "53", "55", "57", "58", "25", "XX"):
            return StoreError(f"{where}: {said} ({state})")
        return StoreUnavailableError(f"{where} does not answer as it should: {type(exc).__name__}: {said}")


class _Connection(asyncpg.Connection):  # type: ignore[misc]  # ships no types
    """Leaves nothing behind in its session, which therefore need not be cleaned with each use."""

    def get_reset_query(self) -> str:
        return ""


def _arguments(dsn: str | None) -> dict[str, Any]:
    """What `asyncpg.connect` makes of a DSN, the environment, `~/.pgpass` and certificates: files that it would read on
    the event loop with each connection.
    """
    parse = getattr(asyncpg.connect_utils, "_parse_connect_dsn_and_args", None)
    if parse is None:
        return {"dsn": dsn}
    addresses, found = parse(**dict.fromkeys(signature(parse).parameters) | {"dsn": dsn})
    addresses = [
        address if isinstance(address, tuple) else (os.path.dirname(address), _port(address)) for address in addresses
    ]
    return {
        "host": [host for host, _ in addresses],
        "port": [port for _, port in addresses],
        "user": found.user,
        "password": found.password or "",
        "database": found.database,
        "ssl": found.ssl or False,
        "server_settings": found.server_settings,
        "target_session_attrs": found.target_session_attrs,
        "krbsrvname": found.krbsrvname,
        "gsslib": found.gsslib,
        "direct_tls": getattr(found, "ssl_negotiation", None) == "direct",
        "connect": _Connector(may_be_plain=found.sslmode < found.sslmode.require),
    }


def _port(socket: str) -> int:
    return int(socket.rpartition(".")[2])


class _Connector:
    """Connects as `sslmode=prefer` says: without TLS where the server has none."""

    def __init__(self, may_be_plain: bool) -> None:
        self._may_be_plain = may_be_plain
        self._has_no_tls = False

    async def __call__(self, dsn: str | None = None, **arguments: Any) -> Connection:
        arguments["dsn"] = dsn
        if not self._has_no_tls:
            try:
                return await asyncpg.connect(**arguments)
            except ConnectionError as exc:
                if not self._may_be_plain or not arguments.get("ssl") or "rejected SSL" not in str(exc):
                    raise
        try:
            connection = await asyncpg.connect(**arguments | {"ssl": False})
        except BaseException:
            self._has_no_tls = False
            raise
        self._has_no_tls = True
        return connection


async def _at_the_end_of_the_loop(pool: Pool) -> AsyncGenerator[None, None]:
    """Ends all connections when `asyncio.run` does, if nobody closed the tracker: later their loop is gone."""
    try:
        yield
    finally:
        if not pool.is_closing():
            pool.terminate()


class _ServerTime:
    """The server's clock, by a clock of ours that nobody can set."""

    def __init__(self, seconds: Callable[[], float]) -> None:
        self._seconds = seconds
        self._best = float("inf")
        self._seen_at = 0.0
        self._there = 0.0
        self._then = datetime.min

    def saw(self, before: float, then: datetime, after: float) -> None:
        """The server told its time between two moments of ours."""
        took = after - before
        if took > self._best + DRIFT:
            return  # a slow answer says less than an older one
        self._best = min(self._best, took)
        self._seen_at, self._there, self._then = after, (before + after) / 2, then

    @property
    def uncertainty(self) -> float:
        """Seconds by which two machines may differ that read it like this."""
        return self._best + 2 * DRIFT

    @property
    def is_old(self) -> bool:
        return self._seconds() - self._seen_at > MEASURE_EVERY

    def now(self) -> datetime:
        return self._then + timedelta(seconds=self._seconds() - self._there)


class _Pause:
    """Waits between tries, longer each time, until a moment."""

    def __init__(self, until: float) -> None:
        self._until = until
        self._bound = 0.01

    async def wait(self) -> bool:
        """`False` where the time is over."""
        if time.monotonic() >= self._until:
            return False
        await asyncio.sleep(random.uniform(0, self._bound))
        self._bound = min(MAX_PAUSE, self._bound * 2)
        return time.monotonic() < self._until


class _UnknownError(Exception):
    """Whether a transaction was committed is not known."""

    def __init__(self, xid: str) -> None:
        super().__init__(xid)
        self.xid = xid


class _RevivedError(Exception):
    """Rows would have come back that somebody has deleted."""

    def __init__(self, ids: set[str]) -> None:
        super().__init__(ids)
        self.ids = ids


class _PoisonError(Exception):
    """The server does not take a value."""


async def _give_up(connection: Connection) -> None:
    """Ends a transaction that went wrong; ends the connection where that cannot be. Raises nothing of the driver's."""
    try:
        await connection.execute("ROLLBACK", timeout=1.0)
    except BaseException as exc:
        with contextlib.suppress(*_DRIVER_ERRORS):  # a connection that is lost is taken away from us by its pool
            connection.terminate()
        if not isinstance(exc, _DRIVER_ERRORS):
            raise


def _state(exc: BaseException) -> str:
    return getattr(exc, "sqlstate", None) or ""


def _is_poison(exc: BaseException) -> bool:
    return _state(exc)[:2] in ("22", "23", "54") or isinstance(exc, ValueError)


def _same(value: datetime) -> datetime:
    return value


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
