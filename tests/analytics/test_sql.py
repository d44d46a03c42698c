"""`analytics.sql`: DuckDB over any store."""

import asyncio
import tempfile
from collections.abc import AsyncIterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from aiotracker import BaseTracker, InvalidValueError, MemoryTracker, Query, SqliteTracker, Task, analytics
from aiotracker.analytics import _sql
from aiotracker.analytics._extra import driver

from .conftest import fill

TYPES = "select error_type, count(*) from tasks where status = 'failed' group by 1 order by 2 desc"


from_2 = pytest.mark.skipif(
    find_spec("duckdb") is None or int(version("duckdb").partition(".")[0]) < 2,
    reason="older releases of DuckDB make two statements of it",
)


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where databases are made; empty in the end, whatever happened."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


class Counting(MemoryTracker):
    """Counts how often it was read as a whole."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.scans = 0

    async def scan(self, query: Query) -> AsyncIterator[Task]:
        self.scans += 1
        async for task in super().scan(query):
            yield task


async def rows(tracker: BaseTracker[Any, Any], query: str, *args: Any, **where: Any) -> list[Any]:
    table = await analytics.sql(tracker, query, *args, **where)
    return [tuple(row.values()) for row in table.to_pylist()]


async def test_a_query_is_answered_over_tasks_errors_and_steps(tracker: MemoryTracker, temporary: Path) -> None:
    assert await rows(tracker, TYPES) == [("KeyError", 3)]
    assert await rows(tracker, "select type, count(distinct task_id) from errors group by 1 order by 1") == [
        ("KeyError", 3),
        ("ValueError", 3),
    ]
    joined = """
        select t.id, s.name, s.status, e.message from tasks t
        join steps s on s.task_id = t.id join errors e on e.task_id = t.id
        where t.status = 'exhausted' order by 1 limit 1
    """
    assert await rows(tracker, joined) == [("page/00001", "fetch", "succeeded", "no number in 'page/00001'")]
    assert list(temporary.iterdir()) == []


async def test_data_and_results_are_json_that_can_be_looked_into(tracker: MemoryTracker) -> None:
    query = "select id, result ->> 'length' from tasks where data ->> 'country' = 'FR' and result is not null"
    assert sorted(await rows(tracker, query))[0] == ("page/00002", "2")


async def test_times_compare_and_are_in_utc(tracker: MemoryTracker) -> None:
    query = "select count(*) from tasks where finish_time > now() - interval '1 hour' and seconds between 0 and 3600"
    assert await rows(tracker, query) == [(9,)]
    task = await tracker.load("page/00000")
    assert task is not None
    [(time, text)] = await rows(tracker, "select create_time, create_time::varchar from tasks order by 1 limit 1")
    assert time == task.create_time
    assert text.endswith("+00")


async def test_the_same_query_works_in_the_view_of_a_database(tracker: MemoryTracker, tmp_path: Path) -> None:
    import sqlite3

    def ask(query: str) -> list[Any]:
        connection = sqlite3.connect(tmp_path / "jobs.db")
        try:
            return connection.execute(query).fetchall()
        finally:
            connection.close()

    async with SqliteTracker(tmp_path / "jobs.db", worker="me") as stored:
        await fill(stored)
        columns = {row[1] for row in await asyncio.to_thread(ask, "pragma table_info('tasks')")}
        shared = [column.name for column in analytics.TABLES["tasks"] if column.name in columns]
        assert len(shared) >= 15
        for query in (
            TYPES,
            "select id, status, attempts, priority, worker, error_message, last_outcome from tasks order by 1",
            f"select {', '.join(f'count({name})' for name in shared)} from tasks",
            "select id from tasks where data ->> 'country' = 'DE' order by 1",
        ):
            assert await rows(stored, query) == await asyncio.to_thread(ask, query), query


async def test_parameters_and_filters_narrow_a_query(tracker: MemoryTracker) -> None:
    assert await rows(tracker, "select status from tasks where id = ?", ["page/00002"]) == [("succeeded",)]
    assert await rows(tracker, "select status from tasks where id = $id", {"id": "page/00003"}) == [("pending",)]
    assert await rows(tracker, "select count(*) from tasks", status="failed") == [(3,)]
    with pytest.raises(InvalidValueError, match="unknown filter"):
        await rows(tracker, "select 1", colour="red")


async def test_an_empty_result_has_its_columns(tracker: MemoryTracker) -> None:
    table = await analytics.sql(tracker, "select id, attempts from tasks where false")
    assert (table.num_rows, table.column_names) == (0, ["id", "attempts"])


async def test_a_large_result_comes_in_pieces(tracker: MemoryTracker) -> None:
    sizes = [batch.num_rows async for batch in analytics.sql_batches(tracker, "select range from range(50000)")]
    assert sum(sizes) == 50_000
    assert max(sizes) < 20_000


@pytest.mark.parametrize(
    ("query", "why"),
    [
        ("selec 1", "syntax error"),
        ("select colour from tasks", "colour"),
        ("select * from nothing", "nothing"),
        ("select cast(id as int) from tasks", "Could not convert"),
        ("", "one statement"),
        ("select 1; select 2", "one statement"),
        ("select * from tasks where id = ?", "parameter"),
    ],
)
async def test_a_query_that_cannot_be_run_says_why(
    tracker: MemoryTracker, temporary: Path, query: str, why: str
) -> None:
    with pytest.raises(InvalidValueError, match=why):
        await analytics.sql(tracker, query)
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize(
    "query",
    [
        "delete from tasks",
        "update tasks set status = 'pending'",
        "drop table tasks",
        "create table more as select 1",
        "insert into tasks select * from tasks",
        "copy tasks to 'FOLDER/out.csv'",
        "export database 'FOLDER/out'",
        "attach 'FOLDER/other.db'",
        "install httpfs",
        "load httpfs",
        "set memory_limit = '100GB'",
        "pragma memory_limit = '100GB'",
        "call pragma_version()",
    ],
)
async def test_a_query_changes_nothing(tracker: MemoryTracker, tmp_path: Path, query: str) -> None:
    with pytest.raises(InvalidValueError, match=r"is a SELECT and changes nothing|Permission|not allowed"):
        await analytics.sql(tracker, query.replace("FOLDER", str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["temporary"]


@pytest.mark.parametrize(
    "source",
    [
        "read_text('FILE')",
        "read_csv('FILE')",
        "read_json('FILE')",
        "read_parquet('FILE')",
        "'FILE'",
        "glob('FILE')",
        "sniff_csv('FILE')",
        "read_text('https://127.0.0.1/x')",
        "secret_of_python",
    ],
)
async def test_a_query_reaches_neither_files_nor_the_network_nor_variables(
    tracker: MemoryTracker, tmp_path: Path, source: str
) -> None:
    secret_of_python = driver("pyarrow").table({"secret": [1]})
    file = tmp_path / "secret.csv"
    file.write_text("secret\n")
    with pytest.raises(InvalidValueError):
        await analytics.sql(tracker, f"select * from {source.replace('FILE', str(file))}")
    del secret_of_python


async def test_mistakes_are_told_before_the_store_is_read() -> None:
    async with Counting() as tracker:
        await tracker.add("a")
        for query in ("select colour from tasks", "delete from tasks", "selec"):
            with pytest.raises(InvalidValueError):
                await analytics.sql(tracker, query)
        assert tracker.scans == 0
        assert await rows(tracker, "select 1") == [(1,)]
        assert tracker.scans == 0, "it names no table"
        assert await rows(tracker, "select count(*) from tasks a join tasks b using (id)") == [(1,)]
        assert tracker.scans == 1, "what is named twice is read once"


ALL = {table: [column.name for column in columns] for table, columns in analytics.TABLES.items()}


@pytest.mark.parametrize(
    ("query", "wanted"),
    [
        ("select 1", {}),
        ("select count(*) from tasks", {"tasks": ["id"]}),
        (TYPES, {"tasks": ["status", "error_type"]}),
        ("select ID, t.Note from Tasks t where t.ATTEMPTS > 1", {"tasks": ["id", "attempts", "note"]}),
        (
            "select e.message from tasks join errors e on id = task_id",
            {"tasks": ["id"], "errors": ["task_id", "message"]},
        ),
        ("select a.id from tasks a join tasks b using (fingerprint)", {"tasks": ["id", "fingerprint"]}),
        ("with t as (select status s from tasks) select s from t", {"tasks": ["status"]}),
        ("select * from tasks", ALL),
        ("from tasks", ALL),
        ("select tasks from tasks", ALL),
        ("select t from tasks t", ALL),
        ("select columns('.*time') from tasks", ALL),
        ("select t.a from tasks t(a, b)", ALL),
        ("select count(*) from tasks natural join steps", ALL),
        pytest.param("pivot tasks on status using count(*)", ALL, marks=from_2),
        ("summarize tasks", ALL),
        ("describe tasks", ALL),
    ],
)
async def test_only_the_tables_and_columns_that_a_query_names_are_read(query: str, wanted: dict[str, Any]) -> None:
    database = _sql._Database()
    await asyncio.to_thread(database.open)
    try:
        named = await asyncio.to_thread(database._named, query)
        assert {table: list(names) for table, names in named.items()} == wanted
        assert await asyncio.to_thread(database.prepare, query, None) is bool(wanted)
    finally:
        await asyncio.to_thread(database.close)


@pytest.mark.parametrize(
    "query",
    [
        pytest.param("pivot tasks on status using count(*) group by priority", marks=from_2),
        "summarize steps",
        "show tables",
        "explain from tasks",
    ],
)
async def test_other_ways_to_ask_work_too(tracker: MemoryTracker, query: str) -> None:
    assert (await analytics.sql(tracker, query)).num_rows > 0


async def test_a_cancelled_query_ends_at_once_and_leaves_nothing(tracker: MemoryTracker, temporary: Path) -> None:
    query = "select sum(a.range * b.range) from range(100000000) a, range(100000000) b, tasks"
    # Before the query, which has then begun on its thread.
    asking = asyncio.create_task(analytics.sql(tracker, query, on_progress=lambda _: asking.cancel()))
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(asking, 60)
    assert await asyncio.to_thread(lambda: list(temporary.iterdir())) == []


async def test_ids_and_texts_of_any_kind_come_through() -> None:
    async with MemoryTracker() as tracker:
        ids = ["a\0b", "ümlaut/😀", "'quoted\"", "new\nline"]
        await tracker.add_many((task_id, {"text": task_id}) for task_id in ids)
        found = await rows(tracker, "select id, data ->> 'text' from tasks order by id")
    assert found == [(task_id, task_id) for task_id in sorted(ids)]


async def test_the_store_may_be_read_only(tmp_path: Path) -> None:
    async with SqliteTracker(tmp_path / "jobs.db") as tracker:
        await fill(tracker)
    async with SqliteTracker(tmp_path / "jobs.db", read_only=True) as tracker:
        assert (await analytics.sql(tracker, TYPES)).to_pylist() == [{"error_type": "KeyError", "count_star()": 3}]
