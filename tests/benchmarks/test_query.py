"""`python -m benchmarks query` with tiny numbers, so that it cannot rot."""

import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from aiotracker import Status
from benchmarks.query import records
from tests.conftest import require
from tests.services.postgres import has_postgres

from .test_commands import bench, result_of


def measured(store: str, tmp_path: Path) -> None:
    require(find_spec("pyarrow"), "pyarrow is not installed")
    result = result_of("query", "--tasks", "300", "--stores", store, "--dir", str(tmp_path))
    of = result["stores"][store]
    assert of["fill"]["by_status"] == {"pending": 60, "failed": 30, "exhausted": 30, "succeeded": 180}
    asked = of["ask"]
    assert (asked["find_found"], asked["count_found"], asked["count_by_error_type_found"]) == (30, 300, 20)
    for name in ("find", "count", "count_by_error_type"):
        assert asked[f"{name}_ms"] > 0
    assert of["export"]["tasks"] == 300
    assert of["export"]["file_megabytes"] > 0
    assert [line["what"].partition(":")[0] for line in result["figures"]] == [store] * 5
    assert list(tmp_path.iterdir()) == []


def test_query_asks_a_file_store_and_exports_it(tmp_path: Path) -> None:
    measured("file", tmp_path)


@pytest.mark.chaos
def test_query_asks_sqlite_too(tmp_path: Path) -> None:
    measured("sqlite", tmp_path)


@pytest.mark.chaos
def test_query_asks_postgres_too(tmp_path: Path) -> None:
    require(has_postgres() and find_spec("asyncpg"), "no PostgreSQL")
    with tempfile.TemporaryDirectory(dir=Path("/tmp") if Path("/tmp").is_dir() else tmp_path) as folder:
        Path(folder).chmod(0o755)  # the server's user must get in
        measured("postgres", Path(folder))


def test_a_kind_of_store_that_is_not_measured_is_refused(tmp_path: Path) -> None:
    done = bench("query", "--stores", "papyrus", "--dir", str(tmp_path))
    assert done.returncode == 1
    assert "no such stores: papyrus; there are: file, sqlite, postgres" in done.stderr


def test_the_tasks_are_a_realistic_mix() -> None:
    tasks = list(records(400))
    assert len({task.id for task in tasks}) == 400
    assert sum(task.status is Status.FAILED for task in tasks) == 40
    assert len({task.errors[-1].type for task in tasks if task.errors}) == 20
    assert 300 < sum(len(task.encode()) for task in tasks) / len(tasks) < 2_000
