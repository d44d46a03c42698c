"""The commands that a newcomer and a build server run."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A clone, as far as make looks at it."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    return tmp_path


def command(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def make(project: Path, target: str, **environ: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(
        ["make", target],
        cwd=project,
        env=clean | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )


def test_without_a_target_make_says_what_there_is(project: Path) -> None:
    done = subprocess.run(["make"], cwd=project, capture_output=True, text=True, timeout=60)
    for target in ("install", "demo", "test", "lint", "bench", "chaos", "clean"):
        assert f"make {target}" in done.stdout


def test_an_old_python3_is_passed_over_for_a_newer_one_beside_it(project: Path, tmp_path: Path) -> None:
    made = "mkdir -p .venv/bin; cp ok .venv/bin/python"
    command(project, "ok", f'echo "$@" >> {tmp_path}/calls')
    command(project, "path/python3", "exit 1")
    command(project, "path/python3.12", f'case "$*" in *venv*) {made};; esac')
    done = make(project, "install", PATH=f"{project / 'path'}:{os.environ['PATH']}")
    assert done.returncode == 0, done.stdout
    assert "--group dev" in (tmp_path / "calls").read_text()


def test_without_a_python_that_is_new_enough_it_says_so(project: Path) -> None:
    for name in ("python3", "python3.11", "python3.12", "python3.13", "python3.14"):
        command(project, f"path/{name}", "exit 1")
    done = make(project, "install", PATH=f"{project / 'path'}:{os.environ['PATH']}")
    assert done.returncode != 0
    assert "Python 3.11 or newer is needed" in done.stdout


def test_an_installation_is_not_repeated_until_its_needs_change(project: Path, tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    command(project, ".venv/bin/python", f"echo call >> {calls}")
    make(project, "install")
    first = calls.read_text()
    make(project, "install")
    assert calls.read_text() == first
    os.utime(project / "pyproject.toml", (2_000_000_000, 2_000_000_000))
    make(project, "install")
    assert len(calls.read_text()) == 2 * len(first)


def test_ci_checks_everything_and_skips_nothing_but_the_long_tests(project: Path) -> None:
    for name in ("python", "ruff", "mypy"):
        command(project, f".venv/bin/{name}", f'echo {name} "$@" with CI=$CI')
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MAKE") and name != "MFLAGS"}
    run = str(project / ".ci" / "run")
    done = subprocess.run([run], env=clean, capture_output=True, text=True, timeout=60, check=True)
    for line in ("ruff check .", "ruff format --check .", "mypy aiotracker tests", "pytest -m not chaos"):
        assert line in done.stdout
    assert done.stdout.rstrip().endswith("with CI=true")
