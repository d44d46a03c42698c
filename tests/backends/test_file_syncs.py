"""The file tracker when writes fail or are cut off: what it asks of the disk, and in which order."""

import asyncio
from pathlib import Path

import pytest

from aiotracker import FileTracker, StoreError
from aiotracker.backends import _log_files
from aiotracker.backends._filesystem import Disk

Calls = list[str]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What was done to the log. A record of the task "bad" finds the disk full in its middle."""
    calls: Calls = []
    write, truncate, sync = Disk.write, Disk.truncate, Disk.sync

    def note_write(disk: Disk, fd: int, data: bytes, offset: int) -> None:
        if not data.startswith(b'{"id":'):
            return write(disk, fd, data, offset)
        calls.append("write")
        if b'"id":"bad"' in data:
            write(disk, fd, data[:100], offset)
            raise OSError(28, "No space left on device")
        return write(disk, fd, data, offset)

    def note_truncate(disk: Disk, fd: int, size: int) -> None:
        calls.append("truncate")
        truncate(disk, fd, size)

    def note_sync(disk: Disk, fd: int) -> None:
        calls.append("sync")
        sync(disk, fd)

    monkeypatch.setattr(Disk, "write", note_write)
    monkeypatch.setattr(Disk, "truncate", note_truncate)
    monkeypatch.setattr(Disk, "sync", note_sync)
    return calls


async def test_a_commit_is_told_after_it_was_written_and_synced(tmp_path: Path, calls: Calls) -> None:
    async with FileTracker(tmp_path) as tracker:
        calls.clear()
        assert await tracker.add("good")
        assert calls == ["write", "sync"]


async def test_that_a_write_failed_is_told_after_it_was_taken_back_and_that_was_synced(
    tmp_path: Path, calls: Calls
) -> None:
    async with FileTracker(tmp_path) as tracker:
        calls.clear()
        with pytest.raises(StoreError, match="full"):
            await tracker.add("bad")
        assert calls == ["write", "truncate", "sync"]


async def test_what_a_killed_writer_left_is_synced_before_anything_is_written_behind_it(
    tmp_path: Path, calls: Calls
) -> None:
    async with FileTracker(tmp_path) as tracker:
        await tracker.add("good")
        lock = tmp_path / "lock"
        lock.write_bytes(lock.read_bytes()[: _log_files.OWNER_BYTES - 1] + b"*")  # it was killed in its commit
        calls.clear()
        await tracker.add("better")
        assert calls == ["sync", "write", "sync"]
        calls.clear()
        await tracker.add("best")
        assert calls == ["write", "sync"]


async def test_a_process_that_is_killed_in_its_commit_leaves_word_of_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bytes] = []
    lock, sync = tmp_path / "lock", Disk.sync

    def look_and_sync(disk: Disk, fd: int) -> None:
        seen.append(lock.read_bytes()[-1:])
        sync(disk, fd)

    async with FileTracker(tmp_path) as tracker:
        monkeypatch.setattr(Disk, "sync", look_and_sync)
        await tracker.add("good")
        assert seen == [b"*"]
        assert (await asyncio.to_thread(lock.read_bytes))[-1:] == b" "


async def test_who_failed_to_write_goes_on_behind_what_others_wrote_meanwhile(tmp_path: Path, calls: Calls) -> None:
    async with FileTracker(tmp_path) as one, FileTracker(tmp_path) as two:
        with pytest.raises(StoreError, match="full"):
            await one.add("bad")
        await two.add("large", "x" * 1000)
        assert await one.add("good")
        assert {task.id async for task in one.find()} == {task.id async for task in two.find()} == {"large", "good"}
