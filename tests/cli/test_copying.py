"""`aiotracker copy` and `aiotracker init`."""

import asyncio
import json
import signal
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from aiotracker import BaseTracker, FileTracker, open_tracker
from aiotracker.cli import copying

from .conftest import Shell
from .test_map import on_a_terminal


def fill(url: str, *ids: str) -> None:
    async def work() -> None:
        async with open_tracker(url) as tracker:
            await tracker.add_many(ids)

    asyncio.run(work())


def statuses(url: str) -> dict[str, str]:
    async def work() -> dict[str, str]:
        async with open_tracker(url, read_only=True) as tracker:
            return {task.id: str(task.status) async for task in tracker.find()}

    return asyncio.run(work())


def test_copy_tells_what_was_done_and_again_that_all_is_there(shell: Shell) -> None:
    fill("file:a", "one", "two")
    done = shell("copy", "file:a", "folder:b")
    assert (done.code, done.err) == (0, "")
    assert done.out == "2 tasks, 2 new, 0 replaced, 0 there already, 2 compared and there\n"
    assert statuses("folder:b") == {"one": "pending", "two": "pending"}
    again = shell("copy", "file:a", "folder:b", "--json").json
    assert (again["source"], again["target"], again["read"], again["created"]) == ("file:a", "folder:b", 2, 0)
    assert (again["unchanged"], again["verified"], again["ok"], again["problems"]) == (2, 2, True, [])
    assert shell("copy", "file:a", "folder:b", "--no-verify", "--json").json["verified"] is None


def test_copy_takes_what_map_remembers_along(shell: Shell) -> None:
    assert shell("map", "--", "true", ids="x\ny\n").code == 0
    assert shell("copy", "file:store", "folder:b").code == 0
    assert shell("count", "--store", "folder:b", "--json").json["succeeded"] == 2
    other = shell("map", "--store", "folder:b", "--", "false", ids="x\n")
    assert (other.code, "another command" in other.err) == (2, True)


def test_a_dry_run_makes_no_store(shell: Shell) -> None:
    fill("file:a", "one")
    done = shell("copy", "file:a", "file:b", "--dry-run")
    assert (done.code, done.out) == (0, "1 task, would be copied: 1 new, 0 replaced, 0 there already\n")
    assert not (shell.folder / "b").exists()


def test_what_was_not_copied_is_listed_and_the_exit_status_is_1(shell: Shell) -> None:
    fill("file:a", "one", "t\two")
    fill("file:b", "t\two")
    done = shell("copy", "file:a", "file:b")
    assert done.code == 1
    assert done.out.startswith("2 tasks, 1 new,")
    assert "not all is there: 1 conflict" in done.err
    assert "t\\two: conflict: the target has another task of this id" in done.err
    shown = shell("copy", "file:a", "file:b", "--json")
    assert (shown.code, shown.json["ok"], shown.json["failed"]) == (1, False, {"conflict": 1})
    assert shown.json["problems"][0]["id"] == "t\two"
    assert shell("copy", "file:a", "file:b", "--overwrite").code == 0
    assert shell("copy", "file:a", "file:b").code == 0


def test_of_many_problems_the_first_are_shown(shell: Shell) -> None:
    ids = [f"t{number:03}" for number in range(50)]
    fill("file:a", *ids)
    fill("file:b", *ids)
    done = shell("copy", "file:a", "file:b")
    assert sum(line.startswith("aiotracker:   t0") for line in done.err.splitlines()) == copying.PROBLEMS_SHOWN
    assert "and 30 more" in done.err


def test_held_tasks_are_left_out_unless_asked_for(shell: Shell) -> None:
    async def copy_while_held(*options: str) -> Any:
        async with FileTracker("a") as tracker, tracker.run("one", lease=60):
            return await asyncio.to_thread(lambda: shell.process("copy", "file:a", "file:b", *options))

    done = asyncio.run(copy_while_held())
    assert (done.code, "one: held: held by" in done.err, "--held" in done.err) == (1, True, True)
    assert statuses("file:b") == {}
    # Its run has ended; the next one is copied while it lasts.
    asyncio.run(reset("file:a", "one"))
    done = asyncio.run(copy_while_held("--held", "--json"))
    assert (done.code, done.json["ok"]) == (0, True)
    assert statuses("file:b") == {"one": "in_progress"}


async def reset(url: str, task_id: str) -> None:
    async with open_tracker(url) as tracker:
        await tracker.reset(task_id)


def test_files_of_abstract_tracker_are_copied(shell: Shell) -> None:
    old = shell.folder / "old"
    old.mkdir()
    moment = datetime(2024, 5, 1, tzinfo=UTC).isoformat()
    times = dict.fromkeys(("create_time", "update_time", "lock_time", "lock_expire_time"), moment)
    record: dict[str, Any] = {"id": 1, "status": 40, "attempts": 1, "lock": None, "data": {}, "errors": {}, **times}
    (old / "1.json").write_text(json.dumps(record, indent=4))
    (old / "cut.json").write_text(json.dumps(record)[:20])
    (old / "README").write_text("about")
    done = shell("copy", "abstract-tracker:old", "file:b")
    assert (done.code, statuses("file:b")) == (1, {"1": "succeeded"})
    assert "1 other file passed over" in done.out
    assert "old/cut.json: unreadable: no record of abstract_tracker" in done.err
    (old / "cut.json").unlink()
    assert shell("copy", "abstract-tracker:old", "file:b").code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("file:none", "file:b"), 1, "there is no store at none"),
        (("fiel:a", "file:b"), 2, "did you mean 'file'"),
        (("file:a", "file:a"), 2, "the same store"),
        (("abstract-tracker:none", "file:b"), 1, "there is no folder none"),
        (("file:a",), 2, "Missing argument 'TO'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(shell: Shell, arguments: tuple[str, ...], code: int, message: str) -> None:
    fill("file:a", "one")
    done = shell("copy", *arguments)
    assert (done.code, message in done.err) == (code, True), done.err
    assert "Traceback" not in done.err
    assert not (shell.folder / "b").exists()


def test_a_missing_package_is_named(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: object, **options: object) -> Any:
        raise ModuleNotFoundError('stores on X need y: pip install "aiotracker[x]"', name="y")

    monkeypatch.setattr(copying, "copy_store", missing)
    monkeypatch.setattr(copying, "open_tracker", missing)
    for command in (("copy", "x:a", "x:b"), ("init", "x:a")):
        done = shell(*command)
        assert (done.code, done.err) == (2, 'aiotracker: stores on X need y: pip install "aiotracker[x]"\n')


def test_an_interrupted_copy_says_so_and_the_next_ends_it(shell: Shell) -> None:
    fill("file:a", *map(str, range(600)))
    process = shell.start("copy", "file:a", "folder:b")
    shell.until(lambda: (shell.folder / "b").is_dir() and len(list((shell.folder / "b").glob("*.json"))) > 20)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "")
    assert "interrupted; started again, it goes on where it was" in err
    there = len(statuses("folder:b"))
    assert 20 < there < 600
    done = shell("copy", "file:a", "folder:b", "--json").json
    assert (done["unchanged"], done["created"], done["verified"]) == (there, 600 - there, 600)


def test_progress_is_lines_in_a_log_and_a_bar_on_a_terminal(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    fill("file:a", *map(str, range(600)))
    monkeypatch.setattr(copying, "LINE_EVERY", 0.0)
    done = shell("copy", "file:a", "file:b")
    assert "aiotracker: 0 of 600 copied\n" in done.err
    assert "aiotracker: 600 of 600 copied\n" in done.err
    assert "aiotracker: 600 of 600 compared\n" in done.err

    code, shown = on_a_terminal(shell, "copy", "file:a", "file:c")
    assert code == 0
    assert "600/600" in shown
    assert "compared" in shown


def test_init_opens_stores_that_make_themselves_and_says_so(shell: Shell) -> None:
    done = shell("init", "file:new")
    assert (done.code, (shell.folder / "new").is_dir()) == (0, True)
    assert done.out == "file:new is ready; stores of this kind also make themselves when they are first opened\n"
    assert shell("init", "--json").json == {"url": "file:store", "needs_init": False}
    assert shell("init", "--store", "folder:f").code == 0
    assert (shell.folder / "f").is_dir()


def test_init_makes_what_others_need_before_it_opens_them(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class NeedyTracker(FileTracker[Any, Any]):
        async def init(self) -> None:
            calls.append("init")

        async def open(self) -> Any:
            calls.append("open")
            return await super().open()

    def opening(url: str) -> BaseTracker[Any, Any]:
        assert url == "needy://me:secret@host/db"
        return NeedyTracker("needy")

    monkeypatch.setattr(copying, "open_tracker", opening)
    done = shell("init", "needy://me:secret@host/db")
    assert (done.code, done.out) == (0, "needy://host/db is ready\n")
    assert calls == ["init", "open"]


def test_what_init_cannot_do_is_said_in_one_line(shell: Shell) -> None:
    Path("file").write_text("x")
    done = shell("init", "file:file")
    assert (done.code, done.err.count("\n")) == (1, 1)
