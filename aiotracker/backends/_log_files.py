"""The log on a local disk: the files of one store, as one process uses them.

    state/
      store.json             which format this is; written once
      lock                   locked during a commit; names who locked it last
      log-00000001.jsonl     the log; see `_log.py` for what is in it
      compact.lock           locked by the one process that compacts

A commit is: lock, read what others wrote, run the waiting transitions, append, sync, unlock. All of it happens on one
thread a tracker. Whatever it asks of the system it asks of a `Disk`, which tests replace by a simulated one.
"""

import contextlib
import logging
import mmap
import os
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import msgspec

from .._core.codec import FORMAT
from ..errors import StoreCorruptedError, StoreError, StoreUnavailableError
from ._filesystem import LOCAL_DISK, Disk, explain
from ._log import Index, Parsed, Wanted, commits, parse, seal

__all__ = ["Compaction", "Files", "forget_mutexes"]

logger = logging.getLogger("aiotracker")

READ_BYTES: Final = 16 * 1024 * 1024  # at once
COMPACT_RATIO: Final = 3  # a log this many times larger than what is live ...
COMPACT_BYTES: Final = 16 * 1024 * 1024  # ... and this much is compacted
COMPACT_LINES: Final = 1_000  # of a commit in a new log
CAUGHT_UP_BYTES: Final = 1024 * 1024  # that may be left to copy while everybody waits
LOOKS: Final = 5  # at what seems damaged, before it counts: a writer may be in the middle of it
LOOK_PAUSE: Final = 0.02  # seconds between them
OWNER_BYTES: Final = 64  # of the lock file: who locked it last, when, and whether that one has left it in order
UNCLEAN: Final = b"*"
TAIL_BYTES: Final = 64
_LOG_NAME: Final = re.compile(r"log-(\d{8,})\.jsonl")


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
        disk: Disk = LOCAL_DISK,
    ) -> None:
        self.index = Index()
        self.on_thread: Callable[[Callable[[], None]], None] | None = None
        self.is_abandoned: Callable[[], bool] = lambda: False  # whether nobody waits any more for what is committed
        self._path = path
        self._fsync = fsync
        self._read_only = read_only
        self._allow_unsafe = allow_unsafe
        self._max_record_bytes = max_record_bytes
        self._now = now
        self.disk = disk
        self._broken: StoreError | None = None
        self._lock_fd = -1
        self._owner: mmap.mmap | None = None
        self._mutex = _Mutex()  # before the file's lock: two trackers of one process take turns
        self._fd = -1  # of the log
        self._number = 0
        self._offset = 0  # up to here the log is in the index
        self._tail = b""  # what stood before that, where it was read while somebody may have taken it back
        self._foreign = False  # others wrote some of that, and nobody here has synced it
        self._reloads = 0  # how many times all was read again
        self._is_clean = True  # all in the log is synced, while we hold the lock
        self.written = 0  # bytes that were committed since this was opened
        self._compaction: Compaction | None = None
        self._compact_above = COMPACT_BYTES

    # -- opening and closing

    def open(self) -> None:
        """Opens the store for `read`, and makes it where there is none; waits for whoever holds the lock."""
        self._or_close(self._open)

    def read(self) -> None:
        """Reads what is there, before anybody is kept waiting for it."""
        self._or_close(self._read_first)

    def _or_close(self, step: Callable[[], None]) -> None:
        try:
            step()
        except OSError as exc:
            self.close()
            raise explain(exc, self._path) from exc
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        path, disk = self._path, self.disk
        if disk.exists(path) and not disk.is_folder(path):
            raise StoreError(f"{path} is a file; a store is a folder. Choose another path")
        if self._read_only:
            if not disk.is_folder(path):
                raise StoreError(f"there is no store at {path}; nothing is created with read_only=True")
            disk.check_local(path, self._allow_unsafe)
            self._check_identity()
            self._open_lowest_log()
        else:
            disk.make_folder(path)
            disk.check_local(path, self._allow_unsafe)
            self._check_not_foreign()
            self._lock_fd = disk.open(path / "lock", os.O_RDWR | os.O_CREAT)
            if disk.size_and_links(self._lock_fd)[0] < OWNER_BYTES:
                disk.write(self._lock_fd, b" " * OWNER_BYTES, 0)
            self._owner = disk.view(self._lock_fd, OWNER_BYTES)
            self._mutex = _mutex_of(disk.identity(self._lock_fd))
            with self._locked():
                self._create()
                self._check_identity()
                self._open_lowest_log()

    def _read_first(self) -> None:
        self._refresh(locked=False)
        if self._fsync:
            self.disk.sync(self._fd)

    def _check_not_foreign(self) -> None:
        names = set(self.disk.names(self._path))
        if names and "store.json" not in names and not names <= {"lock", "store.json.new"}:
            some = ", ".join(sorted(names)[:3])
            raise StoreError(f"{self._path} is no store and holds other files ({some}); choose a folder of its own")

    def _create(self) -> None:
        disk, identity = self.disk, self._path / "store.json"
        if not disk.exists(identity):
            new = self._path / "store.json.new"
            fd = disk.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            try:
                disk.write(fd, msgspec.json.encode({"format": FORMAT, "layout": "log"}) + b"\n", 0)
                disk.sync(fd)
            finally:
                disk.close(fd)
            disk.rename(new, identity)
        if not self._log_numbers():
            disk.sync_folder(self._path)  # a log without an identity would be somebody's other files
            disk.close(disk.open(self._log_path(1), os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        # Each time: whoever created these may have been killed before it could.
        disk.sync_folder(self._path)

    def _check_identity(self) -> None:
        path = self._path / "store.json"
        try:
            identity = msgspec.json.decode(self.disk.read_file(path), type=dict[str, Any])
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
        return sorted(int(found[1]) for name in self.disk.names(self._path) if (found := _LOG_NAME.fullmatch(name)))

    def _log_path(self, number: int) -> Path:
        return self._path / f"log-{number:08}.jsonl"

    def _open_lowest_log(self, after: int = 0) -> None:
        for _ in range(100):
            numbers = [number for number in self._log_numbers() if number > after]
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
        fd = self.disk.open(self._log_path(number), access)
        if self._fd >= 0:
            self.disk.close(self._fd)
        self._fd, self._number, self._offset, self._tail = fd, number, offset, b""

    def close(self) -> None:
        if self._compaction is not None:
            self._compaction.stop()
        self._broken = self._broken or StoreError("the tracker is closed")
        if self._owner is not None:
            self._owner.close()
            self._owner = None
        for fd in (self._fd, self._lock_fd):
            if fd >= 0:
                self.disk.close(fd)
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
                self._refresh(locked=False)
                self._sync_foreign()
                self.index.look(wanted)
                return len(wanted)
            self._refresh(locked=False)  # what is read now is not read while the others wait
            with self._locked():
                if self.is_abandoned():
                    raise StoreUnavailableError("whoever wanted this has given up waiting for the lock")
                taken = self._commit_locked(wanted)
        except OSError as exc:
            raise explain(exc, self._path) from exc
        if self._compaction is None and self._offset > self._compact_above:
            if self._offset > COMPACT_RATIO * self.index.live_bytes:
                self.start_compaction()
            else:
                self._compact_above = max(COMPACT_BYTES, COMPACT_RATIO * self.index.live_bytes)
        return taken

    def _commit_locked(self, wanted: list[Wanted]) -> int:
        batch = self.index.batch(wanted, self._now(), self._max_record_bytes)
        if batch.data:
            self._append(batch.data)
        else:
            self._sync_foreign()
        self.index.apply(batch)
        taken = wanted[: batch.taken]
        self.index.look(taken)
        return batch.taken

    def _sync_foreign(self) -> None:
        """What others wrote, and may not have synced, is not told before it is safe."""
        if self._foreign and self._fsync:
            self._sync_or_break()
        self._foreign = False

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Nobody else writes meanwhile, and all that is in the log is known here."""
        disk = self.disk
        with self._mutex:
            disk.lock(self._lock_fd)
            try:
                assert self._owner is not None
                self._is_clean = self._owner[OWNER_BYTES - 1 : OWNER_BYTES] != UNCLEAN
                with contextlib.suppress(OSError):
                    disk.write(self._lock_fd, b"%-20d%-43.3f%b" % (os.getpid(), time.time(), UNCLEAN), 0)
                if self._fd >= 0:
                    self._refresh(locked=True)
                    if not self._is_clean and self._fsync:
                        # Somebody was killed between a write and its sync. If our own commit came behind that, and
                        # reached the disk before it, a power loss would make a damaged log of both.
                        self._sync_or_break()
                        self._is_clean, self._foreign = True, False
                yield
                if self._is_clean:
                    with contextlib.suppress(OSError):
                        disk.write(self._lock_fd, b" ", OWNER_BYTES - 1)
            finally:
                disk.unlock(self._lock_fd)

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
        start, self._is_clean = self._offset, False
        try:
            self.disk.write(self._fd, data, start)
            if self._fsync:
                self._sync_or_break()
                self._is_clean, self._foreign = True, False
        except OSError:
            self._take_back(start)
            raise
        self._offset = start + len(data)
        self.written += len(data)

    def _take_back(self, end: int) -> None:
        try:
            self.disk.truncate(self._fd, end)
            if self._fsync:
                self.disk.sync(self._fd)
        except OSError as exc:
            self._break(f"a write failed, and could not be taken back: {exc}")

    def _sync_or_break(self) -> None:
        try:
            self.disk.sync(self._fd)
        except OSError as exc:
            # The system may have dropped what it could not write: nothing that it says later counts.
            self._break(f"the log could not be synced: {exc}")
            raise

    def _break(self, reason: str) -> None:
        logger.error("%s: %s", self._path, reason, extra={"event": "store_given_up", "where": str(self._path)})
        self._broken = StoreError(f"{self._path} was given up until it is opened again: {reason}")

    # -- reading

    def _refresh(self, *, locked: bool) -> bool:
        """Reads what others wrote; whether there was anything."""
        seen, looks, disk = False, 0, self.disk
        if locked and self._tail:
            # Something of the same length may stand there now.
            if disk.read(self._fd, len(self._tail), self._offset - len(self._tail)) != self._tail:
                self._take_in_again()
            self._tail = b""
        while True:
            size, links = disk.size_and_links(self._fd)
            if size == self._offset:
                if links == 0 or (self._lock_fd >= 0 and disk.size_and_links(self._lock_fd)[1] == 0):
                    raise StoreError(f"{self._path} was removed under us; nothing is recorded any more")
                return seen
            if size < self._offset:
                self._take_in_again()
                seen = True
                continue
            parsed = self._read(size, locked=locked)
            if parsed.sealed is not None:
                if self._fsync:
                    self._sync_or_break()  # who goes on in the next log relies on the seal of this one
                try:
                    self._open_log(_number_of(parsed.sealed[0]), parsed.sealed[1])
                except FileNotFoundError:
                    # It was compacted, too. A power loss may have kept this one and lost its removed successor.
                    self._reload(after=self._number)
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
                extra = {"event": "torn_commit_cut", "where": str(self._path), "bytes": size - parsed.end}
                logger.warning("%s: cut off a torn commit of %d bytes", self._path, size - parsed.end, extra=extra)
                self.disk.truncate(self._fd, parsed.end)
            elif parsed.damage is None:
                return seen
            else:
                disk.pause(LOOK_PAUSE)

    def _read(self, size: int, *, locked: bool) -> Parsed:
        length = READ_BYTES
        while True:
            data = self.disk.read(self._fd, min(length, size - self._offset), self._offset)
            parsed = parse(data, self._offset, self.index)
            if (length_read := parsed.end - self._offset) > 0:
                self._foreign = True
                self._tail = b"" if locked else data[max(0, length_read - TAIL_BYTES) : length_read]
            # Less than there seemed to be was taken back meanwhile.
            if length_read > 0 or parsed.sealed or parsed.damage or len(data) < length:
                return parsed
            length *= 2  # a commit larger than that

    def _take_in_again(self) -> None:
        """A writer took back what it could not sync. What we read of it was never acknowledged."""
        if self._fsync:
            self._sync_or_break()  # the system tells of a failure once to each: better now than at a write of ours
        self._reload()

    def _reload(self, after: int = 0) -> None:
        self.index = Index()
        self._offset = 0
        self._reloads += 1
        self._open_lowest_log(after)

    # -- compaction

    def start_compaction(self) -> "Future[bool]":
        """Begins to write a new log, on a thread of its own."""
        if self._broken is not None:
            raise self._broken
        compaction = self._compaction
        if compaction is None:
            compaction = self._compaction = Compaction(self)
            self.disk.start(compaction.run, "aiotracker compaction")
        return compaction.outcome

    def switch(self, compaction: "Compaction") -> bool:
        """Everybody goes on in the new log. Whoever follows the old one comes to its end, and finds the seal there."""
        self._compaction = None
        self._compact_above = max(COMPACT_BYTES, 2 * self._offset)
        if self._broken is not None:
            raise self._broken
        with self._locked():
            if (self._number, self._reloads) != (compaction.number, compaction.reloads):
                return False  # another process was faster, or took back what the new log has
            compaction.copy(self._offset)
            self.disk.sync(compaction.fd)
            name = self._log_path(self._number + 1).name
            self.disk.rename(compaction.path, self._path / name)
            self.disk.sync_folder(self._path)
            line = seal(name, compaction.size)
            try:
                self.disk.write(self._fd, line, self._offset)
                self.disk.sync(self._fd)
            except OSError:
                self._take_back(self._offset)
                raise
            old = self._number
            self._open_log(old + 1, compaction.size)
            for number in self._log_numbers():
                if number <= old:
                    self.disk.remove(self._log_path(number))
        self._compact_above = COMPACT_BYTES
        return True


class Compaction:
    """Writes a new log beside the old one, which goes on meanwhile.

    Attributes:
        number: Of the old log.
        reloads: How many times its tracker had read all again, which shows that what it had read was taken back.
        path: Of the new log, under a name that nobody opens.
        fd: Of the new log.
        size: Of the new log, so far.
        outcome: Whether it was done.
    """

    def __init__(self, files: Files) -> None:
        self._files = files
        self._disk = files.disk
        self._entries = files.index.snapshot()
        self._old_fd = files.disk.dup(files._fd)
        self._lock_fd = -1
        self._copied = files._offset  # up to here the old log is in the new one
        self._stopped = False
        self._handing_over = threading.Lock()
        self.number = files._number
        self.reloads = files._reloads
        self.path = files._path / "log.new"
        self.fd = -1
        self.size = 0
        self.outcome: Future[bool] = Future()

    def stop(self) -> None:
        """Gives up, soon."""
        with self._handing_over:
            self._stopped = True

    def run(self) -> None:
        """All but its end; on a thread of its own."""
        try:
            self._lock_fd = self._disk.open(self._files._path / "compact.lock", os.O_RDWR | os.O_CREAT)
            if not self._disk.try_lock(self._lock_fd):
                self._end(False)
                return
            self.fd = self._disk.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            self._write()
            with self._handing_over:
                self._check_not_stopped()
                # The thread that commits has the lock and the index, and runs this before it ends.
                assert self._files.on_thread is not None
                self._files.on_thread(self._switch)
        except Exception as exc:
            self._fail(exc)

    def _write(self) -> None:
        files, disk, unsynced = self._files, self._disk, 0
        for data in commits(self._entries, COMPACT_LINES):
            self._check_not_stopped()
            disk.write(self.fd, data, self.size)
            self.size += len(data)
            unsynced += len(data)
            if unsynced > READ_BYTES:
                disk.sync(self.fd)  # a little at a time, so that the last sync, when all wait, has little to do
                unsynced = 0
        self._entries = []
        disk.sync(self.fd)
        while (end := files._offset) - self._copied > CAUGHT_UP_BYTES and files._number == self.number:
            self.copy(end)
            disk.sync(self.fd)

    def _check_not_stopped(self) -> None:
        if self._stopped:
            raise StoreError("the tracker was closed during a compaction; the old log goes on")

    def copy(self, end: int) -> None:
        """What the old log got meanwhile, up to `end`, goes into the new one."""
        while self._copied < end:
            data = self._disk.read(self._old_fd, min(READ_BYTES, end - self._copied), self._copied)
            if not data:
                raise StoreError("the log became shorter during a compaction; the old log goes on")
            self._disk.write(self.fd, data, self.size)
            self.size += len(data)
            self._copied += len(data)

    def _switch(self) -> None:
        try:
            self._check_not_stopped()
            self._end(self._files.switch(self))
        except Exception as exc:
            self._fail(exc)

    def _fail(self, exc: Exception) -> None:
        extra = {"event": "compaction_failed", "where": str(self._files._path), "error_type": type(exc).__name__}
        if isinstance(exc, OSError):
            exc = explain(exc, self._files._path)
        elif not isinstance(exc, StoreError):
            logger.exception("a compaction failed", extra=extra)
            exc = StoreError(f"the compaction failed: {exc}")
        if not self._stopped:
            logger.warning("%s could not be compacted: %s", self._files._path, exc, extra=extra)
        self._end(exc)

    def _end(self, outcome: bool | StoreError) -> None:
        files = self._files
        if files._compaction is self:
            files._compaction = None
            files._compact_above = max(COMPACT_BYTES, 2 * files._offset)
        if self.fd >= 0 and outcome is not True:
            with contextlib.suppress(OSError):
                self._disk.remove(self.path)
        for fd in (self.fd, self._old_fd, self._lock_fd):
            if fd >= 0:
                self._disk.close(fd)
        if isinstance(outcome, StoreError):
            self.outcome.set_exception(outcome)
        else:
            self.outcome.set_result(outcome)


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


def _mutex_of(identity: tuple[int, int]) -> _Mutex:
    with _mutexes_guard:
        return _mutexes.setdefault(identity, _Mutex())


def forget_mutexes() -> None:
    """In a forked child, where somebody may hold them who does not exist."""
    global _mutexes_guard
    _mutexes_guard = threading.Lock()
    _mutexes.clear()
