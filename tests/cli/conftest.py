"""The command line, in this process and as one of its own."""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from aiotracker import FileTracker, Task
from aiotracker.cli.app import app
from aiotracker.cli.remembered import RESERVED

# By libuv, which starts programs as execvp does.
refuses_what_is_no_program = pytest.mark.skipif(
    os.environ.get("AIOTRACKER_TEST_LOOP") == "uvloop", reason="uvloop has /bin/sh run a file without a format"
)


class Answer:
    """What a command printed, and its exit status."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def rows(self) -> list[list[str]]:
        return [line.split("\t") for line in self.out.splitlines()]

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Shell:
    """Runs `aiotracker` in a folder of its own, on a store of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = folder / "store"
        self.environ: Mapping[str, str] = {"AIOTRACKER_STORE": "file:store", "COLUMNS": "100"}

    def __call__(self, *args: str, ids: str | None = None) -> Answer:
        """Runs a command here; ids go into a file for `map`, since there is no standard input."""
        if ids is not None:
            (self.folder / "given").write_bytes(ids.encode("utf-8", "surrogateescape"))
            args = (args[0], "--ids", "given", *args[1:])
        result = CliRunner().invoke(app, args, env=self.environ)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Answer(result.exit_code, result.stdout, result.stderr)

    def start(self, *args: str, **options: Any) -> subprocess.Popen[str]:
        """Starts a command as a process of its own."""
        return subprocess.Popen(
            [sys.executable, "-m", "aiotracker", *args],
            cwd=self.folder,
            env=os.environ | self.environ,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            **options,
        )

    def process(self, *args: str, ids: str = "") -> Answer:
        """Runs a command as a process of its own, with ids on its standard input."""
        process = self.start(*args, stdin=subprocess.PIPE)
        out, err = process.communicate(ids, timeout=60)
        return Answer(process.returncode, out, err)

    def lines(self, name: str) -> list[str]:
        """Of a file in the folder, which may not be there yet."""
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []

    def tasks(self) -> dict[str, Task]:
        """All tasks of the store."""

        async def read() -> dict[str, Task]:
            async with FileTracker(str(self.store), read_only=True) as tracker:
                return {task.id: task async for task in tracker.find() if task.id != RESERVED}

        return asyncio.run(read())

    def counts(self) -> Counter[str]:
        """How many there are, by status."""
        return Counter(str(task.status) for task in self.tasks().values())

    def until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 30
        while not condition():
            if time.monotonic() > deadline:
                pytest.fail("waited for 30 s")
            time.sleep(0.01)


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shell:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Shell(tmp_path)
