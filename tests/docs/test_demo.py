"""The demo is the first thing that a newcomer runs."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_demo_is_killed_and_still_records_each_outcome_once(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "demo.py"), "--files", "500"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout
    assert "killed (SIGKILL)" in done.stdout
    assert "tasks with exactly one outcome: 500 of 500" in done.stdout
    assert (tmp_path / "demo-store" / "store.json").exists()
