from pathlib import Path

import pytest

from aiotracker import FolderTracker
from aiotracker.testing import ConformanceSuite
from aiotracker.testing.conformance import MakeTracker


class TestFolder(ConformanceSuite):
    @pytest.fixture
    def make_tracker(self, tmp_path: Path) -> MakeTracker:
        return lambda **options: FolderTracker(tmp_path / "store", **options)

    @pytest.fixture
    def store_url(self, tmp_path: Path) -> str:
        return f"folder:{tmp_path / 'store'}"
