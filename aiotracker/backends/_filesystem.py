"""What the trackers on local files need of a file system, and which ones cannot give it."""

import errno
import os
from pathlib import Path

from ..errors import StoreError, StoreUnsafeError

__all__ = ["check_local", "explain", "sync_data", "sync_folder", "write_all"]

# Their locks are advisory among machines at best, or their caches show one machine's writes late to another.
UNSAFE = frozenset({"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "glusterfs", "lustre", "ncpfs"})


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
        point = parts[4].encode("utf-8", "surrogateescape").decode("unicode_escape", "replace")
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
    import fcntl

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
