import asyncio
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from aiotracker import FileTracker, GiveUp, Retry, RunningTask
from tests.conftest import require

from .conftest import PROGRAMS


async def night(tracker: FileTracker) -> None:
    """Some rows cannot be read, a file is missing, a bank does not answer, and one customer is not done yet."""
    wrong = {f"customer/{number}": ValueError(f"no number in row {number}") for number in (3, 5, 7)}
    errors = wrong | {"customer/8": KeyError("file"), "customer/9": GiveUp("the bank has closed the account")}

    async def load(task: RunningTask) -> None:
        await task.step("fetch", asyncio.sleep, 0)
        if task.id in errors:
            raise errors[task.id]
        task.result = "loaded"

    await tracker.work(load, ids=[f"customer/{number}" for number in range(10)], retry=Retry(1))
    for kind in (OSError, OSError, TimeoutError):
        try:
            async with tracker.run(f"customer/{kind.__name__}/{os.urandom(2).hex()}"):
                raise kind("the bank does not answer")
        except kind:
            pass
    await tracker.add("customer/10")


async def test_the_mornings_questions_are_answered_by_the_command_line_alone(tmp_path: Path) -> None:
    require(find_spec("duckdb"), "duckdb is not installed")
    for name in ("one.py", "deep/two.py"):
        path = tmp_path / name
        await asyncio.to_thread(path.parent.mkdir, exist_ok=True)
        await asyncio.to_thread(path.write_text, "print(1)\n")
    environ = {name: value for name, value in os.environ.items() if not name.startswith("AIOTRACKER_")}
    environ["STORE"] = f"file:{tmp_path / 'state'}"
    environ["PATH"] = f"{Path(sys.executable).parent}:{environ['PATH']}"
    async with FileTracker(tmp_path / "state", worker="night-1") as tracker:
        await night(tracker)
        async with tracker.run("customer/11", lease=600) as task:
            task.note = "row 40 of 100"
            await task.save()
            done = await asyncio.to_thread(
                subprocess.run,
                ["bash", str(PROGRAMS / "operator.sh")],
                cwd=tmp_path,
                env=environ,
                capture_output=True,
                text=True,
                timeout=300,
            )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    out = done.stdout
    assert "exhausted\t5\n" in out, "count"
    running = next(line.split("\t") for line in out.splitlines() if line.startswith("customer/11\t"))
    assert running[1] == "night-1"
    assert running[-1] == "row 40 of 100"
    assert "3\t3\t" in out, "errors: one cause of three tasks"
    assert "fetch" in out, "show: its steps"
    assert "Traceback (most recent call last):" in out
    assert "3 tasks would be reset:" in out
    assert "3 reset" in out
    assert "OSError\t2\nTimeoutError\t1\n" in out, "sql"
    assert "15 tasks written to tasks.parquet" in out
    assert (tmp_path / "tasks.parquet").exists()
    assert "2 succeeded" in done.stderr, "map"
