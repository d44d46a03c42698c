"""SqliteTracker: tasks in an SQLite database, shared by any number of processes of one machine.

Two threads a tracker, each with a connection of its own: one commits, all that waits in one transaction, one reads, so
that a long query keeps no lease from being renewed. Only sqlite3 ever opens the file: who opens and closes it in
another way loses all locks that this process has on it.
"""

import asyncio
import contextlib
import logging
import os
import random
import sqlite3
import time
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import AsyncExitStack, contextmanager, nullcontext
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import quote

import msgspec
from msgspec.structs import force_setattr
from typing_extensions import TypeVar, Unpack

from .._core.codec import FORMAT
from .._core.query import Query, Where
from .._core.task import Status, Task
from .._core.transitions import Renew
from ..contract import UNKNOWN, Claimable, Transition
from ..errors import (
    ConflictError,
    InvalidValueError,
    StoreCorruptedError,
    StoreError,
    StoreUnavailableError,
    StoreUnsafeError,
    TrackerError,
)
from ..tracker import BaseTracker, Options
from ._commit import Committer
from ._filesystem import check_local, explain, sync_folder
from ._sql import (
    COLUMNS,
    MAX_COMMIT_BYTES,
    Changes,
    Operation,
    Replacement,
    check_namespace,
    conditions,
    decide,
    escaped,
    is_all_sql,
    ordering,
    orphaned,
    row,
    statements,
    unescaped,
)

__all__ = ["SqliteTracker"]

logger = logging.getLogger("aiotracker")

D = TypeVar("D", default=Any)
R = TypeVar("R", default=Any)

Synchronous = Literal["full", "normal", "off"]

APPLICATION_ID: Final = 0x61696F74  # "aiot", in the header of the file, so that `file` and we know what it is
OLDEST_SQLITE: Final = (3, 37, 0)  # json_each without a build option, NULLS LAST, upserts of many rows
CHECKPOINT_PAGES: Final = 4_000  # of the write-ahead log, from which on a commit copies it into the database
JOURNAL_BYTES: Final = 64 * 1024 * 1024  # that are kept of the write-ahead log after a burst
CACHE_KIB: Final = 32 * 1024  # of pages in memory, a connection
RECORDS: Final = 64  # that one statement reads, until it is known how large they are
READ_BYTES: Final = 2 * 1024 * 1024  # of records that a scan reads at once
KEYS: Final = 100_000  # numbers of tasks that a scan reads at once
WAIT_SHARE: Final = 0.8  # of the time that a waiter has, for which a commit tries to get the lock
SLICES: Final = (64, 16, 4, 1)  # rows that one statement writes
_SEPARATOR: Final = b"\x1e"  # is in no JSON
_INTEGERS: Final = (-(2**63), 2**63 - 1)  # that SQLite takes

_encode: Final = msgspec.json.Encoder().encode
_decode: Final = msgspec.json.Decoder(Task).decode
_decode_any: Final = msgspec.json.Decoder().decode


class SqliteTracker(BaseTracker[D, R]):
    """Keeps tasks in an SQLite database on a local disk, in WAL mode; safe among processes of one machine.

    `sqlite3 FILE` answers questions from the view `tasks`. Reading it while trackers work is safe. Do not write to it.

    A process that is stopped (SIGSTOP, a debugger) in the middle of a commit stops the store for all others; they
    give up waiting after a third of a lease.

    Args:
        path: The file; created where there is none, with its folder, unless `read_only`. Beside it are `FILE-wal` and
            `FILE-shm`, which belong to it.
        namespace: Which of the stores in the database; nothing outside of it is seen or changed.
        synchronous: What an acknowledged write survives: `full` a power loss; `normal` and `off` a `kill -9` only, and
            with `off` a power loss may damage the database.
        allow_unsafe: Take a network file system all the same.
        **options: As for `BaseTracker`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        namespace: str = "default",
        synchronous: Synchronous = "full",
        allow_unsafe: bool = False,
        **options: Unpack[Options[D, R]],
    ) -> None:
        super().__init__(**options)
        if os.fspath(path) in ("", ":memory:"):
            raise InvalidValueError(f"SqliteTracker takes the path of a file, not {path!r}; in memory is MemoryTracker")
        if synchronous not in ("full", "normal", "off"):
            raise InvalidValueError(f"synchronous is full, normal or off, not {synchronous!r}")
        self._path = Path(path)
        self._namespace = check_namespace(namespace)
        self._synchronous = synchronous
        self._allow_unsafe = allow_unsafe
        self._writer: Committer[Operation] | None = None
        self._reader: Committer[Look] | None = None

    @property
    def path(self) -> Path:
        """The database's file."""
        return self._path

    @property
    def namespace(self) -> str:
        """Which of the stores in the database."""
        return self._namespace

    # -- the contract

    async def connect(self, stack: AsyncExitStack) -> None:
        file = File(self._path, self._patience * WAIT_SHARE)
        if not self.read_only:
            writer = Writer(file, self._namespace, self.max_record_bytes, self.now)
            # Closed after the reader: who closes last, copies the write-ahead log into the database.
            self._writer = await self._start(stack, writer, writer.commit, lambda done: orphaned(done, self.new_id()))
            await self._writer.call(lambda: writer.create(self._synchronous, self._allow_unsafe))
        reader = Reader(file, self._namespace)
        self._reader = await self._start(stack, reader, reader.look, lambda look: None)
        await self._reader.call(lambda: reader.open(self._allow_unsafe, read_only=self.read_only))

    async def _start(
        self,
        stack: AsyncExitStack,
        connection: "Connection",
        commit: Callable[[list[Any]], int],
        orphaned: Callable[[Any], Any],
    ) -> "Committer[Any]":
        committer: Committer[Any] = Committer(
            commit,
            orphaned=orphaned,
            blame=connection.file.blame,
            patience=self._patience,
            name=f"aiotracker {self._path}",
        )

        async def close() -> None:
            self._writer, self._reader = (None, None) if committer is self._writer else (self._writer, None)
            await committer.aclose(connection.close)

        stack.push_async_callback(close)
        _close_in_child(connection, committer)
        return committer

    def update(self, task_id: str, transition: Transition, *, known: object = UNKNOWN) -> "asyncio.Future[Task | None]":
        return self._submit(Operation(task_id, transition, self.new_id(), known if isinstance(known, Task) else None))

    def _submit(self, operation: Operation) -> "asyncio.Future[Task | None]":
        if self._writer is None:
            self._check_writable("update")
            raise StoreError(_NOT_OPEN)
        return self._writer.submit(operation, urgent=type(operation.transition) is Renew)

    async def load(self, task_id: str) -> Task | None:
        self._check_id(task_id)
        if self._writer is None:
            task: Task | None = await self._ask(partial(Reader.load, task_id=task_id))
            return task
        # After this tracker's own writes, so that nobody sees less than what is already on its way.
        return await self._submit(Operation(task_id))

    async def dump(self, task: Task) -> Task:
        # A write_id that is the version already would not show that anything was written.
        write_id = self.new_id() if task.write_id in ("", task.version) else task.write_id
        new = task.replace()
        stored = await self._submit(Operation(task.id, Replacement(task, new), write_id))
        if stored is not new:
            raise ConflictError(f"another version of {task.id!r} is stored", stored, known=True)
        return new

    async def delete(self, task: Task) -> None:
        stored = await self._submit(Operation(task.id, Replacement(task, None), self.new_id()))
        if stored is not None:
            raise ConflictError(f"another version of {task.id!r} is stored", stored, known=True)

    async def scan(self, query: Query) -> AsyncIterator[Task]:
        after: int | None = -1
        size = RECORDS
        while after is not None:
            keys, after = await self._ask(partial(Reader.keys, query=query, after=after))
            position = 0
            while position < len(keys):
                some = keys[position : position + size]
                position += size
                tasks, read = await self._ask(partial(Reader.records_at, keys=some))
                size = max(1, min(1000, READ_BYTES * len(some) // max(1, read)))
                for task in tasks:
                    yield task

    async def count(self, **where: Unpack[Where]) -> Counter[str]:
        query = self._query(where)
        if not is_all_sql(query):
            return await super().count(**where)
        return Counter(await self._ask(partial(Reader.count, query=query)))

    async def claimable(self, limit: int) -> Claimable:
        now = self.now()
        keys, next_due = await self._ask(partial(Reader.claimable, limit=limit, now=now))
        tasks: list[Task] = []
        while keys:
            some, keys = keys[:RECORDS], keys[RECORDS:]
            tasks += (await self._ask(partial(Reader.records_at, keys=some)))[0]
        return Claimable(tasks, next_due)

    async def _ask(self, question: Callable[["Reader"], Any]) -> Any:
        if self._reader is None:
            raise StoreError(_NOT_OPEN)
        return await self._reader.submit(Look(question))


Stored = dict[str, Task | Exception | None]
"""Records by id, or why one cannot be read; `None`: there is none."""

_NOT_OPEN: Final = "this SqliteTracker is not open; use `async with`, or await open()"


class Look(msgspec.Struct, gc=False):
    """A question to the database, and its answer."""

    question: Callable[["Reader"], Any]
    answer: Any = None
    error: Exception | None = None


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
        path, code = self.path, _code(exc)
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
    """One connection, used by one thread."""

    def __init__(self, file: File, namespace: str) -> None:
        self.file = file
        self._namespace = namespace
        self._sqlite: sqlite3.Connection | None = None
        self._sql: dict[str, str] = {}
        self._broken: StoreError | None = None

    def _connect(self, mode: str) -> None:
        if sqlite3.sqlite_version_info < OLDEST_SQLITE:
            oldest = ".".join(map(str, OLDEST_SQLITE))
            raise StoreError(f"this Python has SQLite {sqlite3.sqlite_version}; {oldest} or newer is needed")
        self._sql = _statements()
        self._sqlite = self.file.open(mode)
        self._do("PRAGMA trusted_schema = OFF")
        self._do(f"PRAGMA cache_size = -{CACHE_KIB}")

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
                if _code(exc) not in _BUSY or time.monotonic() > until:
                    raise
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
        found, joined = self._do(self._sql[records], (self._namespace, _json(keys)))
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


class Writer(Connection):
    """Commits."""

    def __init__(self, file: File, namespace: str, max_record_bytes: int, now: Callable[[], datetime]) -> None:
        super().__init__(file, namespace)
        self._max_record_bytes = max_record_bytes
        self._now = now

    def create(self, synchronous: Synchronous, allow_unsafe: bool) -> None:
        """Opens the database, and makes it where there is none."""
        path = self.file.path
        with self.file.translated():
            missing = [folder for folder in path.parents if not folder.exists()]
            path.parent.mkdir(parents=True, exist_ok=True)
            for folder in missing:
                sync_folder(folder.parent)
            check_local(path.parent, allow_unsafe)
            is_new = not path.exists()
            self._connect("rwc")
            self._is_ours()  # before anything in it is changed
            if self._patiently("PRAGMA journal_mode = WAL")[0] != b"wal":
                raise StoreUnsafeError(f"{path} is where SQLite has no write-ahead log; choose a local disk")
            self._do(f"PRAGMA synchronous = {synchronous}")
            for pragma in (
                "fullfsync",
                "checkpoint_fullfsync",
            ):  # of macOS, whose fsync leaves bytes in the disk's cache
                self._do(f"PRAGMA {pragma} = {'OFF' if synchronous == 'off' else 'ON'}")
            self._do(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
            self._do(f"PRAGMA journal_size_limit = {JOURNAL_BYTES}")
            self._do("PRAGMA busy_timeout = 0")  # we have our own way of waiting
            with self._transaction():
                if not self._is_ours():
                    for statement in _parts(self._sql["schema"]):
                        self._do(statement)
                    self._do(f"PRAGMA application_id = {APPLICATION_ID}")
                    self._do(f"PRAGMA user_version = {FORMAT}")
                self._do("COMMIT")
            if is_new:
                sync_folder(path.parent)
        self.file.remember()

    def commit(self, operations: list[Operation]) -> int:
        """Stores what waits, and answers it; how many operations that were."""
        is_only_read = all(operation.transition is None for operation in operations)
        with self.file.translated(), nullcontext() if is_only_read else self._transaction():
            self.file.check_there()
            stored, known = self._stored(operations)
            changes, taken = decide(operations[:known], stored, self._now(), self._max_record_bytes)
            if changes:
                self._write(changes, stored)
                self._end()
            return taken

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Holds the lock for writing; takes back what was not committed."""
        self._patiently("BEGIN IMMEDIATE")
        try:
            yield
        finally:
            if self._sqlite is not None and self._sqlite.in_transaction:
                try:
                    self._sqlite.execute("ROLLBACK")
                except sqlite3.Error as exc:
                    self._give_up(f"a transaction could not be taken back: {exc}")

    def _end(self) -> None:
        try:
            self._do("COMMIT")
        except sqlite3.Error as exc:
            if _code(exc) != sqlite3.SQLITE_IOERR:
                raise
            # After a failed sync the system may have dropped the pages: nothing that it says later counts.
            self._give_up(f"a commit failed: {exc}")
            raise StoreUnavailableError(f"whether a commit to {self.file.path} survives is unknown: {exc}") from exc

    def _give_up(self, reason: str) -> None:
        logger.error("%s: %s", self.file.path, reason)
        self._broken = StoreError(f"{self.file.path} was given up until it is opened again: {reason}")

    def _stored(self, operations: list[Operation]) -> tuple[Stored, int]:
        """The records that operations are about, and for how many of these, from the first on, that holds."""
        stored: Stored = {operation.task_id: None for operation in operations}
        keys = [escaped(task_id) for task_id in stored]
        (found,) = self._do(self._sql["versions"], (self._namespace, _json(keys)))
        versions: dict[str, str] = _decode_any(found)
        if not versions:
            return stored, len(operations)
        for operation in operations:
            known = operation.known
            if known is not None and known.version == versions.get(escaped(known.id)):
                stored[known.id] = known
        missing = [task_id for task_id, task in stored.items() if task is None and escaped(task_id) in versions]
        size = 0
        for first in range(0, len(missing), RECORDS):
            if size > MAX_COMMIT_BYTES:
                unread = set(missing[first:])
                return stored, next(n for n, operation in enumerate(operations) if operation.task_id in unread)
            for task_id, task, length in self._load(missing[first : first + RECORDS]):
                stored[task_id] = task
                size += length
        return stored, len(operations)

    def _write(self, changes: Changes, stored: Stored) -> None:
        namespace = self._namespace
        time_text = _TimeTexts().__getitem__
        values: list[Any] = []
        deleted: list[str] = []
        for task_id, change in changes.items():
            old = stored[task_id]
            if change is not None:
                values += row(*change, namespace, time_text)
            if change is None or (isinstance(old, Task) and old.create_time != change[0].create_time):
                deleted.append(escaped(task_id))  # perhaps to be made anew
        if deleted:
            self._do(self._sql["delete"], (namespace, _json(deleted)))
        position = 0
        for rows in SLICES:
            width = rows * len(COLUMNS)
            while len(values) - position >= width:
                self._do(_upsert(rows), values[position : position + width])
                position += width


class Reader(Connection):
    """Answers questions."""

    def open(self, allow_unsafe: bool, *, read_only: bool) -> None:
        """Opens a database that must be there."""
        path = self.file.path
        if not path.exists():
            raise StoreError(f"there is no store at {path}; nothing is created with read_only=True")
        with self.file.translated():
            check_local(path.parent, allow_unsafe)
            try:
                self._connect("ro")
                is_ours = self._is_ours()
            except sqlite3.OperationalError as exc:
                if not _needs_no_lock(exc, path):
                    raise
                self._connect("ro&immutable=1")  # no lock is needed, since nobody can change it
                is_ours = self._is_ours()
        if not is_ours:
            raise StoreError(f"there is no store in {path}: it is empty")
        if read_only:
            self.file.remember()

    def look(self, looks: list[Look]) -> int:
        """Answers what waits; how many that were."""
        for look in looks:
            try:
                with self.file.translated():
                    self.file.check_there()
                    look.answer = look.question(self)
            except Exception as exc:
                look.error = exc
        return len(looks)

    def load(self, task_id: str) -> Task | None:
        """The record."""
        for _, task, _ in self._load([task_id]):
            if isinstance(task, Exception):
                raise task
            return task
        return None

    def keys(self, query: Query, after: int) -> tuple[list[int], int | None]:
        """The numbers of tasks that may match, in the query's order.

        Args:
            query: What is asked for.
            after: The greatest number that is known already; where the query has an order, all come at once.

        Returns:
            Them, and after which to ask for more; `None`: that was all.
        """
        values: list[Any] = [self._namespace]
        where = ["namespace = ?", *conditions(query, _putting(values))]
        limit = query.limit if is_all_sql(query) else None
        if query.order_by is None:
            where.append("seq > ?")
            values.append(after)
            limit = KEYS if limit is None else min(KEYS, limit)
        values.append(-1 if limit is None else min(limit, _INTEGERS[1]))
        (found,) = self._do(
            f"SELECT json_group_array(seq) FROM (SELECT seq FROM task WHERE {' AND '.join(where)} "
            f"ORDER BY {ordering(query)} LIMIT ?)",
            values,
        )
        keys: list[int] = _decode_any(found)
        is_more = query.order_by is None and len(keys) == KEYS and query.limit != KEYS
        return keys, keys[-1] if is_more else None

    def records_at(self, keys: list[int]) -> tuple[list[Task], int]:
        """The records of these numbers, in this order, as far as they are still there; and how many bytes they are."""
        found = {seq: (self._task(raw, seq), len(raw)) for seq, raw in self._read_records("records_at", keys)}
        there = [found[seq] for seq in keys if seq in found]
        return [task for task, _ in there], sum(size for _, size in there)

    def count(self, query: Query) -> dict[Status, int]:
        """How many tasks match, by status."""
        if query.statuses is None:
            query = msgspec.structs.replace(query, statuses=frozenset(Status))  # so that the index on it is used
        values: list[Any] = [self._namespace]
        where = " AND ".join(["namespace = ?", *conditions(query, _putting(values))])
        (found,) = self._do(
            "SELECT json_group_object(status, number) FROM "
            f"(SELECT status, count(*) AS number FROM task WHERE {where} GROUP BY status)",
            values,
        )
        return {Status(status): number for status, number in _decode_any(found).items()}

    def claimable(self, limit: int, now: datetime) -> tuple[list[int], datetime | None]:
        """The numbers of tasks that may be worth a claim, best first, and when more may become so."""
        parameters = {"namespace": self._namespace, "now": _time_text(now), "limit": limit + 1}
        keys = _decode_any(self._do(self._sql["claimable"], parameters)[0])
        if len(keys) > limit:
            return keys[:limit], now
        (due,) = self._do(self._sql["next_due"], parameters)
        return keys, None if due is None else datetime.fromisoformat(due.decode()).replace(tzinfo=UTC)


@cache
def _statements() -> dict[str, str]:
    return statements("sqlite.sql")


@cache
def _upsert(rows: int) -> str:
    values = ", ".join([f"({', '.join('?' * len(COLUMNS))})"] * rows)
    # What is named here has its indexes written again, whether it is another value or not.
    lasting = ("namespace", "id", "create_time")
    changed = ", ".join(f"{name} = excluded.{name}" for name in COLUMNS if name not in lasting)
    return (
        f"INSERT INTO task ({', '.join(COLUMNS)}) VALUES {values} ON CONFLICT (namespace, id) DO UPDATE SET {changed}"
    )


def _parts(script: str) -> Iterable[str]:
    """The statements of a script; `executescript` would commit before them."""
    part = ""
    for line in script.splitlines(keepends=True):
        part += line
        if sqlite3.complete_statement(part):
            yield part
            part = ""
    if part:
        yield part


def _putting(values: list[Any]) -> Callable[[Any], str]:
    def put(value: Any) -> str:
        if isinstance(value, datetime):
            value = _time_text(value)
        values.append(value)
        return "?"

    return put


def _json(values: list[Any]) -> str:
    return _encode(values).decode()


def _time_text(time: datetime) -> str:
    """As SQLite's own date functions write it, so that it compares with what they give; to the microsecond."""
    return time.astimezone(UTC).isoformat(" ", "microseconds")[:26]


class _TimeTexts(dict[datetime, str]):
    """Times as text; most of a commit's are one and the same."""

    def __missing__(self, time: datetime) -> str:
        text = self[time] = _time_text(time)
        return text


_BUSY: Final = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL)


def _code(exc: sqlite3.Error) -> int:
    """SQLite's primary result code; 0: the error is not SQLite's."""
    code: int = getattr(exc, "sqlite_errorcode", 0)
    return code & 0xFF


def wal_of(path: Path) -> Path:
    """The write-ahead log of a database; there while anybody has the database open."""
    return path.with_name(path.name + "-wal")


def _needs_no_lock(exc: sqlite3.Error, path: Path) -> bool:
    """Whether a database could not be opened only because nobody can write beside it, so that it cannot change."""
    if _code(exc) not in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY):
        return False
    wal = wal_of(path)
    is_clean = not wal.exists() or wal.stat().st_size == 0
    return is_clean and bool(os.statvfs(path).f_flag & os.ST_RDONLY)


# -- forks

_of_parents: list[sqlite3.Connection | None] = []  # closing them here would disturb the parent's database
_inherited: "weakref.WeakKeyDictionary[Connection, Committer[Any]]" = weakref.WeakKeyDictionary()


def _close_in_child(connection: Connection, committer: "Committer[Any]") -> None:
    if hasattr(os, "register_at_fork"):
        _watch_forks()
        _inherited[connection] = committer


@cache
def _watch_forks() -> None:
    os.register_at_fork(after_in_child=_after_fork)


def _after_fork() -> None:
    for connection, committer in list(_inherited.items()):
        committer.forget()
        connection.forget()
    _inherited.clear()
