"""The two connections that a tracker has to its SQLite database: one commits, one answers questions."""

import logging
import sqlite3
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from functools import cache
from typing import Any, Final, Literal

import msgspec

from .._core.codec import FORMAT
from .._core.query import GroupBy, Query
from .._core.task import Status, Task
from ..errors import (
    StoreError,
    StoreUnavailableError,
    StoreUnsafeError,
)
from ._filesystem import check_local, make_folder, sync_folder
from ._sql import (
    COLUMNS,
    MAX_COMMIT_BYTES,
    RARE,
    Changes,
    Operation,
    conditions,
    decide,
    escaped,
    is_all_sql,
    ordering,
    row,
    unescaped,
)
from ._sqlite_file import APPLICATION_ID, RECORDS, Connection, File, code_of, json_text, needs_no_lock

__all__ = ["Look", "Reader", "Synchronous", "Writer"]

logger = logging.getLogger("aiotracker")

Synchronous = Literal["full", "normal", "off"]

PAGE_BYTES: Final = 8_192  # of a new database: about ten records in each
CHECKPOINT_PAGES: Final = 4_000  # of the write-ahead log, from which on a commit copies it into the database
JOURNAL_BYTES: Final = 64 * 1024 * 1024  # that are kept of the write-ahead log after a burst
KEYS: Final = 100_000  # numbers of tasks that a scan reads at once
SLICES: Final = (
    1,
    2,
    3,
    4,
    6,
    8,
    12,
    16,
    24,
    32,
    48,
    64,
    96,
    128,
    192,
    256,
    384,
    512,
    768,
    1024,
)  # rows of a statement
PADDING: Final = 8  # rows for which one may be written twice, so that fewer statements do
_INTEGERS: Final = (-(2**63), 2**63 - 1)  # that SQLite takes

_decode_any: Final = msgspec.json.Decoder().decode

Stored = dict[str, Task | Exception | None]
"""Records by id, or why one cannot be read; `None`: there is none."""


class Look(msgspec.Struct, gc=False):
    """A question to the database, and its answer."""

    question: Callable[["Reader"], Any]
    answer: Any = None
    error: Exception | None = None


class Writer(Connection):
    """Commits."""

    def __init__(self, file: File, namespace: str, max_record_bytes: int, now: Callable[[], datetime]) -> None:
        super().__init__(file, namespace)
        self._max_record_bytes = max_record_bytes
        self._now = now
        self.counts = False  # whether somebody wants to know what follows
        self.written = 0  # bytes of records that were committed

    def create(self, synchronous: Synchronous, allow_unsafe: bool) -> None:
        """Opens the database, and makes it where there is none."""
        path = self.file.path
        with self.file.translated():
            make_folder(path.parent)
            check_local(path.parent, allow_unsafe)
            is_new = not path.exists()
            self._connect("rwc")
            self._is_ours()  # before anything in it is changed
            self._do(f"PRAGMA page_size = {PAGE_BYTES}")  # counts only where there is no database yet
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
                if self.counts:
                    self.written += sum(len(change[1]) for change in changes.values() if change is not None)
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
            if code_of(exc) != sqlite3.SQLITE_IOERR:
                raise
            # After a failed sync the system may have dropped the pages: nothing that it says later counts.
            self._give_up(f"a commit failed: {exc}")
            raise StoreUnavailableError(f"whether a commit to {self.file.path} survives is unknown: {exc}") from exc

    def _give_up(self, reason: str) -> None:
        logger.error("%s: %s", self.file.path, reason, extra={"event": "store_given_up", "where": str(self.file.path)})
        self._broken = StoreError(f"{self.file.path} was given up until it is opened again: {reason}")

    def _stored(self, operations: list[Operation]) -> tuple[Stored, int]:
        """The records that operations are about, and for how many of these, from the first on, that holds."""
        stored: Stored = {operation.task_id: None for operation in operations}
        keys = [escaped(task_id) for task_id in stored]
        (found,) = self._do(self._sql["versions"], (self._namespace, json_text(keys)))
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
        few: list[Any] = []  # values of rows that have none of RARE: binding a None costs most of all
        all_: list[Any] = []
        deleted: list[str] = []
        for task_id, change in changes.items():
            old = stored[task_id]
            if change is not None:
                task, raw = change
                values = row(task, raw.decode(), namespace, time_text)
                if len(values) == len(COLUMNS):
                    all_ += values
                else:
                    few += values
            if change is None or (isinstance(old, Task) and old.create_time != change[0].create_time):
                deleted.append(escaped(task_id))  # perhaps to be made anew
        self.away()
        if deleted:
            self._do(self._sql["delete"], (namespace, json_text(deleted)))
        self._upsert(few, len(COLUMNS) - len(RARE))
        self._upsert(all_, len(COLUMNS))

    def _upsert(self, values: list[Any], width: int) -> None:
        """Writes rows, in as few statements as may be: between two, the interpreter has to be waited for."""
        last = values[-width:]
        while values:
            rows = len(values) // width
            slice_ = SLICES[bisect_left(SLICES, rows, hi=len(SLICES) - 1)]
            if slice_ - rows > rows // PADDING:
                slice_ = SLICES[bisect_right(SLICES, rows) - 1]
            some, values = values[: slice_ * width], values[slice_ * width :]
            self._do(_upsert(slice_, width), some + last * (slice_ - rows))


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
                if not needs_no_lock(exc, path):
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
        order = ordering(query)
        if order == "seq" and (
            query.times or query.prefix or query.min_attempts > 1 or query.step or query.step_status
        ):
            order = "+seq"  # with a sign it is no column, and an index on what is asked for is used, not the table
        if query.order_by is None:
            where.append(f"{order} > ?")
            values.append(after)
            limit = KEYS if limit is None else min(KEYS, limit)
        values.append(-1 if limit is None else min(limit, _INTEGERS[1]))
        (found,) = self._do(
            f"SELECT json_group_array(seq) FROM (SELECT seq FROM task WHERE {' AND '.join(where)} "
            f"ORDER BY {order} LIMIT ?)",
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

    def tally(self, query: Query, by: GroupBy) -> dict[str, int]:
        """How many tasks match, by what `by` says. All that the query asks for must be SQL."""
        # With a status, the index on it is used.
        some = query if query.statuses else msgspec.structs.replace(query, statuses=frozenset(Status))
        if by == "status":
            return self._groups(some, by)
        with self._snapshot():
            # The indexes have only tasks with something to be counted by.
            counts = self._groups(query, by)
            rest = sum(self._groups(some, "status").values()) - sum(counts.values())
        if rest:
            counts[""] = counts.get("", 0) + rest
        return counts

    def _groups(self, query: Query, column: str) -> dict[str, int]:
        values: list[Any] = [self._namespace]
        where = " AND ".join(["namespace = ?", *conditions(query, _putting(values))])
        has_all = query == Query(statuses=query.statuses)  # the index on the column has all that is needed
        table = f"task INDEXED BY task_{column}" if has_all else "task"
        (found,) = self._do(
            f"SELECT json_group_object({column}, number) FROM (SELECT {column}, count(*) AS number FROM {table} "
            f"WHERE {where} AND {column} IS NOT NULL GROUP BY {column})",
            values,
        )
        return {unescaped(name): number for name, number in _decode_any(found).items()}

    def claimable(self, limit: int, now: datetime) -> tuple[list[int], datetime | None]:
        """The numbers of tasks that may be worth a claim, best first, and when more may become so."""
        parameters = {"namespace": self._namespace, "now": _time_text(now), "limit": limit + 1}
        keys = _decode_any(self._do(self._sql["claimable"], parameters)[0])
        if len(keys) > limit:
            return keys[:limit], now
        (due,) = self._do(self._sql["next_due"], parameters)
        return keys, None if due is None else datetime.fromisoformat(due.decode()).replace(tzinfo=UTC)


@cache
def _upsert(rows: int, width: int) -> str:
    given = ", ".join(["?"] * width + ["NULL"] * (len(COLUMNS) - width))
    # What is named here has its indexes written again, whether it is another value or not.
    lasting = ("namespace", "id", "create_time")
    changed = ", ".join(f"{name} = excluded.{name}" for name in COLUMNS if name not in lasting)
    return (
        f"INSERT INTO task ({', '.join(COLUMNS)}) VALUES {', '.join([f'({given})'] * rows)} "
        f"ON CONFLICT (id, namespace) DO UPDATE SET {changed}"
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


def _time_text(time: datetime) -> str:
    """As SQLite's own date functions write it, so that it compares with what they give; to the microsecond."""
    return time.astimezone(UTC).isoformat(" ", "microseconds")[:26]


class _TimeTexts(dict[datetime, str]):
    """Times as text; most of a commit's are one and the same."""

    def __missing__(self, time: datetime) -> str:
        text = self[time] = _time_text(time)
        return text
