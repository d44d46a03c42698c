"""dynalite: a DynamoDB for tests, written for node."""

import contextlib
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self
from urllib.error import HTTPError
from urllib.request import urlopen

from .moto import free_port

__all__ = ["DynaliteServer", "dynalite_path", "dynalite_server"]

INSTALLED = Path(__file__).parent / ".npm/node_modules/.bin/dynalite"
START_TIME = 60.0  # seconds


def dynalite_path() -> str | None:
    """The program; `None` where it is not installed."""
    return shutil.which("dynalite") or (str(INSTALLED) if INSTALLED.exists() and shutil.which("node") else None)


class DynaliteServer:
    """One server in a process of its own.

    Args:
        path: Of its files, which outlive `kill` and `start`; by default it keeps all in memory.
    """

    def __init__(self, path: Path | None = None) -> None:
        program = dynalite_path()
        if program is None:
            raise RuntimeError("dynalite is not installed: tests/services/install_dynalite.sh")
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._command = [
            *(program, "--host", "127.0.0.1", "--port", str(port)),
            *("--createTableMs", "0", "--deleteTableMs", "0", "--updateTableMs", "0"),
            *(() if path is None else ("--path", str(path))),
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        until = time.monotonic() + START_TIME
        while not _answers(self.url):
            if self._process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"dynalite did not start: {self._process.returncode}")
            time.sleep(0.05)

    def kill(self) -> None:
        """As `kill -9` does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()


@contextlib.contextmanager
def dynalite_server() -> Iterator[str]:
    """A server that keeps all in memory; its URL."""
    with DynaliteServer() as server:
        yield server.url


def _answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=5):
            return True
    except HTTPError:
        return True
    except OSError:
        return False
