"""Bytes that nobody wrote: damaged logs, records, ids and URLs."""

import asyncio
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aiotracker import (
    BaseTracker,
    FileTracker,
    FolderTracker,
    InvalidValueError,
    MemoryTracker,
    StoreCorruptedError,
    Task,
    open_tracker,
)
from aiotracker.backends._log import Index, closed, parse
from aiotracker.doctor import examine

fuzz = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
long = settings(fuzz, max_examples=3000)


class Line(NamedTuple):
    """One record in the log."""

    begin: int
    end: int
    task_id: str
    raw: Any


class Whole(NamedTuple):
    """A store without damage."""

    data: bytes
    lines: list[Line]
    last_commit: int  # where it begins


@pytest.fixture(scope="module")
def whole() -> Whole:
    """A log of many commits, of one task or several."""
    with tempfile.TemporaryDirectory(prefix="aiotracker-fuzz-") as folder:
        asyncio.run(_fill(folder))
        data = Path(folder, "log-00000001.jsonl").read_bytes()
    lines, marks, begin = list[Line](), [0], 0
    for line in data.splitlines(keepends=True):
        found, end = msgspec.json.decode(line), begin + len(line)
        if "id" in found:
            lines.append(Line(begin, end, found["id"], found))
        else:
            marks.append(end)
        begin = end
    return Whole(data, lines, marks[-2])


async def _fill(folder: str) -> None:
    async with FileTracker(folder, fsync=False) as tracker:
        await tracker.add_many([("a", {"text": "ä" * 30}), ("b", [1, 2]), ("c", "x" * 200)])
        for task_id in ("a", "b", "a", "d"):
            async with tracker.run(task_id, force=True) as task:
                task.result = {"of": task_id}
        await tracker.reset("b")
        await tracker.add_many(["e", "f"])


Damage = tuple[int, int, bytes]  # what stands at some bytes, and what instead


@st.composite
def damages(draw: st.DrawFn) -> tuple[str, float, int, bytes]:
    how = draw(st.sampled_from(["flip", "zero", "cut", "insert", "garble"]))
    return (
        how,
        draw(st.floats(0, 1, exclude_max=True)),
        draw(st.integers(1, 300)),
        draw(st.binary(min_size=1, max_size=40)),
    )


def damaged(data: bytes, how: str, place: float, length: int, noise: bytes) -> tuple[bytes, int, int]:
    """The data with a damage, and which bytes of it are gone."""
    begin = int(place * len(data))
    if how == "flip":
        return data[:begin] + bytes([data[begin] ^ (1 << length % 8)]) + data[begin + 1 :], begin, begin + 1
    if how == "insert":
        return data[:begin] + noise + data[begin:], begin, begin + 1
    end = min(len(data), begin + (length if how != "garble" else len(noise)))
    instead = {"zero": bytes(end - begin), "cut": b"", "garble": noise[: end - begin]}[how]
    return data[:begin] + instead + data[end:], begin, end


def _store(data: bytes) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="aiotracker-fuzz-"))
    (folder / "store.json").write_text('{"format":1,"layout":"log"}\n')
    (folder / "log-00000001.jsonl").write_bytes(data)
    return folder


async def _read(folder: Path) -> dict[str, Task]:
    async with FileTracker(folder, read_only=True) as tracker:
        return {task.id: task async for task in tracker.find()}


def _check_damage(whole: Whole, how: str, place: float, length: int, noise: bytes) -> None:
    data, begin, end = damaged(whole.data, how, place, length, noise)
    folder = _store(data)
    try:
        latest = {line.task_id: line for line in whole.lines}
        is_last = end > whole.last_commit or data == whole.data
        refused: StoreCorruptedError | None = None
        try:
            found = asyncio.run(_read(folder))
        except StoreCorruptedError as exc:
            refused = exc
        if refused is not None:
            assert refused.offset is not None
            assert refused.offset <= max(begin, 1), "all before the place is sound"
            assert refused.path == str(folder / "log-00000001.jsonl")
            report = asyncio.run(examine(f"file:{folder}", repair=True))
            assert report.problems
            assert report.repaired
            assert report.set_aside is not None
            assert Path(report.set_aside, "log-00000001.jsonl").read_bytes().startswith(data), "it is set aside"
            found = asyncio.run(_read(folder))
        else:
            assert is_last, "damage before the last commit is never passed over"
        for task_id, line in latest.items():
            versions = [_id_of(one.raw) for one in whole.lines if one.task_id == task_id]
            if task_id in found:
                assert found[task_id].write_id in versions, "nothing is made up"
            is_hit = line.begin < end and begin < line.end
            # The newline before a line is what tells where it begins; a last commit without its mark is a torn one.
            is_near = begin < line.begin <= end + 1
            if not (is_hit or is_near or line.begin >= whole.last_commit):
                assert found[task_id].write_id == versions[-1], f"{task_id} was not damaged"
        assert found.keys() <= latest.keys()
    finally:
        shutil.rmtree(folder)


def _id_of(raw: Any) -> str:
    return str(raw["write_id"])


@fuzz
@given(damages())
def test_a_damaged_log_is_read_right_or_refused_and_repair_loses_only_what_was_damaged(
    whole: Whole, damage: tuple[str, float, int, bytes]
) -> None:
    _check_damage(whole, *damage)


@pytest.mark.chaos
@long
@given(damages())
def test_many_damaged_logs_are_read_right_or_refused(whole: Whole, damage: tuple[str, float, int, bytes]) -> None:
    _check_damage(whole, *damage)


@pytest.mark.chaos
def test_a_log_that_is_damaged_at_any_single_byte_is_read_right_or_refused(whole: Whole) -> None:
    for begin in range(len(whole.data)):
        _check_damage(whole, "flip", (begin + 0.5) / len(whole.data), begin, b"")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
field_names = st.sampled_from(["id", "status", "mark", "sealed", "offset", "lease", "data", "deleted", "priority"])
whole_lines = st.dictionaries(field_names, json_values, min_size=1, max_size=4).map(
    lambda fields: closed(msgspec.json.encode(fields)[:-1])
)


@fuzz
@given(st.lists(whole_lines | st.binary(max_size=40), max_size=6).map(b"".join))
def test_whatever_bytes_a_log_has_reading_it_ends_with_an_offset(data: bytes) -> None:
    parsed = parse(data, 0, Index())
    assert 0 <= parsed.end <= len(data)
    assert parsed.damage is None or parsed.damage.offset >= parsed.end


@fuzz
@given(
    st.dictionaries(field_names | st.text(max_size=5), json_values, max_size=6).map(msgspec.json.encode) | st.binary()
)
def test_whatever_bytes_a_record_has_it_is_a_task_or_refused(data: bytes) -> None:
    try:
        task = Task.decode(data, version="1")
    except ValueError:
        return
    assert Task.decode(task.encode(), version="1") == task


@pytest.fixture
def folders(tmp_path: Path) -> Iterator[Path]:
    outside = {path.name for path in tmp_path.iterdir()}
    yield tmp_path / "store"
    assert {path.name for path in tmp_path.iterdir()} <= outside | {"store"}, "nothing is written elsewhere"


@fuzz
@given(task_id=st.text(max_size=30) | st.text("./\\%~\0 ", max_size=8) | st.binary(max_size=9).map(repr))
def test_whatever_an_id_is_it_is_refused_or_kept_as_it_is(folders: Path, task_id: str) -> None:
    async def use(tracker: BaseTracker[Any, Any]) -> None:
        async with tracker:
            try:
                await tracker.add(task_id)
            except InvalidValueError:
                return
            task = await tracker.load(task_id)
            assert task is not None
            assert task.id == task_id
            assert task_id in {found.id async for found in tracker.find()}

    asyncio.run(use(FolderTracker(folders)))
    asyncio.run(use(MemoryTracker()))


schemes = st.sampled_from(
    ["memory", "file", "folder", "sqlite", "redis", "postgresql", "s3", "dynamodb", "nothing", ""]
)
urls = st.builds(
    lambda scheme, rest, query: f"{scheme}:{rest}?{query}",
    schemes,
    st.text(max_size=20) | st.text("/:@?&=%#[]", max_size=10).map(lambda text: f"//{text}"),
    st.lists(st.tuples(st.sampled_from(["lease", "namespace", "read_only", "fsync", "x"]), st.text(max_size=6))).map(
        lambda pairs: "&".join(f"{name}={value}" for name, value in pairs)
    ),
)


@fuzz
@given(st.text(max_size=30) | urls)
def test_whatever_a_url_is_it_names_a_store_or_is_refused(url: str) -> None:
    try:
        tracker = open_tracker(url)
    except (InvalidValueError, ImportError):
        return
    assert isinstance(tracker, BaseTracker)
