"""The log engine: what a log of records means, apart from where it is kept.

A log is a sequence of commits. A commit is some lines, each a JSON object that ends with its own CRC, and a mark that
ends the commit with the number of its lines and a CRC over their CRCs. The latest line of an id is its record.

    {"id":"order-17","status":"in_progress",...,"crc":"0a1b2c3d"}
    {"id":"order-18","deleted":true,"crc":"..."}
    {"mark":2,"crc":"..."}

`Index` is that meaning in memory; `Index.batch` runs transitions on an overlay, so that nothing is changed, and
nobody answered, before the commit is stored.
"""

import asyncio
import heapq
from abc import abstractmethod
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from datetime import datetime
from itertools import islice
from typing import Any, Final
from zlib import crc32

import msgspec
from msgspec.structs import force_setattr
from typing_extensions import TypeVar

from .._core.codec import MAX_RECORD_BYTES
from .._core.query import GroupBy, Query
from .._core.task import Status, Task
from .._core.transitions import Claim
from ..contract import UNKNOWN, Claimable, Transition, in_order
from ..errors import (
    ConflictError,
    OutcomeUnknownError,
    RecordTooLargeError,
    StoreCorruptedError,
    StoreUnavailableError,
)
from ..tracker import BaseTracker
from ._glance import counter, may_match

__all__ = [
    "Batch",
    "Damage",
    "Index",
    "LogTracker",
    "Parsed",
    "Wanted",
    "check_line",
    "closed",
    "commits",
    "parse",
    "seal",
]

D = TypeVar("D", default=Any)
R = TypeVar("R", default=Any)

MAX_COMMIT_BYTES: Final = 4 * 1024 * 1024
CHUNK: Final = 256  # records that are read before others get a turn
COUNTED: Final = 2048  # ... or counted, which is faster
_TAIL: Final = len(b',"crc":"00000000"}\n')
_MARK: Final = b'{"mark":'
_SEAL: Final = b'{"sealed":'


class Head(msgspec.Struct, gc=False):
    """The few fields of a line that indexes need."""

    id: str
    status: Status = Status.IGNORED  # of a deleted one
    priority: int = 0
    not_before: datetime | None = None
    deleted: bool = False


class Entry(msgspec.Struct, gc=False):
    """One task in memory: its line as it is stored, and the few fields that indexes need."""

    line: bytes
    status: Status
    priority: int
    not_before: datetime | None


class Wanted(msgspec.Struct, gc=False):
    """One operation that waits for a commit, and its answer."""

    task_id: str = ""
    transition: Transition | None = None
    write_id: str = ""
    look: Callable[["Index"], Any] | None = None  # or: what is asked of the index as it is after the commit
    answer: Any = None
    error: Exception | None = None
    again: float | None = None  # see `_pump.Item`


class Batch(msgspec.Struct):
    """What a number of transitions came to, before it is stored."""

    data: bytes  # the commit; empty: nothing to store
    changes: dict[str, tuple[Task, bytes] | None]  # by id; None: deleted
    taken: int  # how many of the operations, from the first on, are in it


class Damage(msgspec.Struct, frozen=True):
    """Where a log stops making sense."""

    offset: int
    reason: str


class Seal(msgspec.Struct, frozen=True):
    """The last line of a log whose records have moved."""

    sealed: str  # the log that follows
    offset: int  # at which to go on there


class Parsed(msgspec.Struct):
    """Some bytes of a log, read."""

    end: int  # after the last valid mark
    damage: Damage | None = None  # of a commit that others follow, which a crash cannot cause
    sealed: tuple[str, int] | None = None  # the log that follows, and the offset at which to go on there


_encode: Final = msgspec.json.Encoder().encode
_decode: Final = msgspec.json.Decoder(Task).decode
_decode_head: Final = msgspec.json.Decoder(Head).decode
_decode_seal: Final = msgspec.json.Decoder(Seal).decode


def closed(body: bytes) -> bytes:
    """A JSON object without its last brace, ended with its CRC."""
    return b'%b,"crc":"%08x"}\n' % (body, crc32(body))


def check_line(line: bytes) -> bool:
    """Whether a line, its newline included, ends with its own CRC."""
    return line[-_TAIL:] == b',"crc":"%08x"}\n' % crc32(line[:-_TAIL])


def _mark(lines: Sequence[bytes]) -> bytes:
    """The mark that ends a commit of these lines."""
    body = b"%b%d" % (_MARK, len(lines))
    # Each line's bytes are in its own CRC already.
    return b'%b,"crc":"%08x"}\n' % (body, crc32(b"".join([line[-11:-3] for line in lines]) + body))


def seal(name: str, offset: int) -> bytes:
    """The line that ends a log whose records have moved."""
    return closed(_encode({"sealed": name, "offset": offset})[:-1])


def decode(line: bytes) -> Task:
    """The record of a line.

    Raises:
        StoreCorruptedError: It is none, although its bytes are as they were written.
    """
    try:
        task = _decode(line)
    except msgspec.DecodeError as exc:
        raise StoreCorruptedError(f"a record in the log cannot be read: {exc}") from exc
    force_setattr(task, "version", task.write_id)
    return task


def parse(data: bytes, start: int, index: "Index | None") -> Parsed:
    """Reads commits, and applies them to the index.

    Args:
        data: Bytes of a log, from the end of a commit on.
        start: Where in the log they begin.
        index: What to apply them to; `None`: only check.
    """
    position, commit, size = 0, 0, len(data)
    lines: list[bytes] = []
    while True:
        newline = data.find(b"\n", position) + 1
        if newline == 0:
            break
        line = data[position:newline]
        if line.startswith(_MARK):
            if line != _mark(lines):
                break
            try:
                if index is not None:
                    for stored in lines:
                        index.apply_line(stored)
            except msgspec.DecodeError as exc:
                return Parsed(start + commit, Damage(start + commit, f"a record that cannot be read: {exc}"))
            lines, position, commit = [], newline, newline
            continue
        if not check_line(line):
            break
        if line.startswith(_SEAL):
            if lines:
                break
            try:
                sealed = _decode_seal(line)
            except msgspec.DecodeError as exc:
                return Parsed(start + commit, Damage(start + commit, f"a seal that cannot be read: {exc}"))
            return Parsed(start + newline, sealed=(sealed.sealed, sealed.offset))
        lines.append(line)
        position = newline
    parsed = Parsed(start + commit)
    if commit < size and (later := next_commit(data, commit)) < size:
        parsed.damage = Damage(
            start + position,
            f"the line at byte {start + position} is damaged, and what follows from byte {start + later} on is whole",
        )
    return parsed


def next_commit(data: bytes, start: int) -> int:
    """Where the first whole commit begins behind a damaged place; the end of the data where there is none.

    A write that was torn by a crash leaves none: each commit is synced before the next begins.
    """
    position = data.find(b"\n" + _MARK, start)
    while position != -1:
        begin, end = position + 1, data.find(b"\n", position + 1) + 1
        if end == 0:
            break
        found = _begin_of_commit(data, start, begin, data[begin:end])
        if found is not None:
            return found
        position = data.find(b"\n" + _MARK, end - 1)
    return len(data)


def _begin_of_commit(data: bytes, start: int, begin: int, line: bytes) -> int | None:
    """Where the commit begins whose mark is this line; `None` if it is not whole, or reaches back to `start`."""
    count = line[len(_MARK) : line.find(b",")]
    if not count.isdigit():
        return None
    first = begin
    for _ in range(int(count)):
        first = data.rfind(b"\n", start, first - 1) + 1
        if first <= start:
            return None
    lines = [line + b"\n" for line in data[first:begin].split(b"\n")[:-1]]
    if not lines or line != _mark(lines) or not all(map(check_line, lines[1:])):
        return None
    # Where the damage took the newline before it, the first line hangs on what was there.
    place = 0
    while not check_line(lines[0][place:]):
        place = lines[0].find(b'{"id":', place + 1)
        if place == -1:
            return None
    return first + place


def is_record(line: bytes) -> bool:
    """Whether a whole line is one of a task, neither a mark nor a seal."""
    return not line.startswith((_MARK, _SEAL))


class Index:
    """All records of a log, in memory.

    Changed by one thread at a time, with `apply`; read by others in single steps that the interpreter does not
    interrupt.
    """

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.by_status: dict[Status, dict[str, None]] = {status: {} for status in Status}
        self.live_bytes = 0
        self.first_share = 0.0  # where among equally urgent tasks `claimable` begins, from 0 to 1
        self._ready: dict[int, dict[str, None]] = {}  # by priority: pending and failed, as far as they are known due
        self._scheduled: list[tuple[datetime, str]] = []  # the others, by due time; may hold what is not true any more

    def get(self, task_id: str) -> Task | None:
        """The record."""
        entry = self.entries.get(task_id)
        return None if entry is None else decode(entry.line)

    # -- changing

    def apply_line(self, line: bytes) -> None:
        """What a stored line says is so."""
        head = _decode_head(line)
        if head.deleted:
            self._forget(head.id)
        else:
            self._put(head.id, Entry(line, head.status, head.priority, head.not_before))

    def apply(self, batch: Batch) -> None:
        """What a stored batch says is so."""
        for task_id, change in batch.changes.items():
            if change is None:
                self._forget(task_id)
            else:
                task, line = change
                self._put(task_id, Entry(line, task.status, task.priority, task.not_before))

    def _put(self, task_id: str, entry: Entry) -> None:
        old = self.entries.get(task_id)
        self.entries[task_id] = entry
        self.live_bytes += len(entry.line)
        status = entry.status
        if old is None:
            self.by_status[status][task_id] = None
        else:
            self.live_bytes -= len(old.line)
            if old.status is not status:
                del self.by_status[old.status][task_id]
                self.by_status[status][task_id] = None
            if old.status in _WAITING:
                self._unready(task_id, old.priority)
        if status in _WAITING:
            if entry.not_before is None:
                self._ready.setdefault(entry.priority, {})[task_id] = None
            else:
                heapq.heappush(self._scheduled, (entry.not_before, task_id))

    def _unready(self, task_id: str, priority: int) -> None:
        ready = self._ready.get(priority)
        if ready is not None:
            ready.pop(task_id, None)

    def _forget(self, task_id: str) -> None:
        old = self.entries.pop(task_id, None)
        if old is not None:
            self.live_bytes -= len(old.line)
            del self.by_status[old.status][task_id]
            self._unready(task_id, old.priority)

    # -- deciding

    def batch(self, wanted: Sequence[Wanted], now: datetime, limit: int = MAX_RECORD_BYTES) -> Batch:
        """Runs transitions one after another, each on what those before it made; one that fails fails alone.

        Their answers are set, but nothing is changed before `apply`. Takes as many as fit into a commit.
        """
        lines: list[bytes] = []
        changes: dict[str, tuple[Task, bytes] | None] = {}
        entries = self.entries
        size = taken = 0
        for want in wanted:
            if size > MAX_COMMIT_BYTES:
                break
            taken += 1
            if want.transition is None:
                continue
            task_id = want.task_id
            try:
                if task_id in changes:
                    change = changes[task_id]
                    current = None if change is None else change[0]
                else:
                    entry = entries.get(task_id)
                    current = None if entry is None else decode(entry.line)
                new = want.transition(current, now)
                if new is current:
                    want.answer = current
                    continue
                if new is None:
                    line = closed(_encode({"id": task_id, "deleted": True})[:-1])
                    changes[task_id] = None
                else:
                    line = self._line(new, want.write_id, limit)
                    changes[task_id] = (new, line)
                    want.answer = new
            except Exception as exc:
                want.error = exc
                continue
            lines.append(line)
            size += len(line)
        if lines:
            lines.append(_mark(lines))
        return Batch(b"".join(lines), changes, taken)

    def _line(self, task: Task, write_id: str, limit: int) -> bytes:
        # The transition has just made this record, and nobody else has seen it.
        force_setattr(task, "write_id", write_id)
        force_setattr(task, "version", None)
        line = closed(_encode(task)[:-1])
        if len(line) > limit:
            raise RecordTooLargeError(
                f"the record of {task.id!r} would take {len(line):,} bytes, and {limit:,} are the most; "
                "keep large values elsewhere, and their path here",
                task.id,
                len(line),
                limit,
            )
        force_setattr(task, "version", write_id)
        return line

    def look(self, wanted: Sequence[Wanted]) -> None:
        """Answers those that only ask."""
        for want in wanted:
            if want.look is not None:
                try:
                    want.answer = want.look(self)
                except Exception as exc:
                    want.error = exc

    # -- reading

    def ids(self, query: Query) -> list[str]:
        """The ids of all that may match."""
        if query.statuses is None:
            found = list(self.entries)
        else:
            found = [task_id for status in query.statuses for task_id in self.by_status[status]]
        return [task_id for task_id in found if task_id.startswith(query.prefix)] if query.prefix else found

    def found(self, query: Query) -> list[Entry]:
        """All that may match, as of now; they do not change."""
        if query.statuses is None and not query.prefix:
            return list(self.entries.values())
        return [self.entries[task_id] for task_id in self.ids(query)]

    def counts(self) -> Counter[str]:
        """How many tasks there are, by status."""
        return Counter({status: len(ids) for status, ids in self.by_status.items() if ids})

    def claimable(self, limit: int, now: datetime) -> Claimable:
        """As the contract says. Called by one thread at a time, the one that changes the index."""
        while self._scheduled and self._scheduled[0][0] <= now:
            due, task_id = heapq.heappop(self._scheduled)
            entry = self.entries.get(task_id)
            if entry is not None and entry.status in _WAITING and entry.not_before == due:
                self._ready.setdefault(entry.priority, {})[task_id] = None
        while self._scheduled and not self._is_scheduled(*self._scheduled[0]):
            heapq.heappop(self._scheduled)
        next_due = self._scheduled[0][0] if self._scheduled else None
        tasks: list[Task] = []
        for task_id in self.by_status[Status.IN_PROGRESS]:
            task = decode(self.entries[task_id].line)
            if task.lease is None or task.lease.expires_at <= now:
                tasks.append(task)
            elif next_due is None or task.lease.expires_at < next_due:
                next_due = task.lease.expires_at
        for priority in sorted(self._ready, reverse=True):
            ready = self._ready[priority]
            first = int(self.first_share * max(0, len(ready) - limit + len(tasks)))
            for task_id in islice(ready, first, None):
                if len(tasks) >= limit:
                    return Claimable(tasks[:limit], now)
                tasks.append(decode(self.entries[task_id].line))
            if not ready:
                del self._ready[priority]
        return Claimable(tasks[:limit], now if len(tasks) > limit else next_due)

    def _is_scheduled(self, due: datetime, task_id: str) -> bool:
        entry = self.entries.get(task_id)
        return entry is not None and entry.status in _WAITING and entry.not_before == due

    # -- compaction

    def snapshot(self) -> list[Entry]:
        """All entries as of now; they do not change."""
        return self.found(Query())


_WAITING: Final = (Status.PENDING, Status.FAILED)


def commits(entries: Iterable[Entry], lines_each: int) -> Iterator[bytes]:
    """A new log of these records, commit by commit."""
    lines: list[bytes] = []
    for entry in entries:
        lines.append(entry.line)
        if len(lines) == lines_each:
            yield _commit(lines)
            lines = []
    if lines:
        yield _commit(lines)


def _commit(lines: list[bytes]) -> bytes:
    return b"".join([*lines, _mark(lines)])


class LogTracker(BaseTracker[D, R]):
    """What all trackers have in common whose records are in an `Index`."""

    @abstractmethod
    def submit(self, want: Wanted) -> "asyncio.Future[Any]":
        """Commits one operation together with others that wait, and answers."""

    def update(self, task_id: str, transition: Transition, *, known: object = UNKNOWN) -> "asyncio.Future[Task | None]":
        if self.read_only:
            self._check_writable("update")
        return self.submit(Wanted(task_id, transition, self.new_id()))

    async def load(self, task_id: str) -> Task | None:
        task_id = self._check_id(task_id)
        task: Task | None = await self.submit(Wanted(task_id, look=lambda index: index.get(task_id)))
        return task

    async def dump(self, task: Task) -> Task:
        self._check_writable("dump")
        # A write_id that is the version already would not show that anything was written.
        write_id = self.new_id() if task.write_id in ("", task.version) else task.write_id
        new = task.replace()
        stored: Task | None = await self._replace(task, new, write_id)
        if stored is None or (stored is not new and stored.version != write_id):
            raise ConflictError(f"another version of {task.id!r} is stored", stored, known=True)
        return stored

    async def delete(self, task: Task) -> None:
        self._check_writable("delete")
        stored = await self._replace(task, None, self.new_id())
        if stored is not None:
            raise ConflictError(f"another version of {task.id!r} is stored", stored, known=True)

    async def _replace(self, old: Task, new: Task | None, write_id: str) -> Task | None:
        try:
            stored: Task | None = await self.submit(Wanted(old.id, _Guard(old, new), write_id))
        except OutcomeUnknownError as exc:
            raise StoreUnavailableError(str(exc)) from exc
        return stored

    async def scan(self, query: Query) -> AsyncIterator[Task]:
        async for task in in_order(query, self._scan(query)):
            yield task

    async def _scan(self, query: Query) -> AsyncIterator[Task]:
        found: list[tuple[list[str], dict[str, Entry]]]
        found = await self._look(lambda index: (index.ids(query), index.entries))
        may = may_match(query)
        for ids, entries in found:
            for count, task_id in enumerate(ids, 1):
                entry = entries.get(task_id)
                if entry is not None and (query.statuses is None or entry.status in query.statuses):
                    if may(entry.line):
                        yield decode(entry.line)
                if count % CHUNK == 0:
                    await asyncio.sleep(0)

    async def claimable(self, limit: int) -> Claimable:
        now = self.now()
        found: list[Claimable] = await self._look(lambda index: index.claimable(limit, now))
        return found[0] if len(found) == 1 else _merged(found, limit, now)

    async def tally(self, query: Query, by: GroupBy) -> Counter[str]:
        counts: Counter[str] = Counter()
        if by == "status" and query == Query(statuses=query.statuses):
            for some in await self._look(lambda index: index.counts()):
                counts.update(some)
            wanted = query.statuses
            return counts if wanted is None else Counter({key: n for key, n in counts.items() if key in wanted})
        is_known = by == "status" and query == Query(statuses=query.statuses, prefix=query.prefix)
        groups = None if is_known else counter(query, by)
        found: list[list[Entry]] = await self._look(lambda index: index.found(query))
        for entries in found:
            for start in range(0, len(entries), COUNTED):
                chunk = entries[start : start + COUNTED]
                if groups is None:
                    counts.update([entry.status for entry in chunk])
                else:
                    counts.update(groups([entry.line for entry in chunk]))
                await asyncio.sleep(0)
        return counts

    async def _look(self, look: Callable[[Index], Any]) -> list[Any]:
        """What is asked of the index; of each one, where there are several."""
        return [await self.submit(Wanted(look=look))]


def _merged(found: list[Claimable], limit: int, now: datetime) -> Claimable:
    tasks = [task for some in found for task in some.tasks]
    tasks.sort(key=lambda task: (-task.priority, task.create_time))
    dues = [some.next_due for some in found if some.next_due is not None]
    return Claimable(tasks[:limit], now if len(tasks) > limit else min(dues, default=None))


class _Guard:
    """The transition of a guarded write."""

    def __init__(self, old: Task, new: Task | None) -> None:
        self._old = old
        self._new = new

    def __call__(self, task: Task | None, now: datetime) -> Task | None:
        return self._new if (None if task is None else task.version) == self._old.version else task


def orphaned(want: Wanted, write_id: str) -> Wanted | None:
    """What undoes a claim that landed although its claimant had gone."""
    claim, task = want.transition, want.answer
    if isinstance(claim, Claim) and task is not None and task.lease is not None:
        if task.lease.token == claim.terms.token:
            return Wanted(want.task_id, claim.undo(), write_id)
    return None
