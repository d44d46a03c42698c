"""One command line for many ids: the template, and one run of it as a child process."""

import asyncio
import errno
import hashlib
import os
import shlex
import signal
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import aiofiles
import msgspec

__all__ = ["CannotStart", "CommandFailed", "CommandTimeout", "Outcome", "OutputError", "Runner", "Template"]

INLINE: Final = 8 * 1024  # bytes of output that a record keeps: all of it, or its end
KILL_AFTER: Final = 5.0  # seconds between SIGTERM and SIGKILL
DRAIN: Final = 5.0  # seconds after a command's end in which what it left running may still write
NO_ROOM: Final = frozenset({errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM})
CHUNK: Final = 64 * 1024  # bytes: what a pipe of Linux holds
POLL: Final = 0.02  # seconds between looks at whether a process group is gone


class CannotStart(Exception):
    """The program is not there, or is none: it would be the same for every id."""


class CommandFailed(Exception):
    """A command that ended with another exit code than 0."""


class CommandTimeout(CommandFailed, TimeoutError):
    """A command that was ended since it took too long."""


class OutputError(Exception):
    """Output could not be written to its file: it would be the same for every id."""


class Template(msgspec.Struct, frozen=True):
    """The command for every id."""

    command: list[str]
    shell: bool = False  # one string for /bin/sh, and ids are quoted in it

    def argv(self, task_id: str) -> list[str]:
        """The arguments for one id: it stands for each `{}`, or, where there is none, comes last."""
        value = shlex.quote(task_id) if self.shell else task_id
        if any("{}" in part for part in self.command):
            parts = [part.replace("{}", value) for part in self.command]
        elif self.shell:
            parts = [f"{self.command[0]} {value}"]
        else:
            parts = [*self.command, value]
        return ["/bin/sh", "-c", *parts] if self.shell else parts

    @property
    def is_one_program(self) -> bool:
        """Whether every id runs the same program."""
        return self.shell or "{}" not in self.command[0]

    def __str__(self) -> str:
        return f"--shell {shlex.quote(self.command[0])}" if self.shell else shlex.join(self.command)


class Outcome(msgspec.Struct):
    """How one run of a command ended."""

    exit_code: int  # negative: killed by the signal of this number
    seconds: float
    stdout: "Output"
    stderr: "Output"
    timed_out: bool = False

    def as_json(self) -> dict[str, Any]:
        """As it is kept with the task."""
        kept: dict[str, Any] = {"exit_code": self.exit_code, "seconds": round(self.seconds, 3)}
        for name, output in (("stdout", self.stdout), ("stderr", self.stderr)):
            kept[name] = output.text
            if output.file is not None:
                kept[f"{name}_file"] = {"path": str(output.file), "bytes": output.size}
        return kept

    @property
    def problem(self) -> str | None:
        """What to call the failure; `None` after a success."""
        if self.exit_code == 0:
            return None
        if self.exit_code < 0:
            try:
                text = f"killed by {signal.Signals(-self.exit_code).name}"
            except ValueError:
                text = f"killed by signal {-self.exit_code}"
        else:
            text = f"exit code {self.exit_code}"
        last = self.stderr.last_line or self.stdout.last_line
        return f"{text}: {last}" if last else text


class Output:
    """What a command writes to one of its pipes: short output in memory, long output in a file, as it comes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tail = bytearray()
        self.size = 0
        self.file: Path | None = None

    async def collect(self, fd: int) -> None:
        """Reads to the end; closes the descriptor.

        Raises:
            OutputError: The file cannot be written.
        """
        try:
            os.set_blocking(fd, False)
            while (chunk := await _read(fd)) and self.size + len(chunk) <= INLINE:
                self._keep(chunk)
            if chunk:
                await self._stream(fd, chunk)
        finally:
            os.close(fd)

    async def _stream(self, fd: int, chunk: bytes) -> None:
        try:
            await asyncio.to_thread(self._path.parent.mkdir, parents=True, exist_ok=True)
            async with aiofiles.open(self._path, "wb") as file:
                self.file = self._path
                await file.write(self._tail)
                while chunk:
                    self._keep(chunk)
                    await file.write(chunk)
                    chunk = await _read(fd)
        except OSError as exc:
            raise OutputError(f"long output cannot be written to {self._path}: {exc.strerror or exc}") from exc

    def _keep(self, chunk: bytes) -> None:
        self.size += len(chunk)
        self._tail += chunk
        del self._tail[:-INLINE]

    @property
    def text(self) -> str:
        """All of it or, where it is in a file, the last part; bytes that are no UTF-8 escaped."""
        kept = bytes(self._tail)
        if self.size > len(kept):
            kept = kept.lstrip(bytes(range(0x80, 0xC0)))  # the rest of a character that was cut
        return kept.decode(errors="backslashreplace")

    @property
    def last_line(self) -> str:
        """The last line that is not blank, shortened."""
        lines = self.text.split("\n")
        return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")


class Runner:
    """Runs commands as children, each in a session of its own, so that Ctrl-C in a terminal reaches only us.

    Args:
        folder: Where long output goes.
        timeout: Seconds after which a command is ended, and has failed.
    """

    def __init__(self, folder: Path, timeout: float | None) -> None:
        self._folder = folder
        self._timeout = timeout
        self._groups: set[int] = set()

    async def run(self, argv: list[str], task_id: str, *, attempt: int, fence: int) -> Outcome:
        """Runs one command to its end. However this is left, no process of it is: SIGTERM, then SIGKILL.

        Raises:
            CannotStart: The program is not there, or cannot be executed.
            OutputError: Its output cannot be written.
            OSError: The machine has no room for one more process.
        """
        loop = asyncio.get_running_loop()
        began = loop.time()
        name = f"{quote(task_id, safe='')[:100]}-{hashlib.sha256(task_id.encode()).hexdigest()[:12]}.{fence}"
        outcome = Outcome(0, 0.0, Output(self._folder / f"{name}.stdout"), Output(self._folder / f"{name}.stderr"))
        environ = os.environ | {
            "AIOTRACKER_ID": task_id,
            "AIOTRACKER_ATTEMPT": str(attempt),
            "AIOTRACKER_FENCE": str(fence),
        }
        pipes: list[tuple[int, int]] = []
        try:
            # Pipes of our own: asyncio's tie the end of the process to the end of its output.
            pipes += [os.pipe()]
            pipes += [os.pipe()]
            process = await _start(
                asyncio.create_subprocess_exec(
                    *argv,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=pipes[0][1],
                    stderr=pipes[1][1],
                    start_new_session=True,
                    env=environ,
                )
            )
        except BaseException as exc:
            for reading, _ in pipes:
                os.close(reading)
            if isinstance(exc, OSError) and exc.errno not in NO_ROOM:
                why = "there is no such command" if exc.errno == errno.ENOENT else exc.strerror
                raise CannotStart(f"{argv[0]!r} cannot be run: {why}") from exc
            raise
        finally:
            for _, writing in pipes:
                os.close(writing)
        self._groups.add(process.pid)
        outputs = zip((outcome.stdout, outcome.stderr), pipes, strict=True)
        readers = [asyncio.create_task(output.collect(reading)) for output, (reading, _) in outputs]
        try:
            try:
                async with asyncio.timeout(self._timeout):
                    await _first_error(process.wait(), readers)
            except TimeoutError:
                outcome.timed_out = True
                await self._end(process, readers)
            except BaseException:
                await self._end(process, readers)
                raise
            _, late = await asyncio.wait(readers, timeout=DRAIN)
            for reader in readers:
                if reader not in late:
                    reader.result()
        finally:
            self._groups.discard(process.pid)
            for reader in readers:
                reader.cancel()
            await asyncio.gather(*readers, return_exceptions=True)
        outcome.exit_code = process.returncode or 0
        outcome.seconds = loop.time() - began
        return outcome

    def kill(self) -> None:
        """Sends SIGKILL to everything that runs: for who cannot wait."""
        for group in self._groups:
            _signal(group, signal.SIGKILL)

    async def _end(self, process: asyncio.subprocess.Process, readers: list[asyncio.Task[None]]) -> None:
        group = process.pid
        _signal(group, signal.SIGTERM)
        loop = asyncio.get_running_loop()
        until = loop.time() + KILL_AFTER
        try:
            # The first process may end before those that it has started; dead ones may wait long for their burial.
            while loop.time() < until and _signal(group, 0):  # the system has no event for this
                if process.returncode is not None and all(reader.done() for reader in readers):
                    break
                await asyncio.sleep(POLL)
        finally:
            await _kill(process)


async def _read(fd: int) -> bytes:
    """What is in a pipe, as soon as there is something; nothing at its end."""
    # Not by connect_read_pipe: uvloop's closes a descriptor twice, and with it a file that another thread has just
    # opened (https://github.com/MagicStack/uvloop/issues/763).
    loop = asyncio.get_running_loop()
    while True:
        with suppress(BlockingIOError):
            return os.read(fd, CHUNK)
        ready = asyncio.Event()
        loop.add_reader(fd, ready.set)
        try:
            await ready.wait()
        finally:
            loop.remove_reader(fd)


def _signal(group: int, number: int) -> bool:
    """Whether anybody of this process group is left."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # a child that changed its user
    return True


async def _kill(process: asyncio.subprocess.Process) -> None:
    """Ends what is left of the group, and waits for the first of them."""
    _signal(process.pid, signal.SIGKILL)
    with suppress(TimeoutError):
        async with asyncio.timeout(KILL_AFTER):
            await process.wait()


async def _start(starting: Coroutine[Any, Any, asyncio.subprocess.Process]) -> asyncio.subprocess.Process:
    """Starts a process. A cancellation waits until it is known, so that it can be ended: that is a matter of
    milliseconds, and what was handed to it must stay open until then.
    """
    future = asyncio.ensure_future(starting)
    cancelled = False
    while not future.done():
        try:
            await asyncio.wait({future})
        except asyncio.CancelledError:
            cancelled = True
    process = future.result()
    if cancelled:
        await _kill(process)
        raise asyncio.CancelledError
    return process


async def _first_error(waiting: Coroutine[Any, Any, int], readers: list[asyncio.Task[None]]) -> None:
    """Waits for a process, but not when its output cannot be taken."""
    exited = asyncio.ensure_future(waiting)
    pending: set[asyncio.Future[Any]] = {exited, *readers}
    try:
        while not exited.done():
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for future in done:
                future.result()
    finally:
        exited.cancel()
