"""An SQLite database with tasks in it: its file, what its errors mean, and how a connection to it behaves.

Only sqlite3 ever opens the file: who opens and closes it in another way loses all locks that this process has on it.
"""

import contextlib
import os
import random
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import msgspec
from msgspec.structs import force_setattr

from .._core.codec import FORMAT
from .._core.task import Task
from ..errors import (
    StoreCorruptedError,
    StoreError,
    StoreUnavailableError,
    TrackerError,
)
from ._filesystem import explain
from ._sql import (
    escaped,
    statements,
    unescaped,
)

__all__ = ["APPLICATION_ID", "RECORDS", "Connection", "File", "code_of", "json_text", "needs_no_lock", "wal_of"]


APPLICATION_ID: Final = 0x61696F74  # "aiot", in the header of the file, so that `file` and we know what it is
OLDEST_SQLITE: Final = (3, 37, 0)  # json_each without a build option, NULLS LAST, upserts of many rows
CACHE_KIB: Final = 32 * 1024  # of pages in memory, a connection
RECORDS: Final = 64  # that one statement reads, until it is known how large they are
_SEPARATOR: Final = b"\x1e"  # is in no JSON

_encode: Final = msgspec.json.Encoder().encode
_decode: Final = msgspec.json.Decoder(Task).decode
_decode_any: Final = msgspec.json.Decoder().decode


class File:
    """The database's file, and what its errors mean.

    Args:
        path: Where it is.
        patience: Seconds for which others may keep it locked.
    """

    def __init__(self, path: Path, patience: float) -> None:
        self.path = path
        self.patience = patience
        self._identity: list[tuple[int, int] | None] = []

    def blame(self) -> str:
        """Why there may be no answer."""
        return (
            f"another process has locked {self.path} for long (fuser {self.path} says who uses it), or its disk hangs"
        )

    def open(self, mode: str) -> sqlite3.Connection:
        """A new connection.

        Args:
            mode: `ro`, `rw` or `rwc`, as in SQLite's URIs, or `ro&immutable=1`.
        """
        connection = sqlite3.connect(
            f"file:{quote(os.path.abspath(self.path))}?mode={mode}",
            uri=True,
            timeout=self.patience,
            isolation_level=None,
            check_same_thread=False,  # also closed by a thread that collects garbage
            cached_statements=64,
        )
        connection.text_factory = bytes
        return connection

    def remember(self) -> None:
        """From now on, it must stay this file."""
        self._identity = self._found()

    def check_there(self) -> None:
        """Raises StoreError where the file is not the one that was opened."""
        if self._found() != self._identity:
            raise StoreError(f"{self.path} or its -wal was removed or replaced under us; nothing is recorded any more")

    def _found(self) -> list[tuple[int, int] | None]:
        found: list[tuple[int, int] | None] = []
        for path in (self.path, wal_of(self.path)):
            try:
                status = os.stat(path)
            except OSError:
                found.append(None)
            else:
                found.append((status.st_dev, status.st_ino))
        return found

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Errors of the driver become ours."""
        try:
            yield
        except sqlite3.Error as exc:
            raise self.explain(exc) from exc
        except OSError as exc:
            raise explain(exc, self.path) from exc

    def explain(self, exc: sqlite3.Error) -> TrackerError:
        """What an error of SQLite means for the store, and what to do."""
        path, code = self.path, code_of(exc)
        if code in _BUSY:
            return StoreUnavailableError(f"no lock for {self.patience:.3g} s, and nothing was changed: {self.blame()}")
        if code == sqlite3.SQLITE_FULL:
            return StoreError(f"the disk of {path} is full; nothing was changed. Make room, and go on")
        is_closed = code == sqlite3.SQLITE_CANTOPEN and path.exists() and not os.access(path.parent, os.W_OK)
        if code == sqlite3.SQLITE_READONLY or is_closed:
            return StoreError(f"{path} or its folder is read-only; open it with read_only=True to look at it")
        if code == sqlite3.SQLITE_NOTADB:
            return StoreCorruptedError(
                f"{path} is no SQLite database, or its beginning is damaged; nothing was changed", str(path)
            )
        if code == sqlite3.SQLITE_CORRUPT:
            return StoreCorruptedError(
                f"{path} is damaged ({exc}); nothing was changed. `sqlite3 {path} .recover` saves what can be read",
                str(path),
            )
        if code == sqlite3.SQLITE_CANTOPEN:
            if path.is_dir():
                return StoreError(f"{path} is a folder; this store is a file. Choose another path")
            return StoreError(f"{path} cannot be opened: this process needs to read and write it and its folder")
        return StoreError(f"{path} cannot be used: {exc} ({getattr(exc, 'sqlite_errorname', 'no code')})")


class Connection:
    """One connection, used by one thread.

    Attributes:
        away: Called when the thread leaves the interpreter to others for a while.
    """

    def __init__(self, file: File, namespace: str) -> None:
        self.file = file
        self._namespace = namespace
        self._sqlite: sqlite3.Connection | None = None
        self._sql: dict[str, str] = {}
        self._broken: StoreError | None = None
        self.away: Callable[[], None] = _nothing

    def _connect(self, mode: str) -> None:
        if sqlite3.sqlite_version_info < OLDEST_SQLITE:
            oldest = ".".join(map(str, OLDEST_SQLITE))
            raise StoreError(f"this Python has SQLite {sqlite3.sqlite_version}; {oldest} or newer is needed")
        self._sql = _statements()
        if self._sqlite is not None:
            self._sqlite.close()
        self._sqlite = self.file.open(mode)
        self._do("PRAGMA trusted_schema = OFF")
        self._do(f"PRAGMA cache_size = -{CACHE_KIB}")
        # Else each statement of many rows copies the pages that it changes into a file, to be able to take them back.
        self._do("PRAGMA temp_store = MEMORY")
        self._do("PRAGMA secure_delete = OFF")  # of which some builds overwrite with zeros all that goes

    def close(self) -> None:
        """Nothing is done with it any more."""
        self._broken = self._broken or StoreError("the tracker is closed")
        if self._sqlite is not None:
            with contextlib.suppress(sqlite3.Error):
                self._sqlite.close()
            self._sqlite = None

    def forget(self) -> None:
        """In a forked child: it is the parent's, and must not even be closed."""
        self._broken = StoreError("this tracker was opened before a fork; open another one in the child process")
        _of_parents.append(self._sqlite)
        self._sqlite = None

    def _do(self, sql: str, parameters: Any = ()) -> Any:
        """Runs a statement, and gives the row that it finds."""
        if self._broken is not None:
            raise self._broken
        assert self._sqlite is not None
        return self._sqlite.execute(sql, parameters).fetchone()

    def _number(self, pragma: str) -> int:
        value: int = self._do(f"PRAGMA {pragma}")[0]
        return value

    def _patiently(self, sql: str) -> Any:
        """Runs a statement that needs a lock, as soon as nobody else has it.

        SQLite's own waiting has pauses of up to 0.1 s, in which other busy processes always come first.
        """
        until = time.monotonic() + self.file.patience
        pause = 0.0005
        while True:
            try:
                return self._do(sql)
            except sqlite3.OperationalError as exc:
                if code_of(exc) not in _BUSY or time.monotonic() > until:
                    raise
            self.away()
            time.sleep(random.uniform(0, pause))
            pause = min(0.01, pause * 1.2)

    def _is_ours(self) -> bool:
        """Whether a store is there; `False`: the database is empty.

        Raises:
            StoreError: It is something else.
        """
        assert self._sqlite is not None
        path = self.file.path
        with nullcontext() if self._sqlite.in_transaction else self._snapshot():
            application, version = self._number("application_id"), self._number("user_version")
            is_empty = not self._do("SELECT count(*) FROM sqlite_master")[0]
        if application == APPLICATION_ID:
            if version != FORMAT:
                raise StoreError(
                    f"{path} has format {version}, and this release of aiotracker knows format {FORMAT}: use the "
                    "release that wrote it, or a newer one; nothing was changed"
                )
            return True
        if application or version or not is_empty:
            raise StoreError(f"{path} is a database of something else; choose a file of its own; nothing was changed")
        return False

    @contextmanager
    def _snapshot(self) -> Iterator[None]:
        """What is read meanwhile is of one moment."""
        self._do("BEGIN")
        try:
            yield
        finally:
            self._do("ROLLBACK")

    def _load(self, task_ids: list[str]) -> Iterator[tuple[str, Task | StoreCorruptedError, int]]:
        """Those of the records that are there, or why one cannot be read; with their bytes."""
        for key, raw in self._read_records("records", [escaped(task_id) for task_id in task_ids]):
            task_id = unescaped(key)
            try:
                yield task_id, self._task(raw, task_id), len(raw)
            except StoreCorruptedError as exc:
                yield task_id, exc, len(raw)

    def _read_records(self, records: str, keys: list[Any]) -> Iterator[tuple[Any, bytes]]:
        found, joined = self._do(self._sql[records], (self._namespace, json_text(keys)))
        if joined:
            yield from zip(_decode_any(found), joined.split(_SEPARATOR), strict=True)

    def _task(self, raw: bytes, key: object) -> Task:
        try:
            task = _decode(raw)
        except (ValueError, RecursionError) as exc:
            raise StoreCorruptedError(
                f"the record of {key!r} in {self.file.path} cannot be read: {exc}", str(self.file.path)
            ) from exc
        force_setattr(task, "version", task.write_id)
        return task


def _nothing() -> None:
    pass


@cache
def _statements() -> dict[str, str]:
    return statements("sqlite.sql")


def json_text(values: list[Any]) -> str:
    return _encode(values).decode()


_BUSY: Final = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL)


def code_of(exc: sqlite3.Error) -> int:
    """SQLite's primary result code; 0: the error is not SQLite's."""
    code: int = getattr(exc, "sqlite_errorcode", 0)
    return code & 0xFF


def wal_of(path: Path) -> Path:
    """The write-ahead log of a database; there while anybody has the database open."""
    return path.with_name(path.name + "-wal")


def needs_no_lock(exc: sqlite3.Error, path: Path) -> bool:
    """Whether a database could not be opened only because nobody can write beside it, so that it cannot change."""
    if code_of(exc) not in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY):
        return False
    wal = wal_of(path)
    is_clean = not wal.exists() or wal.stat().st_size == 0
    return is_clean and bool(os.statvfs(path).f_flag & os.ST_RDONLY)


_of_parents: list[sqlite3.Connection | None] = []  # closing them here would disturb the parent's database
