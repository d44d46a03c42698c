"""What trackers on local files ask of the system."""

import fcntl
import os
from pathlib import Path

import pytest

from aiotracker.backends import _filesystem
from aiotracker.backends._filesystem import make_folder, sync_data, write_all


def test_a_write_of_which_the_system_takes_a_part_at_a_time_is_written_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:3], offset))
    path = tmp_path / "file"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    write_all(fd, b"0123456789", 2)
    os.close(fd)
    assert path.read_bytes() == b"\0\0" + b"0123456789"


def test_where_a_sync_leaves_bytes_in_the_disks_cache_that_is_flushed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.delattr(os, "fdatasync", raising=False)
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)  # macOS
    monkeypatch.setattr(fcntl, "fcntl", lambda fd, command: asked.append((fd, command)))
    sync_data(7)
    assert asked == [(7, 51)]


def test_every_folder_that_is_made_is_synced_into_the_one_it_lies_in_before_the_next_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[Path, list[str]]] = []
    monkeypatch.setattr(_filesystem, "sync_folder", lambda path: synced.append((path, os.listdir(path))))
    make_folder(tmp_path / "a" / "b")
    assert synced[1:] == [(tmp_path, ["a"]), (tmp_path / "a", ["b"])]


def test_a_folder_that_is_there_is_synced_too_since_whoever_made_it_may_have_been_killed_before_it_could(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(_filesystem, "sync_folder", synced.append)
    (tmp_path / "a").mkdir()
    make_folder(tmp_path / "a")
    make_folder(tmp_path / "a" / "b")
    assert synced == [tmp_path, tmp_path, tmp_path / "a"]


def test_a_folder_in_one_that_we_may_not_read_can_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(_filesystem, "sync_folder", refused)
    make_folder(tmp_path)
