"""The engine with one of its remedies taken out: the simulation must notice each."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Final
from unittest import mock

from aiotracker.backends import _log, _log_files
from aiotracker.backends._log import Index, Parsed, Wanted
from aiotracker.backends._log_files import Files

from .disk import SimulatedDisk

__all__ = ["MUTATIONS"]


def _commit_at_once(self: Files, wanted: Sequence[Wanted]) -> int:
    batch = self.index.batch(wanted, self._now(), self._max_record_bytes)
    self.index.apply(batch)
    if batch.data:
        self._append(batch.data)
    else:
        self._sync_foreign()
    self.index.look(wanted[: batch.taken])
    return batch.taken


_write = SimulatedDisk.write


def _write_what_fits(self: SimulatedDisk, fd: int, data: bytes, offset: int) -> None:
    try:
        _write(self, fd, data, offset)
    except OSError:
        pass


def _parse_line_by_line(data: bytes, start: int, index: Index | None) -> Parsed:
    position = 0
    while (newline := data.find(b"\n", position) + 1) > 0 and _log.check_line(data[position:newline]):
        line = data[position:newline]
        position = newline
        if line.startswith(b'{"sealed":'):
            seal = _log._decode_seal(line)
            return Parsed(start + position, sealed=(seal.sealed, seal.offset))
        if index is not None and _log.is_record(line):
            index.apply_line(line)
    return Parsed(start + position)


def _nothing(*args: Any, **more: Any) -> None:
    pass


def _marks_without_sums(lines: Sequence[bytes]) -> bytes:
    return b'{"mark":%d,"crc":"00000000"}\n' % len(lines)


MUTATIONS: Final[dict[str, Callable[[], AbstractContextManager[Any]]]] = {
    "a commit takes no lock": lambda: mock.patch.object(SimulatedDisk, "lock", _nothing),
    "the index changes before the sync": lambda: mock.patch.object(Files, "_commit_locked", _commit_at_once),
    "a short write counts": lambda: mock.patch.object(SimulatedDisk, "write", _write_what_fits),
    "a failed sync does not stop the tracker": lambda: mock.patch.object(Files, "_break", _nothing),
    "nothing is synced": lambda: mock.patch.object(SimulatedDisk, "sync", _nothing),
    "lines have no sum": lambda: mock.patch.multiple(
        _log, check_line=lambda line: line.startswith(b"{"), _mark=_marks_without_sums
    ),
    "lines count without their mark": lambda: mock.patch.object(_log_files, "parse", _parse_line_by_line),
    "a torn tail is not cut": lambda: mock.patch.object(SimulatedDisk, "truncate", _nothing),
    "what others wrote is told before it is synced": lambda: mock.patch.object(Files, "_sync_foreign", _nothing),
    "what a killed writer left is not synced first": lambda: mock.patch.object(_log_files, "UNCLEAN", b""),
    "what was read ahead is not looked at again": lambda: mock.patch.object(_log_files, "TAIL_BYTES", 0),
    "a compacted log is not sealed": lambda: mock.patch.object(_log_files, "seal", return_value=b""),
    "folders are not synced": lambda: mock.patch.object(SimulatedDisk, "sync_folder", _nothing),
}
