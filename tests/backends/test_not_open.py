"""A tracker that is not open, and a backend whose driver is not there."""

import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from aiotracker import BaseTracker, FileTracker, Status, StoreError, Task, UnsupportedError, open_tracker
from tests.conftest import require_module

STORES: dict[str, Callable[[Path], str]] = {
    "memory": lambda folder: "memory:",
    "file": lambda folder: f"file:{folder}/store",
    "folder": lambda folder: f"folder:{folder}/store",
    "sqlite": lambda folder: f"sqlite:{folder}/store",
    "redis": lambda folder: "redis://localhost",
    "postgresql": lambda folder: "postgresql://localhost/db",
    "s3": lambda folder: "s3://bucket/prefix",
    "s3+log": lambda folder: "s3+log://bucket/prefix",
    "dynamodb": lambda folder: "dynamodb://table",
}
DRIVERS = {"redis": "redis", "postgresql": "asyncpg", "s3": "aioboto3", "s3+log": "aioboto3", "dynamodb": "aioboto3"}

NOW = datetime(2026, 1, 1, tzinfo=UTC)
A_TASK = Task(id="job", status=Status.PENDING, create_time=NOW, update_time=NOW)


@pytest.fixture(params=STORES)
def tracker(request: pytest.FixtureRequest, tmp_path: Path) -> BaseTracker[Any, Any]:
    if driver := DRIVERS.get(request.param):
        require_module(driver)
    return open_tracker(STORES[request.param](tmp_path))


@pytest.mark.parametrize("verb", ["load", "add", "run", "count", "find", "claimable", "update", "dump"])
async def test_a_tracker_that_is_not_open_says_so(tracker: BaseTracker[Any, Any], verb: str) -> None:
    asked: dict[str, Callable[[], Any]] = {
        "load": lambda: tracker.load("job"),
        "add": lambda: tracker.add("job"),
        "run": lambda: tracker.run("job").__aenter__(),
        "count": tracker.count,
        "find": lambda: anext(tracker.find().__aiter__()),
        "claimable": lambda: tracker.claimable(1),
        "update": lambda: tracker.update("job", lambda task, now: A_TASK),
        "dump": lambda: tracker.dump(A_TASK),
    }
    with pytest.raises(StoreError, match="not open"):
        await asked[verb]()


@pytest.mark.parametrize("store", ["file", "folder", "sqlite"])
async def test_a_tracker_that_only_reads_writes_in_no_way(tmp_path: Path, store: str) -> None:
    url = STORES[store](tmp_path)
    async with open_tracker(url) as writer:
        await writer.add("there")
        there = await writer.load("there")
        assert there is not None
    async with open_tracker(url, read_only=True) as reader:
        with pytest.raises(UnsupportedError):
            await reader.update("job", lambda task, now: A_TASK)
        with pytest.raises(UnsupportedError):
            await reader.dump(A_TASK)
        with pytest.raises(UnsupportedError):
            await reader.delete(there)
        assert [task async for task in reader.find()] == [there]


async def test_a_log_that_is_not_open_is_not_compacted(tmp_path: Path) -> None:
    tracker = FileTracker(tmp_path / "store")
    assert tracker.path == tmp_path / "store"
    with pytest.raises(StoreError, match="not open"):
        await tracker.compact()


WITHOUT = """
import importlib, sys
from importlib.abc import MetaPathFinder

class Missing(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == missing:
            raise ModuleNotFoundError(f"No module named {needs!r}", name=needs)

sys.meta_path.insert(0, Missing())
for case in sys.argv[1:]:
    backend, missing, needs = case.split(",")
    for name in list(sys.modules):
        if name.startswith(("redis", "hiredis", "asyncpg", "aioboto3", "aiotracker.backends.")):
            del sys.modules[name]
    try:
        importlib.import_module(f"aiotracker.backends.{backend}")
    except ModuleNotFoundError as exc:
        print(exc)
    else:
        print("well")
"""


def test_a_backend_says_how_its_driver_is_installed_if_it_is_not_there() -> None:
    for name in ("redis", "hiredis", "asyncpg", "aioboto3"):
        require_module(name)
    cases = {
        "redis,redis,redis": 'stores on Redis need redis: pip install "aiotracker[redis]"',
        "redis,redis.backoff,redis.backoff": 'stores on Redis need redis.backoff: pip install "aiotracker[redis]"',
        "redis,redis.asyncio,its_own_need": "No module named 'its_own_need'",  # it is there, and broken
        "redis,hiredis,hiredis": "well",
        "s3,aioboto3,aioboto3": 'stores on AWS need aioboto3: pip install "aiotracker[s3]" or "aiotracker[dynamodb]"',
        "postgres,asyncpg,asyncpg": 'PostgresTracker needs asyncpg: pip install "aiotracker[postgres]"',
    }
    command = [sys.executable, "-c", WITHOUT, *cases]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines() == list(cases.values())
