"""One command, one child process."""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from aiotracker.cli import command as module
from aiotracker.cli.command import CannotStart, Outcome, OutputError, Runner, Template

from .conftest import refuses_what_is_no_program

Run = Callable[..., Awaitable[Outcome]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    async def run_it(*argv: str, timeout: float | None = None, task_id: str = "an id") -> Outcome:
        async with asyncio.timeout(20):
            return await Runner(tmp_path / "out", timeout).run(list(argv), task_id, attempt=2, fence=77)

    return run_it


def sh(script: str) -> tuple[str, str, str]:
    return "sh", "-c", script


async def until_gone(pid: int) -> None:
    async with asyncio.timeout(10):
        while await asyncio.to_thread(alive, pid):  # noqa: ASYNC110 - the system has no event for this
            await asyncio.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        # A dead one that nobody has buried yet does nothing any more.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("command", "argv"),
    [
        (["gzip", "{}"], ["gzip", "a b;$(c)"]),
        (["cp", "{}", "out/{}.bak"], ["cp", "a b;$(c)", "out/a b;$(c).bak"]),
        (["gzip"], ["gzip", "a b;$(c)"]),
    ],
)
def test_the_id_is_an_argument_whatever_is_in_it(command: list[str], argv: list[str]) -> None:
    assert Template(command).argv("a b;$(c)") == argv


def test_for_a_shell_the_id_is_quoted() -> None:
    assert Template(["wc < {} > {}.n"], shell=True).argv("a'b $(c)") == [
        "/bin/sh",
        "-c",
        "wc < 'a'\"'\"'b $(c)' > 'a'\"'\"'b $(c)'.n",
    ]
    assert Template(["echo hi"], shell=True).argv("x y") == ["/bin/sh", "-c", "echo hi 'x y'"]


async def test_exit_code_output_and_error_are_kept(run: Run) -> None:
    outcome = await run(*sh("echo out; echo err >&2; exit 3"))
    kept = outcome.as_json()
    assert kept.pop("seconds") > 0
    assert kept == {"exit_code": 3, "stdout": "out\n", "stderr": "err\n"}
    assert outcome.problem == "exit code 3: err"


async def test_a_success_is_no_problem(run: Run) -> None:
    assert (await run("true")).problem is None


async def test_a_signal_is_named(run: Run) -> None:
    outcome = await run(*sh("echo last words; kill -KILL $$"))
    assert outcome.exit_code == -signal.SIGKILL
    assert outcome.problem == "killed by SIGKILL: last words"


async def test_the_command_learns_what_it_runs_for_and_has_no_input(run: Run) -> None:
    outcome = await run(*sh('echo "$AIOTRACKER_ID,$AIOTRACKER_ATTEMPT,$AIOTRACKER_FENCE"; cat'))
    assert outcome.stdout.text == "an id,2,77\n"


async def test_bytes_that_are_no_text_are_escaped(run: Run) -> None:
    assert (await run("printf", r"caf\303\251 \377")).stdout.text == "café \\xff"


async def test_long_output_goes_to_a_file_and_its_end_stays(run: Run, tmp_path: Path) -> None:
    outcome = await run(
        *sh("head -c 3000000 /dev/zero | tr '\\0' é; echo; echo the end; echo short >&2"), task_id="a/b"
    )
    kept = outcome.as_json()
    assert kept["stdout"].endswith("\nthe end\n")
    assert len(kept["stdout"].encode(errors="replace")) <= 4 * module.INLINE
    file = Path(kept["stdout_file"]["path"])
    assert file.parent == tmp_path / "out"
    content = await asyncio.to_thread(file.read_bytes)
    assert len(content) == kept["stdout_file"]["bytes"] > 3_000_000
    assert content.endswith(b"\nthe end\n")
    assert kept["stderr"] == "short\n"
    assert "stderr_file" not in kept


async def test_a_character_that_was_cut_is_left_out(run: Run) -> None:
    outcome = await run("printf", "%s", "é" * 5000 + "x")
    assert outcome.stdout.text.strip("éx") == ""


async def test_output_that_cannot_be_written_ends_the_command(run: Run, tmp_path: Path) -> None:
    await asyncio.to_thread((tmp_path / "out").write_text, "a file where a folder should be")
    with pytest.raises(OutputError, match="out/"):
        await run(*sh("yes"))


async def test_after_the_timeout_the_whole_group_is_ended(run: Run, tmp_path: Path) -> None:
    outcome = await run(*sh("sleep 1000 & echo $!; wait"), timeout=0.2)
    assert outcome.timed_out
    assert outcome.exit_code == -signal.SIGTERM
    await until_gone(int(outcome.stdout.text))


async def test_who_does_not_heed_sigterm_is_killed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KILL_AFTER", 0.2)
    outcome = await run(*sh("trap '' TERM; echo $$; while :; do sleep 0.01; done"), timeout=0.2)
    assert outcome.exit_code == -signal.SIGKILL
    await until_gone(int(outcome.stdout.text))


async def test_who_heeds_sigterm_has_time_to_clean_up(run: Run) -> None:
    outcome = await run(*sh("trap 'echo cleaned; exit 5' TERM; echo ready; while :; do sleep 0.01; done"), timeout=0.3)
    assert outcome.timed_out
    assert (outcome.exit_code, outcome.stdout.text) == (5, "ready\ncleaned\n")


@pytest.mark.parametrize("cancels", [1, 2])
async def test_a_cancelled_run_leaves_no_process(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cancels: int
) -> None:
    monkeypatch.setattr(module, "KILL_AFTER", 0.3)
    file = tmp_path / "pids"
    running = asyncio.ensure_future(
        run(*sh(f"trap '' TERM; sleep 1000 & echo $! $$ > {file}.new; mv {file}.new {file}; wait"))
    )
    async with asyncio.timeout(10):
        while not await asyncio.to_thread(file.exists):  # noqa: ASYNC110 - likewise
            await asyncio.sleep(0.01)
    pids = (await asyncio.to_thread(file.read_text)).split()
    running.cancel()
    for _ in range(1, cancels):
        await asyncio.sleep(0.05)
        running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    for pid in pids:
        await until_gone(int(pid))


async def test_a_cancel_while_it_starts_leaves_no_process(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "ran"
    for turns in range(4):
        running = asyncio.ensure_future(run(*sh(f"echo $$ >> {file}; sleep 1000")))
        for _ in range(turns):
            await asyncio.sleep(0)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    text = await asyncio.to_thread(lambda: file.read_text() if file.exists() else "")
    for pid in text.split():
        await until_gone(int(pid))


async def test_what_stays_in_the_background_with_the_output_open_is_not_waited_for(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "DRAIN", 0.2)
    outcome = await run(*sh("sleep 1000 & echo $!"))
    assert outcome.exit_code == 0
    pid = int(outcome.stdout.text)
    assert await asyncio.to_thread(alive, pid)
    os.kill(pid, signal.SIGKILL)


async def test_a_program_that_is_not_there_cannot_be_started(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "file"
    await asyncio.to_thread(file.write_text, "no program")
    with pytest.raises(CannotStart, match="no such command"):
        await run("no-such-command-anywhere")
    with pytest.raises(CannotStart, match="Permission denied"):
        await run(str(file))


@refuses_what_is_no_program
async def test_a_file_that_is_no_program_cannot_be_started(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "file"
    await asyncio.to_thread(file.write_text, "no program")
    await asyncio.to_thread(file.chmod, 0o755)
    with pytest.raises(CannotStart, match="format"):
        await run(str(file))


async def test_descriptors_are_closed(run: Run) -> None:
    await run("true")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        await run(*sh("echo; head -c 20000 /dev/zero"))
        with pytest.raises(CannotStart):
            await run("no-such-command-anywhere")
    assert len(os.listdir("/proc/self/fd")) <= before
