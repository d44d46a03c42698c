"""What is particular to the SQLite tracker."""

import asyncio
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from aiotracker import (
    InvalidValueError,
    MemoryTracker,
    Retry,
    SqliteTracker,
    StoreCorruptedError,
    StoreError,
    StoreUnavailableError,
    StoreUnsafeError,
    TaskUnavailableError,
    UnsupportedError,
)
from aiotracker._core.query import GroupBy
from aiotracker.backends import _sqlite, _sqlite_file, sqlite
from aiotracker.backends._sql import escaped, unescaped
from aiotracker.contract import Contract
from aiotracker.testing.conformance import HOSTILE_IDS
from aiotracker.testing.conformance._base import until
from tests.conftest import require

WHEN = datetime(2026, 1, 1, tzinfo=UTC)
FAILED_TODAY = """
    SELECT error_type, count(*) FROM tasks
    WHERE status IN ('failed', 'exhausted') AND finish_time >= date('now')
    GROUP BY error_type ORDER BY count(*) DESC
"""


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "jobs.db"


def ask(store: Path, sql: str) -> list[Any]:
    with closing(sqlite3.connect(store)) as connection:
        return connection.execute(sql).fetchall()


def statements_of(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the committing thread runs from now on."""
    seen: list[str] = []
    do = _sqlite.Writer._do

    def watch(self: _sqlite.Writer, sql: str, parameters: Any = ()) -> Any:
        seen.append(sql.split(" ")[0])
        return do(self, sql, parameters)

    monkeypatch.setattr(_sqlite.Writer, "_do", watch)
    return seen


async def run(tracker: SqliteTracker, task_id: str, **options: Any) -> None:
    async with tracker.run(task_id, **options) as task:
        task.result = task_id


async def fail(tracker: SqliteTracker, task_id: str, error: Exception) -> None:
    with pytest.raises(type(error)):
        async with tracker.run(task_id):
            raise error


# -- committing


async def test_what_waits_together_is_committed_together(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with SqliteTracker(store) as tracker:
        await run(tracker, "first")
        seen = statements_of(monkeypatch)
        await asyncio.gather(*(run(tracker, f"task-{n}") for n in range(500)))
        assert seen.count("COMMIT") <= 20
        # As many rows a statement as there are, since each statement gives up the interpreter.
        assert seen.count("INSERT") <= 200
        assert await tracker.count() == {"succeeded": 501}


async def test_a_lone_task_takes_two_commits(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with SqliteTracker(store) as tracker:
        seen = statements_of(monkeypatch)
        await run(tracker, "alone")
        assert seen.count("COMMIT") == 2


async def test_reading_takes_no_lock_for_writing_and_is_not_stopped_by_one(store: Path) -> None:
    async with SqliteTracker(store) as tracker:
        await tracker.add_many(f"task-{n}" for n in range(10))
        with Lock(store):
            async with asyncio.timeout(5):
                assert await tracker.count() == {"pending": 10}
                assert len([task async for task in tracker.find()]) == 10
                assert await tracker.load("task-3") is not None
                assert len((await tracker.claimable(5)).tasks) == 5


async def test_a_value_that_cannot_be_stored_fails_alone(store: Path) -> None:
    async with SqliteTracker(store) as tracker:

        def breaks(task: Any, now: datetime) -> Any:
            raise ZeroDivisionError

        async def broken() -> None:
            await tracker.update("broken", breaks)

        answers = await asyncio.gather(
            *(run(tracker, f"task-{n}") for n in range(20)), broken(), return_exceptions=True
        )
        assert [type(answer) for answer in answers] == [type(None)] * 20 + [ZeroDivisionError]
        assert await tracker.count() == {"succeeded": 20}


async def test_a_record_that_cannot_be_read_fails_alone(store: Path) -> None:
    async with SqliteTracker(store) as tracker:
        await asyncio.gather(*(run(tracker, f"task-{n}") for n in range(5)))
        with closing(sqlite3.connect(store)) as other, other:
            other.execute("UPDATE task SET record = '{\"id\": 7}' WHERE id = 'task-3'")
        answers = await asyncio.gather(*(tracker.load(f"task-{n}") for n in range(5)), return_exceptions=True)
        assert [type(answer) for answer in answers].count(StoreCorruptedError) == 1
        answers = await asyncio.gather(
            *(run(tracker, f"task-{n}", force=True) for n in range(5)), return_exceptions=True
        )
        assert [isinstance(answer, StoreCorruptedError) for answer in answers] == [n == 3 for n in range(5)]
        with pytest.raises(StoreCorruptedError, match="cannot be read"):
            [task async for task in tracker.find()]


async def test_records_of_a_megabyte_are_committed_a_few_at_a_time(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with SqliteTracker(store) as tracker:
        seen = statements_of(monkeypatch)
        await tracker.add_many((f"task-{n}", "x" * 900_000) for n in range(20))
        assert seen.count("COMMIT") >= 4
        sizes = [len(task.data) async for task in tracker.find()]
        assert sizes == [900_000] * 20
        assert await tracker.reset(status="pending", min_attempts=0) == 0


async def test_what_must_be_read_for_a_commit_is_read_a_few_records_at_a_time(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_sqlite, "MAX_COMMIT_BYTES", 1000)
    monkeypatch.setattr(_sqlite, "RECORDS", 4)
    async with SqliteTracker(store) as tracker:
        await tracker.add_many((f"task-{n}", n) for n in range(60))
        seen = statements_of(monkeypatch)
        with Lock(store):
            runs = [asyncio.create_task(run(tracker, f"task-{n}")) for n in range(60)]
            await asyncio.sleep(0.02)  # they gather
        await asyncio.gather(*runs)
        assert seen.count("COMMIT") >= 6
        found = {task.id: (task.data, task.result) async for task in tracker.find()}
        assert found == {f"task-{n}": (n, f"task-{n}") for n in range(60)}


async def test_a_task_that_is_purged_and_added_in_one_commit_is_a_new_one_in_all_columns(store: Path) -> None:
    async with SqliteTracker(store) as tracker:
        await tracker.add("job", priority=1)
        before = ask(store, "SELECT create_time FROM tasks WHERE id = 'job'")
        with Lock(store):
            first = asyncio.create_task(tracker.add("first"))
            await asyncio.sleep(0.02)  # its commit waits for the lock, and the next two for that commit
            purged = asyncio.ensure_future(tracker.update("job", lambda task, now: None))
            added = asyncio.create_task(tracker.add("job", priority=2))
            await asyncio.sleep(0)
        await asyncio.gather(first, purged, added)
        (row,) = ask(store, "SELECT create_time, priority FROM tasks WHERE id = 'job'")
        assert row[0] > before[0][0]
        assert row[1] == 2
        task = await tracker.load("job")
        assert task is not None
        assert row[0] == _sqlite._time_text(task.create_time)


async def test_a_commit_that_changes_nothing_ends_its_transaction(store: Path) -> None:
    async with SqliteTracker(store) as tracker:
        await run(tracker, "job")
        with pytest.raises(TaskUnavailableError):
            await run(tracker, "job")
        assert (await in_writer(tracker, "SELECT count(*) FROM task")) == 1
        async with SqliteTracker(store) as other:
            await run(other, "other")
        await run(tracker, "another")


# -- several processes and trackers

CRUNCH = """
import asyncio, sys
from aiotracker import SqliteTracker

async def main():
    async with SqliteTracker(sys.argv[1], lease=5) as tracker:
        print("ready", flush=True)
        count = 0
        async def one():
            nonlocal count
            while True:
                count += 1
                async with tracker.run(f"{sys.argv[2]}-{count}") as task:
                    task.result = count
                print(task.id, flush=True)
        await asyncio.gather(*(one() for _ in range(20)))
asyncio.run(main())
"""


async def test_kill_9_in_the_middle_of_commits_loses_nothing_acknowledged(store: Path) -> None:
    acknowledged: list[str] = []
    for round_ in range(3):
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", CRUNCH, str(store), str(round_), stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        assert await child.stdout.readline() == b"ready\n"
        for _ in range(100 + 50 * round_):
            acknowledged.append((await child.stdout.readline()).decode().strip())
        child.kill()
        rest = (await child.stdout.read()).decode()
        acknowledged += rest.split("\n")[:-1]  # the last line may be torn
        await child.wait()
    async with SqliteTracker(store) as tracker:
        done = {task.id async for task in tracker.find(status="succeeded")}
        assert set(acknowledged) <= done
        await run(tracker, "after")
    assert ask(store, "PRAGMA integrity_check") == [("ok",)]


async def test_two_trackers_of_one_process_take_turns(store: Path) -> None:
    async with SqliteTracker(store) as one, SqliteTracker(store) as other:
        winners = 0

        async def claim(tracker: SqliteTracker, n: int) -> None:
            nonlocal winners
            try:
                await run(tracker, f"task-{n}")
            except TaskUnavailableError:
                return
            winners += 1

        await asyncio.gather(*(claim(tracker, n) for n in range(200) for tracker in (one, other)))
        assert winners == 200


async def test_namespaces_of_one_database_know_nothing_of_each_other(store: Path) -> None:
    async with SqliteTracker(store) as one, SqliteTracker(store, namespace="other") as other:
        assert (one.namespace, other.namespace) == ("default", "other")
        await run(one, "job")
        await one.add("mine")
        await fail(other, "job", ValueError("no"))
        assert await one.count() == {"succeeded": 1, "pending": 1}
        assert await other.count() == {"failed": 1}
        assert [task.id async for task in other.find()] == ["job"]
        assert [task.id async for task in other.find(order_by="id")] == ["job"]
        assert await other.load("mine") is None
        assert [task.id for task in (await one.claimable(10)).tasks] == ["mine"]
        assert await other.purge(status="failed", force=True) == 1
        assert await one.count() == {"succeeded": 1, "pending": 1}
        keys = [task.id async for task in one.find(prefix="j")]
        assert keys == ["job"]


@pytest.mark.parametrize("namespace", ["", "a b", "a/b", "x" * 101, "ä", "{a}", None, 7, "a\n"])
def test_a_namespace_that_cannot_be_one_is_refused(store: Path, namespace: Any) -> None:
    with pytest.raises(InvalidValueError, match="namespace"):
        SqliteTracker(store, namespace=namespace)


@pytest.mark.parametrize("path", ["", ":memory:"])
def test_a_database_in_memory_is_refused(path: str) -> None:
    with pytest.raises(InvalidValueError, match="MemoryTracker"):
        SqliteTracker(path)


def test_another_durability_is_refused(store: Path) -> None:
    with pytest.raises(InvalidValueError, match="synchronous"):
        SqliteTracker(store, synchronous="extra")  # type: ignore[arg-type]  # that is the point


@pytest.mark.parametrize(("synchronous", "number"), [("full", 2), ("normal", 1), ("off", 0)])
async def test_durability_is_as_asked_for(store: Path, synchronous: Any, number: int) -> None:
    async with SqliteTracker(store, synchronous=synchronous) as tracker:
        await run(tracker, "job")
        assert await in_writer(tracker, "PRAGMA synchronous") == number
        assert await in_writer(tracker, "PRAGMA journal_mode") == b"wal"


async def in_writer(tracker: SqliteTracker, sql: str) -> Any:
    """What a statement finds on the connection that commits."""
    assert tracker._writer is not None
    connection = tracker._writer._commit.__self__  # type: ignore[attr-defined]  # a bound method
    return await tracker._writer.call(lambda: connection._do(sql)[0])


# -- locks


class Lock:
    """Holds the lock for writing, as somebody else's transaction does."""

    def __init__(self, store: Path) -> None:
        self._connection = sqlite3.connect(store, isolation_level=None)

    def __enter__(self) -> None:
        self._connection.execute("BEGIN IMMEDIATE")

    def __exit__(self, *exc: object) -> None:
        self._connection.close()


async def test_a_lock_that_somebody_keeps_is_said_in_time_and_nothing_is_claimed(store: Path) -> None:
    async with SqliteTracker(store, lease=0.9) as tracker:
        with Lock(store):
            start = asyncio.get_running_loop().time()
            with pytest.raises(StoreUnavailableError, match="lock"):
                await run(tracker, "job")
            assert asyncio.get_running_loop().time() - start < 0.9
        await run(tracker, "other")
        task = await tracker.load("job")
        assert task is None or (task.status, task.attempts) == ("pending", 0)


async def test_who_waits_for_a_lock_gets_it_when_it_is_free(store: Path) -> None:
    async with SqliteTracker(store) as tracker:
        with Lock(store):
            waiting = asyncio.create_task(run(tracker, "job"))
            await asyncio.sleep(0.05)
            assert not waiting.done()
        async with asyncio.timeout(5):
            await waiting


async def test_a_claim_that_is_cancelled_while_it_waits_for_the_lock_leaves_nothing_claimed(store: Path) -> None:
    async with SqliteTracker(store) as tracker:
        with Lock(store):
            claims = [asyncio.create_task(run(tracker, f"task-{n}")) for n in range(5)]
            await asyncio.sleep(0.02)  # one commit waits for the lock, and the rest for that commit
            for claim in claims:
                claim.cancel()
            await asyncio.wait(claims)

        async def is_free(task_id: str) -> bool:
            task = await tracker.load(task_id)
            return task is None or (task.status, task.attempts) == ("pending", 0)

        for n in range(5):
            await until(partial(is_free, f"task-{n}"))
            await run(tracker, f"task-{n}")


HOLD = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("held", flush=True)
sys.stdin.read()
"""


async def test_a_stopped_process_with_the_lock_is_said_and_waited_for(store: Path) -> None:
    async with SqliteTracker(store, lease=0.9) as tracker:
        await run(tracker, "first")
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", HOLD, str(store), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        await child.stdout.readline()
        child.send_signal(signal.SIGSTOP)
        with pytest.raises(StoreUnavailableError, match="another process has locked"):
            await run(tracker, "second")
        child.kill()
        await child.wait()
        await run(tracker, "third")


async def test_several_processes_may_make_the_database_at_once(store: Path) -> None:
    trackers = [SqliteTracker(store) for _ in range(8)]
    await asyncio.gather(*(tracker.open() for tracker in trackers))
    await asyncio.gather(*(run(tracker, f"task-{n}") for n, tracker in enumerate(trackers)))
    assert await trackers[0].count() == {"succeeded": 8}
    await asyncio.gather(*(tracker.aclose() for tracker in trackers))


# -- files that cannot be used


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    require(mounted.returncode == 0, "mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


async def test_a_full_disk_is_said_and_loses_nothing_acknowledged(small_disk: Path) -> None:
    store = small_disk / "jobs.db"
    done: list[str] = []
    async with SqliteTracker(store) as tracker:
        with pytest.raises(StoreError, match="full"):
            for n in range(1000):
                async with tracker.run(f"task-{n}", data="x" * 5000) as task:
                    task.result = n
                done.append(f"task-{n}")
        assert len(done) > 3
        assert {task.id async for task in tracker.find(status="succeeded")} == set(done)
        subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
        await run(tracker, "after")
    async with SqliteTracker(store, read_only=True) as reader:
        found = {task.id async for task in reader.find(status="succeeded")}
        # The end of the last one could not be written in time, and may have been since.
        assert {*done, "after"} <= found <= {*done, "after", f"task-{len(done)}"}
    assert ask(store, "PRAGMA integrity_check") == [("ok",)]


async def test_a_read_only_disk_is_said_and_can_be_looked_at(small_disk: Path) -> None:
    store = small_disk / "jobs.db"
    async with SqliteTracker(store) as tracker:
        await run(tracker, "job")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(StoreError, match="read-only"):
        await SqliteTracker(store).open()
    async with SqliteTracker(store, read_only=True) as reader:
        assert await reader.count() == {"succeeded": 1}
        assert await reader.load("job") is not None
        with pytest.raises(UnsupportedError):
            await reader.add("more")


async def test_a_file_that_is_no_database_is_refused_and_not_changed(store: Path) -> None:
    store.write_text("my diary\n" * 1000)
    for read_only in (False, True):
        with pytest.raises(StoreCorruptedError, match="no SQLite database"):
            await SqliteTracker(store, read_only=read_only).open()
    assert store.read_text() == "my diary\n" * 1000


async def test_a_damaged_database_is_said(store: Path) -> None:
    async with SqliteTracker(store) as tracker:
        await tracker.add_many((f"task-{n}", "x" * 1000) for n in range(500))
    with open(store, "r+b") as file:
        for page in range(2, store.stat().st_size // 4096):
            file.seek(page * 4096)
            file.write(b"\xff" * 100)
    async with SqliteTracker(store) as tracker:
        with pytest.raises(StoreCorruptedError, match=r"recover"):
            await asyncio.gather(*(tracker.load(f"task-{n}") for n in range(500)))
        with pytest.raises(StoreCorruptedError):
            [task async for task in tracker.find()]
        with pytest.raises(StoreCorruptedError):
            await run(tracker, "task-7")


async def test_another_format_is_refused_and_not_changed(store: Path) -> None:
    async with SqliteTracker(store) as tracker:
        await run(tracker, "job")
    ask(store, "PRAGMA user_version = 2")
    before = store.read_bytes()
    for read_only in (False, True):
        with pytest.raises(StoreError, match="format 2"):
            await SqliteTracker(store, read_only=read_only).open()
    assert store.read_bytes() == before


async def test_a_database_of_something_else_is_refused_and_not_changed(store: Path) -> None:
    ask(store, "CREATE TABLE diary (day TEXT)")
    before = store.read_bytes()
    with pytest.raises(StoreError, match="something else"):
        await SqliteTracker(store).open()
    assert store.read_bytes() == before


async def test_a_folder_where_the_file_should_be_is_said(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="folder"):
        await SqliteTracker(tmp_path).open()


async def test_read_only_creates_nothing(store: Path) -> None:
    with pytest.raises(StoreError, match="no store"):
        await SqliteTracker(store, read_only=True).open()
    assert not store.exists()
    store.touch()
    with pytest.raises(StoreError, match="empty"):
        await SqliteTracker(store, read_only=True).open()


async def test_missing_folders_are_made(tmp_path: Path) -> None:
    async with SqliteTracker(tmp_path / "a" / "b" / "jobs.db") as tracker:
        await run(tracker, "job")


async def test_a_path_with_the_letters_of_a_url_is_a_path(tmp_path: Path) -> None:
    store = tmp_path / "50%?mode=memory#x y.db"
    async with SqliteTracker(store) as tracker:
        await run(tracker, "job")
    assert store.exists()


async def test_a_write_ahead_log_that_is_removed_under_us_is_said(store: Path) -> None:
    async with SqliteTracker(store) as tracker:
        await run(tracker, "job")
        _sqlite_file.wal_of(store).unlink()
        with pytest.raises(StoreError, match="removed or replaced"):
            await run(tracker, "other")


@pytest.mark.parametrize("replaced", [False, True])
async def test_a_file_that_is_removed_under_us_is_said(store: Path, replaced: bool) -> None:
    async with SqliteTracker(store) as tracker:
        await run(tracker, "job")
        store.rename(store.with_name("moved.db"))
        if replaced:
            store.write_bytes(store.with_name("moved.db").read_bytes())
        with pytest.raises(StoreError, match="removed or replaced"):
            await run(tracker, "other")
        with pytest.raises(StoreError, match="removed or replaced"):
            await tracker.count()


async def test_network_file_systems_are_refused_unless_allowed(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiotracker.backends._filesystem.kind_of", lambda *_: "nfs4")
    with pytest.raises(StoreUnsafeError, match="nfs4"):
        await SqliteTracker(store).open()
    async with SqliteTracker(store, allow_unsafe=True) as tracker:
        await run(tracker, "job")


async def test_a_failed_commit_is_never_acknowledged_and_stops_the_tracker(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with SqliteTracker(store) as tracker:
        await run(tracker, "job")
        do = _sqlite.Writer._do

        def breaks(self: _sqlite.Writer, sql: str, parameters: Any = ()) -> Any:
            if sql == "COMMIT":
                error = sqlite3.OperationalError("disk I/O error")
                error.sqlite_errorcode = sqlite3.SQLITE_IOERR_FSYNC
                raise error
            return do(self, sql, parameters)

        monkeypatch.setattr(_sqlite.Writer, "_do", breaks)
        with pytest.raises(StoreUnavailableError, match="unknown"):
            await tracker.add("lost")
        monkeypatch.undo()
        with pytest.raises(StoreError, match="given up until it is opened again"):
            await tracker.add("more")
    async with SqliteTracker(store) as tracker:
        assert await tracker.load("lost") is None
        await run(tracker, "more")


async def test_a_transaction_that_cannot_be_taken_back_stops_the_tracker(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stuck:
        in_transaction = True

        def __init__(self, inner: Any) -> None:
            self._inner = inner

        def execute(self, sql: str, parameters: Any = ()) -> Any:
            if sql in ("COMMIT", "ROLLBACK"):
                error = sqlite3.OperationalError(f"no {sql}")
                error.sqlite_errorcode = sqlite3.SQLITE_FULL
                raise error
            return self._inner.execute(sql, parameters)

        def close(self) -> None:
            self._inner.close()

    async with SqliteTracker(store) as tracker:
        await run(tracker, "job")
        do = _sqlite.Writer._do

        def breaks(self: Any, sql: str, parameters: Any = ()) -> Any:
            if not isinstance(self._sqlite, Stuck):
                self._sqlite = Stuck(self._sqlite)
            return do(self, sql, parameters)

        monkeypatch.setattr(_sqlite.Writer, "_do", breaks)
        with pytest.raises(StoreError, match=r"the disk of .* is full"):
            await tracker.add("lost")
        with pytest.raises(StoreError, match="could not be taken back: no ROLLBACK"):
            await tracker.add("more")
    monkeypatch.undo()
    async with SqliteTracker(store) as tracker:
        assert await tracker.count() == {"succeeded": 1}


async def test_a_place_without_a_write_ahead_log_is_refused(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patiently = _sqlite.Writer._patiently

    def without(self: _sqlite.Writer, sql: str) -> Any:
        return (b"delete",) if sql.startswith("PRAGMA journal_mode") else patiently(self, sql)

    monkeypatch.setattr(_sqlite.Writer, "_patiently", without)
    with pytest.raises(StoreUnsafeError, match="no write-ahead log"):
        await SqliteTracker(store).open()


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (sqlite3.SQLITE_CANTOPEN, "needs to read and write it and its folder"),
        (sqlite3.SQLITE_TOOBIG, r"cannot be used: told \(no code\)"),
        (0, "cannot be used: told"),
    ],
)
def test_what_sqlite_says_is_explained(store: Path, code: int, said: str) -> None:
    error = sqlite3.OperationalError("told")
    error.sqlite_errorcode = code
    with pytest.raises(StoreError, match=said), _sqlite_file.File(store, 1.0).translated():
        raise error


async def test_who_only_reads_is_told_of_a_record_that_is_missing_or_cannot_be_read(store: Path) -> None:
    async with SqliteTracker(store) as tracker:
        assert tracker.path == store
        await tracker.add("bad")
        await tracker.add("good")
    with closing(sqlite3.connect(store)) as other, other:
        other.execute("UPDATE task SET record = '{\"id\": 7}' WHERE id = 'bad'")
    async with SqliteTracker(store, read_only=True) as reader:
        assert await reader.load("good") is not None
        assert await reader.load("missing") is None
        with pytest.raises(StoreCorruptedError, match="'bad'"):
            await reader.load("bad")
        with pytest.raises(UnsupportedError):
            await reader.add("new")


async def test_a_database_that_others_may_change_is_not_read_without_their_locks(store: Path) -> None:
    async with SqliteTracker(store) as tracker:
        await run(tracker, "job")
    busy, closed = sqlite3.OperationalError("busy"), sqlite3.OperationalError("closed")
    busy.sqlite_errorcode, closed.sqlite_errorcode = sqlite3.SQLITE_BUSY, sqlite3.SQLITE_CANTOPEN
    assert not await asyncio.to_thread(_sqlite_file.needs_no_lock, busy, store)
    assert not await asyncio.to_thread(_sqlite_file.needs_no_lock, closed, store)  # the disk is not read-only


async def test_a_tracker_that_is_closed_can_be_opened_again(store: Path) -> None:
    tracker = SqliteTracker(store)
    for n in range(2):
        async with tracker:
            await run(tracker, f"task-{n}")
        with pytest.raises(StoreError, match="not open"):
            await tracker.load("task-0")
    assert not store.with_name("jobs.db-wal").exists()  # the last who closes copies the log into the database


# -- what people see


def test_each_hostile_id_has_a_column_of_its_own_in_the_order_of_ids() -> None:
    ids = sorted([*HOSTILE_IDS, "\x01", "\x01\x01", "\x01\x02", "a\x00", "a\x01", "a\x02", "\x00\x01", "\x01\x00"])
    columns = [escaped(task_id) for task_id in ids]
    assert columns == sorted(set(columns))
    assert [unescaped(column) for column in columns] == ids
    assert not any("\x00" in column for column in columns)
    assert all(
        (column == task_id) for column, task_id in zip(columns, ids, strict=True) if "\x00" < min(task_id) != "\x01"
    )


async def test_hostile_ids_and_prefixes_are_found_as_python_finds_them(store: Path) -> None:
    ids = [
        *HOSTILE_IDS,
        "a\x01",
        "\x01",
        "\x00\x01",
        "퟿",
        "\ue000",
        "\U0010ffff",
        "\U0010ffffa",
        "\U0010ffff\U0010ffff",
    ]
    async with SqliteTracker(store) as tracker, MemoryTracker() as memory:
        for each in (tracker, memory):
            assert await each.add_many(ids) == len(set(ids))
        assert [task.id async for task in tracker.find(order_by="id")] == sorted(ids)
        for prefix in {task_id[:length] for task_id in ids for length in (1, 2)}:
            wanted = {task_id for task_id in ids if task_id.startswith(prefix)}
            assert {task.id async for task in tracker.scan(tracker._query({"prefix": prefix}))} == wanted
        for task_id in ids:
            await run(tracker, task_id)
            task = await tracker.load(task_id)
            assert task is not None
            assert (task.id, task.result) == (task_id, task_id)


async def test_one_statement_says_what_failed_today_by_type_of_error(store: Path) -> None:
    async with SqliteTracker(store, retry=Retry(1)) as tracker:
        for n, error in enumerate((ValueError("a"), ValueError("b"), KeyError("c"))):
            await fail(tracker, f"bad-{n}", error)
        await run(tracker, "good")
        assert ask(store, FAILED_TODAY) == [("ValueError", 2), ("KeyError", 1)]
        assert ask(store, FAILED_TODAY.replace("date('now')", "datetime('now', '+1 minute')")) == []
        assert ask(store, FAILED_TODAY.replace("date('now')", "datetime('now', '-1 minute')")) != []
        assert ask(store, "SELECT error_message FROM tasks WHERE id = 'bad-1'") == [("b",)]
        assert ask(store, "SELECT result, json_extract(record, '$.status') FROM tasks WHERE id = 'good'") == [
            ("good", "succeeded")
        ]
        async with tracker.run("held") as task:
            (row,) = ask(
                store, "SELECT worker, lease_expires_at > datetime('now') FROM tasks WHERE status = 'in_progress'"
            )
            assert row == (tracker.worker, 1)
            assert task.id == "held"


async def test_the_view_cannot_be_written_to(store: Path) -> None:
    async with SqliteTracker(store) as tracker:
        await tracker.add("job")
        with pytest.raises(sqlite3.OperationalError, match="cannot modify tasks"):
            ask(store, "UPDATE tasks SET status = 'succeeded'")


# Each of these is answered from an index.
@pytest.mark.parametrize(
    ("index", "condition"),
    [
        ("sqlite_autoindex_task_1", "id = 'job'"),
        ("task_status", "status = 'failed'"),
        ("task_attempts", "attempts > 1"),
        ("task_attempts", "attempts > 1 AND attempts >= 5"),
        (
            "task_ready",
            "namespace = 'default' AND priority > 5 AND not_before IS NULL AND status IN ('pending', 'failed')",
        ),
        ("task_create_time", "create_time >= '2026-01-01'"),
        ("task_update_time", "update_time >= '2026-01-01'"),
        ("task_finish_time", "finish_time >= '2026-01-01'"),
        ("task_lease_expires_at", "lease_expires_at < datetime('now')"),
        ("task_worker", "worker = 'me'"),
        ("task_error_type", "error_type = 'ValueError'"),
        ("task_error_type", "error_type = 'ValueError' AND namespace = 'default' AND status = 'failed'"),
        ("task_fingerprint", "fingerprint = '0123456789ab'"),
        ("task_last_outcome", "last_outcome = 'timeout'"),
        ("task_step", "step = 'parse'"),
    ],
)
async def test_what_people_ask_for_has_an_index(store: Path, index: str, condition: str) -> None:
    async with SqliteTracker(store):
        plan = ask(store, f"EXPLAIN QUERY PLAN SELECT * FROM tasks WHERE {condition}")
        assert [line[3] for line in plan if line[3].startswith(f"SEARCH task USING INDEX {index} ")], plan


@pytest.mark.parametrize(
    ("index", "where"),
    [
        ("task_status", {"status": "failed"}),
        ("task_status", {"status": {"failed", "exhausted"}}),
        ("task_attempts", {"min_attempts": 2}),
        ("task_attempts", {"min_attempts": 5}),
        ("task_create_time", {"created_after": WHEN}),
        ("task_create_time", {"created_before": WHEN}),
        ("task_update_time", {"updated_after": WHEN}),
        ("task_finish_time", {"finished_after": WHEN}),
        ("task_finish_time", {"finished_before": WHEN}),
        ("task_worker", {"worker": "me"}),
        ("task_error_type", {"error_type": "ValueError"}),
        ("task_error_type", {"error_type": "ValueError", "status": "failed"}),
        ("task_fingerprint", {"fingerprint": "0123456789ab"}),
        ("task_last_outcome", {"last_outcome": "timeout"}),
        ("task_step", {"step": "parse", "step_status": "failed"}),
        ("sqlite_autoindex_task_1", {"prefix": "2026-"}),
    ],
)
async def test_each_filter_has_an_index(
    store: Path, index: str, where: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with SqliteTracker(store) as tracker:
        plan = await plans(monkeypatch, store, lambda: listed(tracker.find(**where, limit=10)))
        assert [line for line in plan if re.match(rf"SEARCH task USING (COVERING )?INDEX {index} ", line)], plan


@pytest.mark.parametrize("by", ["status", "error_type", "fingerprint", "worker", "last_outcome", "step"])
async def test_what_is_counted_is_counted_in_an_index_alone(
    store: Path, by: GroupBy, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with SqliteTracker(store) as tracker:
        plan = await plans(monkeypatch, store, lambda: tracker.count(by=by))
        plan += await plans(monkeypatch, store, lambda: tracker.count(by=by, status={"failed", "exhausted"}))
        looked_at = [line for line in plan if " task " in line]
        assert f"USING COVERING INDEX task_{by} " in looked_at[0]
        assert all("USING COVERING INDEX" in line for line in looked_at), plan


async def plans(monkeypatch: pytest.MonkeyPatch, store: Path, asks: Callable[[], Awaitable[Any]]) -> list[str]:
    """How SQLite answers what is asked meanwhile."""
    asked: list[tuple[str, Any]] = []
    do = _sqlite.Reader._do

    def watch(self: _sqlite.Reader, sql: str, parameters: Any = ()) -> Any:
        if "FROM task" in sql:
            asked.append((sql, parameters))
        return do(self, sql, parameters)

    with monkeypatch.context() as patch:
        patch.setattr(_sqlite.Reader, "_do", watch)
        await asks()

    def explain() -> list[str]:
        with closing(sqlite3.connect(store)) as connection:
            return [
                line[3] for sql, values in asked for line in connection.execute(f"EXPLAIN QUERY PLAN {sql}", values)
            ]

    return await asyncio.to_thread(explain)


async def listed(found: AsyncIterator[Any]) -> list[Any]:
    return [one async for one in found]


async def test_claimable_is_answered_from_indexes(store: Path) -> None:
    async with SqliteTracker(store):
        for name in ("claimable", "next_due"):
            sql = _sqlite_file._statements()[name]
            with closing(sqlite3.connect(store)) as connection:
                plan = connection.execute(
                    f"EXPLAIN QUERY PLAN {sql}", {"namespace": "default", "limit": 10, "now": "2026-01-01"}
                ).fetchall()
            looked_at = [line[3] for line in plan if " task" in line[3]]
            assert looked_at
            expected = ("task_ready", "task_not_before", "task_lease_expires_at")
            assert all("SEARCH" in line and any(index in line for index in expected) for line in looked_at), plan


async def test_due_tasks_and_expired_leases_are_claimable_and_more_are_announced(
    store: Path,
) -> None:
    async with SqliteTracker(store) as tracker:
        now = datetime.now(UTC)
        await tracker.add("later", not_before=now + timedelta(hours=1))
        await tracker.add("was due", not_before=now - timedelta(hours=1), priority=5)
        await tracker.add("ready")
        found = await tracker.claimable(10)
        assert [task.id for task in found.tasks] == ["was due", "ready"]
        assert found.next_due == now + timedelta(hours=1)
        found = await tracker.claimable(1)
        assert [task.id for task in found.tasks] == ["was due"]
        assert found.next_due is not None
        assert found.next_due < now + timedelta(minutes=1)


# -- queries


async def test_filters_orders_and_counts_are_those_of_any_other_tracker(store: Path) -> None:
    queries: list[dict[str, Any]] = [
        {},
        {"status": "failed"},
        {"status": ["failed", "exhausted", "pending"]},
        {"prefix": "a"},
        {"prefix": "a", "status": "succeeded"},
        {"error_type": "ValueError"},
        {"error_type": "Value\x00Error"},
        {"worker": "me"},
        {"last_outcome": "error"},
        {"min_attempts": 1},
        {"min_attempts": 2**70},
        {"data": {"n": 3}},
        {"created_before": datetime.now(UTC) + timedelta(days=1)},
        {"created_after": datetime.now(UTC) + timedelta(days=1)},
        {"finished_after": datetime.now(UTC) - timedelta(days=1)},
        {"finished_before": datetime.now(UTC) - timedelta(days=1)},
    ]
    orders = [None, "id", "-id", "create_time", "-finish_time", "not_before", "-not_before", "-priority", "attempts"]
    options: dict[str, Any] = {"worker": "me", "retry": Retry(1)}
    async with SqliteTracker(store, **options) as tracker, MemoryTracker(**options) as memory:
        for n in range(12):
            due = datetime(2026, 1, 1, n % 5, tzinfo=UTC) if n % 3 else None
            for each in (tracker, memory):
                await each.add(f"{'ab'[n % 2]}-{n}", {"n": n}, priority=n % 4, not_before=due)
        for n in range(4):
            for each in (tracker, memory):
                await each.call(f"a-{n * 2}", asyncio.sleep, 0)
        for each in (tracker, memory):
            with pytest.raises(ValueError, match="bad"):
                async with each.run("b-1"):
                    raise ValueError("bad")
        for where in queries:
            assert await tracker.count(**where) == await memory.count(**where), where
            for order in orders:
                for limit in (None, 0, 3):
                    got = [task.id async for task in tracker.find(order_by=order, limit=limit, **where)]
                    wanted = [task.id async for task in memory.find(order_by=order, limit=limit, **where)]
                    if order is None and limit is not None:
                        assert len(got) == len(wanted)
                    elif order in (None, "create_time", "-finish_time"):
                        assert sorted(got) == sorted(wanted) or limit is not None, (where, order)
                    else:
                        assert got == wanted, (where, order, limit)


async def test_a_scan_reads_what_it_finds_in_parts_and_sees_all(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sqlite, "KEYS", 100)
    monkeypatch.setattr(sqlite, "RECORDS", 7)
    monkeypatch.setattr(sqlite, "READ_BYTES", 10_000)
    async with SqliteTracker(store) as tracker:
        await tracker.add_many(f"task-{n}" for n in range(250))
        found = []
        async for task in tracker.find():
            found.append(task.id)
            if len(found) == 1:
                await tracker.purge("task-200", force=True)  # nothing is held while we do something else
                await tracker.ignore("task-201")
        assert len(found) == 249
        assert len({task.id async for task in tracker.find(status=["pending", "ignored"])}) == 249
        assert len([task async for task in tracker.find(limit=150)]) == 150
        assert len([task async for task in tracker.find(limit=100)]) == 100
        assert len((await tracker.claimable(300)).tasks) == 248


# -- life with threads and processes


async def test_a_long_query_does_not_keep_a_lease_from_being_renewed(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with SqliteTracker(store) as tracker:
        await tracker.add("job")
        go = threading.Event()
        tally = _sqlite.Reader.tally

        def slow(self: _sqlite.Reader, query: Any, by: Any) -> Any:
            go.wait(10)
            return tally(self, query, by)

        monkeypatch.setattr(_sqlite.Reader, "tally", slow)
        counting = asyncio.create_task(tracker.count())
        async with asyncio.timeout(5), tracker.run("job") as task:
            await task.renew()
        go.set()
        assert await counting == {"succeeded": 1}


def in_child(check: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            check()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_forked_child_cannot_use_its_parents_tracker_and_does_not_disturb_it(store: Path) -> None:
    with asyncio.Runner() as runner:
        tracker = runner.run(SqliteTracker(store).open())
        runner.run(run(tracker, "before"))

        def check() -> None:
            for use in (tracker.update, lambda task_id, _: tracker._ask(lambda reader: reader.load(task_id))):
                with pytest.raises(StoreError):
                    asyncio.new_event_loop().run_until_complete(_await(use("job", lambda task, now: task)))

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of a fork with threads, which is what is tested
            assert in_child(check) == 0
        runner.run(run(tracker, "after"))
        runner.run(tracker.aclose())
    assert ask(store, "SELECT count(*) FROM tasks WHERE status = 'succeeded'") == [(2,)]


async def _await(awaitable: Any) -> Any:
    return await awaitable


async def test_an_old_sqlite_is_said(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sqlite_file, "OLDEST_SQLITE", (99, 0, 0))
    with pytest.raises(StoreError, match=r"99\.0\.0"):
        await SqliteTracker(store).open()


def test_it_implements_the_whole_contract() -> None:
    for name in ("load", "dump", "update", "scan", "delete", "claimable"):
        assert getattr(SqliteTracker, name) is not getattr(Contract, name)
