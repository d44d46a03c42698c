"""Log records, for people and for machines."""

import ast
import functools
import logging
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

import aiotracker
from aiotracker import GiveUp, MemoryTracker, Retry, log_events
from aiotracker.testing import FakeClock

PACKAGE = Path(aiotracker.__file__).parent
PAGE = PACKAGE.parent / "docs" / "reference" / "telemetry.md"
METHODS = {"debug", "info", "warning", "error", "exception", "critical", "log"}
BUILT_IN = set(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


@functools.cache
def nodes() -> list[tuple[Path, ast.Call | ast.Dict]]:
    """All calls and dicts of the package."""
    return [
        (path, node)
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call | ast.Dict)
    ]


def calls() -> Iterator[tuple[Path, ast.Call]]:
    """Every call of a logger."""
    for path, node in nodes():
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in METHODS:
            if isinstance(node.func.value, ast.Name) and node.func.value.id in ("logger", "log"):
                yield path, node


def names() -> Iterator[str]:
    """Every word that stands for a message."""
    for _, node in nodes():
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "event" and isinstance(value, ast.Constant):
                    yield str(value.value)
        elif isinstance(node.func, ast.Attribute) and node.func.attr == "where":
            if node.args and isinstance(node.args[0], ast.Constant):
                yield str(node.args[0].value)


def test_every_log_call_has_attributes() -> None:
    found = list(calls())
    assert len(found) > 30
    for path, call in found:
        assert "extra" in {keyword.arg for keyword in call.keywords}, f"{path}:{call.lineno}"


def test_the_table_of_log_messages_is_complete() -> None:
    table = PAGE.read_text(encoding="utf-8").partition("## Log messages")[2]
    rows = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert rows == sorted(set(rows))
    assert set(rows) == set(names())


@pytest.fixture
async def tracker(clock: FakeClock) -> AsyncIterator[MemoryTracker]:
    hooks = [log_events]
    async with MemoryTracker(clock=clock, worker="me", hooks=hooks, retry=Retry(max_attempts=1)) as tracker:
        yield tracker


async def one() -> int:
    return 1


async def test_events_are_logged_with_their_fields(tracker: MemoryTracker, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "aiotracker"):
        async with tracker.run("job") as task:
            await task.step("load", one)
        with pytest.raises(GiveUp):
            async with tracker.run("other"):
                raise GiveUp("not found")
    told = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert told == [
        ("DEBUG", "claimed 'job'"),
        ("DEBUG", "step started 'job' step 'load'"),
        ("DEBUG", "step succeeded 'job' step 'load'"),
        ("INFO", "succeeded 'job'"),
        ("DEBUG", "claimed 'other'"),
        ("ERROR", "exhausted 'other' (GiveUp: not found)"),
    ]
    assert {record.name for record in caplog.records} == {"aiotracker.events"}
    last = vars(caplog.records[-1])
    assert {name: last[name] for name in last.keys() - BUILT_IN} == {
        "event": "exhausted",
        "store": "memory",
        "worker": "me",
        "task_id": "other",
        "attempt": 1,
        "fence": last["fence"],
        "outcome": "exhausted",
        "seconds": 0,
        "error_type": "GiveUp",
    }
    assert vars(caplog.records[2])["step"] == "load"


async def test_what_a_run_logs_names_the_task_and_the_claim(clock: FakeClock, caplog: pytest.LogCaptureFixture) -> None:
    async with MemoryTracker(clock=clock, worker="me") as tracker:
        with pytest.raises(KeyError):
            async with tracker.run("job") as task:
                task.data = {"a set": {1}}
                raise KeyError("x")
    (record,) = caplog.records
    assert (
        vars(record).items()
        >= {
            "event": "data_not_kept",
            "task_id": "job",
            "attempt": 1,
            "fence": task.fence,
            "worker": "me",
            "store": "memory",
            "error_type": "InvalidValueError",
        }.items()
    )
