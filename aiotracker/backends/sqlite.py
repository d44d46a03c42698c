"""SqliteTracker: tasks in an SQLite database, shared by any number of processes of one machine.

Two threads a tracker, each with a connection of its own: one commits, all that waits in one transaction, one reads, so
that a long query keeps no lease from being renewed. Only sqlite3 ever opens the file: who opens and closes it in
another way loses all locks that this process has on it.
"""

import asyncio
import os
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from functools import cache, partial
from pathlib import Path
from typing import Any, Final

from typing_extensions import TypeVar, Unpack

from .._core.query import GroupBy, Query
from .._core.task import Task
from .._core.transitions import Renew
from ..contract import UNKNOWN, Claimable, Transition
from ..errors import (
    ConflictError,
    InvalidValueError,
    StoreError,
)
from ..tracker import BaseTracker, Options
from ._commit import Committer
from ._filesystem import checked_path
from ._sql import Operation, Replacement, check_namespace, is_all_sql, orphaned
from ._sqlite import Look, Reader, Synchronous, Writer
from ._sqlite_file import RECORDS, Connection, File

__all__ = ["SqliteTracker"]

D = TypeVar("D", default=Any)
R = TypeVar("R", default=Any)

READ_BYTES: Final = 2 * 1024 * 1024  # of records that a scan reads at once
WAIT_SHARE: Final = 0.8  # of the time that a waiter has, for which a commit tries to get the lock

_NOT_OPEN: Final = "this SqliteTracker is not open; use `async with`, or await open()"


class SqliteTracker(BaseTracker[D, R]):
    """Keeps tasks in an SQLite database on a local disk, in WAL mode; safe among processes of one machine.

    `sqlite3 FILE` answers questions from the view `tasks`. Reading it while trackers work is safe. Do not write to it.

    A process that is stopped (SIGSTOP, a debugger) in the middle of a commit stops the store for all others; they
    give up waiting after a third of a lease.

    Args:
        path: The file; created where there is none, with its folder, unless `read_only`. Beside it are `FILE-wal` and
            `FILE-shm`, which belong to it.
        namespace: Which of the stores in the database; nothing outside of it is seen or changed.
        synchronous: What an acknowledged write survives: `full` a power loss; `normal` and `off` a `kill -9` only, and
            with `off` a power loss may damage the database.
        allow_unsafe: Take a network file system all the same.
        **options: As for `BaseTracker`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        namespace: str = "default",
        synchronous: Synchronous = "full",
        allow_unsafe: bool = False,
        **options: Unpack[Options[D, R]],
    ) -> None:
        super().__init__(**options)
        if os.fspath(path) in ("", ":memory:"):
            raise InvalidValueError(f"SqliteTracker takes the path of a file, not {path!r}; in memory is MemoryTracker")
        if synchronous not in ("full", "normal", "off"):
            raise InvalidValueError(f"synchronous is full, normal or off, not {synchronous!r}")
        self._path = checked_path(path)
        self._namespace = check_namespace(namespace)
        self._synchronous = synchronous
        self._allow_unsafe = allow_unsafe
        self._writer: Committer[Operation] | None = None
        self._reader: Committer[Look] | None = None

    @property
    def path(self) -> Path:
        """The database's file."""
        return self._path

    @property
    def namespace(self) -> str:
        """Which of the stores in the database."""
        return self._namespace

    # -- the contract

    async def connect(self, stack: AsyncExitStack) -> None:
        file = File(self._path, self._patience * WAIT_SHARE)
        if not self.read_only:
            writer = Writer(file, self._namespace, self.max_record_bytes, self.now)
            # Closed after the reader: who closes last, copies the write-ahead log into the database.
            commit: Callable[[list[Operation]], int] = writer.commit
            if self.observer is not None:
                writer.counts = True
                commit = self.observer.commits(commit, lambda: writer.written)
            self._writer = await self._start(stack, writer, commit, lambda done: orphaned(done, self.new_id()))
            await self._writer.call(lambda: writer.create(self._synchronous, self._allow_unsafe))
        reader = Reader(file, self._namespace)
        self._reader = await self._start(stack, reader, reader.look, lambda look: None)
        await self._reader.call(lambda: reader.open(self._allow_unsafe, read_only=self.read_only))

    async def _start(
        self,
        stack: AsyncExitStack,
        connection: "Connection",
        commit: Callable[[list[Any]], int],
        orphaned: Callable[[Any], Any],
    ) -> "Committer[Any]":
        committer: Committer[Any] = Committer(
            commit,
            orphaned=orphaned,
            blame=connection.file.blame,
            patience=self._patience,
            name=f"aiotracker {self._path}",
            tells=isinstance(connection, Writer),
        )
        connection.away = committer.tell

        async def close() -> None:
            self._writer, self._reader = (None, None) if committer is self._writer else (self._writer, None)
            await committer.aclose(connection.close)

        stack.push_async_callback(close)
        _close_in_child(connection, committer)
        return committer

    def update(self, task_id: str, transition: Transition, *, known: object = UNKNOWN) -> "asyncio.Future[Task | None]":
        return self._submit(Operation(task_id, transition, self.new_id(), known if isinstance(known, Task) else None))

    def _submit(self, operation: Operation) -> "asyncio.Future[Task | None]":
        if self._writer is None:
            self._check_writable("update")
            raise StoreError(_NOT_OPEN)
        return self._writer.submit(operation, urgent=type(operation.transition) is Renew)

    async def load(self, task_id: str) -> Task | None:
        task_id = self._check_id(task_id)
        if self._writer is None:
            task: Task | None = await self._ask(partial(Reader.load, task_id=task_id))
            return task
        # After this tracker's own writes, so that nobody sees less than what is already on its way.
        return await self._submit(Operation(task_id))

    async def dump(self, task: Task) -> Task:
        # A write_id that is the version already would not show that anything was written.
        write_id = self.new_id() if task.write_id in ("", task.version) else task.write_id
        new = task.replace()
        stored = await self._submit(Operation(task.id, Replacement(task, new), write_id))
        if stored is not new:
            raise ConflictError(f"another version of {task.id!r} is stored", stored, known=True)
        return new

    async def delete(self, task: Task) -> None:
        stored = await self._submit(Operation(task.id, Replacement(task, None), self.new_id()))
        if stored is not None:
            raise ConflictError(f"another version of {task.id!r} is stored", stored, known=True)

    async def scan(self, query: Query) -> AsyncIterator[Task]:
        after: int | None = -1
        size = RECORDS
        while after is not None:
            keys, after = await self._ask(partial(Reader.keys, query=query, after=after))
            position = 0
            while position < len(keys):
                some = keys[position : position + size]
                position += size
                tasks, read = await self._ask(partial(Reader.records_at, keys=some))
                size = max(1, min(1000, READ_BYTES * len(some) // max(1, read)))
                for task in tasks:
                    yield task

    async def tally(self, query: Query, by: GroupBy) -> Counter[str]:
        if not is_all_sql(query):
            return await super().tally(query, by)
        return Counter(await self._ask(partial(Reader.tally, query=query, by=by)))

    async def claimable(self, limit: int) -> Claimable:
        now = self.now()
        keys, next_due = await self._ask(partial(Reader.claimable, limit=limit, now=now))
        tasks: list[Task] = []
        while keys:
            some, keys = keys[:RECORDS], keys[RECORDS:]
            tasks += (await self._ask(partial(Reader.records_at, keys=some)))[0]
        return Claimable(tasks, next_due)

    async def _ask(self, question: Callable[["Reader"], Any]) -> Any:
        if self._reader is None:
            raise StoreError(_NOT_OPEN)
        return await self._reader.submit(Look(question))


# -- forks

_inherited: "weakref.WeakKeyDictionary[Connection, Committer[Any]]" = weakref.WeakKeyDictionary()


def _close_in_child(connection: Connection, committer: "Committer[Any]") -> None:
    _watch_forks()
    _inherited[connection] = committer


@cache
def _watch_forks() -> None:
    os.register_at_fork(after_in_child=_after_fork)


def _after_fork() -> None:
    for connection, committer in list(_inherited.items()):
        committer.forget()
        connection.forget()
    _inherited.clear()
