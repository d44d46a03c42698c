"""On what the figures were taken."""

import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["PACKAGES", "file_system", "folder_of", "fresh", "machine"]

PACKAGES = ("aiotracker", "msgspec", "anyio", "abstract-tracker", "crawlee", "huey", "persist-queue")
IN_MEMORY = frozenset({"tmpfs", "ramfs"})


def machine(folder: Path | None) -> dict[str, Any]:
    """Processor, system, versions, what else runs, and the file system of a folder (`None`: no disk is used)."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "packages": {name: _version(name) for name in PACKAGES},
        "file_system": None if folder is None else file_system(folder),
    }


def file_system(folder: Path) -> dict[str, Any]:
    """The kind of file system that a folder is on, and whether a sync there reaches a disk."""
    where = folder.resolve()
    while not where.exists():
        where = where.parent
    kind, device, best = "unknown", "unknown", -1
    try:
        mounts = Path("/proc/self/mountinfo").read_text(errors="surrogateescape")
    except OSError:
        mounts = ""  # not Linux
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        point = before.split(" ")[4].replace("\\040", " ")
        if where.is_relative_to(point) and len(point) >= best:
            best = len(point)
            kind, device = after.split(" ")[:2]
    return {"kind": kind, "device": device, "folder": str(folder), "syncs_count": kind not in IN_MEMORY}


def folder_of(store: str) -> Path | None:
    """The folder of a store's URL; `None` where it is not on this machine's disk."""
    scheme, _, rest = store.partition(":")
    return Path(rest.partition("?")[0]) if scheme in ("file", "folder", "sqlite") else None


@contextmanager
def fresh(folder: Path) -> Iterator[Path]:
    """An empty folder inside of this one, which is made where it is missing; both are gone afterwards if empty.

    Raises:
        FileNotFoundError: Somebody removed the folder while it was in use, whatever that broke.
    """
    existed = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix="bench-", dir=folder))
    made.chmod(0o755)  # a server's own user keeps its files in it
    try:
        yield made
    except Exception as exc:
        if not made.exists():
            raise FileNotFoundError(f"{made} was removed by somebody while it was in use") from exc
        raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
        if not existed:
            with suppress(OSError):  # another benchmark uses it too
                folder.rmdir()


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "Model", "Hardware"):
                return value.strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
