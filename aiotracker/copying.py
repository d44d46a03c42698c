"""Copies all tasks from one store to another.

Records stay whole, with their history. Run again, it copies only what is missing or has changed, so it can be
interrupted at any time; afterwards both stores are read again and compared.

A copy is no replication: what workers do in the source while it is copied, the target learns from the next copy, and
what they do in both at once cannot be put together again.
"""

import asyncio
import os
import random
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from enum import Enum, auto
from functools import partial
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any, Final, Literal, TypeVar
from urllib.parse import parse_qsl, unquote

import msgspec

from ._core.codec import check_id, find_problem
from ._core.task import Task
from ._core.transitions import ENDS_KEPT, Judge
from .backends._abstract_tracker import from_abstract_tracker
from .backends._filesystem import checked_path
from .backends.memory import MemoryTracker
from .clock import SystemClock
from .contract import UNKNOWN
from .errors import InvalidValueError, RecordTooLargeError, StoreError, StoreUnavailableError, UnsupportedError
from .tracker import BaseTracker
from .urls import open_tracker, path_of, shown

__all__ = ["CopyReport", "Kind", "Problem", "Progress", "copy"]

T = TypeVar("T")

Kind = Literal["held", "conflict", "too_large", "unreadable", "missing", "different", "not_listed"]
"""What is wrong with a task:

* held: somebody holds it, in the source or, where it would be overwritten, in the target.
* conflict: the target has another task of this id, or workers have changed it in both stores.
* too_large: for the target.
* unreadable: a file of abstract_tracker.
* missing, different: not in the target afterwards, or not as in the source.
* not_listed: in the target, but its queries do not find it.
"""

AT_ONCE: Final = 256  # writes under way, which share commits
FILES_AT_ONCE: Final = 64  # of abstract_tracker
MAX_FILE: Final = 8 * 1024 * 1024  # bytes; a file of abstract_tracker is indented, and a record has 1 MiB at the most
PROBLEMS_KEPT: Final = 1_000
PATIENCE: Final = 20.0  # seconds for which a store that does not answer is asked again

OLD_FILES: Final = "abstract-tracker:"


class Problem(msgspec.Struct, frozen=True):
    """Why one task was not copied, or is not the same afterwards."""

    id: str  # of the task; of an unreadable file, its name
    kind: Kind
    what: str  # for people


class Progress(msgspec.Struct, frozen=True):
    """How far it is."""

    phase: Literal["copy", "verify"]
    done: int  # tasks
    total: int | None  # `None`: not known


class CopyReport(msgspec.Struct):
    """What was done, and what is wrong."""

    source: str  # its URL, without a password
    target: str
    dry_run: bool
    read: int = 0  # tasks in the source
    created: int = 0  # in the target; with `dry_run` what would have been, here and below
    replaced: int = 0  # in the target, by what the source knows better
    unchanged: int = 0  # were there already
    newer: int = 0  # were there already, and have gone on in the target since
    verified: int | None = None  # read again in both stores, and the same or newer; `None`: not compared
    passed_over: int = 0  # files that are no records and have no name of one
    failed: dict[Kind, int] = {}  # how many problems there are
    problems: list[Problem] = []  # the first thousand of them
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Everything that is in the source is in the target (or could be copied, with `dry_run`)."""
        return not self.failed


async def copy(
    source: str | BaseTracker[Any, Any],
    target: str | BaseTracker[Any, Any],
    *,
    held: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    verify: bool = True,
    on_progress: Callable[[Progress], object] | None = None,
) -> CopyReport:
    """Copies all tasks, as they are, from one store to another.

    A record is written where the target has none of its id, or an older state of the same task. One that has gone on
    in the target is left alone. So it may be run again: after an interruption, or to bring what has changed since.

    Args:
        source: A URL as for `open_tracker`, or `abstract-tracker:DIR` or `abstract-tracker:s3://BUCKET/PREFIX` for
            the files of abstract_tracker; or an open tracker.
        target: A URL, or an open tracker.
        held: Also tasks that somebody holds, with their leases. They stay held in the target until the lease ends;
            how the holder ends them, the target does not learn.
        overwrite: Also where the target has another task of the same id, or both stores have gone on; the target's
            record is lost. Never one that somebody holds in the target.
        dry_run: Change nothing, and report what would be done.
        verify: Read both stores again afterwards, the target from its storage, and compare each record.
        on_progress: Called now and then.

    Returns:
        What was done; everything is in the target if it is `ok`.

    Raises:
        InvalidValueError: A URL is not known.
        StoreError: A store cannot be used, or did not answer for a while. What has been copied by then stays.
        UnsupportedError: The source has no `scan`, or the target was opened `read_only`.
        ModuleNotFoundError: The package for a kind of store is missing; the message says what to install.
    """
    job = _Copy(source, target, held=held, overwrite=overwrite, dry_run=dry_run, on_progress=on_progress)
    began = time.monotonic()
    async with AsyncExitStack() as stack:
        await job.open(stack)
        await job.copy()
        if verify and not dry_run:
            await job.verify()
    job.report.seconds = time.monotonic() - began
    return job.report


# -- which of two records is the later one


class _Relation(Enum):
    """What the target's record is, seen from the source's."""

    ABSENT = auto()
    SAME = auto()
    OLDER = auto()  # an earlier state of the same task
    NEWER = auto()  # a later one
    OTHER = auto()  # of another task that has the same id
    FORKED = auto()  # of the same task, which was worked on in both stores
    IN_USE = auto()  # one of the last two, and held


def _compare(source: Task, target: Task | None) -> _Relation:
    if target is None:
        return _Relation.ABSENT
    if source.create_id != target.create_id or (not source.create_id and source.create_time != target.create_time):
        return _Relation.OTHER
    if not _differences(source, target):
        return _Relation.SAME
    follows, leads = _may_come_from(source, target), _may_come_from(target, source)
    is_later = (source.fence, source.update_time) >= (target.fence, target.update_time)
    if follows and (is_later or not leads):
        return _Relation.OLDER
    return _Relation.NEWER if leads else _Relation.FORKED


def _may_come_from(late: Task, early: Task) -> bool:
    """Whether the later record knows of all claims of the earlier one, as far as it remembers."""
    ends = set(late.ends)
    # Of claims before the last few nothing is known any more.
    forgotten = late.ends[0].fence if len(late.ends) >= ENDS_KEPT else -1
    if any(end not in ends for end in early.ends if end.fence > forgotten):
        return False
    if early.lease is None or early.fence <= forgotten:
        return True
    tokens = {end.token for end in late.ends}
    return early.lease.token in tokens or (late.lease is not None and late.lease.token == early.lease.token)


_encode: Final = msgspec.json.Encoder(order="deterministic").encode


def _differences(source: Task, target: Task) -> list[str]:
    """The names of the fields that differ, but for those that each store makes itself.

    A fence never goes back: that of a record that was written over may be larger.
    """
    fence = max(source.fence, target.fence)
    one = source.replace(version=None, write_id="", fence=fence)
    other = target.replace(version=None, write_id="")
    # Python's == does not tell 1 from 1.0 or true.
    if _encode(one) == _encode(other):
        return []
    return [name for name in one.__struct_fields__ if _encode(getattr(one, name)) != _encode(getattr(other, name))]


class _Take:
    """The rule of a copy: the target's record is the source's, unless there is a reason against it.

    Attributes:
        found: What was there, when it was last applied.
    """

    def __init__(self, source: Task, overwrite: bool, judge: Judge) -> None:
        self._source = source
        self._overwrite = overwrite
        self._judge = judge
        self.found = _Relation.ABSENT

    def __call__(self, task: Task | None, now: datetime) -> Task | None:
        found = _compare(self._source, task)
        if found in (_Relation.OTHER, _Relation.FORKED) and self._overwrite and task is not None:
            if self._judge.is_live(task.lease, now):
                found = _Relation.IN_USE
        self.found = found
        if not self.writes:
            return task
        fence = self._source.fence if task is None else max(self._source.fence, task.fence)
        return self._source.replace(version=None, fence=fence)

    @property
    def writes(self) -> bool:
        """Whether it changed the target's record."""
        if self.found in (_Relation.OTHER, _Relation.FORKED):
            return self._overwrite
        return self.found in (_Relation.ABSENT, _Relation.OLDER)


# -- the work


class _Copy:
    """One copy."""

    def __init__(
        self,
        source: str | BaseTracker[Any, Any],
        target: str | BaseTracker[Any, Any],
        *,
        held: bool,
        overwrite: bool,
        dry_run: bool,
        on_progress: Callable[[Progress], object] | None,
    ) -> None:
        for side in (source, target):
            if isinstance(side, str) and side.startswith("memory:"):
                raise InvalidValueError("memory: is a store of its own each time it is opened: pass the open tracker")
        if isinstance(target, str) and target.startswith(OLD_FILES):
            raise InvalidValueError("abstract_tracker's files are only read; for files like these write folder:PATH")
        if isinstance(source, str) and source == target:
            raise InvalidValueError("source and target are the same store")
        self._target_given = target
        self._held = held
        self._overwrite = overwrite
        self._dry_run = dry_run
        self._on_progress = on_progress
        self._source: _Source = _source(source)
        self._target: BaseTracker[Any, Any]
        self._expects_none = True  # what is not there need not be looked for; learned from the last record
        self._told: set[str] = set()  # ids that have a problem
        self._done = 0
        self._total: int | None = None
        self.report = CopyReport(_title(source), _title(target), dry_run, failed={}, problems=[])

    async def open(self, stack: AsyncExitStack) -> None:
        """Opens the source; the stack closes it."""
        await self._source.open(stack)

    async def copy(self) -> None:
        """Writes."""
        async with self._target_opened(writes=not self._dry_run):
            await self._for_each("copy", self._copy_one)
            self.report.read = self._done
            self.report.passed_over = self._source.passed_over

    async def verify(self) -> None:
        """Compares."""
        self.report.verified = 0
        async with self._target_opened(writes=False):
            await self._for_each("verify", self._verify_one)
            await self._verify_count(self.report.verified)

    async def _verify_count(self, found: int) -> None:
        try:
            listed = (await self._target.count()).total()
        except UnsupportedError:
            return  # a store without queries
        if listed < found:
            self._tell("", "not_listed", f"the target's queries find {listed:,} tasks, and {found:,} are in it")

    @asynccontextmanager
    async def _target_opened(self, *, writes: bool) -> AsyncIterator[None]:
        """Anew each time, so that what is compared comes from the storage."""
        async with AsyncExitStack() as stack:
            given = self._target_given
            if isinstance(given, BaseTracker):
                self._target = _open(given)
            elif not writes and await asyncio.to_thread(_is_yet_to_be_made, given):
                self._target = await stack.enter_async_context(MemoryTracker())
            else:
                options = {} if writes else {"read_only": True}
                self._target = await stack.enter_async_context(await _opening(given, **options))
            if writes:
                self._target._check_writable("copy")
            yield

    async def _for_each(self, phase: Literal["copy", "verify"], do: Callable[[Task], Awaitable[None]]) -> None:
        """Many at once, but never all."""
        self._done = 0
        if self._on_progress is not None and self._total is None:
            self._total = await self._source.total()
        self._report_progress(phase)
        waiting: deque[asyncio.Future[None]] = deque()
        try:
            async for item in self._source.records():
                if isinstance(item, Problem):
                    if phase == "copy":
                        self._tell(item.id, item.kind, item.what)
                    continue
                waiting.append(asyncio.ensure_future(do(item)))
                if len(waiting) >= AT_ONCE:
                    while len(waiting) > AT_ONCE // 2:
                        await waiting.popleft()
                        self._done += 1
                    self._report_progress(phase)
            while waiting:
                await waiting.popleft()
                self._done += 1
        finally:
            for left in waiting:
                left.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
        self._total = self._done
        self._report_progress(phase)

    def _report_progress(self, phase: Literal["copy", "verify"]) -> None:
        if self._on_progress is not None:
            self._on_progress(Progress(phase, self._done, self._total))

    async def _copy_one(self, task: Task) -> None:
        if not self._held and self._source.is_held(task):
            self._tell(task.id, "held", f"held by {_holder(task)} in the source")
            return
        rule = _Take(task, self._overwrite, self._target.judge)
        try:
            if self._dry_run:
                rule(await _patiently(lambda: self._target.load(task.id)), self._target.now())
                if rule.writes:
                    self._check_size(task)
            else:
                await self._target.update(task.id, rule, known=None if self._expects_none else UNKNOWN)
        except RecordTooLargeError as exc:
            self._tell(task.id, "too_large", str(exc))
            return
        self._expects_none = rule.found is _Relation.ABSENT
        self._count(task, rule)

    def _check_size(self, task: Task) -> None:
        size, limit = len(task.encode()), self._target.max_record_bytes
        if size > limit:
            raise RecordTooLargeError(f"it takes {size:,} bytes, and {limit:,} are the most", task.id, size, limit)

    def _count(self, task: Task, rule: _Take) -> None:
        report = self.report
        if rule.found is _Relation.ABSENT:
            report.created += 1
        elif rule.writes:
            report.replaced += 1
        elif rule.found is _Relation.SAME:
            report.unchanged += 1
        elif rule.found is _Relation.NEWER:
            report.newer += 1
        elif rule.found is _Relation.IN_USE:
            self._tell(task.id, "held", "the target has another task of this id, and somebody holds it")
        elif rule.found is _Relation.OTHER:
            self._tell(task.id, "conflict", "the target has another task of this id")
        else:
            self._tell(task.id, "conflict", "it was worked on in both stores since it was copied")

    async def _verify_one(self, task: Task) -> None:
        if task.id in self._told:
            return
        stored = await _patiently(lambda: self._target.load(task.id))
        found = _compare(task, stored)
        if found in (_Relation.SAME, _Relation.NEWER):
            assert self.report.verified is not None
            self.report.verified += 1
        elif stored is None:
            self._tell(task.id, "missing", "it is not in the target")
        else:
            self._tell(task.id, "different", f"differs from the source in {', '.join(_differences(task, stored))}")

    def _tell(self, task_id: str, kind: Kind, what: str) -> None:
        report = self.report
        report.failed[kind] = report.failed.get(kind, 0) + 1
        if kind != "unreadable":
            self._told.add(task_id)
        if len(report.problems) < PROBLEMS_KEPT:
            report.problems.append(Problem(task_id, kind, what))


def _holder(task: Task) -> str:
    assert task.lease is not None
    return f"{task.lease.worker} until {task.lease.expires_at.isoformat(timespec='seconds')}"


def _open(tracker: BaseTracker[Any, Any]) -> BaseTracker[Any, Any]:
    """The tracker, if it is open.

    Raises:
        StoreError: It is not.
    """
    _ = tracker.keeper
    return tracker


def _title(store: str | BaseTracker[Any, Any]) -> str:
    return shown(store) if isinstance(store, str) else type(store).__name__


async def _opening(url: str, **options: Any) -> BaseTracker[Any, Any]:
    # The import of a driver reads many files.
    return await asyncio.to_thread(open_tracker, url, **options)


def _is_yet_to_be_made(url: str) -> bool:
    """A store that would create itself, and is looked at before it has."""
    scheme, _, rest = url.partition(":")
    return scheme in ("file", "folder", "sqlite") and not os.path.exists(path_of(rest.partition("?")[0]))


async def _patiently(ask: Callable[[], Awaitable[T]]) -> T:
    """Asks again while there is no answer.

    Raises:
        StoreUnavailableError: There was none for `PATIENCE` seconds.
    """
    until, pause = time.monotonic() + PATIENCE, 0.05
    while True:
        try:
            return await ask()
        except StoreUnavailableError:
            if time.monotonic() > until:
                raise
            await asyncio.sleep(random.uniform(0, pause))
            pause = min(2.0, pause * 2)


# -- sources


class _Source(ABC):
    """Where the records come from."""

    passed_over = 0  # files that are none

    @abstractmethod
    async def open(self, stack: AsyncExitStack) -> None:
        """The stack closes it."""

    @abstractmethod
    async def total(self) -> int | None:
        """How many there are, where that is quickly told."""

    @abstractmethod
    def records(self) -> AsyncIterator[Task | Problem]:
        """All of them."""

    @abstractmethod
    def is_held(self, task: Task) -> bool:
        """Whether its lease is live."""


def _source(given: str | BaseTracker[Any, Any]) -> _Source:
    if not isinstance(given, str) or not given.startswith(OLD_FILES):
        return _TrackerSource(given)
    place = given.removeprefix(OLD_FILES)
    if place.startswith("s3://"):
        return _OldObjects(given, place.removeprefix("s3://"))
    if not place:
        raise InvalidValueError(f"{given!r} names no files; write {OLD_FILES}DIR or {OLD_FILES}s3://BUCKET/PREFIX")
    return _OldFolder(checked_path(path_of(place)))


class _TrackerSource(_Source):
    def __init__(self, given: str | BaseTracker[Any, Any]) -> None:
        self._given = given
        self._tracker: BaseTracker[Any, Any]

    async def open(self, stack: AsyncExitStack) -> None:
        if isinstance(self._given, BaseTracker):
            self._tracker = _open(self._given)
        else:
            self._tracker = await stack.enter_async_context(await _opening(self._given, read_only=True))

    async def total(self) -> int | None:
        return (await self._tracker.count()).total()

    def records(self) -> AsyncIterator[Task | Problem]:
        return self._tracker.find()

    def is_held(self, task: Task) -> bool:
        return self._tracker.judge.is_live(task.lease, self._tracker.now())


class _OldFiles(_Source):
    """abstract_tracker's files, wherever they are. Their names do not matter: the record tells its id."""

    async def total(self) -> int | None:
        return None

    def is_held(self, task: Task) -> bool:
        return task.lease is not None and datetime.now(UTC) < task.lease.expires_at

    @abstractmethod
    def files(self) -> AsyncIterator[tuple[str, bytes | None]]:
        """Names, and what is in the files; `None`: too much."""

    async def records(self) -> AsyncIterator[Task | Problem]:
        self.passed_over = 0
        names: dict[str, str] = {}  # of the files, by id
        is_empty = True
        async for name, raw in self.files():
            try:
                task = _read_old(raw)
            except ValueError as exc:
                if name.endswith(".json"):
                    is_empty = False
                    yield Problem(name, "unreadable", f"no record of abstract_tracker: {exc}")
                else:
                    self.passed_over += 1
                continue
            if (first := names.setdefault(task.id, name)) != name:
                yield Problem(name, "unreadable", f"holds the task {task.id!r}, and so does {first}")
                continue
            yield task
        if not names and is_empty:
            raise StoreError(f"there are no files of abstract_tracker in {self}")


def _read_old(raw: bytes | None) -> Task:
    if raw is None:
        raise ValueError(f"it has more than {MAX_FILE:,} bytes")
    try:
        task = Task.decode(raw)  # a FolderTracker has worked on it
    except ValueError:
        task = from_abstract_tracker(raw)
    check_id(task.id)
    if (problem := find_problem(task.data, "data")) is not None:
        raise ValueError(problem)
    return task.replace(version=None)


class _OldFolder(_OldFiles):
    def __init__(self, path: Path) -> None:
        self._path = path

    def __str__(self) -> str:
        return str(self._path)

    async def open(self, stack: AsyncExitStack) -> None:
        if not await asyncio.to_thread(self._path.is_dir):
            raise StoreError(f"there is no folder {self._path}")

    async def files(self) -> AsyncIterator[tuple[str, bytes | None]]:
        paths = self._walk()
        while True:
            try:
                some = await asyncio.to_thread(lambda: [self._read(path) for path in islice(paths, FILES_AT_ONCE)])
            except OSError as exc:
                raise StoreError(f"{exc.filename or self._path} cannot be read: {exc.strerror or exc}") from exc
            if not some:
                return
            for file in some:
                yield file

    def _walk(self) -> Iterator[str]:
        def fail(exc: OSError) -> None:
            raise exc

        for folder, folders, names in os.walk(self._path, onerror=fail):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(names):
                path = os.path.join(folder, name)
                if not name.startswith(".") and os.path.isfile(path):
                    yield path

    def _read(self, path: str) -> tuple[str, bytes | None]:
        with open(path, "rb") as file:
            raw = file.read(MAX_FILE + 1)
        return path, raw if len(raw) <= MAX_FILE else None


class _OldObjects(_OldFiles):
    def __init__(self, url: str, place: str) -> None:
        place, _, query = place.partition("?")
        self._bucket, _, self._prefix = unquote(place).partition("/")
        self._options: dict[str, str] = {}
        for name, value in parse_qsl(query, keep_blank_values=True):
            if name not in ("endpoint_url", "region", "profile"):
                raise InvalidValueError(
                    f"{url!r} has an unknown parameter {name!r}; there are: endpoint_url, region, profile"
                )
            self._options[name] = value
        self._store: Any = None
        self._together: Any = None

    def __str__(self) -> str:
        return f"s3://{self._bucket}/{self._prefix}"

    async def open(self, stack: AsyncExitStack) -> None:
        module = await asyncio.to_thread(import_module, ".backends._s3", __package__)
        self._together = module.together
        self._store = module.S3Store(self._bucket, self._prefix, module.S3Options(**self._options), SystemClock())
        await self._store.connect(stack)

    async def files(self) -> AsyncIterator[tuple[str, bytes | None]]:
        token: str | None = None
        while True:
            entries, token = await _patiently(partial(self._store.page, "", token=token))
            for first in range(0, len(entries), FILES_AT_ONCE):
                some = entries[first : first + FILES_AT_ONCE]
                for entry, raw in zip(some, await self._together(map(self._read, some)), strict=True):
                    yield entry.key, raw
            if token is None:
                return

    async def _read(self, entry: Any) -> bytes | None:
        if entry.size > MAX_FILE:
            return None
        stored = await _patiently(lambda: self._store.get(entry.key))
        if stored is None:
            raise StoreUnavailableError(f"{entry.key!r} in {self} was removed while it was read")
        body: bytes = stored.body
        return body
