"""The file tracker when something is not as it should be: files that somebody has changed, locks, other systems."""

import asyncio
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from aiotracker import FileTracker, StoreCorruptedError, StoreError, StoreUnavailableError
from aiotracker.backends import _log_files, file
from aiotracker.backends._filesystem import Disk, check_local, explain, kind_of, sync_data
from aiotracker.backends._log import seal
from tests.backends.test_file import BadDisk, churn, disk, logs, run, store, tracker

__all__ = ["disk", "store", "tracker"]  # fixtures


@contextmanager
def locked(store: Path) -> Iterator[None]:
    """As by a process that is stopped."""
    fd = os.open(store / "lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


# -- opening


async def test_opening_gives_up_soon_while_somebody_keeps_the_lock_and_does_it_when_it_is_free(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file, "ABORT_TIME", 0.01)
    async with FileTracker(store) as tracker:
        await run(tracker, "a")
    with locked(store):
        with pytest.raises(StoreUnavailableError, match=r"not opened within .* last taken by this process"):
            async with asyncio.timeout(30):
                await FileTracker(store, lease=0.3).open()
        async with FileTracker(store, read_only=True) as reader:  # it needs no lock
            assert await reader.count() == {"succeeded": 1}
    async with FileTracker(store) as again:
        await run(again, "b")


async def test_a_lock_that_nobody_has_signed_is_blamed_on_the_disk(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file, "ABORT_TIME", 0.01)
    store.mkdir()
    with locked(store), pytest.raises(StoreUnavailableError, match="does not answer"):
        await FileTracker(store, lease=0.3).open()


@pytest.mark.parametrize(
    ("identity", "error", "said"),
    [
        ("{", StoreCorruptedError, "cannot be read"),
        ("[]", StoreCorruptedError, "cannot be read"),
        ('{"layout": "other"}', StoreError, "another kind, 'other'"),
    ],
)
async def test_an_identity_that_is_none_of_a_log_is_refused_and_left_alone(
    tracker: FileTracker, store: Path, identity: str, error: type[StoreError], said: str
) -> None:
    (store / "store.json").write_text(identity)
    with pytest.raises(error, match=said):
        await FileTracker(store).open()
    assert (store / "store.json").read_text() == identity


async def test_a_log_that_is_compacted_away_between_two_looks_is_looked_for_again(
    tracker: FileTracker, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await run(tracker, "a")
    assert await tracker.compact()
    names = Disk.names
    looks: list[Path] = []

    def stale(self: Disk, folder: Path) -> list[str]:
        looks.append(folder)
        return [*names(self, folder), *(["log-00000001.jsonl"] if len(looks) < 5 else [])]

    monkeypatch.setattr(Disk, "names", stale)
    async with FileTracker(store, read_only=True) as reader:
        assert await reader.count() == {"succeeded": 1}
    assert len(looks) == 5


@pytest.mark.parametrize("forever", [True, False])
async def test_a_store_without_a_log_is_refused_to_readers(
    tracker: FileTracker, store: Path, monkeypatch: pytest.MonkeyPatch, forever: bool
) -> None:
    if forever:  # named, and never there
        monkeypatch.setattr(Disk, "names", lambda self, folder: ["store.json", "log-00000007.jsonl"])
    else:
        logs(store)[0].unlink()
    with pytest.raises(StoreError, match="has no log"):
        await FileTracker(store, read_only=True).open()


# -- reading and writing


async def test_a_seal_that_names_something_else_than_a_log_is_damage(tracker: FileTracker, store: Path) -> None:
    await run(tracker, "a")
    with open(logs(store)[0], "ab") as log:
        log.write(seal("../elsewhere", 0))
    with pytest.raises(StoreCorruptedError, match="elsewhere"):
        await tracker.load("a")


async def test_a_log_that_becomes_shorter_is_read_anew(store: Path) -> None:
    async with FileTracker(store, fsync=False) as tracker:
        await run(tracker, "a")
        size = logs(store)[0].stat().st_size
        await run(tracker, "b")
        os.truncate(logs(store)[0], size)  # as by a writer that could not sync it
        assert await tracker.count() == {"succeeded": 1}
        await run(tracker, "c")
        assert await tracker.load("b") is None


async def test_without_fsync_a_failed_write_is_taken_back_without_one(
    store: Path,
    disk: BadDisk,
) -> None:
    async with FileTracker(store, fsync=False) as tracker:
        await run(tracker, "a")
        before = logs(store)[0].read_bytes()
        disk.writes_left, disk.sync_fails = 50, True
        with pytest.raises(StoreError, match="full"):
            await run(tracker, "b")
        disk.writes_left = -1
        assert logs(store)[0].read_bytes() == before
        await run(tracker, "b")
        assert await tracker.count() == {"succeeded": 2}


# -- compaction


async def test_a_log_of_live_records_is_not_compacted_however_large_it_is(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_log_files, "COMPACT_BYTES", 1_000)
    async with FileTracker(store) as tracker:
        for number in range(20):
            await tracker.add(str(number), "x" * 100)
        assert tracker._files is not None
        assert tracker._files._compact_above > 1_000
        assert tracker._files._compaction is None
    assert [log.name for log in logs(store)] == ["log-00000001.jsonl"]


@pytest.mark.parametrize("stops", ["given up", "closed", "a fault of ours", "shorter"])
async def test_a_compaction_that_cannot_go_on_says_why_and_the_old_log_does(
    store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, stops: str
) -> None:
    async with FileTracker(store) as tracker:
        await churn(tracker, ["a", "b"], 3)
        files = tracker._files
        assert files is not None
        write = _log_files.Compaction._write

        def stopped(compaction: _log_files.Compaction) -> None:
            write(compaction)
            if stops == "given up":
                files._broken = StoreError("the log could not be synced")
            elif stops == "closed":
                compaction.stop()
            elif stops == "shorter":
                compaction._copied = 0
                os.ftruncate(compaction._old_fd, 0)
                compaction.copy(1)
            else:
                raise ZeroDivisionError("ours")

        sound = logs(store)[0].read_bytes()
        monkeypatch.setattr(_log_files.Compaction, "_write", stopped)
        said = {
            "given up": "could not be synced",
            "closed": "was closed",
            "a fault of ours": "the compaction failed: ours",
            "shorter": "became shorter",
        }
        with pytest.raises(StoreError, match=said[stops]):
            await tracker.compact()
        monkeypatch.undo()
        if stops == "given up":
            with pytest.raises(StoreError, match="could not be synced"):
                await tracker.compact()
    assert ("a compaction failed" in caplog.text) is (stops == "a fault of ours")
    assert not (store / "log.new").exists()
    logs(store)[0].write_bytes(sound)
    async with FileTracker(store) as again:
        assert await again.compact()
        assert sum((await again.count()).values()) == 2


# -- the file system


def test_lines_about_mounts_that_are_cut_off_or_of_another_kind_are_passed_over() -> None:
    mounts = (
        "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n"
        "23 22 0:40 / /mnt/a\n"
        "24 22\n"
        "\n"
        "25 22 0:41 / /mnt/größer\\040als rw - nfs4 server:/x rw\n"
        "26 22 8:1 / / rw - squashfs below rw\n"
        "27 22 8:1 / /mnt rw - xfs /dev/sda1 rw\n"
        "28 22 8:1 / / rw - ext3 /dev/sda1 rw\n"
    )
    assert kind_of(Path("/mnt/größer als/x"), os.makedev(0, 99), mounts) == "nfs4"
    assert kind_of(Path("/mnt/a"), os.makedev(8, 1), mounts) == "xfs"


def test_where_the_system_does_not_tell_of_its_mounts_nothing_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(self: Path, **options: Any) -> str:
        raise FileNotFoundError(self)

    monkeypatch.setattr(Path, "read_text", nothing)
    check_local(tmp_path, False)


def test_a_system_that_has_nothing_better_syncs_with_fsync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.delattr(os, "fdatasync")
    monkeypatch.delattr(fcntl, "F_FULLFSYNC", raising=False)
    monkeypatch.setattr(os, "fsync", calls.append)
    with open(tmp_path / "file", "wb") as opened:
        sync_data(opened.fileno())
        assert calls == [opened.fileno()]


def test_an_error_of_the_system_that_nobody_foresaw_is_told_as_it_is() -> None:
    assert (
        str(explain(OSError(5, "Input/output error"), Path("/s"))) == "/s cannot be used: [Errno 5] Input/output error"
    )
