"""FileTracker: a log in JSON Lines on a local disk, shared by any number of processes of one machine.

    state/
      store.json             which format this is; written once
      lock                   locked during a commit; names who locked it last
      log-00000001.jsonl     the log; see `_log.py` for what is in it
      compact.lock           locked by the one process that compacts

A commit is: lock, read what others wrote, run the waiting transitions, append, sync, unlock. All of it happens on one
thread a tracker.
"""

import asyncio
import contextlib
import fcntl
import logging
import mmap
import os
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AsyncExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import msgspec
from typing_extensions import TypeVar, Unpack

from .._core.codec import FORMAT
from .._core.transitions import Renew
from ..errors import StoreCorruptedError, StoreError
from ..tracker import Options
from ._commit import Committer
from ._filesystem import check_local, explain, sync_data, sync_folder, write_all
from ._log import Index, LogTracker, Parsed, Wanted, commits, orphaned, parse, seal

__all__ = ["FileTracker"]

logger = logging.getLogger("aiotracker")

D = TypeVar("D", default=Any)
R = TypeVar("R", default=Any)

READ_BYTES: Final = 16 * 1024 * 1024  # at once
COMPACT_RATIO: Final = 3  # a log this many times larger than what is live ...
COMPACT_BYTES: Final = 16 * 1024 * 1024  # ... and this much is compacted
COMPACT_LINES: Final = 1_000  # of a commit in a new log
CAUGHT_UP_BYTES: Final = 1024 * 1024  # that may be left to copy while everybody waits
LOOKS: Final = 5  # at what seems damaged, before it counts: a writer may be in the middle of it
OWNER_BYTES: Final = 64
_LOG_NAME: Final = re.compile(r"log-(\d{8,})\.jsonl")


class FileTracker(LogTracker[D, R]):
    """Keeps tasks in a folder of this machine: the embedded default. Fast, readable with `jq` and `grep`, safe among
    processes.

    A process that is stopped (SIGSTOP, a debugger) in the middle of a commit stops the store for all others; they
    give up waiting after a third of a lease, with an error that names it.

    Args:
        path: The folder; created where there is none, unless `read_only`.
        fsync: Whether what was acknowledged survives a power loss. Without it, it survives `kill -9` only.
        allow_unsafe: Take a network file system all the same.
        **options: As for `BaseTracker`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        fsync: bool = True,
        allow_unsafe: bool = False,
        **options: Unpack[Options[D, R]],
    ) -> None:
        super().__init__(**options)
        self._path = Path(path)
        self._fsync = fsync
        self._allow_unsafe = allow_unsafe
        self._committer: Committer[Wanted] | None = None
        self._files: Files | None = None

    @property
    def path(self) -> Path:
        """The store's folder."""
        return self._path

    async def connect(self, stack: AsyncExitStack) -> None:
        files = Files(
            self._path,
            fsync=self._fsync,
            read_only=self.read_only,
            allow_unsafe=self._allow_unsafe,
            max_record_bytes=self.max_record_bytes,
            now=self.now,
        )
        committer: Committer[Wanted] = Committer(
            files.commit,
            orphaned=lambda want: orphaned(want, self.new_id()),
            blame=files.blame,
            patience=self._patience,
            name=f"aiotracker {self._path}",
        )

        async def close() -> None:
            self._committer = self._files = None
            await committer.aclose(files.close)

        stack.push_async_callback(close)
        await committer.call(files.open)
        files.on_thread = committer.post
        _forget_in_child(files, committer)
        self._committer, self._files = committer, files

    def submit(self, want: Wanted) -> "asyncio.Future[Any]":
        if self._committer is None:
            raise StoreError("this FileTracker is not open; use `async with`, or await open()")
        return self._committer.submit(want, urgent=type(want.transition) is Renew)

    async def compact(self) -> bool:
        """Writes a new log without what is out of date, while others go on. Happens by itself when most is.

        Returns:
            Whether it was done; `False` where another process is doing it.

        Raises:
            StoreError: It could not be written; the old log goes on.
        """
        self._check_writable("compact")
        committer, files = self._committer, self._files
        if committer is None or files is None:
            raise StoreError("this FileTracker is not open; use `async with`, or await open()")
        return await asyncio.wrap_future(await committer.call(files.start_compaction))


class Files:
    """The files of one store, as one process uses them. All methods but `blame` run on one thread."""

    def __init__(
        self,
        path: Path,
        *,
        fsync: bool,
        read_only: bool,
        allow_unsafe: bool,
        max_record_bytes: int,
        now: Callable[[], datetime],
    ) -> None:
        self.index = Index()
        self.on_thread: Callable[[Callable[[], None]], None] | None = None
        self._path = path
        self._fsync = fsync
        self._read_only = read_only
        self._allow_unsafe = allow_unsafe
        self._max_record_bytes = max_record_bytes
        self._now = now
        self._broken: StoreError | None = None
        self._lock_fd = -1
        self._owner: mmap.mmap | None = None
        self._mutex = _Mutex()  # before the file's lock: two trackers of one process take turns
        self._fd = -1  # of the log
        self._number = 0
        self._offset = 0  # up to here the log is in the index
        self._compaction: Compaction | None = None
        self._compact_above = COMPACT_BYTES

    # -- opening and closing

    def open(self) -> None:
        try:
            self._open()
        except OSError as exc:
            self.close()
            raise explain(exc, self._path) from exc
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        path = self._path
        if path.exists() and not path.is_dir():
            raise StoreError(f"{path} is a file; a store is a folder. Choose another path")
        if self._read_only:
            if not path.is_dir():
                raise StoreError(f"there is no store at {path}; nothing is created with read_only=True")
            check_local(path, self._allow_unsafe)
            self._check_identity()
            self._open_lowest_log()
        else:
            if not path.is_dir():
                path.mkdir(parents=True, exist_ok=True)
                sync_folder(path.parent)
            check_local(path, self._allow_unsafe)
            self._check_not_foreign()
            self._lock_fd = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            if os.fstat(self._lock_fd).st_size < OWNER_BYTES:
                os.pwrite(self._lock_fd, b" " * OWNER_BYTES, 0)
            self._owner = mmap.mmap(self._lock_fd, OWNER_BYTES, access=mmap.ACCESS_READ)
            self._mutex = _mutex_of(self._lock_fd)
            with self._locked():
                self._create()
                self._check_identity()
                self._open_lowest_log()
        # Most of a large log is read before anybody is kept waiting for it.
        self._refresh(locked=False)
        if self._fsync:
            sync_data(self._fd)

    def _check_not_foreign(self) -> None:
        names = {entry.name for entry in os.scandir(self._path)}
        if names and "store.json" not in names and not names <= {"lock", "store.json.new"}:
            some = ", ".join(sorted(names)[:3])
            raise StoreError(f"{self._path} is no store and holds other files ({some}); choose a folder of its own")

    def _create(self) -> None:
        identity = self._path / "store.json"
        if not identity.exists():
            new = self._path / "store.json.new"
            with open(new, "wb") as file:
                file.write(msgspec.json.encode({"format": FORMAT, "layout": "log"}) + b"\n")
                file.flush()
                os.fsync(file.fileno())
            os.rename(new, identity)
            sync_folder(self._path)
        if not self._log_numbers():
            os.close(os.open(self._log_path(1), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
            sync_folder(self._path)

    def _check_identity(self) -> None:
        path = self._path / "store.json"
        try:
            identity = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        except FileNotFoundError:
            raise StoreError(f"there is no store at {self._path}: it has no store.json") from None
        except msgspec.DecodeError as exc:
            raise StoreCorruptedError(f"{path} cannot be read: {exc}", str(path), 0) from exc
        if identity.get("layout") != "log":
            raise StoreError(f"{self._path} holds a store of another kind, {identity.get('layout')!r}: open it as that")
        if identity.get("format") != FORMAT:
            raise StoreError(
                f"{self._path} has format {identity.get('format')!r}, and this release of aiotracker knows format "
                f"{FORMAT}: use the release that wrote it, or a newer one; nothing was changed"
            )

    def _log_numbers(self) -> list[int]:
        return sorted(int(found[1]) for entry in os.scandir(self._path) if (found := _LOG_NAME.fullmatch(entry.name)))

    def _log_path(self, number: int) -> Path:
        return self._path / f"log-{number:08}.jsonl"

    def _open_lowest_log(self) -> None:
        for _ in range(100):
            numbers = self._log_numbers()
            if not numbers:
                break
            try:
                self._open_log(numbers[0], 0)
            except FileNotFoundError:
                continue  # it was compacted away since
            return
        raise StoreError(f"{self._path} has no log; somebody removed it")

    def _open_log(self, number: int, offset: int) -> None:
        access = os.O_RDONLY if self._read_only else os.O_RDWR
        fd = os.open(self._log_path(number), access | os.O_CLOEXEC)
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._number, self._offset = fd, number, offset

    def close(self) -> None:
        if self._compaction is not None:
            self._compaction.stop()
        self._broken = self._broken or StoreError("the tracker is closed")
        if self._owner is not None:
            self._owner.close()
            self._owner = None
        for fd in (self._fd, self._lock_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._lock_fd = -1

    def forget(self) -> None:
        """In a forked child: this store is the parent's. Closing a copy of a locked file does not unlock it."""
        self._compaction = None
        self._broken = StoreError("this tracker was opened before a fork; open another one in the child process")
        self.close()

    # -- committing

    def commit(self, wanted: list[Wanted]) -> int:
        """Stores what waits, and answers it; how many operations that were."""
        if self._broken is not None:
            raise self._broken
        try:
            if all(want.transition is None for want in wanted):
                if self._refresh(locked=False) and self._fsync:
                    sync_data(self._fd)
                self.index.look(wanted)
                return len(wanted)
            foreign = self._refresh(locked=False)  # what is read now is not read while the others wait
            with self._locked():
                foreign = self._refresh(locked=True) or foreign
                taken = self._commit_locked(wanted, foreign)
        except OSError as exc:
            raise explain(exc, self._path) from exc
        if self._compaction is None and self._offset > self._compact_above:
            if self._offset > COMPACT_RATIO * self.index.live_bytes:
                self.start_compaction()
            else:
                self._compact_above = max(COMPACT_BYTES, COMPACT_RATIO * self.index.live_bytes)
        return taken

    def _commit_locked(self, wanted: list[Wanted], foreign: bool) -> int:
        batch = self.index.batch(wanted, self._now(), self._max_record_bytes)
        if batch.data:
            self._append(batch.data)
        elif foreign and self._fsync:
            sync_data(self._fd)  # what others wrote, and may not have synced, is not told before it is safe
        self.index.apply(batch)
        taken = wanted[: batch.taken]
        self.index.look(taken)
        return batch.taken

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._mutex:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX)
            try:
                with contextlib.suppress(OSError):
                    os.pwrite(self._lock_fd, b"%-20d%-44.3f" % (os.getpid(), time.time()), 0)
                yield
            finally:
                fcntl.flock(self._lock_fd, fcntl.LOCK_UN)

    def blame(self) -> str:
        """Who holds the lock; read from memory, so that the event loop may ask."""
        owner = self._owner
        words = bytes(owner[:]).split() if owner is not None else []
        if len(words) < 2:
            return f"the disk of {self._path} does not answer"
        who = "this process" if int(words[0]) == os.getpid() else f"process {words[0].decode()}"
        since = datetime.fromtimestamp(float(words[1])).astimezone().isoformat(timespec="seconds")
        return f"the lock of {self._path} was last taken by {who}, at {since}"

    def _append(self, data: bytes) -> None:
        start = self._offset
        try:
            write_all(self._fd, data, start)
        except OSError:
            self._take_back(start)
            raise
        if self._fsync:
            try:
                sync_data(self._fd)
            except OSError as exc:
                # After a failed sync the system may have dropped the pages: nothing that it says later counts.
                self._break(f"the log could not be synced: {exc}")
                self._take_back(start)
                raise
        self._offset = start + len(data)

    def _take_back(self, end: int) -> None:
        try:
            os.ftruncate(self._fd, end)
            if self._fsync:
                sync_data(self._fd)
        except OSError as exc:
            self._break(f"a write failed, and could not be taken back: {exc}")

    def _break(self, reason: str) -> None:
        logger.error("%s: %s", self._path, reason)
        self._broken = StoreError(f"{self._path} was given up until it is opened again: {reason}")

    # -- reading

    def _refresh(self, *, locked: bool) -> bool:
        """Reads what others wrote; whether there was anything."""
        seen, looks = False, 0
        while True:
            status = os.fstat(self._fd)
            if status.st_size == self._offset:
                if status.st_nlink == 0 or (self._lock_fd >= 0 and os.fstat(self._lock_fd).st_nlink == 0):
                    raise StoreError(f"{self._path} was removed under us; nothing is recorded any more")
                return seen
            if status.st_size < self._offset:
                # A writer took back what it could not sync. What we read of it was never acknowledged.
                self._reload()
                seen = True
                continue
            parsed = self._read(status.st_size)
            if parsed.sealed is not None:
                if self._fsync:
                    sync_data(self._fd)  # who goes on in the next log relies on the seal of this one
                try:
                    self._open_log(_number_of(parsed.sealed[0]), parsed.sealed[1])
                except FileNotFoundError:
                    self._reload()  # two compactions since our last look
                seen = True
                continue
            if parsed.end > self._offset:
                self._offset, seen, looks = parsed.end, True, 0
                continue
            looks += 1
            if parsed.damage is not None and (locked or looks >= LOOKS):
                log = self._log_path(self._number)
                raise StoreCorruptedError(
                    f"{log} is damaged: {parsed.damage.reason}. Run `aiotracker doctor`; nothing was changed",
                    str(log),
                    parsed.damage.offset,
                )
            if locked:
                # We hold the lock, so nobody is still writing this: its writer died before it could acknowledge it.
                logger.warning("%s: cut off a torn commit of %d bytes", self._path, status.st_size - parsed.end)
                os.ftruncate(self._fd, parsed.end)
            elif parsed.damage is None:
                return seen
            else:
                time.sleep(0.02)

    def _read(self, size: int) -> Parsed:
        length = READ_BYTES
        while True:
            data = os.pread(self._fd, min(length, size - self._offset), self._offset)
            parsed = parse(data, self._offset, self.index)
            if parsed.end > self._offset or parsed.sealed or parsed.damage or self._offset + len(data) >= size:
                return parsed
            length *= 2  # a commit larger than that

    def _reload(self) -> None:
        self.index = Index()
        self._offset = 0
        self._open_lowest_log()

    # -- compaction

    def start_compaction(self) -> "Future[bool]":
        """Begins to write a new log, on a thread of its own."""
        if self._broken is not None:
            raise self._broken
        compaction = self._compaction
        if compaction is None:
            compaction = self._compaction = Compaction(self)
            compaction.start()
        return compaction.outcome

    def switch(self, compaction: "Compaction") -> bool:
        """Everybody goes on in the new log. Whoever follows the old one comes to its end, and finds the seal there."""
        self._compaction = None
        self._compact_above = max(COMPACT_BYTES, 2 * self._offset)
        if self._broken is not None:
            raise self._broken
        with self._locked():
            self._refresh(locked=True)
            if self._number != compaction.number:
                return False  # another process was faster
            compaction.copy(self._offset)
            sync_data(compaction.fd)
            name = self._log_path(self._number + 1).name
            os.rename(compaction.path, self._path / name)
            sync_folder(self._path)
            line = seal(name, compaction.size)
            try:
                write_all(self._fd, line, self._offset)
                sync_data(self._fd)
            except OSError:
                self._take_back(self._offset)
                raise
            old = self._number
            self._open_log(old + 1, compaction.size)
            for number in self._log_numbers():
                if number <= old:
                    self._log_path(number).unlink(missing_ok=True)
        self._compact_above = COMPACT_BYTES
        return True


class Compaction(threading.Thread):
    """Writes a new log beside the old one, which goes on meanwhile.

    Attributes:
        number: Of the old log.
        path: Of the new log, under a name that nobody opens.
        fd: Of the new log.
        size: Of the new log, so far.
        outcome: Whether it was done.
    """

    def __init__(self, files: Files) -> None:
        super().__init__(name="aiotracker compaction", daemon=True)
        self._files = files
        self._entries = files.index.snapshot()
        self._old_fd = os.dup(files._fd)
        self._copied = files._offset  # up to here the old log is in the new one
        self._stopped = False
        self.number = files._number
        self.path = files._path / "log.new"
        self.fd = -1
        self.size = 0
        self.outcome: Future[bool] = Future()

    def stop(self) -> None:
        """Gives up, soon."""
        self._stopped = True

    def run(self) -> None:
        files, lock_fd = self._files, -1
        try:
            lock_fd = os.open(files._path / "compact.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._end(False)
                return
            self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            self._write()
            while (end := files._offset) - self._copied > CAUGHT_UP_BYTES and files._number == self.number:
                self.copy(end)
                sync_data(self.fd)
            self._switch()
        except StoreError as exc:
            self._fail(exc)
        except OSError as exc:
            self._fail(explain(exc, files._path))
        except Exception as exc:
            logger.exception("a compaction failed")
            self._fail(StoreError(f"the compaction failed: {exc}"))
        finally:
            for fd in (self.fd, self._old_fd, lock_fd):
                if fd >= 0:
                    os.close(fd)

    def _write(self) -> None:
        unsynced = 0
        for data in commits(self._entries, COMPACT_LINES):
            if self._stopped:
                raise StoreError("the tracker was closed during a compaction; the old log goes on")
            write_all(self.fd, data, self.size)
            self.size += len(data)
            unsynced += len(data)
            if unsynced > READ_BYTES:
                sync_data(self.fd)  # a little at a time, so that the last sync, when all wait, has little to do
                unsynced = 0
        self._entries = []
        sync_data(self.fd)

    def copy(self, end: int) -> None:
        """What the old log got meanwhile, up to `end`, goes into the new one."""
        while self._copied < end:
            data = os.pread(self._old_fd, min(READ_BYTES, end - self._copied), self._copied)
            if not data:
                raise StoreError("the log became shorter during a compaction; the old log goes on")
            write_all(self.fd, data, self.size)
            self.size += len(data)
            self._copied += len(data)

    def _switch(self) -> None:
        """On the thread that commits, and no other way: it holds the lock and the index."""
        on_thread = self._files.on_thread
        done: Future[bool] = Future()

        def switch() -> None:
            try:
                done.set_result(self._files.switch(self))
            except OSError as exc:
                done.set_exception(explain(exc, self._files._path))
            except Exception as exc:
                done.set_exception(exc)

        if on_thread is None or self._stopped:
            raise StoreError("the tracker was closed during a compaction; the old log goes on")
        on_thread(switch)
        while not self._stopped:
            with contextlib.suppress(TimeoutError):
                self._end(done.result(timeout=0.5))
                return
        raise StoreError("the tracker was closed during a compaction; the old log goes on")

    def _end(self, done: bool) -> None:
        if not done:
            self._clean()
        self.outcome.set_result(done)

    def _fail(self, exc: StoreError) -> None:
        if not self._stopped:
            logger.warning("%s could not be compacted: %s", self._files._path, exc)
        self._clean()
        self.outcome.set_exception(exc)

    def _clean(self) -> None:
        files = self._files
        if files._compaction is self:
            files._compaction = None
            files._compact_above = max(COMPACT_BYTES, 2 * files._offset)
        if self.fd >= 0:
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)


def _number_of(name: str) -> int:
    found = _LOG_NAME.fullmatch(name)
    if found is None:
        raise StoreCorruptedError(f"a log was sealed with the name {name!r}, which is none of a log")
    return int(found[1])


_mutexes: "weakref.WeakValueDictionary[tuple[int, int], _Mutex]" = weakref.WeakValueDictionary()
_mutexes_guard = threading.Lock()


class _Mutex:
    """A lock that a weak dictionary can hold."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *exc: object) -> None:
        self._lock.release()


def _mutex_of(fd: int) -> _Mutex:
    status = os.fstat(fd)
    with _mutexes_guard:
        return _mutexes.setdefault((status.st_dev, status.st_ino), _Mutex())


_inherited: "weakref.WeakKeyDictionary[Files, Committer[Wanted]]" = weakref.WeakKeyDictionary()


def _forget_in_child(files: Files, committer: "Committer[Wanted]") -> None:
    if not _inherited:
        _watch_forks()
    _inherited[files] = committer


def _watch_forks() -> None:
    global _watching
    if not _watching and hasattr(os, "register_at_fork"):
        _watching = True
        os.register_at_fork(after_in_child=_after_fork)


_watching = False


def _after_fork() -> None:
    global _mutexes_guard
    _mutexes_guard = threading.Lock()
    _mutexes.clear()
    for files, committer in list(_inherited.items()):
        committer.forget()
        files.forget()
    _inherited.clear()
