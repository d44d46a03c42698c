"""moto's threaded server: what AWS answers, without AWS.

Of two writes at once, moto compares both before it stores one: seen, two winners of ten. AWS does not, so writes take
turns here. Run as a program, this is the server.
"""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from typing import Any

__all__ = ["CREDENTIALS", "free_port", "moto_server", "use_credentials"]

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "testtest",
    "AWS_DEFAULT_REGION": "us-east-1",
    # What else is set on this machine must play no part.
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_EC2_METADATA_DISABLED": "true",
}
START_TIME = 60.0  # seconds


def use_credentials() -> None:
    """For this process, and those that it starts."""
    os.environ.update(CREDENTIALS)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextlib.contextmanager
def moto_server() -> Iterator[str]:
    """A server in a process of its own; its URL."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, __file__, str(port)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | CREDENTIALS | {"MOTO_S3_DEFAULT_KEY_BUFFER_SIZE": str(64 * 1024 * 1024)},
    )
    url = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + START_TIME
        while not _answers(f"{url}/moto-api/"):
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"moto's server did not start: {process.returncode}")
            time.sleep(0.05)
        yield url
    finally:
        process.kill()
        process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


class Atomic:
    """The application, one write at a time."""

    def __init__(self, application: Callable[..., Iterable[bytes]]) -> None:
        self._application = application
        self._lock = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] in ("GET", "HEAD"):
            return self._application(environ, start_response)
        with self._lock:
            return self._application(environ, start_response)


def main(port: int) -> None:
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import run_simple

    application = DomainDispatcherApplication(create_backend_app)
    run_simple("127.0.0.1", port, Atomic(application), threaded=True)


if __name__ == "__main__":
    sys.path.pop(0)  # this folder, in which redis and others are ours
    main(int(sys.argv[1]))
