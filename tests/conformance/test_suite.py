"""The suite itself."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from aiotracker.testing import ConformanceSuite

THIRD_PARTY = """
import pytest
from aiotracker import FileTracker
from aiotracker.testing import ConformanceSuite

class TestMine(ConformanceSuite):
    @pytest.fixture
    def make_tracker(self, tmp_path):
        return lambda **options: FileTracker(tmp_path / "store", **options)

    @pytest.fixture
    def store_url(self, tmp_path):
        return f"file:{tmp_path / 'store'}"
"""


def test_no_test_of_the_suite_is_hidden_by_another_of_the_same_name() -> None:
    names = Counter(
        name for part in ConformanceSuite.__mro__ for name, value in vars(part).items() if name.startswith("test_")
    )
    assert [name for name, count in names.items() if count > 1] == []
    assert len(names) > 150


@pytest.mark.parametrize("mode", ["auto", "strict"])
def test_somebody_elses_project_proves_its_backend_with_a_few_lines(tmp_path: Path, mode: str) -> None:
    (tmp_path / "test_mine.py").write_text(THIRD_PARTY)
    (tmp_path / "pytest.ini").write_text(
        f"[pytest]\nasyncio_mode = {mode}\nasyncio_default_fixture_loop_scope = function\nfilterwarnings = error\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", "one_key or call_runs or claimable"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 passed" in done.stdout


def test_a_subclass_that_gives_no_tracker_is_told_what_to_override(tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text(
        "from aiotracker.testing import ConformanceSuite\nclass TestMine(ConformanceSuite): pass\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", "call_runs"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "override the fixture make_tracker" in done.stdout
