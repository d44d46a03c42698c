"""redis-server from Debian's packages, alone or three of them as a cluster."""

import contextlib
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

__all__ = ["RedisServer", "free_port", "is_installed", "redis_cluster", "redis_server"]

START_TIME = 30.0  # seconds
SAFE = {
    "appendonly": "yes",
    "appendfsync": "always",
    "maxmemory-policy": "noeviction",
    "save": "",
    "repl-diskless-sync-delay": "0",  # no wait for more replicas
}


def is_installed() -> bool:
    return shutil.which("redis-server") is not None and shutil.which("redis-cli") is not None


def free_port(also: int = 0) -> int:
    """A port that nobody uses, nor the one that many above it."""
    while True:
        with socket.socket() as found, socket.socket() as other:
            found.bind(("127.0.0.1", 0))
            port = int(found.getsockname()[1])
            if not also:
                return port
            with contextlib.suppress(OSError, OverflowError):
                other.bind(("127.0.0.1", port + also))
                return port


class RedisServer:
    """One server in a process of its own. Its data outlives `kill` and `start`.

    Args:
        folder: Of its data.
        port: By default a free one.
        **settings: As in redis.conf, with `_` for `-`; what is not given is as safe as it can be.
    """

    def __init__(self, folder: str | Path, port: int | None = None, /, **settings: str) -> None:
        self.folder = Path(folder)
        self.port = free_port() if port is None else port
        self.settings = SAFE | {name.replace("_", "-"): value for name, value in settings.items()}
        self.url = f"redis://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        options = [part for name, value in self.settings.items() for part in (f"--{name}", value)]
        self._process = subprocess.Popen(
            [
                "redis-server",
                *("--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)),
                *("--daemonize", "no", "--logfile", str(self.folder / "log"), *options),
            ],
            stdin=subprocess.DEVNULL,
        )
        until = time.monotonic() + START_TIME
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"redis-server did not start: {(self.folder / 'log').read_text()[-2000:]}")
            time.sleep(0.01)

    def kill(self) -> None:
        """As `kill -9` does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def cli(self, *args: str) -> str:
        """What redis-cli says."""
        command = ["redis-cli", "-p", str(self.port), *args]
        return subprocess.run(command, capture_output=True, check=True, text=True, timeout=START_TIME).stdout.strip()

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
                connection.sendall(b"PING\r\n")
                answer = connection.recv(64)
        except OSError:
            return False
        return answer.startswith((b"+PONG", b"-NOAUTH"))


@contextlib.contextmanager
def redis_server(**settings: str) -> Iterator[RedisServer]:
    """A server with an empty folder, which is removed at the end."""
    with tempfile.TemporaryDirectory(prefix="aiotracker-redis-") as folder:
        server = RedisServer(folder, None, **settings)
        try:
            server.start()
            yield server
        finally:
            server.kill()


@contextlib.contextmanager
def redis_cluster() -> Iterator[list[RedisServer]]:
    """Three masters."""
    with contextlib.ExitStack() as stack:
        servers = []
        for _ in range(3):
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="aiotracker-redis-"))
            # The nodes talk to each other on a second port.
            server = RedisServer(folder, free_port(10_000), cluster_enabled="yes", cluster_node_timeout="1000")
            stack.callback(server.kill)
            server.start()
            servers.append(server)
        servers[0].cli("--cluster", "create", *(f"127.0.0.1:{server.port}" for server in servers), "--cluster-yes")
        until = time.monotonic() + START_TIME
        while any("cluster_state:ok" not in server.cli("cluster", "info") for server in servers):
            if time.monotonic() > until:
                raise RuntimeError("the cluster did not form")
            time.sleep(0.05)
        yield servers
