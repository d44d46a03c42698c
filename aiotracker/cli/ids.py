"""Ids from a file or pipe: read by a thread, a bounded number ahead, whatever the length of the input."""

import asyncio
import os
import stat
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Final, Self

__all__ = ["IdReader"]

BLOCK: Final = 64 * 1024  # bytes
BATCH: Final = 1_000  # ids that the thread hands over at once
BATCHES: Final = 200  # handed over and not yet begun, at the most: so far ahead, the end is often known early
MAX_ID_BYTES: Final = 2_048


class IdReader:
    """An async iterator of the ids in a file, one a line or NUL-separated; blank ones are passed over.

    What cannot be an id is reported and passed over: one bad line must not stop a million good ones.

    Args:
        fd: An open file descriptor; it is not closed.
        nul: Ids end with a NUL byte instead of a newline, and are taken as they are.
        refuse: Called, in the event loop, with a sentence about each one that cannot be an id.

    Raises:
        OSError: From the iteration: it cannot be read.

    Attributes:
        taken: How many ids were given.
        refused: How many could not be ids.
        total: How many there are, once that is known: for a regular file soon, for a pipe at its end.
    """

    def __init__(self, fd: int, *, nul: bool, refuse: Callable[[str], None]) -> None:
        self._fd = fd
        self._nul = nul
        self._refuse = refuse
        self._batches: deque[list[str]] = deque()
        self._batch: Iterator[str] = iter(())
        self._found = 0
        self._room = threading.Semaphore(BATCHES)
        self._news = asyncio.Event()
        self._over = False
        self._error: OSError | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        is_file = stat.S_ISREG(os.fstat(fd).st_mode)
        self._start = os.lseek(fd, 0, os.SEEK_CUR) if is_file else None
        self.taken = 0
        self.refused = 0
        self.total: int | None = None

    def __aiter__(self) -> Self:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            # Daemons: a read that never returns, from a terminal, must not keep the process from ending.
            threading.Thread(target=self._read, name="aiotracker ids", daemon=True).start()
            if self._start is not None:
                threading.Thread(target=self._count, args=(self._start,), name="aiotracker count", daemon=True).start()
        return self

    async def __anext__(self) -> str:
        while True:
            for task_id in self._batch:
                self.taken += 1
                return task_id
            if self._batches:
                self._batch = iter(self._batches.popleft())
                self._room.release()
                continue
            if self._error is not None:
                raise self._error
            if self._over:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()

    def _read(self) -> None:
        number = 0
        try:
            for pieces in split(self._blocks(), b"\0" if self._nul else b"\n"):
                for start in range(0, len(pieces), BATCH):
                    self._room.acquire()
                    if not self._post(self._deliver, pieces[start : start + BATCH], number + start):
                        return
                number += len(pieces)
        except OSError as exc:
            self._post(self._end, exc)
        else:
            self._post(self._end, None)

    def _blocks(self) -> Iterator[bytes]:
        while block := os.read(self._fd, BLOCK):
            yield block

    def _post(self, call: Callable[..., None], *args: object) -> bool:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(call, *args)
        except RuntimeError:
            return False  # the loop is closed: nobody wants more
        return True

    def _deliver(self, pieces: list[bytes], number: int) -> None:
        batch: list[str] = []
        for offset, raw in enumerate(pieces, 1):
            if _is_blank(raw, self._nul):
                continue
            try:
                batch.append(read_id(raw))
            except ValueError as exc:
                self.refused += 1
                self._refuse(f"{'item' if self._nul else 'line'} {number + offset:,} is passed over: {exc}")
        self._found += len(batch)
        self._batches.append(batch)
        self._news.set()

    def _end(self, error: OSError | None) -> None:
        self._over, self._error = True, error
        if error is None:
            self.total = self._found
        self._news.set()

    def _count(self, start: int) -> None:
        """Reads a regular file once more, ahead of everything, so that the time left can be told from the start."""
        found = 0
        try:
            for pieces in split(self._blocks_from(start), b"\0" if self._nul else b"\n"):
                found += sum(_is_id(raw, self._nul) for raw in pieces)
        except OSError:
            return  # the reading thread meets the same error, and tells
        self._post(self._counted, found)

    def _blocks_from(self, offset: int) -> Iterator[bytes]:
        while block := os.pread(self._fd, BLOCK, offset):
            offset += len(block)
            yield block

    def _counted(self, found: int) -> None:
        if not self._over:
            self.total = found


def split(blocks: Iterable[bytes], separator: bytes) -> Iterator[list[bytes]]:
    """The pieces between separators, as they come; of one far too long to be an id, the beginning."""
    rest = b""
    for block in blocks:
        *pieces, rest = (rest + block).split(separator)
        rest = rest[: 2 * MAX_ID_BYTES]
        if pieces:
            yield pieces
    if rest:
        yield [rest]


def read_id(raw: bytes) -> str:
    """The id.

    Raises:
        ValueError: It cannot be an id, or no argument of a command.
    """
    shown = raw[:60].decode(errors="backslashreplace") + ("..." if len(raw) > 60 else "")
    if len(raw) > MAX_ID_BYTES:
        raise ValueError(f"an id takes at most {MAX_ID_BYTES:,} bytes, and {shown!r} has more")
    if b"\0" in raw:
        raise ValueError(f"{shown!r} has a NUL byte, which no argument of a command can hold")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise ValueError(f"an id is UTF-8, and {shown!r} is not") from None


def _is_blank(raw: bytes, nul: bool) -> bool:
    return not raw if nul else not raw.strip()


def _is_id(raw: bytes, nul: bool) -> bool:
    if _is_blank(raw, nul):
        return False
    try:
        read_id(raw)
    except ValueError:
        return False
    return True
