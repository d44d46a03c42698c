"""The commands that look and change, on a store that was filled by a program."""

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from aiotracker import FileTracker, GiveUp, Retry, RunningTask

from .conftest import Shell


async def work(task: RunningTask[Any, Any]) -> None:
    if task.id.startswith("bad"):
        task.data = {"seen": True}
        await task.step("look", look, task.id)
    if task.id.startswith("worse"):
        raise GiveUp("hopeless")
    task.result = {"size": len(task.id)}


async def look(task_id: str) -> None:
    raise ValueError(f"{task_id} has no row {len(task_id)}")


@pytest.fixture
def store(shell: Shell) -> Path:
    """Two good, three bad, one worse, one pending, one ignored."""

    async def fill() -> None:
        async with FileTracker(str(shell.store), retry=Retry(2, delay=0), worker="w1") as tracker:
            await tracker.work(work, ids=["good1", "good2", "bad1", "bad2", "bad3", "worse"])
            await tracker.add("new")
            await tracker.add("aside")
            await tracker.ignore("aside")

    asyncio.run(fill())
    return shell.store


def test_count_is_by_status(store: Path, shell: Shell) -> None:
    expected = {"pending": 1, "in_progress": 0, "failed": 0, "exhausted": 4, "succeeded": 2, "ignored": 1, "total": 8}
    assert shell("count", "--json").json == expected
    assert shell("count").rows == [[name, str(number)] for name, number in expected.items()]
    assert shell("count", "--prefix", "bad", "--json").json["total"] == 3


@pytest.mark.parametrize(
    ("options", "ids"),
    [
        ((), ["aside", "bad1", "bad2", "bad3", "good1", "good2", "new", "worse"]),
        (("--status", "succeeded"), ["good1", "good2"]),
        (("--status", "succeeded", "--status", "pending"), ["good1", "good2", "new"]),
        (("--prefix", "bad"), ["bad1", "bad2", "bad3"]),
        (("--error-type", "GiveUp"), ["worse"]),
        (("--worker", "w1", "--prefix", "w"), ["worse"]),
        (("--worker", "w2"), []),
        (("--last-outcome", "error", "--prefix", "w"), ["worse"]),
        (("--order-by", "-id", "--limit", "2"), ["new", "worse"]),
        (("--running",), []),
    ],
)
def test_ls_shows_what_the_filters_match(store: Path, shell: Shell, options: tuple[str, ...], ids: list[str]) -> None:
    assert sorted(shell("ls", "--ids", *options).out.splitlines()) == ids
    assert sorted(json.loads(line)["id"] for line in shell("ls", "--json", *options).out.splitlines()) == ids
    assert sorted(row[0] for row in shell("ls", *options).rows) == ids


def test_ls_orders_and_separates_by_nul(store: Path, shell: Shell) -> None:
    assert shell("ls", "-0", "--order-by", "-id", "--limit", "2").out == "worse\0new\0"


def test_ls_elsewhere_than_on_a_terminal_shows_all_in_plain_columns(shell: Shell) -> None:
    async def fill() -> None:
        async with FileTracker(str(shell.store)) as tracker:
            await tracker.add_many(f"{number:0200}\t\n" for number in range(250))

    asyncio.run(fill())
    rows = shell("ls").rows
    assert len(rows) == 250
    task_id, status, attempts, _, error = rows[-1]
    assert (task_id[-7:], len(task_id), status, attempts, error) == ("249\\t\\n", 204, "pending", "0", "")


def test_errors_are_counted_by_cause(store: Path, shell: Shell) -> None:
    bad, worse = shell("errors", "--json").json
    assert (bad["type"], bad["message"], bad["count"], bad["exhausted"]) == ("ValueError", "{} has no row #", 3, 3)
    assert sorted(bad["ids"]) == ["bad1", "bad2", "bad3"]
    assert bad["first"] <= bad["last"]
    assert (worse["type"], worse["message"], worse["count"]) == ("GiveUp", "hopeless", 1)
    assert [row[:4] for row in shell("errors").rows] == [
        ["3", "3", "ValueError", "{} has no row #"],
        ["1", "1", "GiveUp", "hopeless"],
    ]
    assert len(shell("errors", "--error-type", "GiveUp").rows) == 1
    assert len(shell("errors", "--limit", "1").rows) == 1


def test_show_shows_everything(store: Path, shell: Shell) -> None:
    shown = shell("show", "bad1").out
    for part in (
        "status: exhausted",
        "attempts: 2",
        "look: failed, ",
        "ValueError:\n    bad1 has no row 4",
        "Traceback (most recent call last)",
        "by w1",
        '"seen": true',
    ):
        assert part in shown
    assert '"size": 5' in shell("show", "good1").out
    assert shell("show", "bad1", "--json").json["steps"][0]["name"] == "look"


def test_show_of_an_id_that_is_not_there_says_so(store: Path, shell: Shell) -> None:
    answer = shell("show", "nobody")
    assert (answer.code, answer.out) == (1, "")
    assert "there is no task 'nobody'" in answer.err


def test_a_dry_run_shows_what_would_change_and_changes_nothing(store: Path, shell: Shell) -> None:
    before = shell.tasks()
    answer = shell("reset", "--status", "exhausted", "--error-type", "ValueError", "--dry-run")
    assert answer.code == 0
    assert answer.out.splitlines()[0] == "3 tasks would be reset:"
    assert sorted(answer.out.split()[-3:]) == ["bad1", "bad2", "bad3"]
    assert shell.tasks() == before


def test_reset_makes_what_matched_pending(store: Path, shell: Shell) -> None:
    answer = shell("reset", "--status", "exhausted", "--error-type", "ValueError", "--yes")
    assert (answer.code, answer.out) == (0, "3 reset\n")
    assert {task_id for task_id, task in shell.tasks().items() if task.status == "pending"} == {
        "bad1",
        "bad2",
        "bad3",
        "new",
    }


def test_reset_forgets_steps_from_the_one_named(shell: Shell) -> None:
    async def fill() -> None:
        async with FileTracker(str(shell.store)) as tracker, tracker.run("t") as task:
            for name in ("a", "b", "c"):
                await task.step(name, asyncio.sleep, 0)

    asyncio.run(fill())
    assert shell("reset", "t", "--from-step", "b", "--yes").code == 0
    assert [step.name for step in shell.tasks()["t"].steps] == ["a"]


@pytest.mark.parametrize("verb", ["reset", "ignore", "purge"])
def test_without_ids_and_filters_a_change_is_refused(store: Path, shell: Shell, verb: str) -> None:
    answer = shell(verb, "--yes")
    assert (answer.code, "ids or filters" in answer.err) == (2, True)


@pytest.mark.parametrize("verb", ["reset", "ignore", "purge"])
def test_where_nobody_can_confirm_nothing_is_changed(store: Path, shell: Shell, verb: str) -> None:
    before = shell.tasks()
    answer = shell(verb, "bad1", "--force")
    assert (answer.code, "--yes" in answer.err, "1 task would be" in answer.err) == (2, True, True)
    assert shell.tasks() == before


def test_ignore_takes_ids_and_tells_of_those_that_are_not_there(store: Path, shell: Shell) -> None:
    answer = shell("ignore", "new", "nobody", "--yes")
    assert (answer.code, answer.out) == (1, "1 ignored\n")
    assert "nobody" in answer.err
    assert shell.tasks()["new"].status == "ignored"


def test_ids_and_filters_must_both_match(store: Path, shell: Shell) -> None:
    answer = shell("ignore", "new", "good1", "--status", "pending", "--yes", "--json").json
    assert (answer["changed"], answer["missing"]) == (1, ["good1"])
    assert shell.tasks()["good1"].status == "succeeded"


def test_purge_spares_young_records_unless_forced(store: Path, shell: Shell) -> None:
    spared = shell("purge", "--status", "succeeded", "--yes")
    assert (spared.out, "2 passed over" in spared.err) == ("0 purged\n", True)
    assert shell("purge", "--status", "succeeded", "--force", "--yes").out == "2 purged\n"
    assert set(shell.tasks()) == {"aside", "bad1", "bad2", "bad3", "new", "worse"}


def test_held_tasks_are_passed_over_unless_forced(shell: Shell) -> None:
    async def hold(then: Callable[[], Awaitable[None]]) -> None:
        async with FileTracker(str(shell.store)) as tracker:
            run = tracker.run("t")
            await run.__aenter__()  # and never left, as after a kill
            await then()

    async def change() -> None:
        passed = await asyncio.to_thread(shell, "reset", "--status", "in_progress", "--yes")
        assert (passed.out, "1 passed over" in passed.err) == ("0 reset\n", True)
        assert (await asyncio.to_thread(shell, "reset", "t", "--force", "--yes")).out == "1 reset\n"

    asyncio.run(hold(change))
    assert shell.tasks()["t"].status == "pending"


def test_add_takes_data_and_priority_and_leaves_what_is_there(store: Path, shell: Shell) -> None:
    answer = shell("add", "new", "newer", "--data", '{"a": [1]}', "--priority", "7", "--json")
    assert answer.json == {"added": 1, "refused": 0}
    found = shell.tasks()
    assert (found["newer"].data, found["newer"].priority, found["new"].data) == ({"a": [1]}, 7, None)
    assert shell("add", "x", "--data", "{bad").code == 2


def test_the_store_may_stand_on_both_sides_of_the_command(store: Path, shell: Shell) -> None:
    shell.environ = {"AIOTRACKER_STORE": "file:/nowhere/at/all"}
    for args in (("--store", f"file:{store}", "ls", "--ids"), ("ls", "--ids", "--store", f"file:{store}")):
        assert "good1" in shell(*args).out


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (("ls", "--store", "s4:x"), "unknown kind of store"),
        (("ls", "--store", "redis://me:secret@host/0?lese=1"), "'redis://host/0.lese=1' has an unknown parameter"),
        (("doctor", "--store", "sqlite:x.db"), "only file: and folder: stores"),
        (("ls", "--order-by", "size"), "order_by is one of"),
        (("ls", "--last-outcome", "odd"), "last_outcome is one of"),
        (("show", ""), "1 to 2048 bytes"),
    ],
)
def test_a_wrong_call_is_one_clear_line(store: Path, shell: Shell, args: tuple[str, ...], part: str) -> None:
    answer = shell(*args)
    assert (answer.code, answer.out, len(answer.err.splitlines())) == (2, "", 1)
    assert answer.err.startswith("aiotracker: ")
    assert re.search(part, answer.err)
    with pytest.raises(Exception, match=part):
        shell("--debug", *args)


@pytest.mark.parametrize(
    "args", [("ls",), ("count",), ("errors",), ("show", "x"), ("doctor",), ("reset", "x", "--yes")]
)
def test_a_store_that_is_not_there_is_told_and_not_made(shell: Shell, args: tuple[str, ...]) -> None:
    answer = shell(*args)
    assert (answer.code, "there is no store at" in answer.err) == (1, True)
    assert not shell.store.exists()


def damage(store: Path) -> None:
    log = min(store.glob("log-*"))
    raw = bytearray(log.read_bytes())
    raw[raw.index(b'"good2"') + 1] ^= 1
    log.write_bytes(raw)


def test_doctor_finds_damage_and_repairs_it_only_when_told(store: Path, shell: Shell) -> None:
    assert shell("doctor").code == 0
    damage(store)
    found = shell("doctor", "--json")
    assert (found.code, found.json["ok"], found.json["repaired"]) == (1, False, False)
    assert found.json["problems"][0]["path"].endswith(".jsonl")
    assert shell("ls").code == 1
    asked = shell("doctor", "--repair")
    assert (asked.code, "--yes" in asked.err) == (2, True)
    assert shell("doctor", "--repair", "--dry-run").code == 1
    repaired = shell("doctor", "--repair", "--yes")
    assert (repaired.code, "set aside: " in repaired.out) == (0, True)
    assert shell("doctor").code == 0
    assert shell("count").code == 0


def test_a_reader_that_has_seen_enough_ends_the_output_quietly(shell: Shell) -> None:
    async def fill() -> None:
        async with FileTracker(str(shell.folder / "store")) as tracker:
            await tracker.add_many("x" * 200 + str(number) for number in range(2000))

    asyncio.run(fill())
    process = shell.start("ls", "--ids")
    assert process.stdout is not None
    assert process.stdout.readline().startswith("xxx")
    process.stdout.close()
    process.stdout = None
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (141, "")


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_its_extra_the_command_says_what_to_install(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from aiotracker.cli import main

    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert 'pip install "aiotracker[cli]"' in capsys.readouterr().err


def test_a_plain_listing_starts_without_what_only_terminals_need(shell: Shell, store: Path) -> None:
    program = (
        "import sys\nsys.argv = ['aiotracker', 'count']\nfrom aiotracker.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "print([name for name in ('rich.progress', 'rich.table', 'rich.markdown', 'pytest') if name in sys.modules])"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program],
        cwd=shell.folder,
        env=os.environ | shell.environ,
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout.splitlines()[-1] == "[]"
