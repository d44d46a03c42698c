from pathlib import Path

import pytest

from aiotracker import FileTracker
from aiotracker.testing import ConformanceSuite
from aiotracker.testing.conformance import MakeTracker


class TestFile(ConformanceSuite):
    @pytest.fixture
    def make_tracker(self, tmp_path: Path) -> MakeTracker:
        return lambda **options: FileTracker(tmp_path / "store", **options)

    @pytest.fixture
    def store_url(self, tmp_path: Path) -> str:
        return f"file:{tmp_path / 'store'}"
