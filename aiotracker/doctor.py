"""Finds damage in a store of local files and, when asked, repairs it; what is cut is set aside, never thrown away."""

import asyncio
import contextlib
import fcntl
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final
from urllib.parse import unquote

import msgspec

from ._core.codec import FORMAT
from .backends._filesystem import checked_path, explain, sync_data, sync_folder, write_all
from .backends._log import Index, check_line, commits, is_record, next_commit, parse, seal
from .backends.folder import read_record
from .errors import StoreError, UnsupportedError
from .urls import path_of

__all__ = ["Problem", "Report", "examine"]

LINES_EACH: Final = 1_000  # of a commit in a repaired log
_ID: Final = re.compile(rb'"id":\s*("(?:[^"\\]|\\.)*")')
_LOG_NAME: Final = re.compile(r"log-(\d{8,})\.jsonl")


class Problem(msgspec.Struct):
    """One damaged place.

    Attributes:
        path: The file.
        offset: The first damaged byte; `None`: the file as a whole.
        what: What is wrong, for people.
        lost: Ids whose latest record, or one before it, is damaged, as far as they can still be read.
    """

    path: str
    offset: int | None
    what: str
    lost: list[str]


class Report(msgspec.Struct):
    """What was found.

    Attributes:
        url: Of the store.
        tasks: Records that are sound.
        problems: The damage.
        set_aside: Where the damaged files were put; `None`: nowhere.
        repaired: Whether the store was changed so that it can be opened.
    """

    url: str
    tasks: int
    problems: list[Problem]
    set_aside: str | None = None
    repaired: bool = False

    @property
    def ok(self) -> bool:
        """No damage was found."""
        return not self.problems


async def examine(url: str, *, repair: bool = False) -> Report:
    """Reads all of a store and says what is damaged.

    A commit that was cut off by a crash is no damage: nobody was told of it, and the next writer cuts it.

    Args:
        url: `file:PATH` or `folder:PATH`.
        repair: Make the store usable again. Only what is damaged is lost; an id whose latest record is damaged goes
            back to the one before it. The damaged files are kept in a folder `damaged-...` in the store. Let no other
            process use the store meanwhile.

    Raises:
        InvalidValueError: The path cannot be one.
        UnsupportedError: Another kind of store; those repair themselves, or their servers do.
        StoreError: There is no store, or it cannot be read or written.
    """
    scheme, _, rest = url.partition(":")
    path = checked_path(path_of(rest.partition("?")[0]))
    if scheme not in ("file", "folder"):
        raise UnsupportedError(
            f"only file: and folder: stores are examined, not {scheme}: ones; databases have tools of their own",
            "examine",
        )
    look = _examine_log if scheme == "file" else _examine_folder
    try:
        return await asyncio.to_thread(look, url, path, repair)
    except OSError as exc:
        raise explain(exc, path) from exc


def _check_there(path: Path) -> None:
    if not path.is_dir():
        raise StoreError(f"there is no store at {path}")


# -- folder:


def _examine_folder(url: str, path: Path, repair: bool) -> Report:
    _check_there(path)
    report = Report(url, 0, [])
    damaged: list[Path] = []
    for file in sorted(path.glob("*.json")):
        if file.name.startswith("."):
            continue
        try:
            report.tasks += read_record(file) is not None
        except StoreError as exc:
            damaged.append(file)
            report.problems.append(Problem(str(file), None, str(exc), [unquote(file.stem)]))
    if damaged and repair:
        _set_aside(path, damaged, report)
    return report


# -- file:


def _examine_log(url: str, path: Path, repair: bool) -> Report:
    _check_there(path)
    report = Report(url, 0, [])
    numbers = sorted(int(found[1]) for name in os.listdir(path) if (found := _LOG_NAME.fullmatch(name)))
    identity = path / "store.json"
    if not numbers:
        raise StoreError(f"there is no store at {path}: it has no log")
    with _locked(path) if repair else contextlib.nullcontext():
        if not _is_identity(identity):
            report.problems.append(Problem(str(identity), None, "it is missing or cannot be read", []))
        index = Index()
        logs = _salvage(path, numbers, index, report)
        report.tasks = len(index.entries)
        if report.problems and repair:
            _rewrite(path, logs, index, report)
    return report


def _is_identity(path: Path) -> bool:
    try:
        found = msgspec.json.decode(path.read_bytes())
    except (OSError, msgspec.DecodeError):
        return False
    if isinstance(found, dict) and found.get("layout") == "log" and found.get("format") not in (None, FORMAT):
        raise StoreError(f"{path} has format {found['format']!r}, which this release does not know: nothing is done")
    return isinstance(found, dict) and found.get("layout") == "log"


def _salvage(path: Path, numbers: list[int], index: Index, report: Report) -> list[Path]:
    """Reads the logs as an opener does, but goes on behind what is damaged; gives those that are in use."""
    used: list[Path] = []
    number, offset = numbers[0], 0
    while True:
        log = path / f"log-{number:08}.jsonl"
        used.append(log)
        data = log.read_bytes()
        while True:
            parsed = parse(data[offset:], offset, index)
            offset = parsed.end
            if parsed.sealed is not None or parsed.damage is None:
                break
            end = next_commit(data, offset)
            region = data[offset:end]
            lost: list[str] = []
            for line in region.splitlines(keepends=True):
                if check_line(line):
                    if is_record(line):
                        index.apply_line(line)
                elif found := _ID.search(line):
                    with contextlib.suppress(msgspec.DecodeError):
                        lost.append(msgspec.json.decode(found[1], type=str))
            report.problems.append(Problem(str(log), parsed.damage.offset, parsed.damage.reason, lost))
            offset = end
        if parsed.sealed is None:
            return used
        found_name = _LOG_NAME.fullmatch(parsed.sealed[0])
        if found_name is None or int(found_name[1]) not in numbers:
            report.problems.append(Problem(str(log), offset, f"it goes on in {parsed.sealed[0]}, which is gone", []))
            return used
        number, offset = int(found_name[1]), parsed.sealed[1]


def _rewrite(path: Path, logs: list[Path], index: Index, report: Report) -> None:
    new, size = path / "log.repaired", 0
    fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        for data in commits(index.snapshot(), LINES_EACH):
            write_all(fd, data, size)
            size += len(data)
        sync_data(fd)
    finally:
        os.close(fd)
    numbers = [int(found[1]) for name in os.listdir(path) if (found := _LOG_NAME.fullmatch(name))]
    target = path / f"log-{max(numbers) + 1:08}.jsonl"
    old = [path / f"log-{number:08}.jsonl" for number in numbers]
    os.rename(new, target)
    # Whoever still has the last one open comes to its end, and follows the seal.
    fd = os.open(logs[-1], os.O_RDWR)
    try:
        write_all(fd, seal(target.name, size), os.fstat(fd).st_size)
        sync_data(fd)
    finally:
        os.close(fd)
    identity = path / "store.json"
    if not _is_identity(identity):
        if identity.exists():
            old.append(identity)
        (path / "store.json.new").write_bytes(msgspec.json.encode({"format": FORMAT, "layout": "log"}) + b"\n")
    _set_aside(path, old, report)
    if (path / "store.json.new").exists():
        os.rename(path / "store.json.new", identity)
    sync_folder(path)


def _set_aside(path: Path, files: list[Path], report: Report) -> None:
    aside = path / f"damaged-{time.strftime('%Y%m%dT%H%M%S')}"
    while aside.exists():
        aside = aside.with_name(aside.name + "x")
    aside.mkdir()
    for file in files:
        os.rename(file, aside / file.name)
    sync_folder(aside)
    sync_folder(path)
    report.set_aside, report.repaired = str(aside), True


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    fd = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
