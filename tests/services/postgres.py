"""PostgreSQL and PgBouncer, each with a folder and a port of its own."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["Server", "has_pgbouncer", "has_postgres", "pgbouncer", "postgres_server"]

START_TIME = 60.0  # seconds
USERS = ("postgres", "nobody")  # as whom a server runs where root starts it: it refuses to be root
HBA = """\
local all all trust
host all careful 127.0.0.1/32 scram-sha-256
host all all 127.0.0.1/32 trust
host replication all 127.0.0.1/32 trust
"""


def _program(name: str) -> str | None:
    found = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin")
    if found is None:
        versions = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: int(path.parts[-3]))
        found = str(versions[-1]) if versions else None
    return found


def has_postgres() -> bool:
    return _program("initdb") is not None and _program("postgres") is not None


def has_pgbouncer() -> bool:
    return _program("pgbouncer") is not None


def _as_user() -> dict[str, Any]:
    """Arguments of Popen for a process that must not be root's."""
    if os.getuid() != 0:
        return {}
    import pwd

    for name in USERS:
        with contextlib.suppress(KeyError):
            found = pwd.getpwnam(name)
            return {"user": found.pw_uid, "group": found.pw_gid, "extra_groups": []}
    raise RuntimeError("no user to run a server as")


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextlib.contextmanager
def _folder(parent: str | None = None) -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="aiotracker-pg-", dir=parent))
    if user := _as_user():
        os.chown(path, user["user"], user["group"])
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


class Server:
    """A server that can be killed and started again.

    Attributes:
        port: On 127.0.0.1.
        dsn: Of its superuser and first database.
    """

    def __init__(self, folder: Path, settings: dict[str, str]) -> None:
        self.folder = folder
        self.port = _free_port()
        self.dsn = f"postgresql://postgres@127.0.0.1:{self.port}/postgres"
        self._settings = settings
        self._process: subprocess.Popen[bytes] | None = None

    def create(self) -> None:
        """Makes its files."""
        arguments = ["-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"]
        self._run("initdb", "-D", str(self.folder / "data"), *arguments)
        self.folder.joinpath("data/pg_hba.conf").write_text(HBA)

    def copy_of(self, primary: "Server") -> None:
        """Makes its files a read-only replica's."""
        address = ["-h", "127.0.0.1", "-p", str(primary.port), "-U", "postgres"]
        self._run("pg_basebackup", "-D", str(self.folder / "data"), "-R", "-c", "fast", *address)

    def _run(self, name: str, *arguments: str) -> None:
        program = _program(name)
        assert program is not None, name
        done = subprocess.run([program, *arguments], capture_output=True, text=True, cwd="/", **_as_user())
        if done.returncode:
            raise RuntimeError(f"{name} failed: {done.stderr[-2000:]}")

    def start(self) -> None:
        """Starts it, and waits until it answers."""
        program = _program("postgres")
        assert program is not None
        settings = {
            "port": str(self.port),
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": str(self.folder),
            "max_connections": "60",
            "shared_buffers": "64MB",
            **self._settings,
        }
        command = [program, "-D", str(self.folder / "data")]
        for name, value in settings.items():
            command += ["-c", f"{name}={value}"]
        until = time.monotonic() + START_TIME
        while True:
            if self._process is None or self._process.poll() is not None:
                # After a kill, the old server's children may need a moment to notice it.
                with open(self.folder / "log", "ab") as log:
                    self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd="/", **_as_user())
            if self._answers():
                return
            if time.monotonic() > until:
                self.stop()
                raise RuntimeError(f"the server did not start: {(self.folder / 'log').read_text()[-2000:]}")
            time.sleep(0.05)

    def _answers(self) -> bool:
        program = _program("pg_isready")
        assert program is not None
        return subprocess.run([program, "-q", "-h", "127.0.0.1", "-p", str(self.port)], check=False).returncode == 0

    def kill(self) -> None:
        """As `kill -9` does."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def pause(self) -> None:
        """It answers nobody, and keeps its connections, as behind a network that is cut."""
        for pid in self._family():
            os.kill(pid, signal.SIGSTOP)

    def resume(self) -> None:
        """It goes on."""
        for pid in self._family():
            os.kill(pid, signal.SIGCONT)

    def _family(self) -> list[int]:
        assert self._process is not None
        parent = self._process.pid
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        return [parent, *map(int, children)]

    def stop(self) -> None:
        """Ends it at once, in order."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.send_signal(signal.SIGQUIT)  # it ends its children, which a kill would not
                self._process.wait()


@contextlib.contextmanager
def postgres_server(
    *, replica_of: Server | None = None, folder: str | None = None, **settings: str
) -> Iterator[Server]:
    """A server; its settings as in postgresql.conf.

    Args:
        replica_of: Follow this one, read-only.
        folder: In which its own folder is made.
        **settings: Over those of a small machine.
    """
    with _folder(folder) as path:
        server = Server(path, settings)
        if replica_of is None:
            server.create()
        else:
            server.copy_of(replica_of)
        try:
            server.start()
            yield server
        finally:
            server.stop()


@contextlib.contextmanager
def pgbouncer(server: Server, *, pool_size: int = 4) -> Iterator[str]:
    """PgBouncer in transaction mode before a server; the DSN through it."""
    program = _program("pgbouncer")
    assert program is not None
    port = _free_port()
    with _folder() as path:
        path.joinpath("users").write_text('"postgres" ""\n')
        path.joinpath("pgbouncer.ini").write_text(f"""\
[databases]
postgres = host=127.0.0.1 port={server.port} dbname=postgres user=postgres
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = trust
auth_file = {path / "users"}
pool_mode = transaction
default_pool_size = {pool_size}
max_client_conn = 200
""")
        if user := _as_user():
            for name in ("users", "pgbouncer.ini"):
                os.chown(path / name, user["user"], user["group"])
        with open(path / "log", "wb") as log:
            process = subprocess.Popen(
                [program, "-q", str(path / "pgbouncer.ini")], stdout=log, stderr=log, cwd="/", **_as_user()
            )
        try:
            until = time.monotonic() + START_TIME
            while not _is_open(port):
                if process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(f"pgbouncer did not start: {(path / 'log').read_text()[-2000:]}")
                time.sleep(0.02)
            yield f"postgresql://postgres@127.0.0.1:{port}/postgres"
        finally:
            process.terminate()
            process.wait()


def _is_open(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0
