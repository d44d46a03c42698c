"""Damage is found, and repaired without losing more than what was damaged."""

import asyncio
import json
import os
from pathlib import Path

import pytest

from aiotracker import FileTracker, StoreCorruptedError, StoreError, UnsupportedError, open_tracker
from aiotracker.doctor import examine


async def fill(url: str, ids: str = "abcdef") -> None:
    async with open_tracker(url) as tracker:
        for task_id in ids:
            async with tracker.run(task_id) as task:
                task.result = task_id


async def results(url: str) -> dict[str, object]:
    async with open_tracker(url) as tracker:
        return {task.id: task.result async for task in tracker.find()}


async def test_a_sound_store_is_said_to_be_sound(tmp_path: Path) -> None:
    for url in (f"file:{tmp_path}/file", f"folder:{tmp_path}/folder"):
        await fill(url)
        report = await examine(url)
        assert report.ok
        assert report.tasks == 6
        assert report.set_aside is None


async def test_a_torn_commit_is_no_damage(tmp_path: Path) -> None:
    url = f"file:{tmp_path}/s"
    await fill(url)
    with open(tmp_path / "s" / "log-00000001.jsonl", "ab") as log:
        log.write(b'{"id":"g","sta')
    assert (await examine(url)).ok


def flip(path: Path, what: bytes, times: int = 1) -> int:
    data = bytearray(path.read_bytes())
    place = -1
    for _ in range(times):
        place = data.index(what, place + 1)
    data[place + len(what) // 2] ^= 1
    path.write_bytes(data)
    return place


async def test_only_the_damaged_line_is_lost_and_it_is_set_aside(tmp_path: Path) -> None:
    url, store = f"file:{tmp_path}/s", tmp_path / "s"
    await fill(url)
    log = store / "log-00000001.jsonl"
    place = flip(log, b'"result":"c"')
    damaged = log.read_bytes()
    begin = damaged.rfind(b"\n", 0, place) + 1

    found = await examine(url)
    assert [(p.path, p.offset, p.lost) for p in found.problems] == [(str(log), begin, ["c"])]
    assert not found.repaired
    assert log.read_bytes() == damaged
    with pytest.raises(StoreCorruptedError):
        await results(url)

    repaired = await examine(url, repair=True)
    assert repaired.repaired
    assert repaired.set_aside is not None
    assert (Path(repaired.set_aside) / log.name).read_bytes().startswith(damaged)
    assert (await examine(url)).ok
    assert await results(url) == {task_id: None if task_id == "c" else task_id for task_id in "abcdef"}
    async with open_tracker(url) as tracker:
        task = await tracker.load("c")
        assert task is not None
        assert task.status == "in_progress"  # as its line before says: it will be taken over, and run again


async def test_sound_lines_of_a_damaged_commit_are_kept(tmp_path: Path) -> None:
    url, store = f"file:{tmp_path}/s", tmp_path / "s"
    async with FileTracker(store) as tracker:
        await tracker.add_many(str(n) for n in range(50))
        await fill_after(tracker)
    flip(store / "log-00000001.jsonl", b'"id":"17"')
    report = await examine(url, repair=True)
    assert len(report.problems) == 1
    kept = await results(url)
    assert len(kept) == 50
    assert "17" not in kept


async def fill_after(tracker: FileTracker) -> None:
    async with tracker.run("later"):
        pass


async def test_several_damaged_places_are_all_found(tmp_path: Path) -> None:
    url, store = f"file:{tmp_path}/s", tmp_path / "s"
    await fill(url)
    log = store / "log-00000001.jsonl"
    for what in (b'"result":"a"', b'"result":"d"'):
        flip(log, what)
    report = await examine(url, repair=True)
    assert [problem.lost for problem in report.problems] == [["a"], ["d"]]
    assert len(await results(url)) == 6


async def test_a_tracker_that_is_open_goes_on_in_the_repaired_log(tmp_path: Path) -> None:
    url, store = f"file:{tmp_path}/s", tmp_path / "s"
    async with FileTracker(store) as tracker:
        async with tracker.run("a"):
            pass
        async with tracker.run("b"):
            pass
        flip(store / "log-00000001.jsonl", b'"id":"a"')
        assert (await examine(url, repair=True)).repaired
        async with tracker.run("c"):
            pass
    assert {"b", "c"} <= set(await results(url))


async def test_a_lost_identity_is_written_again(tmp_path: Path) -> None:
    url, store = f"file:{tmp_path}/s", tmp_path / "s"
    await fill(url)
    (store / "store.json").write_text("{")
    assert not (await examine(url)).ok
    assert (await examine(url, repair=True)).repaired
    assert len(await results(url)) == 6


async def test_a_store_of_a_newer_format_is_left_alone(tmp_path: Path) -> None:
    url, store = f"file:{tmp_path}/s", tmp_path / "s"
    await fill(url)
    (store / "store.json").write_text('{"format":9,"layout":"log"}')
    with pytest.raises(StoreError, match="format 9"):
        await examine(url, repair=True)


async def test_damaged_files_of_a_folder_store_are_set_aside(tmp_path: Path) -> None:
    url, store = f"folder:{tmp_path}/s", tmp_path / "s"
    await fill(url)
    (store / "c.json").write_text('{"id": "c", "sta')
    found = await examine(url)
    assert [(p.path, p.lost) for p in found.problems] == [(str(store / "c.json"), ["c"])]
    repaired = await examine(url, repair=True)
    assert repaired.set_aside is not None
    assert (Path(repaired.set_aside) / "c.json").exists()
    assert set(await results(url)) == set("abdef")
    assert (await examine(url)).ok


async def test_other_stores_and_missing_ones_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError):
        await examine("memory:")
    for kind in ("file", "folder"):
        with pytest.raises(StoreError, match="no store"):
            await examine(f"{kind}:{tmp_path}/none")


async def test_any_changed_byte_is_found_and_repaired_and_costs_no_other_task(tmp_path: Path) -> None:
    url, store = f"file:{tmp_path}/s", tmp_path / "s"
    await fill(url, "abc")
    log = store / "log-00000001.jsonl"
    sound = log.read_bytes()
    lines = sound.splitlines(keepends=True)
    last_commit = len(sound) - len(lines[-1]) - len(lines[-2])  # there, damage would be a torn commit
    for place in range(0, last_commit, 13):
        for path in store.glob("log-*"):
            path.unlink()
        log.write_bytes(sound[:place] + bytes([sound[place] ^ 4]) + sound[place + 1 :])
        assert not (await examine(url)).ok, place
        await examine(url, repair=True)
        hit = sound[sound.rfind(b"\n", 0, place) + 1 :]  # the line that was changed
        spared = {task_id for task_id in "abc" if not hit.startswith(b'{"id":"%b"' % task_id.encode())}
        kept = await results(url)
        assert spared <= {task_id for task_id, result in kept.items() if result == task_id}, place


def test_the_report_can_be_shown_as_json(tmp_path: Path) -> None:
    import msgspec

    url = f"file:{tmp_path}/s"
    asyncio.run(fill(url))
    shown = json.loads(msgspec.json.encode(asyncio.run(examine(url))))
    assert shown["tasks"] == 6
    assert os.path.isdir(tmp_path / "s")
