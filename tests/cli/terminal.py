"""A terminal, emulated: a program in it believes that a person looks on."""

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

import pyte

__all__ = ["Terminal"]

# A session of its own has no terminal that sends signals before it takes one.
_TAKE = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"


def _without(environ: Mapping[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name not in names}


class Terminal:
    """A command in a terminal, for `with`."""

    def __init__(self, *args: str, folder: Path, columns: int = 100, rows: int = 30, **environ: str) -> None:
        self._ours, self._theirs = pty.openpty()
        self._screen = pyte.Screen(columns, rows)
        self._stream = pyte.ByteStream(self._screen)
        self._set_size(columns, rows)
        self._before = termios.tcgetattr(self._theirs)
        self.shown = b""  # all that was written, as it was
        self.process = subprocess.Popen(
            [sys.executable, "-c", _TAKE, sys.executable, "-m", "aiotracker", *args],
            cwd=folder,
            env=_without(os.environ, "COLUMNS", "LINES", "NO_COLOR") | {"TERM": "xterm-256color"} | environ,
            stdin=self._theirs,
            stdout=self._theirs,
            stderr=self._theirs,
            start_new_session=True,
        )

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._ours)
        os.close(self._theirs)

    @property
    def lines(self) -> list[str]:
        """What stands on the screen."""
        return [line.rstrip() for line in self._screen.display]

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    @property
    def is_as_before(self) -> bool:
        """Whether keys are read and shown as they were before the command."""
        return termios.tcgetattr(self._theirs) == self._before

    def until(self, condition: Callable[[], object]) -> None:
        """Reads until it holds."""
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, f"waited for 60 s; the screen:\n{self.text}"
            self._read()

    def press(self, keys: bytes) -> None:
        os.write(self._ours, keys)

    def resize(self, columns: int, rows: int) -> None:
        self._screen.resize(rows, columns)
        self._set_size(columns, rows)

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self) -> int:
        """Its exit status, once it has ended."""
        self.until(lambda: self.process.poll() is not None)
        self._read()
        return self.process.wait()

    def _set_size(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self._theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def _read(self) -> None:
        if select.select([self._ours], [], [], 0.05)[0]:
            piece = os.read(self._ours, 65536)
            self.shown += piece
            self._stream.feed(piece)
