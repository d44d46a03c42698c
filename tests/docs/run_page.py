"""Runs the examples of one Markdown page, from the top down, in the working directory:
`PYTHONPATH=ROOT python -m tests.docs.run_page PAGE`.

* `python` blocks go on from each other, in one namespace, and may `await` at the top level as in `python -m asyncio`.
  A block that defines tests is run by pytest instead, as a file of its own; `<!-- pytest: -k word -->` before it
  gives more arguments.
* `console` blocks: each `$ command` is run by a shell. The lines below it are its output, where `...` stands for
  anything; a command without such lines may print what it likes. It must succeed, unless its output is shown
  and ends in `[exit status N]`.
* A comment `<!-- not run: why -->` before a block leaves it out; `<!-- needs: jq -->` does where there is no `jq`.
* `python` blocks that begin with `# name.py` are also saved as that file, for the commands that follow; a block that
  has `if __name__ == "__main__":`, or `<!-- saved only: why -->` before it, is saved only.
"""

import ast
import asyncio
import inspect
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from .spare import command_line

_FENCE = re.compile(r"^```(?P<language>\S*)[^\n]*\n(?P<text>.*?)^```\s*$", re.MULTILINE | re.DOTALL)
_NEEDS = re.compile(r"<!-- needs: (\S+) -->\s*\Z")
_PYTEST = re.compile(r"<!-- pytest: ([^>]+?) -->\s*\Z")
# Of one comment alone: an earlier one must not reach over everything to the end of a later one.
_NOT_RUN = re.compile(r"<!-- not run: (?:(?!-->).)+-->\s*\Z", re.DOTALL)
_SAVED = re.compile(r"<!-- saved only: (?:(?!-->).)+-->\s*\Z", re.DOTALL)
_FILE_NAME = re.compile(r"# (\S+\.py)\n")
_EXIT_STATUS = re.compile(r"\n?\[exit status (\d+)\]\n?\Z")


class Block(NamedTuple):
    """One fenced block of a page."""

    language: str
    text: str
    line: int  # of the fence
    is_skipped: bool
    pytest: list[str]  # arguments
    is_saved_only: bool


def blocks(text: str) -> Iterator[Block]:
    """All fenced blocks, in order."""
    for found in _FENCE.finditer(text):
        before = text[: found.start()]
        why = _NOT_RUN.search(before)
        needs = _NEEDS.search(before)
        skipped = why is not None or (needs is not None and shutil.which(needs[1]) is None)
        more = _PYTEST.search(before)
        arguments = [] if more is None else shlex.split(more[1])
        saved_only = _SAVED.search(before) is not None or '__name__ == "__main__"' in found["text"]
        yield Block(found["language"], found["text"], before.count("\n") + 1, skipped, arguments, saved_only)


def run(page: Path) -> None:
    """Runs all that is to be run.

    Raises:
        AssertionError: A command did not do what the page says.
    """
    namespace: dict[str, Any] = {"__name__": "__page__"}
    found = list(blocks(page.read_text()))
    with ExitStack() as stack:
        if any("aiotracker " in block.text for block in found if block.language == "console"):
            folder = stack.enter_context(command_line())
            os.environ["PATH"] = f"{folder}:{os.environ['PATH']}"
        runner = stack.enter_context(asyncio.Runner())
        for block in found:
            if block.is_skipped:
                continue
            if block.language == "python":
                _run_python(page, block, namespace, runner)
            elif block.language == "console":
                for command, expected in _commands(block.text):
                    _run_command(page, block, command, expected)


def _run_python(page: Path, block: Block, namespace: dict[str, Any], runner: asyncio.Runner) -> None:
    name = _FILE_NAME.match(block.text)
    if name is not None:
        Path(name[1]).write_text(block.text)
    if re.search(r"^(async )?def test_|^class Test", block.text, re.MULTILINE):
        path = Path(f"test_line_{block.line}.py")
        path.write_text(block.text)
        arguments = [
            "-q",
            "-o",
            "asyncio_mode=auto",
            "-o",
            "asyncio_default_fixture_loop_scope=function",
            "-p",
            "no:cacheprovider",
            "-p",
            "pytest_asyncio.plugin",
            "-W",
            "error",
            str(path),
        ]
        # Other plugins take longer to load than the tests to run.
        environ = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        subprocess.run(
            [sys.executable, "-m", "pytest", *arguments, *block.pytest], check=True, timeout=120, env=environ
        )
        return
    if name is not None and block.is_saved_only:
        return
    # Line numbers of tracebacks are those of the page.
    code = compile(
        "\n" * block.line + block.text, str(page), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True
    )
    result = eval(code, namespace)
    if inspect.iscoroutine(result):
        runner.run(result)


def _commands(text: str) -> Iterator[tuple[str, str | None]]:
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, output = part.partition("\n")
        while command.endswith("\\"):
            more, _, output = output.partition("\n")
            command = f"{command[:-1]} {more.removeprefix('> ')}"
        yield re.sub(r"\s+# .*$", "", command), output if output.strip() else None


def _run_command(page: Path, block: Block, command: str, expected: str | None) -> None:
    done = subprocess.run(
        command,
        shell=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        env=os.environ | {"COLUMNS": "120"},
    )
    where = f"{page.name}, the block at line {block.line}: $ {command}\n{done.stdout}"
    status = 0
    if expected is not None:
        shown = _EXIT_STATUS.search(expected)
        if shown is not None:
            status, expected = int(shown[1]), expected[: shown.start()]
        pattern = r"\s*\n".join(
            ".*".join(map(re.escape, line.rstrip().split("..."))) if line.strip() != "..." else ".*"
            for line in expected.strip().splitlines()
        )
        assert re.fullmatch(pattern, done.stdout.strip(), re.DOTALL), (
            f"{where}\nis not what the page shows:\n{expected}"
        )
    assert done.returncode == status, f"{where}\nexit status {done.returncode}, not {status}"


if __name__ == "__main__":
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    os.environ.pop("PYTHONPATH", None)  # it was for this module
    os.setpgrp()
    try:
        run(Path(sys.argv[1]))
    finally:
        # What a page has started in the background ends with it, also where the page failed before it came to that.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.killpg(0, signal.SIGTERM)
