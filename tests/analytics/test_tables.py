"""`analytics.to_arrow` and `analytics.export`: tasks as tables and files."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from aiotracker import InvalidValueError, MemoryTracker, Query, Status, StoreUnavailableError, Task, analytics
from aiotracker.analytics import _export, _tables
from aiotracker.analytics._extra import driver

from .conftest import fill


def parquet(path: Path) -> Any:
    return driver("pyarrow.parquet").ParquetFile(path)


def csv(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = driver("pyarrow.csv").read_csv(path).to_pylist()
    return found


async def test_a_table_says_of_each_task_what_its_record_says(tracker: MemoryTracker) -> None:
    async with tracker.run("running", lease=600) as running:
        running.progress = 0.5
        await running.save()
        table = await analytics.to_arrow(tracker)
        held = await tracker.load("running")
    assert table.column_names == [column.name for column in analytics.TABLES["tasks"]]
    assert held is not None
    assert held.lease is not None
    by_id = {row["id"]: row for row in table.to_pylist()}
    assert len(by_id) == 13
    failed = await tracker.load("page/00001")
    assert failed is not None
    error = failed.errors[-1]
    assert by_id["page/00001"] == {
        "id": "page/00001",
        "status": "exhausted",
        "attempts": 1,
        "fence": failed.fence,
        "priority": 0,
        "create_time": failed.create_time,
        "update_time": failed.update_time,
        "start_time": failed.start_time,
        "finish_time": failed.finish_time,
        "seconds": (failed.finish_time - failed.start_time).total_seconds(),  # type: ignore[operator]  # they are there
        "not_before": None,
        "lease_expires_at": None,
        "worker": "me",
        "error_type": "ValueError",
        "error_message": "no number in 'page/00001'",
        "fingerprint": error.fingerprint,
        "last_outcome": "error",
        "step": "fetch",
        "releases": 0,
        "progress": None,
        "note": None,
        "data": '{"number":1,"kind":1,"country":"DE"}',
        "result": None,
    }
    assert (by_id["page/00002"]["note"], by_id["page/00002"]["result"]) == ("done", '{"length":2}')
    assert by_id["page/00003"]["priority"] == 3
    row = by_id["running"]
    assert (row["progress"], row["seconds"], row["worker"]) == (0.5, None, "me")
    assert row["lease_expires_at"] == held.lease.expires_at


def test_the_documentation_has_all_columns_in_their_order() -> None:
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "analyse.md").read_text()
    tables = page[page.index("## Tables") :]
    for table, columns in analytics.TABLES.items():
        section = tables[tables.index(f"`{table}`, a row") :]
        rows = re.match(r".*?\n\n(.*?)(?:\n\n|\Z)", section, re.DOTALL)
        assert rows is not None
        cells = re.findall(r"^\| (`.*?`) \|", rows[1], re.MULTILINE)
        assert [name for cell in cells for name in re.findall(r"`(\w+)`", cell)] == [column.name for column in columns]


async def test_errors_and_steps_are_tables_of_their_own(tracker: MemoryTracker) -> None:
    async with tracker.run("page/00000", force=True) as again:
        await again.step("parse", asyncio.sleep, 0)
    errors = (await analytics.to_arrow(tracker, table="errors", prefix="page/00000")).to_pylist()
    assert [(row["task_id"], row["task_status"], row["attempt"], row["type"]) for row in errors] == [
        ("page/00000", "succeeded", 1, "KeyError")
    ]
    assert "raise" in errors[0]["traceback"]
    steps = (await analytics.to_arrow(tracker, table="steps", prefix="page/00000")).to_pylist()
    assert [(row["number"], row["name"], row["status"], row["attempts"], row["result"]) for row in steps] == [
        (1, "fetch", "succeeded", 1, '"page of page/00000"'),
        (2, "parse", "succeeded", 1, None),
    ]
    assert steps[0]["seconds"] >= 0


async def test_a_table_takes_filters_order_limit_and_columns(tracker: MemoryTracker) -> None:
    table = await analytics.to_arrow(tracker, columns=["id"], status="failed", order_by="-id", limit=2)
    assert table.to_pylist() == [{"id": "page/00008"}, {"id": "page/00004"}]
    assert (await analytics.to_arrow(tracker, skip={"page/00008"}, status="failed")).num_rows == 2
    empty = await analytics.to_arrow(tracker, prefix="nothing")
    assert (empty.num_rows, len(empty.column_names)) == (0, len(analytics.TABLES["tasks"]))


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"columns": ["id", "colour"]}, "no column 'colour'"),
        ({"columns": []}, "one or several"),
        ({"columns": ["id", "id"]}, "each once"),
        ({"table": "colours"}, "no table 'colours'"),
        ({"colour": "red"}, "unknown filter"),
    ],
)
async def test_what_there_is_not_is_refused(tracker: MemoryTracker, arguments: dict[str, Any], why: str) -> None:
    with pytest.raises(InvalidValueError, match=why):
        await analytics.to_arrow(tracker, **arguments)


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
async def test_a_file_holds_all_tasks(tracker: MemoryTracker, tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"tasks.{kind}"
    assert await analytics.export(tracker, path, order_by="id") == 12
    expected = [task async for task in tracker.find(order_by="id")]
    table = (await analytics.to_arrow(tracker, order_by="id")).to_pylist()
    if kind == "parquet":
        read = await asyncio.to_thread(parquet, path)
        assert read.read().to_pylist() == table
    elif kind == "csv":
        rows = await asyncio.to_thread(csv, path)
        for row, task in zip(rows, table, strict=True):
            assert {key: value for key, value in row.items() if value not in ("", None)} == {
                key: value for key, value in task.items() if value is not None
            }
    else:
        lines = (await asyncio.to_thread(path.read_bytes)).splitlines()
        assert [Task.decode(line) for line in lines] == [task.replace(version=None) for task in expected]
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


async def test_a_file_may_hold_errors_or_a_few_columns_in_a_format_that_is_named(
    tracker: MemoryTracker, tmp_path: Path
) -> None:
    path = tmp_path / "what.txt"
    await analytics.export(tracker, path, format="csv", table="errors", columns=["task_id", "type"], status="exhausted")
    assert path.read_text().splitlines()[:2] == ['"task_id","type"', '"page/00001","ValueError"']


@pytest.mark.parametrize(
    ("name", "arguments", "why"),
    [
        ("tasks.xlsx", {}, "not 'xlsx'"),
        ("tasks", {}, "not ''"),
        ("tasks.parquet", {"columns": ["colour"]}, "no column"),
        ("tasks.jsonl", {"columns": ["id"]}, "whole records"),
        ("tasks.jsonl", {"table": "errors"}, "whole records"),
        ("tasks.csv", {"colour": "red"}, "unknown filter"),
    ],
)
async def test_what_cannot_be_exported_makes_no_file(
    tracker: MemoryTracker, tmp_path: Path, name: str, arguments: dict[str, Any], why: str
) -> None:
    with pytest.raises(InvalidValueError, match=why):
        await analytics.export(tracker, tmp_path / name, **arguments)
    assert list(tmp_path.iterdir()) == []


class Broken(MemoryTracker):
    """Can be read up to a point."""

    async def scan(self, query: Query) -> AsyncIterator[Task]:
        async for task in super().scan(query):
            if task.id == "page/00009":
                raise StoreUnavailableError("gone")
            yield task


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
async def test_an_export_that_fails_leaves_the_file_that_was_there(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_tables, "FIRST_ROWS", 2)
    path = tmp_path / f"tasks.{kind}"
    path.write_text("what was there")
    async with Broken() as tracker:
        await fill(tracker)
        with pytest.raises(StoreUnavailableError):
            await analytics.export(tracker, path)
    assert path.read_text() == "what was there"
    assert list(tmp_path.iterdir()) == [path]


async def test_a_folder_that_is_not_there_is_an_error_of_the_system(tracker: MemoryTracker, tmp_path: Path) -> None:
    for kind in ("parquet", "csv", "jsonl"):
        with pytest.raises(FileNotFoundError):
            await analytics.export(tracker, tmp_path / "nowhere" / f"tasks.{kind}")


async def test_a_cancelled_export_waits_for_its_thread_and_removes_its_file(
    tracker: MemoryTracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_tables, "FIRST_ROWS", 2)
    seen: list[int] = []

    def cancel(done: int) -> None:
        seen.append(done)
        exporting.cancel()

    exporting = asyncio.create_task(analytics.export(tracker, tmp_path / "tasks.parquet", on_progress=cancel))
    with pytest.raises(asyncio.CancelledError):
        await exporting
    assert seen == [2]
    assert list(tmp_path.iterdir()) == []


async def test_progress_is_told_and_ends_at_the_number_of_tasks(
    tracker: MemoryTracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_tables, "FIRST_ROWS", 5)
    told: list[int] = []
    await analytics.export(tracker, tmp_path / "tasks.csv", on_progress=told.append)
    assert told == sorted(told)
    assert (len(told) >= 2, told[-1]) == (True, 12)


def large(number: int, size: int) -> Task:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    return Task(id=f"{number:06}", status=Status.PENDING, create_time=now, update_time=now, data="x" * size)


class Given(MemoryTracker):
    """Has tasks of a size."""

    def __init__(self, tasks: int, size: Callable[[int], int]) -> None:
        super().__init__()
        self._tasks, self._size = tasks, size

    async def scan(self, query: Query) -> AsyncIterator[Task]:
        for number in range(self._tasks):
            yield large(number, self._size(number))


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
async def test_tasks_are_read_in_pieces_of_a_bounded_size(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_tables, "BATCH_BYTES", 50_000)
    monkeypatch.setattr(_tables, "FIRST_ROWS", 10)
    read: list[int] = []
    async with Given(500, lambda number: 100 if number < 300 else 5_000) as tracker:
        await analytics.export(tracker, tmp_path / f"tasks.{kind}", on_progress=read.append)
    pieces = [after - before for before, after in zip([0, *read], read, strict=False)]
    assert pieces[0] == 10
    assert max(pieces) > 100, "small ones come many at once"
    assert max(pieces[-3:]) <= 12, "large ones few"


async def test_row_groups_are_large_enough_for_readers_and_small_enough_for_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_tables, "FIRST_ROWS", 10)
    monkeypatch.setattr(_tables, "MAX_ROWS", 10)
    monkeypatch.setattr(_export, "GROUP_ROWS", 100)
    async with Given(250, lambda number: 10) as tracker:
        await analytics.export(tracker, tmp_path / "tasks.parquet")
    groups = await asyncio.to_thread(parquet, tmp_path / "tasks.parquet")
    assert [groups.metadata.row_group(number).num_rows for number in range(groups.num_row_groups)] == [100, 100, 50]
    monkeypatch.setattr(_export, "GROUP_BYTES", 100_000)
    async with Given(60, lambda number: 5_000) as tracker:
        await analytics.export(tracker, tmp_path / "tasks.parquet")
    groups = await asyncio.to_thread(parquet, tmp_path / "tasks.parquet")
    assert groups.num_row_groups == 3


async def test_without_the_packages_it_is_said_how_to_install_them(
    tracker: MemoryTracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "duckdb", None)
    with pytest.raises(ModuleNotFoundError, match=r'needs duckdb; pip install "aiotracker\[analytics\]"'):
        await analytics.sql(tracker, "select 1")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match=r'needs pyarrow; pip install "aiotracker\[analytics\]"'):
        await analytics.to_arrow(tracker)
    with pytest.raises(ModuleNotFoundError, match="needs pyarrow"):
        await analytics.export(tracker, tmp_path / "tasks.parquet")
    assert await analytics.export(tracker, tmp_path / "tasks.jsonl") == 12
    line = (tmp_path / "tasks.jsonl").read_text().splitlines()[0]
    assert json.loads(line)["id"].startswith("page/")
    await analytics.summary(tracker)
