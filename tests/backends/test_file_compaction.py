"""The file tracker's compaction: what it asks of those who go on meanwhile."""

import asyncio
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from aiotracker import FileTracker, StoreError
from aiotracker.backends import _log, _log_files
from aiotracker.backends._filesystem import Disk
from aiotracker.backends._log import Index, Parsed


async def test_others_commit_while_a_new_log_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go, commits = threading.Event(), threading.Event(), _log.commits

    def slow(*args: Any) -> Iterable[bytes]:
        begun.set()
        assert go.wait(30)
        yield from commits(*args)

    async with FileTracker(tmp_path) as one, FileTracker(tmp_path, lease=30) as two:
        await one.add("before")
        monkeypatch.setattr(_log_files, "commits", slow)
        compacting = asyncio.create_task(one.compact())
        try:
            assert await asyncio.to_thread(begun.wait, 30)
            assert await two.add("of another tracker")
            assert await one.add("of its own")
            assert not compacting.done()
        finally:
            go.set()
        assert await compacting
        assert await two.count() == await one.count() == {"pending": 3}


async def test_who_follows_into_a_new_log_reads_there_only_what_is_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[Index | None, int]] = []
    parse = _log.parse

    def noted(data: bytes, start: int, index: Index | None) -> Parsed:
        read.append((index, len(data)))
        return parse(data, start, index)

    async with FileTracker(tmp_path) as one, FileTracker(tmp_path) as two:
        await one.add_many(str(n) for n in range(1000))
        assert await two.count() == {"pending": 1000}
        assert await one.compact()
        await one.add("new")
        monkeypatch.setattr(_log_files, "parse", noted)
        assert await two.count() == {"pending": 1001}
        assert two._files is not None
        assert sum(size for index, size in read if index is two._files.index) < 2000


async def test_a_new_log_is_dropped_where_another_process_was_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go, try_lock = threading.Event(), threading.Event(), Disk.try_lock

    def slow(disk: Disk, fd: int) -> bool:
        if not begun.is_set():
            begun.set()
            assert go.wait(30)
        return try_lock(disk, fd)

    async with FileTracker(tmp_path) as one, FileTracker(tmp_path) as two:
        await one.add("before")
        await two.count()
        monkeypatch.setattr(Disk, "try_lock", slow)
        compacting = asyncio.create_task(two.compact())
        try:
            assert await asyncio.to_thread(begun.wait, 30)
            await one.add("meanwhile")
            assert await one.compact()
        finally:
            go.set()
        assert not await compacting
        assert await two.count() == await one.count() == {"pending": 2}


async def test_a_new_log_is_dropped_where_what_it_holds_was_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, fail, begun, go = (threading.Event() for _ in range(4))
    commits, sync = _log.commits, Disk.sync

    def slow(*args: Any) -> Iterable[bytes]:
        begun.set()
        assert go.wait(30)
        yield from commits(*args)

    async with FileTracker(tmp_path) as one, FileTracker(tmp_path) as two:
        await one.add("before")
        assert one._files is not None
        failing = one._files._fd

        def sync_or_fail(disk: Disk, fd: int) -> None:
            if fd == failing:
                written.set()
                assert fail.wait(30)
                raise OSError(5, "Input/output error")
            sync(disk, fd)

        monkeypatch.setattr(Disk, "sync", sync_or_fail)
        monkeypatch.setattr(_log_files, "commits", slow)
        adding = asyncio.create_task(one.add("taken back"))
        try:
            assert await asyncio.to_thread(written.wait, 30)
            assert await two.count() == {"pending": 2}
            compacting = asyncio.create_task(two.compact())
            assert await asyncio.to_thread(begun.wait, 30)
            fail.set()
            with pytest.raises(StoreError):
                await adding
            assert await two.count() == {"pending": 1}
        finally:
            fail.set()
            go.set()
        assert not await compacting
        assert await two.count() == {"pending": 1}
