"""What the trackers on local files need of a file system, and which ones cannot give it."""

import contextlib
import errno
import fcntl
import mmap
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from ..errors import InvalidValueError, StoreError, StoreUnsafeError

__all__ = [
    "LOCAL_DISK",
    "Disk",
    "check_local",
    "checked_path",
    "explain",
    "make_folder",
    "sync_data",
    "sync_folder",
    "write_all",
]

# Their locks are advisory among machines at best, or their caches show one machine's writes late to another.
UNSAFE = frozenset({"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "glusterfs", "lustre", "ncpfs"})

_ESCAPED: Final = re.compile(r"\\(\d{3})")  # a blank, or the like


def checked_path(path: str | os.PathLike[str]) -> Path:
    """The path of a store, if it can be one.

    Raises:
        InvalidValueError: It cannot.
    """
    if "\0" in str(checked := Path(path)):
        raise InvalidValueError(f"a path has no NUL in it, as {str(checked)!r} has")
    return checked


def check_local(path: Path, allow_unsafe: bool) -> None:
    """Refuses a folder on a network file system or on FUSE, whose locks and syncs cannot be relied on.

    Raises:
        StoreUnsafeError: With what it is on.
    """
    if allow_unsafe:
        return
    try:
        mounts = Path("/proc/self/mountinfo").read_text(errors="surrogateescape")
    except OSError:
        return  # not Linux
    kind = kind_of(path.resolve(), os.stat(path).st_dev, mounts)
    if kind in UNSAFE or kind == "fuse" or kind.startswith("fuse."):
        raise StoreUnsafeError(
            f"{path} is on {kind}, where locks and syncs of several machines cannot be relied on: use a local disk, "
            "or another kind of store; allow_unsafe=True takes it all the same, for one machine at a time"
        )


def kind_of(path: Path, device: int, mounts: str) -> str:
    """The kind of file system that a path is on.

    Args:
        path: Absolute.
        device: Its `st_dev`.
        mounts: The text of `/proc/self/mountinfo`.
    """
    number = f"{os.major(device)}:{os.minor(device)}"
    best, kind = -1, ""
    for line in mounts.splitlines():
        fields, _, rest = line.partition(" - ")
        parts = fields.split(" ")
        if len(parts) < 5 or not rest:
            continue
        point = _ESCAPED.sub(lambda found: chr(int(found[1], 8)), parts[4])
        # Some file systems show another device number to stat; the longest mount point is the next best answer.
        exact = parts[2] == number
        if exact or path.is_relative_to(point):
            rank = len(point) + (1_000_000 if exact else 0)
            if rank >= best:
                best, kind = rank, rest.split(" ")[0]
    return kind


def sync_data(fd: int) -> None:
    """The file's bytes and length survive a power loss."""
    if hasattr(os, "fdatasync"):
        os.fdatasync(fd)
        return
    full_sync = getattr(fcntl, "F_FULLFSYNC", None)  # macOS, whose fsync leaves the bytes in the disk's cache
    if full_sync is not None:
        fcntl.fcntl(fd, full_sync)
    else:
        os.fsync(fd)


def sync_folder(path: Path) -> None:
    """New and renamed files of a folder survive a power loss."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_folder(path: Path) -> None:
    """Makes it, and those that it lies in, where they are not there yet; all of them survive a power loss."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    there = missing[-1].parent if missing else path
    # Whoever made that one may have been killed before it could sync this. Not every file system can, nor may we.
    with contextlib.suppress(OSError):
        sync_folder(there.parent)
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def write_all(fd: int, data: bytes, offset: int) -> None:
    """Writes all of it; the system may take a part at a time."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        offset += written
        view = view[written:]


def explain(exc: OSError, path: Path) -> StoreError:
    """What an error of the system means for the store, and what to do."""
    if exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreError(f"the disk of {path} is full; nothing was changed. Make room, and go on")
    if exc.errno == errno.EROFS:
        return StoreError(f"{path} is on a read-only file system; open it with read_only=True to look at it")
    if exc.errno in (errno.EACCES, errno.EPERM):
        return StoreError(f"no permission for {exc.filename or path}: this process needs to read and write there")
    if exc.errno in (errno.ENOTDIR, errno.EEXIST):
        return StoreError(f"{path} is a file, or lies in one; a store is a folder. Choose another path")
    if exc.errno == errno.ENOENT:
        return StoreError(f"{path} is gone: somebody removed the store, or a part of it")
    return StoreError(f"{path} cannot be used: {exc}")


class Disk:
    """All that the log asks of the system, so that tests can put another one in its place."""

    def open(self, path: Path, flags: int) -> int:
        """A descriptor that no child process inherits."""
        return os.open(path, flags | os.O_CLOEXEC, 0o666)

    def dup(self, fd: int) -> int:
        """Another descriptor of the same file, with the same locks."""
        return os.dup(fd)

    def close(self, fd: int) -> None:
        """Ends it, and with the last one its locks."""
        os.close(fd)

    def read(self, fd: int, size: int, offset: int) -> bytes:
        """Up to so many bytes."""
        return os.pread(fd, size, offset)

    def read_file(self, path: Path) -> bytes:
        """All of it."""
        return path.read_bytes()

    def write(self, fd: int, data: bytes, offset: int) -> None:
        """All of it, or an error."""
        write_all(fd, data, offset)

    def truncate(self, fd: int, size: int) -> None:
        """Makes the file so long."""
        os.ftruncate(fd, size)

    def sync(self, fd: int) -> None:
        """See `sync_data`."""
        sync_data(fd)

    def sync_folder(self, path: Path) -> None:
        """See `sync_folder`."""
        sync_folder(path)

    def size_and_links(self, fd: int) -> tuple[int, int]:
        """How long the file is, and how many names it has."""
        status = os.fstat(fd)
        return status.st_size, status.st_nlink

    def identity(self, fd: int) -> tuple[int, int]:
        """Of the file, among all of this process."""
        status = os.fstat(fd)
        return status.st_dev, status.st_ino

    def lock(self, fd: int) -> None:
        """Waits until nobody else has it locked, and locks it."""
        fcntl.flock(fd, fcntl.LOCK_EX)

    def try_lock(self, fd: int) -> bool:
        """Locks it, unless somebody else has."""
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def unlock(self, fd: int) -> None:
        """Ends a lock."""
        fcntl.flock(fd, fcntl.LOCK_UN)

    def view(self, fd: int, size: int) -> mmap.mmap:
        """The beginning of a file as everybody sees it now, read without a call to the system."""
        return mmap.mmap(fd, size, access=mmap.ACCESS_READ)

    def exists(self, path: Path) -> bool:
        """Whether there is something of that name."""
        return path.exists()

    def is_folder(self, path: Path) -> bool:
        """Whether there is a folder of that name."""
        return path.is_dir()

    def names(self, folder: Path) -> list[str]:
        """Of all that is in it."""
        return os.listdir(folder)

    def make_folder(self, path: Path) -> None:
        """See `make_folder`."""
        make_folder(path)

    def check_local(self, path: Path, allow_unsafe: bool) -> None:
        """See `check_local`."""
        check_local(path, allow_unsafe)

    def rename(self, old: Path, new: Path) -> None:
        """In the place of what had the new name."""
        os.rename(old, new)

    def remove(self, path: Path) -> None:
        """Removes a file, if it is there."""
        path.unlink(missing_ok=True)

    def pause(self, seconds: float) -> None:
        """Waits."""
        time.sleep(seconds)

    def start(self, run: Callable[[], None], name: str) -> None:
        """Runs a function on a thread of its own."""
        threading.Thread(target=run, name=name, daemon=True).start()


LOCAL_DISK: Final = Disk()
