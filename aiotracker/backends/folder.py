"""FolderTracker: a folder with one readable JSON file a task. Also an example of how a backend is written.

    jobs/
      order-17.json          the record of "order-17"
      a%2Fb.json             the record of "a/b"
      .aiotracker.json       which format this is; written once
      .locks/3f.lock         locked during a write of any record whose id falls to 3f
      .locks/3f.new          such a write on its way; one that was killed is written over by the next

A write is: lock, compare, write a new file, sync, put it in the place of the old one, sync, unlock. It is one plain
function that runs in a thread, and so cannot be cancelled in the middle; nothing is held open between two calls.
"""

import asyncio
import contextlib
import errno
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote
from zlib import crc32

import aiofiles.os
import filelock
import msgspec
from typing_extensions import TypeVar, Unpack

from .._core.codec import FORMAT
from .._core.query import Query
from .._core.task import Task
from ..contract import in_order
from ..errors import (
    ConflictError,
    InvalidValueError,
    RecordTooLargeError,
    StoreCorruptedError,
    StoreError,
    StoreUnavailableError,
)
from ..tracker import BaseTracker, Options
from ._abstract_tracker import from_abstract_tracker
from ._filesystem import check_local, checked_path, explain, make_folder, sync_data, sync_folder

__all__ = ["FolderTracker", "read_record"]

D = TypeVar("D", default=Any)
R = TypeVar("R", default=Any)
T = TypeVar("T")

MARKER: Final = ".aiotracker.json"
LOCKS: Final = ".locks"
SHARDS: Final = 256  # lock files, so that a million tasks do not need a million of them
THREADS: Final = 8  # syncs at once; more of them only get in each other's way
POLL: Final = 0.001  # seconds between two looks at a lock that another process holds; it is free for about as long
SETTLED: Final = 60.0  # seconds after which any system has written a changed folder to the disk by itself
CHUNK: Final = 100  # records that a scan reads at once
NAME_BYTES: Final = 200  # of a file's name; file systems take 255
PREFIX_BYTES: Final = 120  # of the readable part of a name that had to be cut


class FolderTracker(BaseTracker[D, R]):
    """Keeps each task in a file of its own, `{id}.json`, for people and other tools to read. Safe among processes of
    one machine. Every write is two syncs and every query reads all files: for many tasks use `FileTracker`.

    Letters, digits and `-_.~` in an id stand in the file's name as they are, others percent-encoded, as in a URL; very
    long ids are cut and end with a hash. On a file system that does not tell upper from lower case, ids must differ
    in more than that, and on Windows they must not be device names such as `CON`.

    Reads abstract_tracker's files too, and respects a lock that one of its workers holds. The first write turns a
    file into our format: the same names of fields, but abstract_tracker itself cannot read it any more.

    A process that is stopped (SIGSTOP, a debugger) in the middle of a write stops writes of some of the tasks; others
    give up waiting after a third of a lease, with an error that names the lock file.

    Args:
        path: The folder; created where there is none, unless `read_only`. All visible `.json` files in it are tasks.
        allow_unsafe: Take a network file system all the same.
        **options: As for `BaseTracker`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        allow_unsafe: bool = False,
        **options: Unpack[Options[D, R]],
    ) -> None:
        super().__init__(**options)
        self._path = checked_path(path)
        self._allow_unsafe = allow_unsafe
        self._threads: ThreadPoolExecutor | None = None
        self._turns: list[asyncio.Lock] = []
        self._pid = 0

    @property
    def path(self) -> Path:
        """The store's folder."""
        return self._path

    # -- the contract

    async def connect(self, stack: AsyncExitStack) -> None:
        # Threads of our own: where bodies keep all of the event loop's threads busy, leases must still be renewed.
        threads = ThreadPoolExecutor(THREADS, f"aiotracker {self._path}")

        async def close() -> None:
            self._threads = None
            await asyncio.to_thread(threads.shutdown)

        stack.push_async_callback(close)
        self._threads, self._pid = threads, os.getpid()
        self._turns = [asyncio.Lock() for _ in range(SHARDS)]
        await self._in_thread(self._open)

    async def load(self, task_id: str) -> Task | None:
        task_id = self._check_id(task_id)
        return await self._in_thread(self._load, task_id)

    async def dump(self, task: Task) -> Task:
        # A write_id that is the version already would not show that anything was written.
        new = task.replace(write_id=self.new_id()) if task.write_id in ("", task.version) else task
        try:
            raw = new.encode()
        except ValueError as exc:
            raise InvalidValueError(str(exc)) from exc
        if len(raw) > self.max_record_bytes:
            raise RecordTooLargeError(
                f"the record of {task.id!r} would take {len(raw):,} bytes, and {self.max_record_bytes:,} are the most; "
                "keep large values elsewhere, and their path here",
                task.id,
                len(raw),
                self.max_record_bytes,
            )
        await self._store("dump", task, raw)
        return new.replace(version=new.write_id)

    async def delete(self, task: Task) -> None:
        await self._store("delete", task, None)

    async def scan(self, query: Query) -> AsyncIterator[Task]:
        async for task in in_order(query, self._scan(query)):
            yield task

    # -- how

    async def _scan(self, query: Query) -> AsyncIterator[Task]:
        start = _encoded(query.prefix)
        names = await self._in_thread(self._files)
        # A name with a hash may have any id that begins like it.
        names = [name for name in names if name.startswith(start) or "=" in name]
        for first in range(0, len(names), CHUNK):
            for task in await self._in_thread(self._read_some, names[first : first + CHUNK]):
                yield task

    async def _store(self, verb: str, task: Task, raw: bytes | None) -> None:
        self._check_writable(verb)
        self._check_id(task.id)
        shard = crc32(task.id.encode()) % SHARDS
        until = time.monotonic() + self._patience
        try:
            # Turns in this process are fair, and let at most one thread a lock file wait for other processes.
            async with asyncio.timeout(self._patience), self._turns[shard]:
                await self._in_thread(self._replace, task, raw, shard, until)
        except TimeoutError as exc:
            raise self._no_turn(shard) from exc

    async def _in_thread(self, function: Callable[..., T], *args: Any) -> T:
        """Runs one of the functions below in a thread, to its end, even if the caller is cancelled.

        Reading and writing with `aiofiles.open` instead would hop to a thread and back for each little step, and could
        be cancelled between any two of them, or lose a file that is just being opened.
        """
        if self._threads is None:
            raise StoreError("this FolderTracker is not open; use `async with`, or await open()")
        if self._pid != os.getpid():
            raise StoreError("this FolderTracker was opened before a fork; open another one in the child process")
        try:
            return await aiofiles.os.wrap(function)(*args, executor=self._threads)
        except OSError as exc:
            raise explain(exc, self._path) from exc

    # -- in a thread

    def _open(self) -> None:
        path, marker = self._path, self._path / MARKER
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
        if self.read_only and not path.exists():
            raise StoreError(f"there is no store at {path}; nothing is created with read_only=True")
        if not self.read_only:
            make_folder(path)
        check_local(path, self._allow_unsafe)
        if marker.exists():
            self._check_format(marker)
        if self.read_only:
            return
        (path / LOCKS).mkdir(exist_ok=True)
        if not marker.exists():
            self._read_some(self._files())  # whatever is here before us must be tasks, each in its place
            with self._locked(0, time.monotonic() + self._patience):
                self._put(marker, msgspec.json.encode({"format": FORMAT, "layout": "folder"}), 0)

    def _check_format(self, marker: Path) -> None:
        try:
            found = msgspec.json.decode(marker.read_bytes(), type=dict[str, Any])
        except msgspec.DecodeError as exc:
            raise StoreCorruptedError(f"{marker} cannot be read: {exc}", str(marker)) from exc
        if found.get("layout") != "folder":
            raise StoreError(f"{self._path} holds a store of another kind, {found.get('layout')!r}: open it as that")
        if found.get("format") != FORMAT:
            raise StoreError(
                f"{self._path} has format {found.get('format')!r}, and this release of aiotracker knows format "
                f"{FORMAT}: use the release that wrote it, or a newer one; nothing was changed"
            )

    def _check_there(self) -> None:
        # Without this, a write would quietly begin another store, and a read would find that nothing was ever done.
        if not (self._path if self.read_only else self._path / MARKER).exists():
            raise StoreError(f"{self._path} was removed, or its {MARKER}; open the tracker again for a new store")

    def _files(self) -> list[str]:
        with os.scandir(self._path) as entries:
            return [e.name for e in entries if e.name.endswith(".json") and e.name[0] != "." and e.is_file()]

    def _load(self, task_id: str) -> Task | None:
        path = self._path / _file_name(task_id)
        task = read_record(path)
        if task is None:
            self._check_there()
        elif not _is_settled(path):
            # Another process may have put it there and not have synced it yet: it is not told before it is safe.
            sync_folder(self._path)
        return task

    def _read_some(self, names: list[str]) -> list[Task]:
        return [task for name in names if (task := read_record(self._path / name)) is not None]

    def _replace(self, task: Task, raw: bytes | None, shard: int, until: float) -> None:
        """The guarded write."""
        path = self._path / _file_name(task.id)
        self._check_there()  # filelock would make a folder that was removed
        with self._locked(shard, until):
            self._check_there()
            stored = read_record(path)
            if (None if stored is None else stored.version) != task.version and not (stored is None and raw is None):
                raise ConflictError(f"another version of {task.id!r} is stored", stored, known=True)
            self._put(path, raw, shard)

    def _put(self, path: Path, raw: bytes | None, shard: int) -> None:
        if raw is None:
            path.unlink(missing_ok=True)
        else:
            new = self._path / LOCKS / f"{shard:02x}.new"
            try:
                with open(new, "wb") as file:
                    file.write(msgspec.json.format(raw) + b"\n")
                    file.flush()
                    sync_data(file.fileno())
                os.replace(new, path)
            except OSError:
                with contextlib.suppress(OSError):
                    new.unlink(missing_ok=True)
                raise
        try:
            sync_folder(self._path)
        except OSError as exc:
            raise StoreUnavailableError(f"whether the write of {path} survives a power loss is unknown: {exc}") from exc

    @contextmanager
    def _locked(self, shard: int, until: float) -> Iterator[None]:
        lock = filelock.FileLock(self._path / LOCKS / f"{shard:02x}.lock")
        try:
            lock.acquire(timeout=max(0.0, until - time.monotonic()), poll_interval=POLL)
        except filelock.Timeout as exc:
            raise self._no_turn(shard) from exc
        try:
            yield
        finally:
            lock.release()

    def _no_turn(self, shard: int) -> StoreUnavailableError:
        lock = self._path / LOCKS / f"{shard:02x}.lock"
        return StoreUnavailableError(
            f"a write was not done within {self._patience:.3g} s: somebody holds {lock} (fuser {lock} says who), or "
            "the disk does not answer"
        )


def _encoded(task_id: str) -> str:
    """An id, or the beginning of one, in the letters of a file's name: never a path, never hidden, never special."""
    name = quote(task_id, safe="")
    return "%2E" + name[1:] if name.startswith(".") else name


def _file_name(task_id: str) -> str:
    name = _encoded(task_id)
    if len(name) > NAME_BYTES:
        name = f"{name[:PREFIX_BYTES]}={sha256(task_id.encode()).hexdigest()}"  # "=" is in no other name
    return name + ".json"


def read_record(path: Path) -> Task | None:
    """The record in a file; `None` where there is no file.

    Raises:
        StoreCorruptedError: It is no record, or one that belongs elsewhere.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        task = Task.decode(raw)
        version = task.write_id
    except ValueError as exc:
        try:
            task = from_abstract_tracker(raw)
        except ValueError:
            raise StoreCorruptedError(
                f"{path} is damaged, or no task at all: {exc}. Repair it, or move it away", str(path)
            ) from exc
        version = sha256(raw).hexdigest()
    if _file_name(task.id) != path.name:
        raise StoreCorruptedError(
            f"{path} holds the task {task.id!r}, whose file must be named {_file_name(task.id)}: rename it, or move it "
            "away",
            str(path),
        )
    return task.replace(version=version)


def _is_settled(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_ctime > SETTLED
    except FileNotFoundError:
        return False
