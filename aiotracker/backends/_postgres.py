"""What asyncpg and a PostgreSQL server need of a tracker: connections, the server's clock, what errors mean."""

import asyncio
import contextlib
import logging
import os
import random
import re
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from datetime import datetime, timedelta
from inspect import signature
from typing import Any, Final
from urllib.parse import urlsplit

from ..errors import (
    InvalidValueError,
    StoreError,
    StoreUnavailableError,
    TrackerError,
)

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

__all__ = [
    "DRIVER_ERRORS",
    "MAX_PAUSE",
    "NO_WRITES",
    "Connection",
    "OwnConnection",
    "Pause",
    "PoisonError",
    "Pool",
    "PostgresError",
    "RevivedError",
    "ServerTime",
    "UnknownError",
    "arguments_of",
    "at_the_end_of_the_loop",
    "check_server",
    "explained",
    "give_up",
    "is_poison",
    "make_pool",
    "place_of",
    "quoted",
    "said_by",
    "state_of",
    "with_nul",
    "without_nul",
]


logger = logging.getLogger("aiotracker")

OLDEST: Final = 130000  # the server's version that has pg_xact_status() for 64-bit ids
MEASURE_EVERY: Final = 10.0  # seconds between two looks at the server's clock
DRIFT: Final = 0.05  # seconds by which a clock may drift between two of them, the slower answers included
MAX_PAUSE: Final = 0.5  # seconds between two tries
DRIVER_ERRORS: Final = (
    PostgresError,
    InterfaceError,
    InternalClientError,
    OSError,
    TimeoutError,
    asyncio.TimeoutError,
)
NO_WRITES: Final = ("25006", "0A000")  # what a replica says to a write, and to BEGIN READ WRITE
Connection = Any  # asyncpg.Connection, or what a pool lends in its place
Pool = Any  # asyncpg.Pool
_NUL: Final = re.compile(r"\\(?:u000([01])|.)", re.DOTALL)
_ESCAPED_NUL: Final = re.compile(r"\\(?:u0001\\u000([12])|.)", re.DOTALL)
_ESCAPES: Final = {"0": r"\u0001\u0001", "1": r"\u0001\u0002"}
_UNESCAPES: Final = {"1": r"\u0000", "2": r"\u0001"}


def without_nul(record: str) -> str:
    """JSON that the server takes: in its texts NUL is written as U+0001 twice, and U+0001 as U+0001 U+0002."""
    if "\\u000" not in record:
        return record
    return _NUL.sub(lambda found: _ESCAPES[found[1]] if found[1] else found[0], record)


def with_nul(record: str) -> str:
    """As it was."""
    if "\\u0001" not in record:
        return record
    return _ESCAPED_NUL.sub(lambda found: _UNESCAPES[found[1]] if found[1] else found[0], record)


def place_of(dsn: str | None) -> str:
    """Host and database, as messages name them; without the password."""
    if dsn is None:
        return "the server of the pool"
    try:
        parts = urlsplit(dsn)
        return f"{parts.hostname or 'localhost'}:{parts.port or 5432}{parts.path}"
    except ValueError:
        return "the server"


def said_by(exc: BaseException) -> str:
    """Its message, or at least its name."""
    return str(exc) or type(exc).__name__


def explained(exc: BaseException, where: str, schema: str) -> TrackerError:
    """What a driver's error means; `StoreUnavailableError` where trying again may help."""
    state, said = state_of(exc), said_by(exc)
    if state in ("28P01", "28000"):
        return StoreError(f"{where} refuses this user: {said}. Check user, password and pg_hba.conf")
    if state == "3D000":
        return StoreError(f"{where}: {said}. Create it (createdb), or correct the dsn")
    if state in ("3F000", "42P01"):
        return StoreError(
            f"{where} has no tables of aiotracker in the schema {schema!r}: run `aiotracker init URL`, or "
            "await tracker.init(), once"
        )
    if state == "42501":
        return StoreError(
            f"{where}: {said}. GRANT USAGE ON SCHEMA {quoted(schema)} and SELECT, INSERT, UPDATE, DELETE ON "
            f"ALL TABLES IN SCHEMA {quoted(schema)} to this user"
        )
    if state in NO_WRITES:
        return StoreUnavailableError(f"{where} takes no writes, as a replica does not: {said}. Connect to the primary")
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


def check_server(facts: Mapping[str, Any], where: str, *, read_only: bool) -> None:
    """Whether a server will do.

    Raises:
        StoreError: It will not.
    """
    if facts["version"] < OLDEST:
        raise StoreError(
            f"{where} runs version {facts['version'] // 10000}; PostgresTracker needs "
            f"PostgreSQL {OLDEST // 10000} or later"
        )
    if facts["encoding"] != "UTF8":
        raise StoreError(
            f"the database {facts['database']!r} is encoded in {facts['encoding']}, which does not hold any text: "
            "create one with ENCODING 'UTF8' TEMPLATE template0"
        )
    if not read_only and (facts["is_replica"] or facts["is_read_only"]):
        what = "a read-only replica" if facts["is_replica"] else "read-only (default_transaction_read_only = on)"
        raise StoreError(
            f"{where} is {what}: connect to the primary (target_session_attrs=read-write finds it among "
            "several hosts), or open the tracker with read_only=True"
        )
    if facts["fsync"] == "off" and not read_only:
        extra = {"event": "store_settings", "where": where, "setting": "fsync"}
        logger.warning("%s runs with fsync = off: what is acknowledged may be lost in a crash", where, extra=extra)


class OwnConnection(asyncpg.Connection):  # type: ignore[misc]  # ships no types
    """Leaves nothing behind in its session, which therefore need not be cleaned with each use."""

    def get_reset_query(self) -> str:
        return ""


async def make_pool(max_connections: int, arguments: dict[str, Any]) -> Pool:
    """A pool that connects when it is asked to."""
    return await asyncpg.create_pool(min_size=0, max_size=max_connections, connection_class=OwnConnection, **arguments)


def arguments_of(dsn: str | None) -> dict[str, Any]:
    """What `asyncpg.connect` makes of a DSN, the environment, `~/.pgpass` and certificates: files that it would read on
    the event loop with each connection.

    Raises:
        InvalidValueError: They cannot be used.
    """
    try:
        return _parsed(dsn)
    except (InterfaceError, InternalClientError, ValueError, OSError) as exc:
        raise InvalidValueError(f"the dsn cannot be used: {exc}") from exc


def _parsed(dsn: str | None) -> dict[str, Any]:
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


async def at_the_end_of_the_loop(pool: Pool) -> AsyncGenerator[None, None]:
    """Ends all connections when `asyncio.run` does, if nobody closed the tracker: later their loop is gone."""
    try:
        yield
    finally:
        if not pool.is_closing():
            pool.terminate()


class ServerTime:
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


class Pause:
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


class UnknownError(Exception):
    """Whether a transaction was committed is not known."""

    def __init__(self, xid: str) -> None:
        super().__init__(xid)
        self.xid = xid


class RevivedError(Exception):
    """Rows would have come back that somebody has deleted."""

    def __init__(self, ids: set[str]) -> None:
        super().__init__(ids)
        self.ids = ids


class PoisonError(Exception):
    """The server does not take a value."""


async def give_up(connection: Connection) -> None:
    """Ends a transaction that went wrong; ends the connection where that cannot be. Raises nothing of the driver's."""
    try:
        await connection.execute("ROLLBACK", timeout=1.0)
    except BaseException as exc:
        with contextlib.suppress(*DRIVER_ERRORS):  # a connection that is lost is taken away from us by its pool
            connection.terminate()
        if not isinstance(exc, DRIVER_ERRORS):
            raise


def state_of(exc: BaseException) -> str:
    return getattr(exc, "sqlstate", None) or ""


def is_poison(exc: BaseException) -> bool:
    return state_of(exc)[:2] in ("22", "23", "54") or isinstance(exc, ValueError)


def quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
