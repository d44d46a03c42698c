"""A remedy is taken out in a copy of the source, and whatever should miss it is run there."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from .mutations import SIMULATION, Mutation

__all__ = ["ROOT", "apply", "copy_source", "run", "run_tests"]

ROOT: Final = Path(__file__).parents[2]
SEEDS: Final = 1000
TIME: Final = 300.0  # seconds for one remedy


def copy_source(folder: Path) -> None:
    """What the tests of the log need."""
    without = shutil.ignore_patterns("__pycache__", ".*")
    for name in ("aiotracker", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=without)
    shutil.copy(ROOT / "pyproject.toml", folder)


def apply(mutation: Mutation, source: str) -> str:
    """The source without the remedy.

    Raises:
        ValueError: What is to be edited does not stand there once.
    """
    for old, new in mutation.edits.items():
        if source.count(old) != 1:
            raise ValueError(f"{mutation.path} has {source.count(old)} times what {mutation.what!r} edits: {old!r}")
        source = source.replace(old, new)
    return source


def run_tests(folder: Path, names: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    """Runs tests of a copy on the copy."""
    return _python(folder, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *names)


def run(mutation: Mutation, folder: Path) -> tuple[bool, str]:
    """Takes a remedy out of a copy, runs what should miss it, and puts it back.

    Returns:
        Whether it was missed, and what was told.
    """
    path = folder / "aiotracker" / mutation.path
    source = path.read_text()
    path.write_text(apply(mutation, source))
    try:
        if mutation.found_by == SIMULATION:
            done = _python(folder, "-m", "tests.simulation", "--seeds", str(SEEDS), "--stop")
            is_found = re.search(r"^seed \d+: ", done.stdout, re.MULTILINE) is not None
        else:
            done = run_tests(folder, [mutation.found_by])
            is_found = done.returncode == 1 and " failed" in done.stdout  # others are errors of pytest, or no test
        return is_found, done.stdout + done.stderr
    finally:
        path.write_text(source)


def _python(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    # Two sources of one size and one second would share their bytecode.
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIME)
