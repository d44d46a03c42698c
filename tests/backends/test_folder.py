"""FolderTracker: what it has beyond the conformance suite, with real files, processes and file systems."""

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar
from zlib import crc32

import filelock
import pytest
from abstract_tracker.base import EPOCH, StatusEnum  # type: ignore[import-untyped]  # it has no types
from abstract_tracker.trackers.file_tracker import FileTracker as OldTracker  # type: ignore[import-untyped]  # likewise

from aiotracker import (
    ConflictError,
    FolderTracker,
    InvalidValueError,
    LeaseLostError,
    RecordTooLargeError,
    Retry,
    RunningTask,
    Status,
    StoreCorruptedError,
    StoreError,
    StoreUnavailableError,
    StoreUnsafeError,
    Task,
    TaskExhaustedError,
    TaskIgnoredError,
    TaskLockedError,
    TaskNotDueError,
    TaskSucceededError,
    UnsupportedError,
    open_tracker,
)
from aiotracker.backends import _filesystem, folder

T = TypeVar("T")

NOW = datetime(2026, 1, 1, tzinfo=UTC)

HOSTILE_IDS = [
    *("a", "A", "order-17", "a_b.c~", "x.json", "1", ".", "..", "../x", "/etc/passwd", "a/b", "a%2Fb", "%2F", "%", "="),
    *(".hidden", ".aiotracker", ".locks/00", "trailing.", "CON", "-rf", " ", "a b", "\x00", "a\x00b", "\n", "\\", "*?"),
    *("é", "e\u0301", "😀", "\u202e", "x" * 196, "x" * 200, "x" * 201, "x" * 2048, "x" * 2047 + "y", "/" * 2048),
    *("😀" * 512, "." * 300, "%" * 67),
]


async def off_loop(fn: Callable[..., T], *args: Any) -> T:
    """Tests look at files without blocking the event loop, too."""
    return await asyncio.to_thread(fn, *args)


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(path))


def new(task_id: str, **fields: Any) -> Task:
    return Task(id=task_id, status=Status.PENDING, create_time=NOW, update_time=NOW, **fields)


def lock_file(path: Path, task_id: str) -> Path:
    return path / ".locks" / f"{crc32(task_id.encode()) % 256:02x}.lock"


async def bump(tracker: FolderTracker[Any, Any], task_id: str, times: int) -> None:
    """Read, add one, write guarded; again after a lost race."""

    def one_more(task: Task | None, now: datetime) -> Task | None:
        return new(task_id, data=1) if task is None else task.replace(data=task.data + 1)

    for _ in range(times):
        await tracker.update(task_id, one_more)


def script(text: str, *args: object) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", text, *map(str, args)], stdout=subprocess.PIPE, text=True)


# -- files and their names


async def test_a_record_is_a_readable_file_named_after_its_id(tmp_path: Path) -> None:
    path = tmp_path / "new" / "jobs"
    async with FolderTracker(path) as tracker, tracker.run("order-17", data={"city": "Köln"}) as task:
        task.result = 42
    text = await off_loop((path / "order-17.json").read_text)
    assert '"status": "succeeded"' in text
    assert "Köln" in text
    assert text.count("\n") > 10
    record = json.loads(text)
    assert (record["id"], record["attempts"], record["data"]) == ("order-17", 1, {"city": "Köln"})
    assert await off_loop(names, path) == [".aiotracker.json", ".locks", "order-17.json"]


async def test_every_id_has_a_file_of_its_own_directly_in_the_folder(tmp_path: Path) -> None:
    path = tmp_path / "jobs"
    async with FolderTracker(path) as tracker:
        assert await tracker.add_many((task_id, {"me": task_id}) for task_id in HOSTILE_IDS) == len(HOSTILE_IDS)
        for task_id in HOSTILE_IDS:
            task = await tracker.load(task_id)
            assert task is not None
            assert task.data == {"me": task_id}
        assert sorted([task.id async for task in tracker.find()]) == sorted(HOSTILE_IDS)
        assert await tracker.purge(*HOSTILE_IDS, force=True) == len(HOSTILE_IDS)
    assert await off_loop(names, path) == [".aiotracker.json", ".locks"]
    assert await off_loop(names, tmp_path) == ["jobs"]


@pytest.mark.parametrize(
    ("task_id", "name"),
    [
        ("order-17", "order-17.json"),
        ("A.b_c~1", "A.b_c~1.json"),
        ("a/b", "a%2Fb.json"),
        ("..", "%2E..json"),
        (".x", "%2Ex.json"),
        ("100%", "100%25.json"),
        ("x" * 200, "x" * 200 + ".json"),
    ],
)
def test_names_can_be_told_from_ids(task_id: str, name: str) -> None:
    assert folder._file_name(task_id) == name


def test_a_long_id_has_a_name_that_file_systems_take_and_people_recognise() -> None:
    url = "https://example.org/" + "x" * 1000
    one, two = folder._file_name(url), folder._file_name(url + "x")
    assert one != two
    assert one.startswith("https%3A%2F%2Fexample.org%2Fxxx")
    assert len(one) < 255


@pytest.mark.parametrize("prefix", ["a", "a/", ".", "..", "x" * 150, "x" * 2047, "/" * 100, "😀", "no such"])
async def test_a_prefix_finds_all_that_begin_with_it(tmp_path: Path, prefix: str) -> None:
    async with FolderTracker(tmp_path) as tracker:
        await tracker.add_many(HOSTILE_IDS)
        found = {task.id async for task in tracker.find(prefix=prefix)}
    assert found == {task_id for task_id in HOSTILE_IDS if task_id.startswith(prefix)}


async def test_find_gives_the_asked_order(tmp_path: Path) -> None:
    async with FolderTracker(tmp_path) as tracker:
        for number in (3, 1, 2):
            await tracker.add(f"t{number}", priority=number)
        assert [task.id async for task in tracker.find(order_by="-priority")] == ["t3", "t2", "t1"]
        assert [task.id async for task in tracker.find(order_by="id", limit=2)] == ["t1", "t2"]


async def test_a_scan_passes_over_what_is_no_record_and_what_vanishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "CHUNK", 1)
    async with FolderTracker(tmp_path) as tracker:
        await tracker.add_many(["a", "b", "c"])
        await off_loop((tmp_path / "readme.txt").write_text, "not a task")
        await off_loop((tmp_path / ".hidden.json").write_text, "not a task")
        await off_loop((tmp_path / "folder.json").mkdir)
        found = []
        async for task in tracker.find():
            found.append(task.id)
            for other in {"a", "b", "c"} - set(found):
                await tracker.purge(other, force=True)
            await tracker.add("d")  # after the call: may be given or not, here it is not
    assert len(found) == 1


async def test_a_scan_holds_nothing_while_it_waits(tmp_path: Path) -> None:
    async with FolderTracker(tmp_path) as tracker:
        await tracker.add_many(["a", "b"])
        async for task in tracker.find():
            async with tracker.run(task.id):
                pass
        assert (await tracker.count())[Status.SUCCEEDED] == 2


# -- the guarded write


async def test_a_write_made_for_another_version_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    async with FolderTracker(tmp_path) as tracker:
        first = await tracker.dump(new("a", data=1))
        second = await tracker.dump(first.replace(data=2))
        assert len({None, first.version, second.version}) == 3
        before = await off_loop((tmp_path / "a.json").read_bytes)
        for stale in (first.replace(data=3), new("a", data=3), first.replace(version="no such")):
            with pytest.raises(ConflictError) as refused:
                await tracker.dump(stale)
            assert refused.value.known
            assert refused.value.current == second
        with pytest.raises(ConflictError):
            await tracker.delete(first)
        assert await off_loop((tmp_path / "a.json").read_bytes) == before
        await tracker.delete(second)
        assert await tracker.load("a") is None
        with pytest.raises(ConflictError) as gone:
            await tracker.dump(second)
        assert gone.value.known
        assert gone.value.current is None
        assert await off_loop(names, tmp_path) == [".aiotracker.json", ".locks"]


async def test_a_record_over_the_limit_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    async with FolderTracker(tmp_path) as tracker:
        first = await tracker.dump(new("a"))
        with pytest.raises(RecordTooLargeError) as refused:
            await tracker.dump(first.replace(data="x" * tracker.max_record_bytes))
        assert refused.value.limit == tracker.max_record_bytes < refused.value.size
        assert await tracker.load("a") == first


async def test_a_record_that_is_no_json_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    async with FolderTracker(tmp_path) as tracker:
        first = await tracker.dump(new("a"))
        with pytest.raises(InvalidValueError, match="cannot be stored as JSON"):
            await tracker.dump(first.replace(data=object()))
        assert await tracker.load("a") == first


async def test_contended_updates_in_one_process_lose_none(tmp_path: Path) -> None:
    async with FolderTracker(tmp_path) as one, FolderTracker(tmp_path) as two:
        async with asyncio.timeout(60):
            await asyncio.gather(*(bump(tracker, "n", 4) for tracker in (one, two) for _ in range(8)))
        task = await one.load("n")
        assert task is not None
        assert task.data == 64


BUMP = """
import asyncio, sys
from datetime import UTC, datetime
from aiotracker import FolderTracker, Status, Task

def one_more(task, now):
    if task is None:
        return Task(id="n", status=Status.PENDING, create_time=now, update_time=now, data=1)
    return task.replace(data=task.data + 1)

async def main():
    async with FolderTracker(sys.argv[1]) as tracker:
        for _ in range(int(sys.argv[2])):
            await tracker.update("n", one_more)

asyncio.run(main())
"""


def test_contended_updates_of_several_processes_lose_none(tmp_path: Path) -> None:
    children = [script(BUMP, tmp_path, 60) for _ in range(3)]
    assert [child.wait(60) for child in children] == [0, 0, 0]
    for child in children:
        child.communicate()
    assert json.loads((tmp_path / "n.json").read_text())["data"] == 180


async def test_who_waits_too_long_is_told_which_lock_file(tmp_path: Path) -> None:
    async with FolderTracker(tmp_path, lease=0.6) as tracker:
        first = await tracker.dump(new("a"))
        lock = filelock.FileLock(lock_file(tmp_path, "a"), thread_local=False)
        await off_loop(lock.acquire)
        try:
            tries = await asyncio.gather(
                *(tracker.dump(first.replace(data=number)) for number in range(3)), return_exceptions=True
            )
        finally:
            await off_loop(lock.release)
        for error in tries:
            assert isinstance(error, StoreUnavailableError)
            assert str(lock_file(tmp_path, "a")) in str(error)
        assert await tracker.load("a") == first
        await tracker.dump(first.replace(data="free again"))


async def test_a_disk_that_does_not_answer_is_told_and_waited_for_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = threading.Event()
    async with FolderTracker(tmp_path, lease=0.6) as tracker:
        first = await tracker.dump(new("a"))
        with monkeypatch.context() as stuck:
            stuck.setattr(folder, "sync_data", lambda fd: answer.wait(30))
            async with asyncio.timeout(10):
                tries = await asyncio.gather(
                    *(tracker.dump(first.replace(data=number)) for number in range(3)), return_exceptions=True
                )
            answer.set()
        assert [type(error) for error in tries] == [StoreUnavailableError] * 3
        assert "the disk does not answer" in str(tries[0])
        await bump(tracker, "b", 1)
        task = await tracker.load("a")
        assert task is not None
        assert task.data in (None, 0)


async def test_a_cancelled_write_leaves_no_lock_and_no_damage(tmp_path: Path) -> None:
    async with FolderTracker(tmp_path) as tracker:
        first = await tracker.dump(new("a", data=0))
        lock = filelock.FileLock(lock_file(tmp_path, "a"), thread_local=False)
        await off_loop(lock.acquire)
        writes = [asyncio.create_task(tracker.dump(first.replace(data=number))) for number in (1, 2, 3)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        for write in writes:
            write.cancel()
        assert await asyncio.wait_for(asyncio.gather(*writes, return_exceptions=True), 5)
        assert all(write.cancelled() for write in writes)
        await off_loop(lock.release)
        # It may still land, as a write without an answer may; after that everything is as always.
        await bump(tracker, "a", 1)
        task = await tracker.load("a")
        assert task is not None
        assert task.data in (1, 2)


async def test_writes_cancelled_at_any_moment_leave_a_whole_record(tmp_path: Path) -> None:
    async with FolderTracker(tmp_path) as tracker:
        await bump(tracker, "a", 1)
        for delay in range(40):
            write = asyncio.create_task(bump(tracker, "a", 1))
            await asyncio.sleep(delay / 10_000)
            write.cancel()
            await asyncio.wait({write})
        task = await tracker.load("a")
        assert task is not None
        assert 1 <= task.data <= 41
        await bump(tracker, "a", 1)


async def test_a_busy_default_executor_does_not_hold_up_writes(tmp_path: Path) -> None:
    loop, done = asyncio.get_running_loop(), threading.Event()
    busy = ThreadPoolExecutor(1)
    async with FolderTracker(tmp_path) as tracker:
        loop.set_default_executor(busy)
        body = asyncio.create_task(asyncio.to_thread(done.wait, 30))
        async with asyncio.timeout(10):
            async with tracker.run("a") as task:
                await task.save()
            assert await tracker.load("a") is not None
        done.set()
        await body


# -- surviving


WRITE = """
import asyncio, sys
from aiotracker import FolderTracker, Status, Task

async def main():
    async with FolderTracker(sys.argv[1]) as tracker:
        task = await tracker.load("n")
        while True:
            data = {"count": task.data["count"] + 1, "filler": "x" * 20_000}
            task = await tracker.dump(task.replace(data=data))
            print(task.data["count"], flush=True)

asyncio.run(main())
"""


async def test_a_killed_writer_leaves_whole_records_and_loses_nothing_acknowledged(tmp_path: Path) -> None:
    async with FolderTracker(tmp_path) as tracker:
        await tracker.dump(new("n", data={"count": 0}))
        for round_ in range(8):
            child = await off_loop(script, WRITE, tmp_path)
            assert child.stdout is not None
            lines = [await off_loop(child.stdout.readline)]
            await asyncio.sleep(round_ * 0.003)
            child.kill()
            lines += (await off_loop(child.communicate))[0].splitlines()
            task = await tracker.load("n")
            assert task is not None
            # The last line may be half of a number.
            acknowledged = [int(line) for line in lines[: -1 if len(lines) > 1 else None]]
            assert task.data["count"] >= acknowledged[-1]
            await tracker.dump(task.replace(data={"count": task.data["count"]}))
        assert len(await off_loop(names, tmp_path / ".locks")) < 6


async def test_the_remains_of_a_killed_write_are_written_over(tmp_path: Path) -> None:
    async with FolderTracker(tmp_path) as tracker:
        first = await tracker.dump(new("a"))
        remains = lock_file(tmp_path, "a").with_suffix(".new")
        await off_loop(remains.write_text, '{"id": "a", "half' + "x" * 100_000)
        assert await tracker.load("a") == first
        second = await tracker.dump(first.replace(data=2))
        assert await tracker.load("a") == second
        assert not await off_loop(remains.exists)


async def test_a_write_is_on_the_disk_before_it_is_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def noting(name: str, fn: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any) -> Any:
            done.append(name)
            return fn(*args)

        return wrapper

    async with FolderTracker(tmp_path / "jobs") as tracker:
        monkeypatch.setattr(folder, "sync_data", noting("data", _filesystem.sync_data))
        monkeypatch.setattr(folder, "sync_folder", noting("folder", _filesystem.sync_folder))
        monkeypatch.setattr(folder, "make_folder", noting("made", _filesystem.make_folder))
        monkeypatch.setattr(os, "replace", noting("replace", os.replace))
        task = await tracker.dump(new("a"))
        assert done == ["data", "replace", "folder"]
        done.clear()
        await tracker.delete(task)
        assert done == ["folder"]
        done.clear()
        async with FolderTracker(tmp_path / "another"):
            pass
        assert done == ["made", "data", "replace", "folder"]


async def test_what_another_process_may_not_have_synced_is_synced_before_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    async with FolderTracker(tmp_path) as tracker:
        await tracker.dump(new("a"))
        monkeypatch.setattr(folder, "sync_folder", synced.append)
        await tracker.load("a")
        assert synced == [tmp_path]
        monkeypatch.setattr(folder, "SETTLED", -1.0)
        await tracker.load("a")
        assert synced == [tmp_path]


async def test_a_record_that_was_removed_since_it_was_read_is_told_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = folder.read_record
    synced: list[Path] = []

    def and_removed(path: Path) -> Task | None:
        task = read(path)
        path.unlink()
        return task

    async with FolderTracker(tmp_path) as tracker:
        await tracker.dump(new("a"))
        monkeypatch.setattr(folder, "sync_folder", synced.append)
        monkeypatch.setattr(folder, "read_record", and_removed)
        task = await tracker.load("a")
        assert task is not None
        assert task.id == "a"
        assert synced == [tmp_path]


async def test_a_failed_sync_of_the_folder_is_an_unknown_outcome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: Path) -> None:
        raise OSError(5, "Input/output error")

    async with FolderTracker(tmp_path) as tracker:
        monkeypatch.setattr(folder, "sync_folder", broken)
        with pytest.raises(StoreUnavailableError) as failed:
            await tracker.dump(new("a"))
        assert isinstance(failed.value.__cause__, OSError)


FORK = """
import asyncio, os, sys
from aiotracker import FolderTracker, StoreError

async def main():
    async with FolderTracker(sys.argv[1]) as tracker:
        await tracker.add("a")
        child = os.fork()
        if child:
            await tracker.add("b")
            assert os.waitpid(child, 0)[1] == 0
            return
        try:
            await tracker.load("a")
        except StoreError as exc:
            os._exit(0 if "fork" in str(exc) else 2)
        os._exit(1)

asyncio.run(main())
"""


def test_a_forked_child_is_told_to_open_its_own(tmp_path: Path) -> None:
    child = script(FORK, tmp_path)
    child.communicate(timeout=30)
    assert child.returncode == 0


# -- stores that cannot be used


def cannot(reason: str) -> None:
    """Skips the test; on CI, where it must run, fails it."""
    if os.environ.get("CI", "").lower() == "true":
        pytest.fail(f"required on CI: {reason}")
    pytest.skip(reason)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "disk"
    path.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", path], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        cannot(f"needs to mount a tmpfs: {done.stderr.strip()}")
    yield path
    subprocess.run(["umount", path], check=True)


async def test_a_full_disk_is_told_and_nothing_is_changed(small_disk: Path) -> None:
    async with FolderTracker(small_disk / "jobs") as tracker:
        first = await tracker.dump(new("a", data="before"))
        await off_loop(fill, small_disk / "filler")
        with pytest.raises(StoreError, match=r"disk .* is full; nothing was changed") as full:
            await tracker.dump(first.replace(data="x" * 100_000))
        assert isinstance(full.value.__cause__, OSError)
        assert not isinstance(full.value, StoreUnavailableError)
        with pytest.raises(StoreError, match="full"):
            await tracker.dump(new("b", data="x" * 100_000))
        assert await tracker.load("a") == first
        assert await tracker.load("b") is None
        assert all(name.endswith(".lock") for name in await off_loop(names, small_disk / "jobs" / ".locks"))
        await off_loop((small_disk / "filler").unlink)
        second = await tracker.dump(first.replace(data="x" * 100_000))
        assert await tracker.load("a") == second


def fill(path: Path) -> None:
    with open(path, "wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError:
            pass


async def test_a_read_only_disk_is_told_and_can_be_looked_at(small_disk: Path) -> None:
    path = small_disk / "jobs"
    async with FolderTracker(path) as tracker:
        await tracker.add("a", 1)
        await off_loop(subprocess.check_call, ["mount", "-o", "remount,ro", small_disk])
        with pytest.raises(StoreError, match="read_only=True"):
            await tracker.add("b")
        assert await tracker.load("b") is None
    with pytest.raises(StoreError, match="read_only=True"):
        async with FolderTracker(small_disk / "another"):
            pass
    async with FolderTracker(path, read_only=True) as tracker:
        assert [task.data async for task in tracker.find()] == [1]
        with pytest.raises(UnsupportedError):
            await tracker.dump(new("b"))


async def test_a_folder_without_permission_is_told(tmp_path: Path) -> None:
    path = tmp_path / "jobs"
    async with FolderTracker(path) as tracker:
        first = await tracker.dump(new("a"))
        async with protected(path):
            with pytest.raises(StoreError, match="permission"):
                await tracker.dump(first.replace(data=2))
            with pytest.raises(StoreError, match="permission"):
                await tracker.dump(new("b"))
            assert await tracker.load("a") == first


class protected:
    """A folder in which nothing can be changed; not even by root, whom permissions do not stop."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def __aenter__(self) -> None:
        if os.geteuid() != 0:
            await off_loop(self._path.chmod, 0o500)
            return
        done = await off_loop(lambda: subprocess.run(["chattr", "+i", self._path], capture_output=True, check=False))
        if done.returncode != 0:
            cannot(f"root needs a file system with chattr +i: {done.stderr!r}")

    async def __aexit__(self, *exc: object) -> None:
        if os.geteuid() != 0:
            await off_loop(self._path.chmod, 0o700)
        else:
            await off_loop(subprocess.check_call, ["chattr", "-i", self._path])


async def test_a_file_in_the_place_of_the_folder_is_told(tmp_path: Path) -> None:
    await off_loop((tmp_path / "file").write_text, "something else")
    for path in (tmp_path / "file", tmp_path / "file" / "jobs"):
        for read_only in (False, True):
            with pytest.raises(StoreError, match=r"is a file|no store at"):
                await FolderTracker(path, read_only=read_only).open()
    assert await off_loop((tmp_path / "file").read_text) == "something else"


async def test_a_removed_store_is_told_and_not_made_again(tmp_path: Path) -> None:
    path = tmp_path / "jobs"
    async with FolderTracker(path) as tracker, FolderTracker(path, read_only=True) as reader:
        first = await tracker.dump(new("a"))
        await off_loop(shutil.rmtree, path)
        for write in (tracker.dump(first), tracker.dump(new("b")), tracker.delete(first)):
            with pytest.raises(StoreError, match="was removed"):
                await write
        for each in (tracker, reader):
            with pytest.raises(StoreError, match="was removed"):
                await each.load("a")
            with pytest.raises(StoreError, match="removed"):
                await each.count()
        assert not await off_loop(path.exists)


async def test_reading_only_creates_nothing(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no store"):
        await FolderTracker(tmp_path / "jobs", read_only=True).open()
    async with FolderTracker(tmp_path, read_only=True) as tracker:
        assert await tracker.load("a") is None
        assert not [task async for task in tracker.find()]
    assert await off_loop(names, tmp_path) == []


@pytest.mark.parametrize(
    "content", ["", "{", '{"id": "a"', "[]", '{"name": "not a task"}', "\x00" * 100, '{"id": "a", "status": "odd"}']
)
async def test_a_damaged_record_is_told_with_its_path(tmp_path: Path, content: str) -> None:
    async with FolderTracker(tmp_path) as tracker:
        await tracker.add_many(["a", "b"])
        await off_loop((tmp_path / "a.json").write_text, content)
        for question in (tracker.load("a"), tracker.count(), tracker.dump(new("a"))):
            with pytest.raises(StoreCorruptedError) as damaged:
                await question
            assert damaged.value.path == str(tmp_path / "a.json")
        assert await tracker.load("b") is not None
        assert await off_loop((tmp_path / "a.json").read_text) == content


async def test_a_record_in_the_place_of_another_is_told(tmp_path: Path) -> None:
    async with FolderTracker(tmp_path) as tracker:
        await tracker.add("a")
        await off_loop(shutil.copy, tmp_path / "a.json", tmp_path / "b.json")
        for question in (tracker.load("b"), tracker.count()):
            with pytest.raises(StoreCorruptedError, match=r"holds the task 'a', whose file must be named a\.json"):
                await question
        assert await tracker.load("a") is not None


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        ('{"format": 2, "layout": "folder"}', "format 2, and this release of aiotracker knows format 1"),
        ('{"format": 1, "layout": "log"}', "a store of another kind, 'log'"),
        ("{}", "another kind"),
        ('{"form', "cannot be read"),
        ("[]", "cannot be read"),
    ],
)
async def test_a_store_of_another_format_is_refused(tmp_path: Path, marker: str, message: str) -> None:
    async with FolderTracker(tmp_path) as tracker:
        await tracker.add("a")
    await off_loop((tmp_path / ".aiotracker.json").write_text, marker)
    for read_only in (False, True):
        with pytest.raises(StoreError, match=message):
            await FolderTracker(tmp_path, read_only=read_only).open()


async def test_a_folder_of_other_things_is_refused_and_left_alone(tmp_path: Path) -> None:
    await off_loop((tmp_path / "package.json").write_text, '{"name": "something"}')
    with pytest.raises(StoreError, match=r"package\.json is damaged, or no task at all"):
        await FolderTracker(tmp_path).open()
    assert ".aiotracker.json" not in await off_loop(names, tmp_path)


async def test_the_two_stores_on_files_refuse_each_other(tmp_path: Path) -> None:
    async with open_tracker(f"file:{tmp_path}/log"), open_tracker(f"folder:{tmp_path}/folder"):
        pass
    for url in (f"file:{tmp_path}/folder", f"folder:{tmp_path}/log"):
        with pytest.raises(StoreError):
            await open_tracker(url).open()


async def test_a_network_file_system_is_refused_unless_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_filesystem, "kind_of", lambda *args: "nfs4")
    with pytest.raises(StoreUnsafeError, match="nfs4"):
        await FolderTracker(tmp_path).open()
    async with FolderTracker(tmp_path, allow_unsafe=True) as tracker:
        assert await tracker.add("a")


async def test_a_tracker_that_is_not_open_says_so(tmp_path: Path) -> None:
    tracker: FolderTracker = FolderTracker(tmp_path)
    for question in (tracker.load("a"), tracker.count(), tracker.dump(new("a"))):
        with pytest.raises(StoreError, match="not open"):
            await question
    async with tracker:
        pass
    with pytest.raises(StoreError, match="not open"):
        await tracker.load("a")
    async with tracker:  # once more
        assert await tracker.load("a") is None


# -- abstract_tracker's files


class Old(OldTracker):  # type: ignore[misc]  # it has no types
    folder = Path()

    @classmethod
    def get_path(cls, id: Any) -> Path:
        return cls.folder / f"{id}.json"


@pytest.fixture
def old(tmp_path: Path) -> type[Old]:
    """abstract_tracker at work in a folder."""
    path = tmp_path / "old"
    path.mkdir()
    return type("Old", (Old,), {"folder": path})


def run_old(old: type[Old], task_id: object, error: Exception | None = None, times: int = 1) -> None:
    tracker = old.load(task_id) or old.new(task_id)
    for _ in range(times):
        with contextlib.suppress(ValueError, KeyError), tracker.start():
            tracker.data = {"seen": str(task_id)}
            if error is not None:
                raise error


async def test_abstract_trackers_outcomes_are_read(old: type[Old]) -> None:
    await off_loop(old.new, "pending")
    await off_loop(run_old, old, "succeeded")
    await off_loop(run_old, old, "failed", ValueError("it's odd"))
    await off_loop(run_old, old, "exhausted", KeyError("x", 1), 3)
    await off_loop(run_old, old, 17)

    def ignore() -> None:
        tracker = old.new("ignored")
        tracker.status = StatusEnum.ignored.value
        tracker.dump()

    await off_loop(ignore)
    async with FolderTracker(old.folder, read_only=True) as tracker:
        tasks = {task.id: task async for task in tracker.find()}
        assert {task_id: str(task.status) for task_id, task in tasks.items()} == {
            "pending": "pending",
            "succeeded": "succeeded",
            "failed": "failed",
            "exhausted": "exhausted",
            "ignored": "ignored",
            "17": "succeeded",
        }
        assert await tracker.load("17") == tasks["17"]
    assert [tasks[name].attempts for name in ("pending", "succeeded", "failed", "exhausted")] == [0, 1, 1, 3]
    assert tasks["pending"].data == {}
    assert tasks["17"].data == {"seen": "17"}
    assert datetime.now(UTC) - tasks["succeeded"].create_time < timedelta(minutes=5)
    (failure,) = tasks["failed"].errors
    assert (failure.type, failure.message, failure.attempt) == ("ValueError", "it's odd", 1)
    assert "Traceback" in failure.traceback
    assert "raise error" in failure.traceback
    assert tasks["exhausted"].errors[0].type == "KeyError"
    assert tasks["exhausted"].errors[0].message == "'x', 1"
    assert await off_loop(names, old.folder) == sorted(f"{task_id}.json" for task_id in tasks)


async def test_abstract_trackers_tasks_go_on_where_they_were(old: type[Old]) -> None:
    await off_loop(run_old, old, "done")
    await off_loop(run_old, old, "failed", ValueError("x"))
    await off_loop(run_old, old, "exhausted", ValueError("x"), 3)
    untouched = await off_loop((old.folder / "done.json").read_bytes)
    async with FolderTracker(old.folder, retry=Retry(3)) as tracker:
        with pytest.raises(TaskSucceededError):
            async with tracker.run("done"):
                pass
        with pytest.raises(TaskExhaustedError):
            async with tracker.run("exhausted"):
                pass
        async with tracker.run("failed") as task:
            assert task.attempts == 2
            assert task.data == {"seen": "failed"}
            task.result = "at last"
        assert await tracker.reset("exhausted") == 1
        assert await tracker.ignore("done") == 1
        with pytest.raises(TaskIgnoredError):
            async with tracker.run("done"):
                pass
    assert await off_loop((old.folder / "done.json").read_bytes) != untouched
    record = json.loads(await off_loop((old.folder / "failed.json").read_text))
    assert (record["id"], record["status"], record["attempts"]) == ("failed", "succeeded", 2)
    assert record["result"] == "at last"
    assert record["data"] == {"seen": "failed"}
    assert record["errors"][0]["type"] == "ValueError"
    assert ".aiotracker.json" in await off_loop(names, old.folder)


async def test_a_run_of_abstract_tracker_is_respected(old: type[Old]) -> None:
    def start() -> Any:
        run = old.new("a").start(expire=100)
        run.__enter__()
        return run

    run = await off_loop(start)
    async with FolderTracker(old.folder) as tracker:
        with pytest.raises(TaskLockedError, match="abstract_tracker") as refused:
            async with tracker.run("a"):
                pass
        assert 90 < (refused.value.retry_after or 0) <= 100
        await off_loop(run.__exit__, None, None, None)
        with pytest.raises(TaskSucceededError):
            async with tracker.run("a"):
                pass


async def test_a_lock_of_abstract_tracker_that_ran_out_is_taken_over_and_counted(old: type[Old]) -> None:
    def die() -> None:
        tracker = old.new("a")
        tracker.mark_as_in_progress(now=datetime.now(UTC) - timedelta(hours=1))

    await off_loop(die)
    async with FolderTracker(old.folder) as tracker, tracker.run("a") as task:
        assert task.attempts == 2
        assert task.record.errors[-1].type == "LeaseLostError"
        assert task.record.errors[-1].worker == "abstract_tracker"


async def test_what_abstract_trackers_users_did_by_hand_is_read(old: type[Old]) -> None:
    def prepare() -> None:
        locked = old.new("locked")
        locked.lock_it()
        locked.dump()
        unlocked = old.new("unlocked")
        unlocked.mark_as_in_progress()
        unlocked.unlock_it()
        unlocked.errors = {"by hand": 1}
        unlocked.create_time = EPOCH.replace(tzinfo=None)
        unlocked.dump()

    await off_loop(prepare)
    async with FolderTracker(old.folder) as tracker:
        with pytest.raises(TaskNotDueError):
            async with tracker.run("locked"):
                pass
        async with tracker.run("unlocked") as task:
            assert task.attempts == 2
            assert task.record.errors[0].type == "Exception"
            assert "by hand" in task.record.errors[0].message
            assert task.record.create_time == EPOCH


async def test_a_write_to_a_file_that_abstract_tracker_changed_meanwhile_is_refused(old: type[Old]) -> None:
    await off_loop(old.new, "a")
    async with FolderTracker(old.folder) as tracker:
        seen = await tracker.load("a")
        assert seen is not None
        await off_loop(run_old, old, "a")
        with pytest.raises(ConflictError):
            await tracker.dump(seen.replace(data="stale"))
        with pytest.raises(ConflictError):
            await tracker.delete(seen)


async def test_a_status_that_abstract_tracker_does_not_know_is_told(old: type[Old]) -> None:
    def prepare() -> None:
        tracker = old.new("a")
        tracker.status = 11
        tracker.dump()

    await off_loop(prepare)
    async with FolderTracker(old.folder, read_only=True) as tracker:
        with pytest.raises(StoreCorruptedError) as damaged:
            await tracker.load("a")
    assert damaged.value.path == str(old.folder / "a.json")


async def test_a_folder_is_not_taken_over_while_a_file_stands_where_its_task_is_not_looked_for(old: type[Old]) -> None:
    await off_loop(old.new, "my task")
    with pytest.raises(StoreError, match=r"must be named my%20task\.json: rename it"):
        await FolderTracker(old.folder).open()
    await off_loop((old.folder / "my task.json").rename, old.folder / "my%20task.json")
    async with FolderTracker(old.folder) as tracker:
        assert await tracker.load("my task") is not None


# -- the whole


async def test_a_life_of_tasks(tmp_path: Path) -> None:
    async def body(task: RunningTask) -> None:
        if task.data == "bad":
            raise ValueError("bad")
        task.result = await task.step("double", double, task.data)

    async def double(number: int) -> int:
        return 2 * number

    async with FolderTracker(tmp_path, retry=Retry(2, delay=0)) as tracker:
        await tracker.add_many((f"t{number}", number) for number in range(20))
        await tracker.add("bad", "bad")
        summary = await tracker.work(body, concurrency=8)
        assert (summary.succeeded, summary.exhausted) == (20, 1)
        assert await tracker.count() == {Status.SUCCEEDED: 20, Status.EXHAUSTED: 1}
        assert await tracker.call("once", double, 4) == 8
        assert await tracker.call("once", double, 5) == 8
        assert await tracker.reset(status="exhausted") == 1
        assert await tracker.purge(prefix="t", force=True) == 20
        assert [task.id async for task in tracker.find(order_by="id")] == ["bad", "once"]


async def test_a_stale_holder_is_refused(tmp_path: Path) -> None:
    async with FolderTracker(tmp_path, lease=0.3) as one, FolderTracker(tmp_path) as two:

        async def hold() -> None:
            async with one.run("a"):
                assert await two.reset("a", force=True) == 1
                await asyncio.Event().wait()

        with pytest.raises(LeaseLostError):
            await asyncio.wait_for(hold(), 10)
        task = await two.load("a")
        assert task is not None
        assert task.status == Status.PENDING
