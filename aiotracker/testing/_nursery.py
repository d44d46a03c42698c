"""Starts torture's workers, several a second: a process that has imported everything, and forks.

Run as a program, this is that process. It is told what to do in lines of JSON on its standard input, and tells what
became of its children on its standard output. Its end is the end of all of them.
"""

import asyncio
import contextlib
import gc
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, NoReturn

import msgspec

from ._spawn import command
from ._worker import Settings, work

__all__ = ["Ended", "Nursery"]

READY_TIME = 60.0  # seconds


class Ended(msgspec.Struct, frozen=True):
    """One worker is no more."""

    number: int
    status: int  # its exit status; negative: the signal that ended it


class Nursery:
    """The process that forks, as the one that torture runs in sees it. Used by one thread."""

    def __init__(self, settings: Settings) -> None:
        self._process = subprocess.Popen(
            command(__name__, msgspec.json.encode(settings).decode()), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._answers: SimpleQueue[dict[str, Any]] = SimpleQueue()
        threading.Thread(target=self._listen, name="aiotracker nursery", daemon=True).start()
        try:
            if self._answers.get(timeout=READY_TIME) != {"ready": True}:
                raise RuntimeError("workers cannot be started: see the message above")
        except BaseException:
            self.close()
            raise

    def start(self, number: int) -> None:
        """Forks one."""
        self._tell(start=number)

    def signal(self, number: int, what: signal.Signals) -> None:
        """Sends a signal, unless it has ended."""
        self._tell(signal=number, what=int(what))

    def tell(self, number: int, **what: Any) -> None:
        """Has a worker disturb itself, unless it has ended."""
        self._tell(tell=number, what=what)

    def ended(self, seconds: float = 0.0) -> Ended | None:
        """The next that ended; waits for it."""
        with contextlib.suppress(Empty):
            answer = self._answers.get(timeout=seconds) if seconds > 0 else self._answers.get_nowait()
            if not answer:
                raise RuntimeError("the process that starts workers has ended")
            return msgspec.convert(answer, Ended)
        return None

    def close(self) -> None:
        """Ends all of them."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.wait(READY_TIME)

    def _tell(self, **what: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what).encode() + b"\n")
        self._process.stdin.flush()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as answers:
            for line in answers:
                self._answers.put(json.loads(line))
        self._answers.put({})


class _Mother:
    """In the process that forks."""

    def __init__(self, settings: Settings, session: Any) -> None:
        self._settings = settings
        self._session = session
        self._children: dict[int, tuple[int, int]] = {}  # by pid: its number, and where it listens
        self._wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def run(self) -> None:
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(self._wake[1], warn_on_full_buffer=False)
        _say(ready=True)
        heard = b""
        with selectors.DefaultSelector() as selector:
            selector.register(0, selectors.EVENT_READ)
            selector.register(self._wake[0], selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fd != 0:
                        os.read(key.fd, 4096)
                        continue
                    data = os.read(0, 65536)
                    if not data:
                        self._end()
                        return
                    *lines, heard = (heard + data).split(b"\n")
                    for line in lines:
                        self._do(json.loads(line))
                self._reap()

    def _do(self, what: dict[str, Any]) -> None:
        if "start" in what:
            self._fork(what["start"])
            return
        number = what.get("signal", what.get("tell"))
        for pid, (child, ear) in self._children.items():
            if child == number:
                # Not reaped before we do it, so the pid is still this child's.
                with contextlib.suppress(OSError):
                    if "signal" in what:
                        os.kill(pid, what["what"])
                    else:
                        os.write(ear, json.dumps(what["what"]).encode() + b"\n")

    def _fork(self, number: int) -> None:
        ear, mouth = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        pid = os.fork()
        if pid == 0:
            os.close(mouth)
            self._be_child(number, ear)
        os.close(ear)
        self._children[pid] = (number, mouth)

    def _be_child(self, number: int, ear: int) -> NoReturn:
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for _, mouth in self._children.values():
                os.close(mouth)
            errors = os.open(Path(self._settings.folder, f"worker-{number}.err"), os.O_WRONLY | os.O_CREAT, 0o644)
            nothing = os.open(os.devnull, os.O_RDWR)
            os.dup2(nothing, 0)
            os.dup2(nothing, 1)
            os.dup2(errors, 2)
            asyncio.run(work(self._settings, number, ear, self._session))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)

    def _reap(self) -> None:
        while self._children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            number, mouth = self._children.pop(pid)
            os.close(mouth)
            _say(number=number, status=os.waitstatus_to_exitcode(status))

    def _end(self) -> None:
        for pid in self._children:
            os.kill(pid, signal.SIGKILL)
        for pid in self._children:
            os.waitpid(pid, 0)


def _say(**what: Any) -> None:
    with contextlib.suppress(BrokenPipeError):
        os.write(1, json.dumps(what).encode() + b"\n")


def _aws_session(service: str) -> Any:
    """One that has read the descriptions of the service, so that no worker has to."""
    import aioboto3  # type: ignore[import-untyped]  # ships no types

    session = aioboto3.Session()

    async def warm() -> None:
        async with session.client(service, endpoint_url="http://127.0.0.1:9", region_name="us-east-1"):
            pass

    asyncio.run(warm())
    return session


def main(settings: str) -> None:
    from ._stores import open_store

    read = msgspec.json.decode(settings.encode(), type=Settings)
    tracker = open_store(read.reference)  # imports its driver
    services: dict[str, Callable[[], Any]] = {
        "s3": lambda: _aws_session("s3"),
        "s3+log": lambda: _aws_session("s3"),
        "dynamodb": lambda: _aws_session("dynamodb"),
    }
    scheme = read.reference.partition(":")[0]
    session = services[scheme]() if scheme in services else None
    del tracker
    gc.collect()
    gc.freeze()  # pages that no collection touches stay shared
    _Mother(read, session).run()


if __name__ == "__main__":
    main(sys.argv[1])
