"""`aiotracker map`, as a user runs it: processes, signals, terminals."""

import asyncio
import errno
import json
import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Coroutine
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from aiotracker import FileTracker, Task
from aiotracker.cli import command
from aiotracker.cli import map as map_module
from aiotracker.cli.remembered import RESERVED

from .conftest import Shell, refuses_what_is_no_program

MANY = "".join(f"{number}\n" for number in range(1, 25))
# Tells that it runs, and runs until it may end.
WAITS = ("sh", "-c", 'echo "$1 $$" >> began; while ! test -e go; do sleep 0.02; done; echo "$1" >> ended', "-")


def test_each_id_is_run_once_and_a_second_run_skips_them_all(shell: Shell) -> None:
    for skipped in (0, 24):
        done = shell.process("map", "-j", "4", "--json", "--", "sh", "-c", 'echo "$1" >> ran', "-", "{}", ids=MANY)
        assert done.code == 0, done.err
        summary = json.loads(done.out)
        assert (summary["succeeded"], summary["skipped"], summary["ok"]) == (24 - skipped, skipped, True)
    assert sorted(shell.lines("ran"), key=int) == MANY.split()
    assert shell.counts() == {"succeeded": 24}


def test_failures_are_retried_kept_and_make_the_exit_status_1(shell: Shell) -> None:
    script = 'echo "try $AIOTRACKER_ATTEMPT"; echo "no $1" >&2; test "$1" != 2 || exit 3'
    command = ("map", "--max-attempts", "2", "--delay", "0", "--", "sh", "-c", script, "-")
    done = shell(*command, ids="1\n2\n")
    assert done.code == 1
    assert "2 is exhausted: exit code 3: no 2" in done.err
    assert "1 succeeded, 1 exhausted, 1 retried" in done.err
    task = shell.tasks()["2"]
    assert [error.type for error in task.errors] == ["CommandFailed"] * 2
    runs = task.data["runs"]
    assert [(run["attempt"], run["exit_code"], run["stdout"], run["stderr"]) for run in runs] == [
        (1, 3, "try 1\n", "no 2\n"),
        (2, 3, "try 2\n", "no 2\n"),
    ]
    assert shell.tasks()["1"].result["stdout"] == "try 1\n"
    again = shell(*command, ids="1\n2\n")
    assert again.code == 1, "an exhausted id has not succeeded, also when it is skipped"
    assert "reset --status exhausted" in again.err


def test_a_mended_command_takes_the_old_ones_place_only_when_told(shell: Shell) -> None:
    assert shell("map", "--max-attempts", "1", "--", "false", ids="1\n").code == 1
    refused = shell("map", "--", "true", "{}", ids="1\n2\n")
    assert refused.code == 2
    assert "its command: false\n" in refused.err
    assert "this one:    true '{}'\n" in refused.err
    assert "--new-command" in refused.err
    assert shell.counts() == {"exhausted": 1}
    assert shell("reset", "--status", "exhausted", "--yes").code == 0
    assert shell("map", "--new-command", "--", "true", "{}", ids="1\n2\n").code == 0
    assert shell("map", "--", "true", "{}", ids="1\n2\n").code == 0
    assert shell("map", "--", "false", ids="1\n").code == 2


def test_the_remembered_command_is_no_task_to_see_or_to_change(shell: Shell) -> None:
    shell("map", "--", "true", ids="1\n")
    assert shell("ls", "--ids").out == "1\n"
    assert shell("ls", "--status", "ignored").out == ""
    assert shell.counts() == {"succeeded": 1}
    assert shell("count", "--status", "ignored").out.endswith("total\t0\n")
    assert shell("purge", "--status", "ignored", "--force", "--yes").out == "0 purged\n"
    assert shell("map", "--", "false", ids="1\n").code == 2, "it is still remembered"

    async def remembered() -> Task | None:
        async with FileTracker(str(shell.store), read_only=True) as tracker:
            return await tracker.load(RESERVED)

    task = asyncio.run(remembered())
    assert task is not None
    assert task.status == "ignored", "nobody runs it"


def test_where_there_is_no_room_for_a_process_the_id_waits_and_keeps_its_attempts(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, refusals = command._start, 3

    async def crowded(starting: Coroutine[Any, Any, asyncio.subprocess.Process]) -> asyncio.subprocess.Process:
        nonlocal refusals
        if refusals:
            refusals -= 1
            starting.close()
            raise OSError(errno.EAGAIN, "Resource temporarily unavailable")
        return await start(starting)

    monkeypatch.setattr(command, "_start", crowded)
    monkeypatch.setattr(map_module, "WAIT_FOR_ROOM", 0.01)
    done = shell("map", "--max-attempts", "1", "--", "true", ids="1\n")
    assert done.code == 0, done.err
    assert done.err.count("no room") == 3
    assert shell.tasks()["1"].attempts == 1


@pytest.mark.parametrize("words", [("no-such-command",), ("./data",), ("--shell", "two", "words"), ("",)])
def test_a_command_that_can_never_run_stops_before_anything_is_done(shell: Shell, words: tuple[str, ...]) -> None:
    (shell.folder / "data").write_text("no program")
    done = shell("map", *(words if words[0] == "--shell" else ("--", *words)), ids=MANY)
    assert done.code == 2
    assert len(done.err.splitlines()) == 1
    assert not (shell.folder / "store").exists()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        pytest.param("no program", "format", marks=refuses_what_is_no_program),
        ("#!/no-such-interpreter\n", "no such command"),
    ],
)
def test_a_program_that_proves_to_be_none_stops_at_once_and_gives_the_ids_back(
    shell: Shell, text: str, why: str
) -> None:
    (shell.folder / "data").write_text(text)
    (shell.folder / "data").chmod(0o755)
    done = shell("map", "-j", "4", "--", "./data", ids=MANY)
    assert done.code == 2
    assert why in done.err
    assert set(shell.counts()) == {"pending"}


def test_where_the_id_is_the_program_a_missing_one_is_a_failure_like_others(shell: Shell) -> None:
    done = shell("map", "--max-attempts", "1", "--", "{}", ids="true\nno-such-command\n")
    assert done.code == 1
    assert shell.counts() == {"succeeded": 1, "exhausted": 1}


def test_ids_are_arguments_also_hostile_ones_and_quoted_in_a_shell(shell: Shell) -> None:
    hostile = ["$(touch pwned)", "a b", "'; touch pwned; '", "-n", "new\nline", "{}"]
    for number, words in enumerate((["--", "printf", "%s", "{}"], ["--shell", "printf %s {}"])):
        store = f"--store=file:s{number}"
        done = shell("map", "-0", store, *words, ids="\0".join(hostile))
        assert done.code == 0, done.err
        listed = shell("ls", "--json", store)
        results = {task["id"]: task["result"]["stdout"] for task in map(json.loads, listed.out.splitlines())}
        assert results == {task_id: task_id for task_id in hostile}
    assert not (shell.folder / "pwned").exists()


def test_ids_come_from_a_file_too_and_bad_ones_are_told(shell: Shell) -> None:
    (shell.folder / "ids").write_bytes(b"1\n\n\xff\n2\n")
    done = shell("map", "--ids", "ids", "--", "true")
    assert done.code == 1
    assert "line 3 is passed over" in done.err
    assert shell.counts() == {"succeeded": 2}
    missing = shell("map", "--ids", "nowhere", "--", "true")
    assert (missing.code, "nowhere" in missing.err) == (2, True)


def test_long_output_lies_beside_the_store(shell: Shell) -> None:
    assert shell("map", "--", "head", "-c", "100000", ids="/dev/zero\n").code == 0
    kept = shell.tasks()["/dev/zero"].result
    path = Path(kept["stdout_file"]["path"])
    assert path.parent == shell.folder / "store-output"
    assert path.stat().st_size == kept["stdout_file"]["bytes"] == 100_000


def test_output_that_cannot_be_written_stops_the_work_with_the_reason(shell: Shell) -> None:
    (shell.folder / "file").write_text("")
    done = shell("map", "--output", "file", "--", "head", "-c", "100000", ids="/dev/zero\n")
    assert done.code == 1
    assert "long output cannot be written" in done.err
    assert shell.counts() == {"pending": 1}


def test_a_timeout_is_a_failure_that_keeps_what_was_written(shell: Shell) -> None:
    command = ("--timeout", "0.2", "--max-attempts", "1", "--", "sh", "-c", "echo so far; sleep 1000")
    assert shell("map", *command, ids="1\n").code == 1
    task = shell.tasks()["1"]
    assert task.errors[0].type == "CommandTimeout"
    assert task.data["runs"][0]["stdout"] == "so far\n"


def test_two_processes_share_the_work_and_both_end_when_all_is_done(shell: Shell) -> None:
    (shell.folder / "ids").write_text(MANY)
    command = ("map", "--ids", "ids", "-j", "2", "--json", "--", *WAITS)
    both = [shell.start(*command) for _ in range(2)]
    shell.until(lambda: len(shell.lines("began")) == 4)
    (shell.folder / "go").touch()
    summaries = []
    for process in both:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        summaries.append(json.loads(out))
    assert sorted(shell.lines("ended"), key=int) == MANY.split()
    assert sum(summary["succeeded"] for summary in summaries) == 24
    assert all(summary["succeeded"] for summary in summaries)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_first_signal_lets_commands_end_and_a_next_start_does_the_rest(shell: Shell, number: signal.Signals) -> None:
    (shell.folder / "ids").write_text(MANY)
    command = ("map", "--ids", "ids", "-j", "3", "--", *WAITS)
    process = shell.start(*command)
    shell.until(lambda: len(shell.lines("began")) == 3)
    process.send_signal(number)
    assert process.stderr is not None
    told = ""
    while "finishing what is under way" not in told:
        told += process.stderr.readline()
    (shell.folder / "go").touch()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "goes on where it was" in err
    assert len(shell.lines("began")) == len(shell.lines("ended")) == 3
    assert shell(*command).code == 0
    assert sorted(shell.lines("ended"), key=int) == MANY.split()


def test_a_second_signal_ends_the_commands_and_gives_the_tasks_back(shell: Shell) -> None:
    (shell.folder / "ids").write_text(MANY)
    process = shell.start("map", "--ids", "ids", "-j", "3", "--json", "--", *WAITS)
    shell.until(lambda: len(shell.lines("began")) == 3)
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    told = ""
    while "finishing what is under way" not in told:
        told += process.stderr.readline()
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert json.loads(out)["released"] == 3
    for line in shell.lines("began"):
        pid = int(line.split()[1])
        shell.until(partial(is_gone, pid))
    assert [(task.status, task.attempts) for task in shell.tasks().values()] == [("pending", 0)] * 3
    assert not shell.lines("ended")


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def has_lines(shell: Shell, name: str, count: int) -> bool:
    return len(shell.lines(name)) == count


def test_after_a_kill_the_next_start_takes_over_when_the_leases_end(shell: Shell) -> None:
    (shell.folder / "ids").write_text(MANY)
    command = ("map", "--ids", "ids", "-j", "3", "--lease", "1", "--", *WAITS)
    process = shell.start(*command)
    shell.until(lambda: len(shell.lines("began")) == 3)
    process.kill()
    process.communicate()
    (shell.folder / "go").touch()
    done = shell(*command)
    assert done.code == 0, done.err
    assert shell.counts() == {"succeeded": 24}
    taken_over = shell.tasks()["1"]
    assert taken_over.attempts == 2
    assert taken_over.errors[0].type == "LeaseLostError"


def test_ls_running_tells_who_is_on_what(shell: Shell) -> None:
    process = shell.start("map", "-j", "1", "--", *WAITS, stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write("only\n")
    process.stdin.close()
    process.stdin = None
    shell.until(lambda: shell.lines("began"))
    task_id, worker, _, attempts, _, left, _ = shell("ls", "--running").out.rstrip("\n").split("\t")
    assert (task_id, attempts) == ("only", "1")
    assert f":{process.pid}:" in worker
    assert 0 < float(left) <= 60
    (shell.folder / "go").touch()
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert shell("ls", "--running").out == ""


def test_an_id_is_run_before_the_next_one_arrives(shell: Shell) -> None:
    process = shell.start("map", "-j", "2", "--", "sh", "-c", 'echo "$1" >> ran', "-", stdin=subprocess.PIPE)
    assert process.stdin is not None
    for number in range(3):
        process.stdin.write(f"{number}\n")
        process.stdin.flush()
        shell.until(partial(has_lines, shell, "ran", number + 1))
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_a_signal_ends_the_wait_for_more_ids(shell: Shell) -> None:
    process = shell.start("map", "--", "sh", "-c", 'echo "$1" >> ran', "-", stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write("1\n")
    process.stdin.flush()
    shell.until(lambda: shell.lines("ran"))
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    process.communicate()


def on_a_terminal(shell: Shell, *args: str, answer: bytes = b"") -> tuple[int, str]:
    """The exit status and all that was shown; the answer is typed at the first question."""
    terminal, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "aiotracker", *args],
        cwd=shell.folder,
        env=os.environ | shell.environ | {"TERM": "xterm"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    shown = b""
    while True:
        assert select.select([terminal], [], [], 60)[0], shown.decode()
        try:
            piece = os.read(terminal, 65536)
        except OSError:  # Linux's way to say that nobody writes any more
            break
        if not piece:
            break
        shown += piece
        if answer and b"?" in shown:
            os.write(terminal, answer)
            answer = b""
    os.close(terminal)
    return process.wait(60), shown.decode()


def test_on_a_terminal_there_is_a_bar_with_rate_and_failures(shell: Shell) -> None:
    (shell.folder / "ids").write_text(MANY)
    command = ("--", "sh", "-c", 'sleep 0.05; test "$1" != 7', "-")
    code, shown = on_a_terminal(shell, "map", "--ids", "ids", "-j", "4", "--max-attempts", "1", *command)
    assert code == 1
    for part in ("24/24", "/s", "1 failed", "━", "7 is exhausted: exit code 1", "23 succeeded, 1 exhausted"):
        assert part in shown
    assert "\x1b[?25h" in shown, "the cursor is shown again"


def test_on_a_terminal_a_change_is_shown_and_confirmed(shell: Shell) -> None:
    shell("add", "a", "b")
    code, shown = on_a_terminal(shell, "ignore", "--status", "pending", answer=b"n\n")
    assert (code, "2 tasks would be ignored" in shown, "nothing was changed" in shown) == (1, True, True)
    assert shell.counts() == {"pending": 2}
    code, shown = on_a_terminal(shell, "ignore", "--status", "pending", answer=b"y\n")
    assert (code, "2 ignored" in shown) == (0, True)
    assert shell.counts() == {"ignored": 2}


def test_on_a_terminal_tables_have_heads_and_ids_cannot_move_the_cursor(shell: Shell) -> None:
    shell("add", "ev\x1b[2Jil", "plain")
    code, shown = on_a_terminal(shell, "ls")
    assert code == 0
    assert "status" in shown
    assert "ev\\x1b[2Jil" in shown
    assert "\x1b[2J" not in shown
    shell.environ = {**shell.environ, "NO_COLOR": "1"}
    shell("ignore", "plain", "--yes")
    _, shown = on_a_terminal(shell, "show", "plain")
    assert "ignored" in shown
    assert "\x1b[3" not in shown
