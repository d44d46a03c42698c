"""`aiotracker status`: a store at work, on one screen."""

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from aiotracker import FileTracker, MemoryTracker, Query, Status, StoreUnavailableError, Task, analytics
from aiotracker.cli import watching
from aiotracker.cli.remembered import RESERVED
from aiotracker.cli.screen import Look, lines
from tests.analytics.conftest import fill

from .conftest import Shell
from .terminal import Terminal

NOW = datetime(2026, 1, 31, 8, tzinfo=UTC)


@pytest.fixture
def busy(shell: Shell) -> Iterator[FileTracker]:
    """A store with a task under way, held by a tracker of this process."""
    over = asyncio.Event()

    async def hold(tracker: FileTracker, started: asyncio.Event) -> None:
        async with tracker.run("film/1") as task:
            task.progress, task.note = 0.4, "reel 3"
            await task.save()
            started.set()
            await over.wait()

    async def start() -> "asyncio.Task[None]":
        started = asyncio.Event()
        holding = asyncio.create_task(hold(tracker, started))
        await started.wait()
        return holding

    with asyncio.Runner() as runner:
        tracker: FileTracker = FileTracker(str(shell.store), lease=3600, worker="worker-7")
        runner.run(tracker.open())
        runner.run(fill(tracker))
        holding = runner.run(start())
        yield tracker
        over.set()
        runner.run(asyncio.wait_for(holding, 60))
        runner.run(tracker.aclose())


def watch(shell: Shell, *args: str, **options: Any) -> Terminal:
    environ = {"AIOTRACKER_STORE": "file:store"} | options.pop("environ", {})
    return Terminal("status", "--watch", "--interval", "0.1", *args, folder=shell.folder, **options, **environ)


def test_not_on_a_terminal_a_summary_is_plain_text(shell: Shell, busy: FileTracker) -> None:
    answer = shell("status")
    assert answer.code == 0
    assert "\x1b" not in answer.out
    for part in (
        "3 pending  1 in_progress  3 failed  3 exhausted  3 succeeded  0 ignored  13 total",
        "running (1)",
        "film/1",
        "40%",
        "60 min left",
        "worker-7",
        "reel 3",
        "oldest pending",
        "KeyError",
        "page/00009",
    ):
        assert part in answer.out


def test_filters_and_json_are_as_everywhere(shell: Shell, busy: FileTracker) -> None:
    found = shell("status", "--json", "--prefix", "film/").json
    assert found["counts"]["in_progress"] == 1
    assert found["counts"]["pending"] == 0
    assert (found["running"][0]["id"], found["running"][0]["progress"]) == ("film/1", 0.4)
    assert len(found["minutes"]) == 15


def test_the_task_of_map_is_not_one_of_the_users(shell: Shell) -> None:
    shell("map", "--", "true", ids="a\n")
    assert RESERVED in (shell.store / "log-00000001.jsonl").read_text()
    assert shell("status", "--json").json["counts"] == {
        "pending": 0,
        "in_progress": 0,
        "failed": 0,
        "exhausted": 0,
        "succeeded": 1,
        "ignored": 0,
    }


def test_elsewhere_a_watch_writes_an_object_a_line_until_it_is_interrupted(shell: Shell, busy: FileTracker) -> None:
    process = shell.start("status", "--watch", "--interval", "0.1", "--json")
    assert process.stdout is not None
    with process:
        found = [json.loads(process.stdout.readline()) for _ in range(2)]
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert found[0]["time"] < found[1]["time"]
    assert process.returncode == 130


def test_on_a_terminal_a_watch_follows_the_store_and_q_gives_the_terminal_back(shell: Shell, busy: FileTracker) -> None:
    with watch(shell) as terminal:
        terminal.until(lambda: "q or Ctrl-C" in terminal.text)
        for part in (
            "3 pending",
            "film/1",
            "40%",
            "left",
            "worker-7",
            "reel 3",
            "latest failures",
            "causes of failures",
        ):
            assert part in terminal.text
        assert len(terminal.lines) == 30
        assert "\x1b[3" in terminal.shown.decode(), "in colour"
        assert not terminal.is_as_before
        shell("add", "new/1", "new/2")
        terminal.until(lambda: "5 pending" in terminal.text)
        terminal.resize(40, 14)
        terminal.until(lambda: "film/1 reel 3" in terminal.text)
        assert len(terminal.lines) == 14
        assert terminal.lines[0].startswith("file:store")
        terminal.press(b"q")
        assert terminal.end() == 0
        assert terminal.shown.count(b"\x1b[?1049h") == terminal.shown.count(b"\x1b[?1049l") == 1
        assert terminal.shown.rindex(b"\x1b[?25h") > terminal.shown.rindex(b"\x1b[?25l"), "the cursor is there"
        assert terminal.is_as_before


@pytest.mark.parametrize("how", ["keys", "signal"])
def test_ctrl_c_and_being_ended_give_the_terminal_back(shell: Shell, busy: FileTracker, how: str) -> None:
    environ = {"NO_COLOR": "1", "PYTHONIOENCODING": "ascii"}
    with watch(shell, "--interval", "600", columns=50, rows=14, environ=environ) as terminal:
        terminal.until(lambda: "q or Ctrl-C" in terminal.text)
        assert "film/1" in terminal.text
        assert "\x1b[3" not in terminal.shown.decode(), "without colour"
        assert terminal.shown.isascii()
        assert "60 min left" not in terminal.text, "there is no room"
        terminal.resize(100, 14)
        terminal.until(lambda: "60 min left" in terminal.text)
        if how == "keys":
            terminal.press(b"\x1b[Ax\x03")
        else:
            terminal.send(signal.SIGTERM)
        assert terminal.end() == 130
        assert b"\x1b[?1049l" in terminal.shown
        assert terminal.is_as_before


def test_a_store_that_is_not_there_is_said_where_it_stays(shell: Shell) -> None:
    with watch(shell, "--store", "file:nowhere") as terminal:
        assert terminal.end() == 1
        assert "there is no store" in terminal.text
        assert b"\x1b[?1049h" not in terminal.shown


class Flaky(MemoryTracker):
    """Cannot be reached now and then."""

    is_down = False

    async def scan(self, query: Query) -> AsyncIterator[Task]:
        if self.is_down:
            raise StoreUnavailableError("no route")
        async for task in super().scan(query):
            yield task


async def test_a_store_that_cannot_be_reached_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    footers: list[str] = []
    async with Flaky() as tracker:
        watch = watching.Watch(tracker, {}, "memory:", 0.001)

        def show(live: Any, console: Any, found: analytics.Summary, footer: str) -> None:
            footers.append(footer)
            tracker.is_down = len(footers) in (2, 3)

        monkeypatch.setattr(watch, "_show", show)
        drawing = asyncio.create_task(
            watch._draw(None, None, await analytics.summary(tracker), asyncio.Event())  # type: ignore[arg-type]  # not drawn
        )
        while len(footers) < 5:
            assert not drawing.done()
            await asyncio.sleep(0.001)
        drawing.cancel()
    assert [footer == watching.KEYS for footer in footers[:5]] == [True, True, False, False, True]
    assert "trying again: no route" in footers[2]


def summary_of(running: int, failures: int) -> analytics.Summary:
    moment = timedelta(seconds=90)
    return analytics.Summary(
        time=NOW,
        counts={status.value: 123_456 for status in Status},
        rates=(analytics.Rate(1, 1234.5, 17), analytics.Rate(5, 3.25, 0), analytics.Rate(15, 0, 0)),
        durations=analytics.Durations(5, 0.0012, 0.5, 120, 7200),
        minutes=tuple(
            analytics.Minute(NOW - timedelta(minutes=15 - number), number, 0, number or None) for number in range(15)
        ),
        oldest=analytics.Waiting("an/id\x1b[2J", NOW - moment, 90),
        running=tuple(
            analytics.Running(f"ünï/😀/{n}", "host:1:ab", NOW - moment, 1, None, "a note\nof two lines", None, 3, True)
            for n in range(running)
        ),
        late=tuple(
            analytics.Running(f"late/{n}", "host:1:ab", NOW - moment, 1, 0.5, None, "parse", -3, True) for n in range(3)
        ),
        causes=(analytics.Cause("0123456789ab", failures, "ValueError", "no number in '…'", "page/1"),),
        failures=tuple(
            analytics.Failed(f"page/{n}", Status.FAILED, 1, NOW, "ValueError", "no\nnumber") for n in range(failures)
        ),
    )


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
@pytest.mark.parametrize("width", [1, 10, 37, 60, 80, 200])
@pytest.mark.parametrize("height", [1, 5, 12, 24, 60])
def test_a_screen_fits_its_terminal(width: int, height: int, encoding: str) -> None:
    look = Look(width, height, encoding)
    drawn = lines(summary_of(20, 20), "file:store", look, footer="q: leave")
    assert len(drawn) <= height
    for line in drawn:
        assert line.cell_len <= width, line.plain
        assert line.plain.isprintable()
    assert drawn[-1].plain == "q: leave"[:width] if width >= 8 else True
    if width >= 80 and height >= 24:
        text = "\n".join(line.plain for line in drawn)
        assert "late leases     3  late/0 late/1 late/2" in text
        assert "an/id\\x1b[2J" in text
        for title in ("running", "causes of failures", "latest failures"):
            assert title in text


def test_long_blocks_leave_room_for_the_others() -> None:
    text = [line.plain for line in lines(summary_of(20, 20), "file:store", Look(80, 24, "utf-8"))]
    running = sum("a note" in line for line in text)
    failures = sum("page/" in line for line in text)
    assert running in (failures, failures + 1)
    assert len(text) == 24


def test_bars_are_as_high_as_their_values() -> None:
    assert Look(80, 24, "utf-8").plot([0, 1, 7, None, 3.5]) == "▁▂█ ▅"
    assert Look(80, 24, "ascii").plot([0, 0]) == "__"
