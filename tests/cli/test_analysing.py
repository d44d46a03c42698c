"""`aiotracker sql` and `aiotracker export`."""

import asyncio
import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from aiotracker import FileTracker, Task
from aiotracker.analytics._extra import driver
from tests.analytics.conftest import fill

from .conftest import Shell
from .test_map import on_a_terminal

TYPES = "select error_type, count(*) from tasks where status = 'failed' group by 1 order by 2 desc"


@pytest.fixture(autouse=True)
def filled(shell: Shell) -> None:
    async def work() -> None:
        async with FileTracker(str(shell.store), worker="me") as tracker:
            await fill(tracker)

    asyncio.run(work())


def table_of(path: Path) -> list[list[str]]:
    return list(csv.reader(io.StringIO(path.read_text())))


def test_sql_prints_rows_with_tabs_between_and_no_head(shell: Shell) -> None:
    answer = shell("sql", TYPES)
    assert (answer.code, answer.out, answer.err) == (0, "KeyError\t3\n", "")
    query = "select id, worker, result, attempts > 0 from tasks where status = 'succeeded' order by id limit 1"
    assert shell("sql", query).rows == [["page/00002", "", '{"length":2}', "true"]]


def test_sql_prints_an_object_a_line_or_csv(shell: Shell) -> None:
    query = (
        "select status, sum(attempts) as attempts, max(finish_time) as last from tasks group by 1 order by 1 limit 1"
    )
    [line] = shell("sql", query, "--json").out.splitlines()
    found = json.loads(line)
    assert (found["status"], found["attempts"]) == ("exhausted", 3)
    assert found["last"].endswith("Z")
    rows = list(csv.reader(io.StringIO(shell("sql", query, "--csv").out)))
    assert rows[0] == ["status", "attempts", "last"]
    assert rows[1] == ["exhausted", "3", found["last"]]
    assert shell("sql", query, "--csv", "--json").code == 2


def test_sql_with_filters_reads_only_some_tasks(shell: Shell) -> None:
    assert shell("sql", "select count(*) from tasks", "--status", "failed").out == "3\n"
    assert shell("sql", "select count(*) from tasks", "--data", "country=DE").out == "6\n"


def test_sql_passes_over_the_task_of_map(shell: Shell) -> None:
    shell("map", "--", "true", ids="a\n")
    assert shell("sql", "select count(*) from tasks where status = 'ignored'").out == "0\n"
    assert json.loads(shell("export", "all.jsonl", "--json").out)["tasks"] == 13


@pytest.mark.parametrize(
    ("query", "why"), [("selec", "syntax error"), ("drop table tasks", "changes nothing"), ("select x from tasks", "x")]
)
def test_a_query_with_a_mistake_ends_with_a_message(shell: Shell, query: str, why: str) -> None:
    answer = shell("sql", query)
    assert (answer.code, answer.out) == (2, "")
    assert why in answer.err
    assert answer.err.startswith("aiotracker: ")


def test_sql_on_a_terminal_is_a_table_with_a_head_and_an_end(shell: Shell) -> None:
    query = "select range, 'a\x1bb' as text from range(1200) order by 1"
    code, shown = on_a_terminal(shell, "sql", query)
    assert code == 0
    for part in ("range", "text", "999", "a\\x1bb", "the first 1,000"):
        assert part in shown
    assert "\x1bb" not in shown
    assert "1100" not in shown


def test_export_writes_a_file_of_the_kind_that_its_name_ends_in(shell: Shell) -> None:
    answer = shell("export", "tasks.parquet")
    assert (answer.code, answer.out) == (0, "12 tasks written to tasks.parquet\n")
    table = driver("pyarrow.parquet").read_table(shell.folder / "tasks.parquet")
    assert (table.num_rows, "error_type" in table.column_names) == (12, True)
    shell("export", "failed.csv", "--status", "failed", "--column", "id", "--column", "error_type")
    rows = table_of(shell.folder / "failed.csv")
    assert rows[0] == ["id", "error_type"]
    assert len(rows) == 4
    assert shell("export", "some.jsonl", "--prefix", "page/00001", "--json").json == {"tasks": 1, "path": "some.jsonl"}
    assert Task.decode((shell.folder / "some.jsonl").read_bytes()).id == "page/00001"
    shell("export", "errors", "--format", "csv", "--table", "errors")
    assert len(table_of(shell.folder / "errors")) == 7


def test_what_cannot_be_exported_is_said(shell: Shell) -> None:
    assert "no column 'colour'" in shell("export", "x.csv", "--column", "colour").err
    assert "not 'xlsx'" in shell("export", "x.xlsx").err
    answer = shell("export", "nowhere/x.csv")
    assert (answer.code, answer.err) == (1, "aiotracker: nowhere/x.csv cannot be written: No such file or directory\n")
    assert not list(Path.cwd().glob("*x.*"))


@pytest.mark.parametrize("command", [["export", "x.parquet"], ["sql", "from tasks"]])
def test_a_full_disk_is_said_and_leaves_nothing(shell: Shell, command: list[str]) -> None:
    shell.environ = {**shell.environ, "TMPDIR": str(shell.folder)}
    limited = ["bash", "-c", 'ulimit -f 1; exec "$@"', "-", sys.executable, "-m", "aiotracker", *command]
    done = subprocess.run(
        limited, cwd=shell.folder, env=os.environ | shell.environ, capture_output=True, text=True, timeout=100
    )
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert "cannot be written" in done.stderr
    assert [path.name for path in shell.folder.iterdir()] == ["store"]


def test_export_on_a_terminal_shows_a_bar(shell: Shell) -> None:
    code, shown = on_a_terminal(shell, "export", "tasks.csv")
    assert code == 0
    for part in ("written", "12/12", "━", "12 tasks written to tasks.csv"):
        assert part in shown
