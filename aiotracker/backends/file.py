"""FileTracker: a log in JSON Lines on a local disk, shared by any number of processes of one machine."""

import asyncio
import os
import weakref
from contextlib import AsyncExitStack
from functools import cache
from pathlib import Path
from typing import Any, Final

from typing_extensions import TypeVar, Unpack

from .._core.transitions import Renew
from ..errors import StoreError, StoreUnavailableError
from ..tracker import Options
from ._commit import Committer
from ._filesystem import checked_path
from ._log import LogTracker, Wanted, orphaned
from ._log_files import Files, forget_mutexes

__all__ = ["FileTracker"]

D = TypeVar("D", default=Any)
R = TypeVar("R", default=Any)

ABORT_TIME: Final = 0.5  # seconds that closing waits for the lock of a store that could not be opened


class FileTracker(LogTracker[D, R]):
    """Keeps tasks in a folder of this machine: the embedded default. Fast, readable with `jq` and `grep`, safe among
    processes.

    A process that is stopped (SIGSTOP, a debugger) in the middle of a commit stops the store for all others; they
    give up waiting after a third of a lease, with an error that names it.

    Args:
        path: The folder; created where there is none, unless `read_only`.
        fsync: Whether what was acknowledged survives a power loss. Without it, it survives `kill -9` only.
        allow_unsafe: Take a network file system all the same.
        **options: As for `BaseTracker`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        fsync: bool = True,
        allow_unsafe: bool = False,
        **options: Unpack[Options[D, R]],
    ) -> None:
        super().__init__(**options)
        self._path = checked_path(path)
        self._fsync = fsync
        self._allow_unsafe = allow_unsafe
        self._committer: Committer[Wanted] | None = None
        self._files: Files | None = None

    @property
    def path(self) -> Path:
        """The store's folder."""
        return self._path

    async def connect(self, stack: AsyncExitStack) -> None:
        files = Files(
            self._path,
            fsync=self._fsync,
            read_only=self.read_only,
            allow_unsafe=self._allow_unsafe,
            max_record_bytes=self.max_record_bytes,
            now=self.now,
        )
        committer: Committer[Wanted] = Committer(
            files.commit if self.observer is None else self.observer.commits(files.commit, lambda: files.written),
            orphaned=lambda want: orphaned(want, self.new_id()),
            blame=files.blame,
            patience=self._patience,
            name=f"aiotracker {self._path}",
        )

        is_open = False

        async def close() -> None:
            self._committer = self._files = None
            await committer.aclose(files.close, within=None if is_open else ABORT_TIME)

        stack.push_async_callback(close)
        try:
            async with asyncio.timeout(self._patience):
                await committer.call(files.open)
        except TimeoutError as exc:
            raise StoreUnavailableError(f"not opened within {self._patience:.3g} s: {files.blame()}") from exc
        is_open = True
        await committer.call(files.read)
        files.on_thread, files.is_abandoned = committer.post, committer.is_abandoned
        _forget_in_child(files, committer)
        self._committer, self._files = committer, files

    def submit(self, want: Wanted) -> "asyncio.Future[Any]":
        if self._committer is None:
            raise StoreError("this FileTracker is not open; use `async with`, or await open()")
        return self._committer.submit(want, urgent=type(want.transition) is Renew)

    async def compact(self) -> bool:
        """Writes a new log without what is out of date, while others go on. Happens by itself when most is.

        Returns:
            Whether it was done; `False` where another process is doing it.

        Raises:
            StoreError: It could not be written; the old log goes on.
        """
        self._check_writable("compact")
        assert self._committer is not None
        assert self._files is not None
        return await asyncio.wrap_future(await self._committer.call(self._files.start_compaction))


_inherited: "weakref.WeakKeyDictionary[Files, Committer[Wanted]]" = weakref.WeakKeyDictionary()


def _forget_in_child(files: Files, committer: "Committer[Wanted]") -> None:
    _watch_forks()
    _inherited[files] = committer


@cache
def _watch_forks() -> None:
    os.register_at_fork(after_in_child=_after_fork)


def _after_fork() -> None:
    forget_mutexes()
    for files, committer in list(_inherited.items()):
        committer.forget()
        files.forget()
    _inherited.clear()
