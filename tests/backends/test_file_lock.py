"""The file tracker's lock and its thread: who waits, how, for how long, and what becomes of what waited."""

import asyncio
import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from aiotracker import FileTracker, StoreError, StoreUnavailableError
from aiotracker.backends._filesystem import Disk
from tests.backends.test_file import store

__all__ = ["store"]  # fixtures


class Gate:
    """Keeps the threads that come to it until it is opened."""

    def __init__(self) -> None:
        self._opened = threading.Event()
        self._reached = 0

    def pass_through(self) -> None:
        self._reached += 1
        assert self._opened.wait(30)

    def open(self) -> None:
        self._opened.set()

    def close(self) -> None:
        self._reached = 0
        self._opened.clear()

    async def reached(self) -> None:
        async with asyncio.timeout(30):
            while not self._reached:  # noqa: ASYNC110 - a thread counts, which sets no event of the loop
                await asyncio.sleep(0.001)


def gate_before(call: str, monkeypatch: pytest.MonkeyPatch) -> Gate:
    """One that every such call on a file passes; open at first."""
    gate, real = Gate(), getattr(Disk, call)

    def wait_and_call(disk: Disk, fd: int) -> None:
        gate.pass_through()
        real(disk, fd)

    gate.open()
    monkeypatch.setattr(Disk, call, wait_and_call)
    return gate


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """Stands before the lock of each commit; open at first."""
    gate = gate_before("lock", monkeypatch)
    yield gate
    gate.open()


# -- waiting


async def test_who_waits_for_the_lock_stands_in_the_systems_queue_and_does_not_ask_again_and_again(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    flock = fcntl.flock

    def noted(fd: int, operation: int) -> None:
        asked.append(operation)
        flock(fd, operation)

    async with FileTracker(store) as tracker:
        holder = os.open(store / "lock", os.O_RDWR)
        flock(holder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        monkeypatch.setattr(fcntl, "flock", noted)
        adding = asyncio.create_task(tracker.add("a"))
        async with asyncio.timeout(30):
            while not asked:  # noqa: ASYNC110 - a thread fills it, which sets no event of the loop
                await asyncio.sleep(0.001)
        os.close(holder)
        assert await adding
    assert asked == [fcntl.LOCK_EX, fcntl.LOCK_UN]


async def test_two_trackers_of_one_process_take_turns_where_the_systems_lock_lets_a_process_in_twice(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Disk, "lock", lambda disk, fd: None)  # on NFS it belongs to the process
    inside = [0]
    another, write = threading.Event(), Disk.write

    def slow(disk: Disk, fd: int, data: bytes, offset: int) -> None:
        if not data.startswith(b"{"):
            return write(disk, fd, data, offset)
        inside.append(inside[-1] + 1)
        if inside[-1] > 1:
            another.set()
        another.wait(0.2)
        write(disk, fd, data, offset)
        inside.append(inside[-1] - 1)
        return None

    async with FileTracker(store) as one, FileTracker(store) as two:
        monkeypatch.setattr(Disk, "write", slow)
        assert sorted(await asyncio.gather(one.add("a"), two.add("a"))) == [False, True]
    assert max(inside) == 1


async def test_who_waits_for_a_third_of_a_lease_is_told_which_process_took_the_lock_and_when(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = gate_before("sync", monkeypatch)
    async with FileTracker(store) as one, FileTracker(store, lease=0.6) as two:
        gate.close()
        first = asyncio.create_task(one.add("a"))
        await gate.reached()
        told = r"within 0\.2 s: .* taken by this process, at 20\d\d-"
        try:
            with pytest.raises(StoreUnavailableError, match=told):
                await asyncio.wait_for(two.add("b"), 20)
        finally:
            gate.open()
        assert await first


async def test_what_nobody_waits_for_any_more_is_not_written_when_the_lock_is_free(store: Path, gate: Gate) -> None:
    async with FileTracker(store, lease=0.6) as tracker:
        gate.close()
        with pytest.raises(StoreUnavailableError):
            await tracker.add("given up")
        gate.open()
        assert await tracker.load("given up") is None


async def test_what_was_cancelled_while_it_waited_is_not_in_the_next_commit(store: Path, gate: Gate) -> None:
    async with FileTracker(store) as tracker:
        gate.close()
        first = asyncio.create_task(tracker.add("first"))
        await gate.reached()
        cancelled, second = asyncio.create_task(tracker.add("cancelled")), asyncio.create_task(tracker.add("second"))
        await asyncio.sleep(0)
        cancelled.cancel()
        gate.open()
        assert await first
        assert await second
        assert await tracker.load("cancelled") is None


async def test_a_renewal_comes_before_all_that_has_waited_longer(store: Path, gate: Gate) -> None:
    async with FileTracker(store) as tracker, tracker.run("held") as held:
        gate.close()
        first = asyncio.create_task(tracker.add("first"))
        await gate.reached()
        others = [asyncio.create_task(tracker.add(f"other {n}")) for n in range(3)]
        await asyncio.sleep(0)
        renewing = asyncio.create_task(held.renew())
        await asyncio.sleep(0)
        gate.open()
        await asyncio.gather(first, renewing, *others)
        log = (store / "log-00000001.jsonl").read_bytes()
        assert log.index(b'"first"') < log.rindex(b'{"id":"held"') < log.index(b'"other 0"')


async def test_a_refusal_is_not_told_where_the_commit_that_it_stands_on_failed(
    store: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Disk.write

    def no_room(disk: Disk, fd: int, data: bytes, offset: int) -> None:
        if b'"id":"a"' in data:
            raise OSError(28, "No space left on device")
        write(disk, fd, data, offset)

    async with FileTracker(store) as tracker:
        monkeypatch.setattr(Disk, "write", no_room)
        gate.close()
        first = asyncio.create_task(tracker.add("first"))
        await gate.reached()
        # The second one would be told that the task is there already.
        both = asyncio.gather(tracker.add("a"), tracker.add("a"), return_exceptions=True)
        await asyncio.sleep(0)
        gate.open()
        assert await first
        assert [type(answer) for answer in await both] == [StoreError, StoreError]
        assert await tracker.load("a") is None


# -- the thread


async def test_commits_go_on_while_all_threads_of_the_event_loop_are_busy(store: Path) -> None:
    over = threading.Event()
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    busy = asyncio.create_task(asyncio.to_thread(over.wait, 60))
    try:
        async with asyncio.timeout(15), FileTracker(store) as tracker:
            async with tracker.run("a") as task:
                task.result = 1
            assert await tracker.count() == {"succeeded": 1}
            assert not busy.done()
    finally:
        over.set()
        await busy


STUCK = """
import asyncio, fcntl, os, sys
from aiotracker import FileTracker
async def main():
    tracker = await FileTracker(sys.argv[1]).open()
    lock = os.open(os.path.join(sys.argv[1], "lock"), os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    adding = asyncio.ensure_future(tracker.add("a"))
    while not tracker._committer._in_flight:
        await asyncio.sleep(0.005)
asyncio.run(main())
"""


def test_a_process_whose_commit_is_stuck_can_end(store: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", STUCK, str(store)], capture_output=True, text=True, timeout=30
    )
    assert ended.returncode == 0, ended.stderr


# -- forks

OPEN_IN_CHILD = """
import asyncio, os, signal, sys, threading
from aiotracker import FileTracker
from aiotracker.backends._filesystem import Disk
store = sys.argv[1]
go, reached, real = threading.Event(), threading.Event(), Disk.write
def slow(disk, fd, data, offset):
    if data.startswith(b"{"):
        reached.set()
        go.wait()
    real(disk, fd, data, offset)

async def add(task_id):
    async with FileTracker(store) as tracker:
        return await tracker.add(task_id)

loop = asyncio.new_event_loop()
tracker = loop.run_until_complete(FileTracker(store).open())
Disk.write = slow
adding = loop.create_task(tracker.add("a"))
loop.run_until_complete(asyncio.sleep(0))
reached.wait()                           # all locks are held, the one in memory too
if (child := os.fork()) == 0:
    signal.alarm(15)
    Disk.write = real
    os._exit(0 if asyncio.run(add("b")) else 1)
go.set()
assert loop.run_until_complete(adding)
_, status = os.waitpid(child, 0)
loop.run_until_complete(tracker.aclose())
sys.exit(os.waitstatus_to_exitcode(status) != 0)
"""


def test_a_child_that_was_forked_during_a_commit_can_open_the_store_for_itself(store: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", OPEN_IN_CHILD, str(store)], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 0, ended.stderr
