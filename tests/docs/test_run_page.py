"""What runs the examples says so when one of them is wrong."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .run_page import Block, blocks

ROOT = Path(__file__).parents[2]


def block(language: str, text: str, before: str = "") -> str:
    return f"{before}\n```{language}\n{text}\n```\n"


def only(page: str) -> Block:
    found = list(blocks(page))
    assert len(found) == 1
    return found[0]


def test_a_block_that_is_not_run_does_not_stop_later_ones() -> None:
    page = block("console", "$ false", "<!-- not run: it would fail -->") + block(
        "console", "$ true", "<!-- needs: sh -->"
    )
    assert [found.is_skipped for found in blocks(page)] == [True, False]


def test_a_block_that_needs_what_is_missing_is_left_out() -> None:
    assert only(block("console", "$ true", "<!-- needs: no-such-program -->")).is_skipped
    assert not only(block("console", "$ true", "<!-- needs: sh -->")).is_skipped


@pytest.mark.parametrize(
    "wrong",
    [
        block("console", "$ echo one\ntwo"),
        block("console", "$ aiotracker count --store nothing:at-all"),
    ],
    ids=["output", "status"],
)
def test_an_example_that_is_wrong_is_told(wrong: str, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(wrong)
    done = subprocess.run(
        [sys.executable, "-m", f"{__package__}.run_page", "page.md"],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "AssertionError" in done.stdout


def test_the_command_line_of_a_page_is_the_real_one(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        block("console", "$ echo one | aiotracker add --store file:state --data '{\"n\": 1}'\n...")
        + block("console", "$ export AIOTRACKER_STORE=file:state; aiotracker ls --ids\none")
        + block("console", "$ aiotracker show two --store file:state\n...\n[exit status 1]")
    )
    subprocess.run(
        [sys.executable, "-m", f"{__package__}.run_page", str(page)],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)},
        check=True,
        timeout=120,
    )


def test_what_a_page_leaves_running_is_ended(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(block("console", "$ (sleep 600 >/dev/null 2>&1 & echo $! >pid)") + block("console", "$ false"))
    done = subprocess.run(
        [sys.executable, "-m", f"{__package__}.run_page", str(page)],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    assert "exit status 1, not 0" in done.stderr
    pid = int((tmp_path / "pid").read_text())
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.01)
    raise AssertionError("it goes on")
