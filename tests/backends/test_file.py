"""The file tracker on real files: group commit, failed writes, damage, compaction, identity, forks."""

import asyncio
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aiotracker import (
    FileTracker,
    InvalidValueError,
    Retry,
    StoreCorruptedError,
    StoreError,
    StoreUnavailableError,
    StoreUnsafeError,
    TaskSucceededError,
    TrackerError,
    UnsupportedError,
    open_tracker,
)
from aiotracker.backends import _commit, _filesystem, _log_files
from aiotracker.backends._filesystem import Disk, kind_of
from aiotracker.backends._log import parse
from tests.conftest import require


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
async def tracker(store: Path) -> AsyncIterator[FileTracker]:
    async with FileTracker(store) as tracker:
        yield tracker


@pytest.fixture
def syncs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the syncs of data."""
    calls: list[int] = []
    real = _filesystem.sync_data

    def counted(disk: BadDisk, fd: int) -> None:
        calls.append(fd)
        real(fd)

    monkeypatch.setattr(Disk, "sync", counted)
    return calls


async def run(tracker: FileTracker, *ids: str) -> None:
    async def one(task_id: str) -> None:
        async with tracker.run(task_id) as task:
            task.result = task_id

    await asyncio.gather(*map(one, ids))


def logs(store: Path) -> list[Path]:
    return sorted(store.glob("log-*.jsonl"))


async def until(condition: Callable[[], bool | Awaitable[bool]], seconds: float = 20) -> None:
    """Polls, with a deadline."""
    async with asyncio.timeout(seconds):
        while True:
            answer = condition()
            if await answer if isinstance(answer, Awaitable) else answer:
                return
            await asyncio.sleep(0.005)


# -- group commit


async def test_what_waits_together_is_committed_together(tracker: FileTracker, syncs: list[int]) -> None:
    await run(tracker, *(str(n) for n in range(500)))
    assert await tracker.count() == {"succeeded": 500}
    assert len(syncs) < 100


async def test_a_lone_task_takes_two_commits_and_a_step_one_more(tracker: FileTracker, syncs: list[int]) -> None:
    async def fetch() -> int:
        return 1

    await run(tracker, "a")
    assert len(syncs) == 2
    async with tracker.run("b") as task:
        await task.step("fetch", fetch)
    assert len(syncs) == 2 + 3


async def test_a_step_of_a_thousand_tasks_takes_no_commit_of_its_own_each(
    tracker: FileTracker, syncs: list[int]
) -> None:
    async def fetch() -> int:
        return 1

    async def one(task_id: str) -> None:
        async with tracker.run(task_id) as task:
            await task.step("fetch", fetch)

    await asyncio.gather(*(one(str(n)) for n in range(1000)))
    assert len(syncs) < 300


async def test_without_fsync_nothing_is_synced(store: Path, syncs: list[int]) -> None:
    async with FileTracker(store, fsync=False) as tracker:
        syncs.clear()
        await run(tracker, "a")
        assert not syncs


async def test_the_log_is_json_lines_that_a_person_can_read(tracker: FileTracker, store: Path) -> None:
    await run(tracker, "order-17")
    lines = [json.loads(line) for line in logs(store)[0].read_text().splitlines()]
    assert [line.get("status") for line in lines if "id" in line] == ["in_progress", "succeeded"]
    assert all("crc" in line for line in lines)


async def test_a_value_that_cannot_be_stored_fails_alone(tracker: FileTracker) -> None:
    async def one(task_id: str, result: Any) -> None:
        async with tracker.run(task_id) as task:
            task.result = result

    bad = "\ud800"
    ends = await asyncio.gather(*(one(str(n), bad if n == 3 else n) for n in range(20)), return_exceptions=True)
    assert [type(end) for end in ends] == [InvalidValueError if n == 3 else type(None) for n in range(20)]
    assert await tracker.count() == {"succeeded": 19, "failed": 1}


# -- failed writes


class BadDisk:
    """Writes and syncs that fail when told so."""

    def __init__(self) -> None:
        self.writes_left = -1  # bytes; -1: all
        self.sync_fails = False
        self.truncate_fails = False

    def write(self, fd: int, data: bytes, offset: int) -> None:
        if self.writes_left < 0:
            _filesystem.write_all(fd, data, offset)
            return
        _filesystem.write_all(fd, data[: self.writes_left], offset)
        if self.writes_left < len(data):
            raise OSError(28, "No space left on device")

    def sync(self, fd: int) -> None:
        if self.sync_fails:
            raise OSError(5, "Input/output error")
        _filesystem.sync_data(fd)

    def truncate(self, fd: int, size: int) -> None:
        if self.truncate_fails:
            raise OSError(5, "Input/output error")
        os.ftruncate(fd, size)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> BadDisk:
    disk = BadDisk()
    for name in ("write", "sync", "truncate"):
        monkeypatch.setattr(Disk, name, staticmethod(getattr(disk, name)))
    return disk


@pytest.mark.parametrize("written", [0, 1, 300])
async def test_a_short_write_fails_its_batch_and_leaves_no_trace(
    tracker: FileTracker, store: Path, disk: BadDisk, written: int
) -> None:
    await run(tracker, "a")
    before = logs(store)[0].read_bytes()
    disk.writes_left = written
    ends = await asyncio.gather(run(tracker, "b"), run(tracker, "c"), return_exceptions=True)
    assert [type(end) for end in ends] == [StoreError, StoreError]
    assert "full" in str(ends[0])
    assert logs(store)[0].read_bytes() == before
    disk.writes_left = -1
    await run(tracker, "b", "c")
    assert await tracker.count() == {"succeeded": 3}


async def test_a_write_that_cannot_be_taken_back_stops_the_tracker_until_it_is_reopened(
    tracker: FileTracker, store: Path, disk: BadDisk
) -> None:
    await run(tracker, "a")
    disk.writes_left, disk.truncate_fails = 50, True
    with pytest.raises(StoreError):
        await run(tracker, "b")
    disk.writes_left, disk.truncate_fails = -1, False
    for refused in (run(tracker, "c"), tracker.load("a"), tracker.count()):
        with pytest.raises(StoreError, match="opened again"):
            await refused
    async with FileTracker(store) as again:
        await run(again, "b")
        assert await again.count() == {"succeeded": 2}


async def test_a_failed_sync_stops_the_tracker_and_is_never_acknowledged(
    tracker: FileTracker, store: Path, disk: BadDisk
) -> None:
    await run(tracker, "a")
    disk.sync_fails = True
    with pytest.raises(StoreError):
        await run(tracker, "b")
    disk.sync_fails = False
    with pytest.raises(StoreError, match="opened again"):
        await run(tracker, "c")
    async with FileTracker(store) as again:
        assert await again.load("b") is None


async def test_what_a_writer_took_back_is_forgotten_by_those_who_read_it(
    tracker: FileTracker, store: Path, disk: BadDisk
) -> None:
    await run(tracker, "a")
    disk.sync_fails = True
    async with FileTracker(store, fsync=False) as reader:
        log = logs(store)[0]
        sound = log.read_bytes()
        with pytest.raises(StoreError):
            await run(tracker, "b")
        assert log.read_bytes() == sound
        log.write_bytes(sound + sound[:0])
        assert await reader.count() == {"succeeded": 1}
        with open(log, "ab") as stale:
            stale.write(b'{"mark":0,"crc":"00000000"}\n')
        os.truncate(log, len(sound))
        assert await reader.load("b") is None


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    require(mounted.returncode == 0, "mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


async def test_a_full_disk_is_said_and_loses_nothing_acknowledged(small_disk: Path) -> None:
    done: list[str] = []
    async with FileTracker(small_disk / "store") as tracker:
        with pytest.raises(StoreError, match="full"):
            for n in range(1000):
                async with tracker.run(f"task-{n}", data="x" * 5000) as task:
                    task.result = n
                done.append(f"task-{n}")
    assert len(done) > 20
    ballast = small_disk / "store" / "lock"
    assert ballast.exists()
    async with FileTracker(small_disk / "store", read_only=True) as reader:
        assert {task.id async for task in reader.find(status="succeeded")} == set(done)
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    async with FileTracker(small_disk / "store") as tracker:
        await run(tracker, "after")
        assert (await tracker.count())["succeeded"] == len(done) + 1


async def test_a_disk_that_is_full_from_the_start_is_said(small_disk: Path) -> None:
    ballast = os.open(small_disk / "ballast", os.O_WRONLY | os.O_CREAT)
    with pytest.raises(OSError, match="space"):
        while True:
            os.write(ballast, b"x" * 4096)
    os.close(ballast)
    with pytest.raises(StoreError, match="full"):
        await FileTracker(small_disk / "store").open()


async def test_a_read_only_disk_is_said_and_can_be_looked_at(small_disk: Path) -> None:
    async with FileTracker(small_disk / "store") as tracker:
        await run(tracker, "a")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(StoreError, match="read_only=True"):
        await FileTracker(small_disk / "store").open()
    async with FileTracker(small_disk / "store", read_only=True) as reader:
        assert await reader.count() == {"succeeded": 1}
        with pytest.raises(UnsupportedError):
            reader.run("b")


# -- damage


async def test_a_torn_commit_is_cut_by_the_next_writer_and_not_seen_by_readers(store: Path) -> None:
    async with FileTracker(store) as tracker:
        await run(tracker, "a")
    whole = logs(store)[0].read_bytes()
    with open(logs(store)[0], "ab") as log:
        log.write(whole[: len(whole) - 10])  # commits, the last without its end
    cut = whole + 9 * whole[: whole.index(b'{"mark"')]  # longer than what will stand there
    logs(store)[0].write_bytes(cut)
    async with FileTracker(store, read_only=True) as reader:
        assert await reader.count() == {"succeeded": 1}
    assert logs(store)[0].read_bytes() == cut
    async with FileTracker(store) as tracker:
        await run(tracker, "b")
        assert await tracker.count() == {"succeeded": 2}
    data = logs(store)[0].read_bytes()
    assert data.startswith(whole)
    assert parse(data, 0, None).end == len(data)


async def test_damage_is_refused_with_its_place_and_nothing_is_cut(store: Path) -> None:
    async with FileTracker(store) as tracker:
        await run(tracker, "a", "b")
        await run(tracker, "c")
    log = logs(store)[0]
    data = bytearray(log.read_bytes())
    place = data.index(b'"succeeded"') + 3
    data[place] ^= 1
    log.write_bytes(data)
    for read_only in (False, True):
        with pytest.raises(StoreCorruptedError) as refused:
            await FileTracker(store, read_only=read_only).open()
        assert refused.value.path == str(log)
        assert refused.value.offset == data.rfind(b"\n", 0, place) + 1
        assert "doctor" in str(refused.value)
    assert log.read_bytes() == data


async def test_foreign_lines_are_synced_before_they_are_told(store: Path, syncs: list[int]) -> None:
    async with FileTracker(store, fsync=False) as writer, FileTracker(store) as reader:
        syncs.clear()
        await run(writer, "a")
        assert not syncs
        assert await reader.load("a") is not None
        assert len(syncs) == 1
        assert await reader.load("a") is not None
        assert len(syncs) == 1
        await run(writer, "b")
        with pytest.raises(TaskSucceededError):
            await run(reader, "b")
        assert len(syncs) == 2


# -- compaction


async def churn(tracker: FileTracker, ids: list[str], rounds: int) -> None:
    for _ in range(rounds):
        await run(tracker, *ids)
        await tracker.reset(*ids)
    await run(tracker, *ids)


async def contents(tracker: FileTracker) -> dict[str, Any]:
    return {task.id: task async for task in tracker.find()}


async def test_a_compaction_keeps_all_records_and_drops_the_rest(tracker: FileTracker, store: Path) -> None:
    await churn(tracker, [str(n) for n in range(50)], 5)
    await tracker.purge("0", "1", force=True)
    before, size = await contents(tracker), logs(store)[0].stat().st_size
    assert await tracker.compact()
    assert await contents(tracker) == before
    assert [log.name for log in logs(store)] == ["log-00000002.jsonl"]
    assert logs(store)[0].stat().st_size < size / 5
    async with FileTracker(store) as again:
        assert await contents(again) == before


async def test_who_follows_an_old_log_goes_on_in_the_new_one(store: Path) -> None:
    async with FileTracker(store) as one, FileTracker(store) as two, FileTracker(store, read_only=True) as reader:
        await run(one, "a")
        assert await two.count() == {"succeeded": 1}
        for number in range(3):
            await run(two, f"b{number}")
            assert await one.compact()
            await run(one, f"c{number}")
        assert await reader.count() == await two.count() == {"succeeded": 7}
        with pytest.raises(TaskSucceededError):
            await run(two, "c2")
        assert await contents(two) == await contents(one) == await contents(reader)


async def test_compactions_while_many_claim_lose_nothing_and_let_no_task_run_twice(store: Path) -> None:
    ran: list[str] = []
    async with FileTracker(store) as one, FileTracker(store) as two:
        over = asyncio.Event()

        async def compact_again_and_again(tracker: FileTracker) -> int:
            done = 0
            while not over.is_set():
                done += await tracker.compact()
            return done

        async def claim(tracker: FileTracker) -> None:
            for n in range(600):
                try:
                    async with tracker.run(f"task-{n}") as task:
                        ran.append(task.id)
                except TrackerError:
                    continue

        compacting = [asyncio.create_task(compact_again_and_again(tracker)) for tracker in (one, two)]
        await asyncio.gather(*(claim(tracker) for tracker in (one, two) for _ in range(5)))
        over.set()
        done = sum(await asyncio.gather(*compacting))
        assert done >= 3
        assert sorted(ran) == sorted(f"task-{n}" for n in range(600))
        assert await one.count() == await two.count() == {"succeeded": 600}


async def test_a_log_that_is_mostly_out_of_date_is_compacted_by_itself(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_log_files, "COMPACT_BYTES", 100_000)
    async with FileTracker(store, retry=Retry(1000)) as tracker:
        await churn(tracker, [str(n) for n in range(20)], 30)
        await until(lambda: logs(store)[-1].name != "log-00000001.jsonl")
        await run(tracker, "last")
        assert await tracker.count() == {"succeeded": 21}
        assert sum(log.stat().st_size for log in logs(store)) < 300_000


@pytest.mark.parametrize("breaks", ["rename", "seal", "copy"])
async def test_a_compaction_that_fails_leaves_the_old_log_in_use(
    tracker: FileTracker, store: Path, monkeypatch: pytest.MonkeyPatch, breaks: str
) -> None:
    await churn(tracker, ["a", "b"], 3)
    before = await contents(tracker)

    def broken(*args: Any) -> Any:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        if breaks == "rename":
            patched.setattr(os, "rename", broken)
        elif breaks == "copy":
            patched.setattr(_log_files.Compaction, "copy", broken)
        else:
            patched.setattr(_log_files, "seal", broken)
        with pytest.raises(StoreError):
            await tracker.compact()
    await run(tracker, "c")
    assert await contents(tracker) == before | {"c": await tracker.load("c")}
    async with FileTracker(store) as again:
        assert await contents(again) == await contents(tracker)
    assert await tracker.compact()
    assert await tracker.count() == {"succeeded": 3}


async def test_a_new_log_that_was_never_sealed_in_is_not_read(tracker: FileTracker, store: Path) -> None:
    await run(tracker, "a")
    (store / "log-00000002.jsonl").write_bytes(b"")  # a crash came between its renaming and the seal
    (store / "log.new").write_bytes(b"half of one")
    await run(tracker, "b")
    async with FileTracker(store) as again:
        assert await again.count() == {"succeeded": 2}
        assert await again.compact()
        assert await again.count() == {"succeeded": 2}
    assert await tracker.count() == {"succeeded": 2}


async def test_an_old_log_that_was_not_removed_is_followed_to_the_new_one(tracker: FileTracker, store: Path) -> None:
    await churn(tracker, ["a"], 2)
    old = logs(store)[0]
    os.link(old, store / "kept")
    assert await tracker.compact()
    await run(tracker, "b")
    os.rename(store / "kept", old)  # a crash came before it was removed
    async with FileTracker(store) as again:
        assert await contents(again) == await contents(tracker)
        await run(again, "c")
    assert await tracker.load("c") is not None


async def test_a_store_that_is_removed_under_us_is_said(store: Path) -> None:
    async with FileTracker(store) as tracker, FileTracker(store, read_only=True) as reader:
        await run(tracker, "a")
        shutil.rmtree(store)
        for refused in (run(tracker, "b"), tracker.load("a"), reader.load("a")):
            with pytest.raises(StoreError, match="removed"):
                await refused
    assert not store.exists()


async def test_a_lock_file_that_is_removed_is_said(store: Path) -> None:
    async with FileTracker(store) as tracker:
        await run(tracker, "a")
        (store / "lock").unlink()
        with pytest.raises(StoreError, match="removed"):
            await run(tracker, "b")


# -- the lock


HOLD = """
import fcntl, os, sys, time
fd = os.open(sys.argv[1], os.O_RDWR)
fcntl.flock(fd, fcntl.LOCK_EX)
os.pwrite(fd, b"%-20d%-44.3f" % (os.getpid(), time.time()), 0)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def hold() -> Iterator[Callable[[Path], "subprocess.Popen[str]"]]:
    """Another process that holds the store's lock until its input is closed."""
    holders: list[subprocess.Popen[str]] = []

    def hold(store: Path) -> "subprocess.Popen[str]":
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(store / "lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        holders.append(holder)
        assert holder.stdout is not None
        holder.stdout.readline()
        return holder

    yield hold
    for holder in holders:
        assert holder.stdin is not None
        assert holder.stdout is not None
        holder.stdin.close()
        holder.wait()
        holder.stdout.close()


async def test_who_waits_too_long_for_the_lock_is_told_who_has_it_and_leaves_nothing_claimed(
    store: Path, hold: Callable[[Path], "subprocess.Popen[str]"]
) -> None:
    async with FileTracker(store, lease=0.6) as tracker:
        await run(tracker, "a")
        holder = await asyncio.to_thread(hold, store)
        with pytest.raises(StoreUnavailableError, match=f"process {holder.pid}"):
            await run(tracker, "b")
        assert holder.stdin is not None
        holder.stdin.close()

        async def is_free() -> bool:
            task = await tracker.load("b")
            return task is None or task.status == "pending"

        await until(is_free)
        assert (await tracker.count())["in_progress"] == 0
        await run(tracker, "b")


async def test_a_claim_that_is_cancelled_while_it_waits_for_the_lock_is_never_made(
    store: Path, hold: Callable[[Path], "subprocess.Popen[str]"]
) -> None:
    async with FileTracker(store) as tracker:
        holder = await asyncio.to_thread(hold, store)
        blocked = asyncio.create_task(run(tracker, "first"))
        assert tracker._committer is not None
        await until(lambda: bool(tracker._committer and tracker._committer._in_flight))
        waiting = asyncio.create_task(run(tracker, "second"))
        await until(lambda: bool(tracker._committer and tracker._committer._normal))
        for task in (blocked, waiting):
            task.cancel()
        await asyncio.gather(blocked, waiting, return_exceptions=True)
        assert holder.stdin is not None
        holder.stdin.close()
        assert await tracker.load("second") is None

        async def is_free() -> bool:
            first = await tracker.load("first")
            return first is None or (first.status == "pending" and first.attempts == 0)

        await until(is_free)


async def test_closing_does_not_wait_for_ever_for_a_stuck_commit(
    store: Path, hold: Callable[[Path], "subprocess.Popen[str]"], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_commit, "CLOSE_TIME", 0.2)
    tracker = await FileTracker(store).open()
    holder = await asyncio.to_thread(hold, store)
    blocked = asyncio.create_task(run(tracker, "a"))
    await until(lambda: bool(tracker._committer and tracker._committer._in_flight))
    blocked.cancel()
    await tracker.aclose()
    assert holder.stdin is not None
    holder.stdin.close()
    async with FileTracker(store) as again:

        async def is_free() -> bool:
            task = await again.load("a")
            return task is None or task.status == "pending"

        await until(is_free)


CLAIM_AND_LEAVE = """
import asyncio, fcntl, os, sys, time
from aiotracker import FileTracker
store, when = sys.argv[1:]
loop = asyncio.new_event_loop()
tracker = loop.run_until_complete(FileTracker(store).open())
lock = os.open(os.path.join(store, "lock"), os.O_RDWR)
waiting = []

def until(is_so):
    deadline = time.monotonic() + 30
    while not is_so():
        if time.monotonic() > deadline:
            sys.exit("it did not come to that")
        time.sleep(0.005)

async def ask():
    for n in range(200):
        waiting.append(tracker.run(f"task-{n}").__aenter__())
        waiting[-1].send(None)          # asked, and never answered: the loop ends first
    if when == "before":
        until(lambda: tracker._committer._handed)
    loop.stop()

if when == "after":
    fcntl.flock(lock, fcntl.LOCK_EX)
asking = loop.create_task(ask())
loop.run_forever()
loop.close()
fcntl.flock(lock, fcntl.LOCK_UN)

async def left():
    async with FileTracker(store) as again:
        return await again.count()
until(lambda: asyncio.run(left()) == {"pending": 200})
os._exit(0)
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_claims_that_land_around_the_end_of_the_loop_are_given_back(store: Path, when: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CLAIM_AND_LEAVE, str(store), when],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


async def test_a_claim_that_is_dropped_while_it_waits_is_given_back(
    store: Path, hold: Callable[[Path], "subprocess.Popen[str]"]
) -> None:
    async with FileTracker(store) as tracker:
        holder = await asyncio.to_thread(hold, store)
        claim = tracker.run("a").__aenter__()
        claim.send(None)
        assert tracker._committer is not None
        await until(lambda: bool(tracker._committer and tracker._committer._in_flight))
        claim.close()
        assert holder.stdin is not None
        holder.stdin.close()

        async def is_free() -> bool:
            task = await tracker.load("a")
            return task is not None and task.status == "pending" and task.attempts == 0

        await until(is_free)


# -- who may use it


async def test_two_trackers_of_one_process_take_turns(store: Path) -> None:
    async with FileTracker(store) as one, FileTracker(store) as two:
        ids = [str(n) for n in range(300)]
        ends = await asyncio.gather(
            *(run(tracker, task_id) for task_id in ids for tracker in (one, two)), return_exceptions=True
        )
        assert sum(end is None for end in ends) == 300
        assert await one.count() == {"succeeded": 300}


FORK = """
import asyncio, os, sys
from aiotracker import FileTracker, StoreError
async def use(tracker):
    async with tracker.run("b"):
        pass
async def main():
    async with FileTracker(sys.argv[1]) as tracker:
        async with tracker.run("a"):
            pass
        if (pid := os.fork()) == 0:
            try:
                use(tracker).send(None)
            except StoreError as exc:
                print(exc, flush=True)
                os._exit(0)
            finally:
                os._exit(3)
        _, status = os.waitpid(pid, 0)
        async with tracker.run("c"):
            pass
        assert await tracker.count() == {"succeeded": 2}
        return os.waitstatus_to_exitcode(status)
sys.exit(asyncio.run(main()))
"""


def test_a_forked_child_cannot_use_its_parents_tracker(store: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", FORK, str(store)], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stdout + ended.stderr


FORK_WHILE_LOCKED = """
import asyncio, fcntl, os, sys, time
from aiotracker import FileTracker
from aiotracker.backends._filesystem import Disk
store = sys.argv[1]
real = Disk.write
def slow(disk, fd, data, offset):
    if not data.startswith(b"{"):
        return real(disk, fd, data, offset)
    real(disk, fd, data[:20], offset)
    child = os.fork()                    # while the lock is held
    if child == 0:
        sys.stdin.read()                 # idle
        os._exit(0)
    print(child, flush=True)
    time.sleep(60)
async def main():
    async with FileTracker(store) as tracker:
        Disk.write = slow
        async with tracker.run("a"):
            pass
asyncio.run(main())
"""


async def test_an_idle_forked_child_does_not_keep_the_lock_of_a_killed_parent(store: Path) -> None:
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", FORK_WHILE_LOCKED, str(store), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert parent.stdout is not None
    child = int(await parent.stdout.readline())
    parent.kill()
    try:
        async with FileTracker(store, lease=10) as tracker:
            await run(tracker, "a")  # and the torn commit is cut
            assert await tracker.count() == {"succeeded": 1}
    finally:
        os.kill(child, signal.SIGKILL)
        await parent.communicate()


async def test_a_store_of_another_format_is_refused_and_not_changed(store: Path) -> None:
    async with FileTracker(store) as tracker:
        await run(tracker, "a")
    (store / "store.json").write_text('{"format":2,"layout":"log"}')
    before = {path.name: path.read_bytes() for path in store.iterdir()}
    for read_only in (False, True):
        with pytest.raises(StoreError, match="format 2"):
            await FileTracker(store, read_only=read_only).open()
    after = {path.name: path.read_bytes() for path in store.iterdir()}
    assert {k: v for k, v in before.items() if k != "lock"} == {k: v for k, v in after.items() if k != "lock"}


async def test_a_folder_store_is_not_opened_as_a_log(tmp_path: Path) -> None:
    async with open_tracker(f"folder:{tmp_path}/s"):
        pass
    with pytest.raises(StoreError, match=r"another kind|other files"):
        await FileTracker(tmp_path / "s").open()


async def test_a_folder_with_other_files_is_not_made_a_store(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(StoreError, match="thesis"):
        await FileTracker(tmp_path).open()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("inside", [False, True])
async def test_a_file_where_the_folder_should_be_is_said(tmp_path: Path, inside: bool) -> None:
    path = tmp_path / "file"
    path.write_text("x")
    with pytest.raises(StoreError, match="is a file"):
        await FileTracker(path / "store" if inside else path).open()


async def test_read_only_creates_nothing(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no store"):
        await FileTracker(tmp_path / "none", read_only=True).open()
    assert not list(tmp_path.iterdir())


async def test_network_and_fuse_file_systems_are_refused_unless_allowed(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in ("nfs4", "cifs", "9p", "fuse.sshfs", "fuse"):
        monkeypatch.setattr(_filesystem, "kind_of", lambda *args, kind=kind: kind)
        with pytest.raises(StoreUnsafeError, match=kind):
            await FileTracker(store).open()
    assert not list(store.iterdir())
    async with FileTracker(store, allow_unsafe=True) as tracker:
        await run(tracker, "a")


def test_the_kind_of_a_file_system_is_that_of_its_device_or_of_the_longest_mount_point() -> None:
    mounts = (
        "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n"
        "30 22 0:40 / /mnt/share\\040one rw,relatime shared:1 - nfs4 server:/x rw\n"
        "31 22 0:41 / /mnt/share\\040one/inner rw - fuse.sshfs h:/y rw\n"
    )
    assert kind_of(Path("/home/x"), os.makedev(8, 1), mounts) == "ext4"
    assert kind_of(Path("/mnt/share one/x"), os.makedev(0, 40), mounts) == "nfs4"
    assert kind_of(Path("/mnt/share one/inner/x"), os.makedev(0, 99), mounts) == "fuse.sshfs"
    assert kind_of(Path("/other"), os.makedev(0, 99), mounts) == "ext4"


async def test_waiting_for_the_lock_does_not_block_the_event_loop(
    store: Path, hold: Callable[[Path], "subprocess.Popen[str]"]
) -> None:
    async with FileTracker(store) as tracker:
        holder = await asyncio.to_thread(hold, store)
        waiting = asyncio.create_task(run(tracker, "a"))
        turns = 0
        while turns < 200:
            await asyncio.sleep(0)
            turns += 1
        assert not waiting.done()
        assert holder.stdin is not None
        holder.stdin.close()
        await waiting


async def test_a_tracker_that_is_closed_can_be_opened_again(store: Path) -> None:
    tracker = FileTracker(store)
    for n in range(3):
        async with tracker:
            await run(tracker, str(n))
        with pytest.raises(StoreError, match="not open"):
            await tracker.load("0")
    async with tracker:
        assert await tracker.count() == {"succeeded": 3}
    assert not [thread for thread in threading.enumerate() if str(store) in thread.name]


def test_the_lock_is_the_systems_own_so_that_a_killed_process_leaves_none(store: Path) -> None:
    async def main() -> None:
        async with FileTracker(store) as tracker:
            await run(tracker, "a")

    asyncio.run(main())
    fd = os.open(store / "lock", os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(fd)
