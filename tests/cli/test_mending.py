"""Finding what failed, and having it run again: filters, causes, changes by hand, steps."""

import asyncio
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from aiotracker import FileTracker, Retry, RunningTask
from aiotracker.cli import render
from aiotracker.cli.session import line_for

from .conftest import Shell


async def fetch(task_id: str) -> str:
    return f"inbox/{task_id}.json"


async def parse(path: str) -> int:
    if "bad" in path:
        raise ValueError(f"{path}: row {len(path)} has no 'value'")
    return 1


async def nightly(task: RunningTask[Any, Any]) -> None:
    path = await task.step("fetch", fetch, task.id)
    task.result = await task.step("parse", parse, path)


@pytest.fixture
def store(shell: Shell) -> Path:
    """Two that succeeded, three that failed at a step, two that took too long."""

    async def fill() -> None:
        async with FileTracker(str(shell.store), retry=Retry(1), worker="w1") as tracker:
            for task_id, customer in (
                ("good1", "DE"),
                ("good2", "FR"),
                ("bad1", "DE"),
                ("bad22", "DE"),
                ("bad333", "FR"),
            ):
                await tracker.add(task_id, {"country": customer, "n": len(task_id)})
            await tracker.work(nightly)
            for task_id in ("slow1", "slow2"):
                with pytest.raises(TimeoutError):
                    async with tracker.run(task_id, timeout=0.001):
                        await asyncio.sleep(60)

    asyncio.run(fill())
    return shell.store


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "is_terminal", lambda: True)
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.mark.parametrize(
    ("options", "ids"),
    [
        (("--step", "parse", "--step-status", "failed"), ["bad1", "bad22", "bad333"]),
        (("--step", "fetch", "--step-status", "failed"), []),
        (("--step-status", "succeeded", "--status", "succeeded"), ["good1", "good2"]),
        (("--last-outcome", "timeout"), ["slow1", "slow2"]),
        (("--data", "country=DE"), ["bad1", "bad22", "good1"]),
        (("--data", "country=DE", "--data", "n=5"), ["bad22", "good1"]),
        (("--data", 'n="5"'), []),
        (("--min-attempts", "2"), []),
        (("--created-after", "1 h", "--prefix", "good"), ["good1", "good2"]),
        (("--created-before", "1h"), []),
        (("--finished-before", "2000-01-01"), []),
        (("--updated-after", "2000-01-01T00:00+02:00", "--prefix", "good1"), ["good1"]),
    ],
)
def test_every_filter_of_the_library_is_an_option(
    store: Path, shell: Shell, options: tuple[str, ...], ids: list[str]
) -> None:
    assert sorted(shell("ls", "--ids", *options).out.splitlines()) == ids


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("ls", "--prefix", ""), "--prefix is empty"),
        (("reset", "--status", "failed", "--worker", "", "--yes"), "--worker is empty"),
        (("ls", "--created-after", "soon"), "'soon' is no time"),
        (("ls", "--data", "country"), "no KEY=VALUE"),
        (("count", "--by", "colour"), "by is one of status, error_type"),
        (("ls", "--fingerprint", "ValueError"), "12 hexadecimal digits"),
    ],
)
def test_a_filter_that_cannot_be_is_refused(store: Path, shell: Shell, args: tuple[str, ...], says: str) -> None:
    before = shell.tasks()
    answer = shell(*args)
    assert answer.code != 0
    assert says in " ".join(answer.err.replace("│", " ").split())
    assert shell.tasks() == before


def test_count_is_by_what_was_asked_most_first_and_what_has_none_last(store: Path, shell: Shell) -> None:
    assert shell("count", "--by", "error_type").rows == [["ValueError", "3"], ["TimeoutError", "2"], ["", "2"]]
    assert shell("count", "--by", "step", "--json").json == {"parse": 5, "": 2}
    assert shell("count", "--by", "last_outcome", "--status", "exhausted").rows == [["error", "3"], ["timeout", "2"]]
    assert shell("count", "--by", "worker", "--prefix", "bad", "--json").json == {"w1": 3}


def test_the_causes_of_errors_lead_to_their_tasks_faults_of_the_work_first(store: Path, shell: Shell) -> None:
    fault, other = shell("errors", "--json").json
    assert (fault["type"], fault["message"], fault["place"]) == (
        "ValueError",
        "inbox/{}.json: row # has no '…'",
        "test_mending.py:parse",
    )
    assert (fault["count"], fault["outcome"], other["count"], other["outcome"]) == (3, "error", 2, "timeout")
    assert "ValueError: inbox/bad" in fault["traceback"]
    assert shell("count", "--by", "fingerprint", "--json").json == {
        fault["fingerprint"]: 3,
        other["fingerprint"]: 2,
        "": 2,
    }
    assert [row[7:] for row in shell("errors").rows] == [
        ["error", "test_mending.py:parse", fault["fingerprint"]],
        ["timeout", "", other["fingerprint"]],
    ]
    assert len(shell("errors", "--last-outcome", "timeout").rows) == 1


@pytest.mark.usefixtures("terminal")
def test_on_a_terminal_errors_gives_the_line_that_runs_them_again(store: Path, shell: Shell) -> None:
    shown = shell("errors").out
    fault, other = shown.split("Not the work's fault")
    assert "3 x ValueError: inbox/{}.json: row # has no '…', in test_mending.py:parse" in fault
    assert "raise ValueError" in fault
    assert "2 x TimeoutError" in other
    (line,) = [line for line in fault.splitlines() if line.strip().startswith("again: ")]
    answer = shell(*shlex.split(line.partition("aiotracker ")[2]), "--yes")
    assert answer.out == "3 reset\n"
    assert {task.id for task in shell.tasks().values() if task.status == "pending"} == {"bad1", "bad22", "bad333"}
    assert "causes not shown: 1;" in shell("errors", "--limit", "1", "--status", "pending", "--status", "exhausted").err


@pytest.mark.usefixtures("terminal")
def test_on_a_terminal_show_draws_when_each_step_ran(store: Path, shell: Shell) -> None:
    shown = shell("show", "bad1").out
    fetch, parse = (
        next(line for line in shown.splitlines() if line.startswith(f"  {step}: ")) for step in ("fetch", "parse")
    )
    assert fetch.startswith("  fetch: ━")
    assert fetch.index("━") < parse.index("━")
    assert "succeeded" in fetch
    assert "failed" in parse


def test_a_change_is_kept_with_who_and_why_and_made_once(store: Path, shell: Shell) -> None:
    answer = shell("reset", "--step", "parse", "--step-status", "failed", "--reason", "parser mended", "--yes")
    assert answer.out == "3 reset\n"
    (change,) = shell.tasks()["bad1"].changes
    assert (change.verb, change.reason) == ("reset", "parser mended")
    assert "@" in change.by
    assert f"by {change.by}: parser mended" in shell("show", "bad1").out
    again = shell("reset", "--step", "parse", "--step-status", "failed", "--dry-run", "--json").json
    assert again["matched"] == 0, "what is done already is passed over"
    assert shell("ignore", "bad1", "--reason", "x" * 201, "--yes").code == 2


def test_filters_are_the_same_for_all_that_looks_and_changes(store: Path, shell: Shell) -> None:
    options = ("--error-type", "ValueError", "--data", "country=FR")
    assert [json.loads(line)["id"] for line in shell("ls", "--json", *options).out.splitlines()] == ["bad333"]
    assert shell("count", "--json", *options).json["total"] == 1
    assert shell("errors", "--json", *options).json[0]["ids"] == ["bad333"]
    for verb in ("reset", "ignore"):
        assert shell(verb, "--dry-run", "--json", *options).json["ids"] == ["bad333"]
    assert shell("purge", "--dry-run", "--force", "--json", *options).json["ids"] == ["bad333"]


def test_no_line_to_type_shows_a_password(monkeypatch: pytest.MonkeyPatch) -> None:
    url = "redis://me:secret@host/0"
    assert line_for(url, "errors") == "aiotracker errors --store redis://host/0"
    monkeypatch.setenv("AIOTRACKER_STORE", url)
    assert line_for(url, "errors") == "aiotracker errors"
    assert line_for("file:my store", "errors") == "aiotracker errors --store 'file:my store'"
