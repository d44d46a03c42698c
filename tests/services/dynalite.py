"""dynalite: a DynamoDB for tests, written for node."""

import contextlib
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

from .moto import free_port

__all__ = ["dynalite_path", "dynalite_server"]

INSTALLED = Path(__file__).parent / ".npm/node_modules/.bin/dynalite"
START_TIME = 60.0  # seconds


def dynalite_path() -> str | None:
    """The program; `None` where it is not installed."""
    return shutil.which("dynalite") or (str(INSTALLED) if INSTALLED.exists() and shutil.which("node") else None)


@contextlib.contextmanager
def dynalite_server(port: int | None = None, path: Path | None = None) -> Iterator[str]:
    """A server in a process of its own; its URL.

    Args:
        port: On loopback; by default a free one.
        path: Of its files; by default it keeps all in memory.
    """
    program = dynalite_path()
    if program is None:
        raise RuntimeError("dynalite is not installed: tests/services/install_dynalite.sh")
    port = port or free_port()
    times = ["--createTableMs", "0", "--deleteTableMs", "0", "--updateTableMs", "0"]
    process = subprocess.Popen(
        [program, "--host", "127.0.0.1", "--port", str(port), *times, *([] if path is None else ["--path", str(path)])],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + START_TIME
        while not _answers(url):
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"dynalite did not start: {process.returncode}")
            time.sleep(0.05)
        yield url
    finally:
        process.kill()
        process.wait()


def _answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=5):
            return True
    except HTTPError:
        return True
    except OSError:
        return False
