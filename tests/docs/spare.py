"""The command line, imported once for all commands of a page.

Starting Python and importing takes twenty times as long as what most of these commands do. So a process that has
imported everything forks a child for each `aiotracker` of a page: the child gets the arguments, the folder, the
environment and the standard streams of who called it, and its exit status is theirs.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["command_line"]

_CALLER = """\
#!{python} -IS
import json, os, socket, sys

with socket.socket(socket.AF_UNIX) as server:
    server.connect({path!r})
    call = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [call[:1]], [0, 1, 2])
    server.sendall(call[1:])
    server.shutdown(socket.SHUT_WR)
    status = server.recv(16)
sys.exit(int(status or 137))
"""


@contextlib.contextmanager
def command_line() -> Iterator[Path]:
    """A folder with a program `aiotracker` in it. To be called before this process has threads."""
    folder = Path(tempfile.mkdtemp(prefix="docs-"))  # a short path, as those of sockets must be
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(folder / "socket"))
            server.listen()
            pid = os.fork()
            if pid == 0:
                _serve(server)
        caller = folder / "aiotracker"
        caller.write_text(_CALLER.format(python=sys.executable, path=str(folder / "socket")))
        caller.chmod(0o755)
        try:
            yield folder
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    finally:
        shutil.rmtree(folder)


def _serve(server: socket.socket) -> NoReturn:
    try:
        import aiotracker.cli.app  # noqa: F401 - so that no child has to

        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        while True:
            caller, _ = server.accept()
            if os.fork() == 0:
                server.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                _run(caller)
            caller.close()
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def _run(caller: socket.socket) -> NoReturn:
    status: Any = 1
    try:
        call, streams, _, _ = socket.recv_fds(caller, 1, 3)
        while part := caller.recv(65536):
            call += part
        arguments, folder, environ = json.loads(call)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 - for as long as the process lives, like the next two
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - as above
        sys.stderr = open(2, "w", closefd=False, buffering=1)  # noqa: SIM115 - as above
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environ)
        sys.argv = ["aiotracker", *arguments]
        from aiotracker.cli import main

        try:
            main()
            status = 0
        except SystemExit as exc:
            status = exc.code if isinstance(exc.code, int) else int(exc.code is not None)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        with contextlib.suppress(OSError):
            caller.sendall(b"%d" % status)
        os._exit(status)
