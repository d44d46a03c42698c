from pathlib import Path

import pytest

from aiotracker import SqliteTracker
from aiotracker.testing import ConformanceSuite
from aiotracker.testing.conformance import MakeTracker


class TestSqlite(ConformanceSuite):
    @pytest.fixture
    def make_tracker(self, tmp_path: Path) -> MakeTracker:
        return lambda **options: SqliteTracker(tmp_path / "store.db", **options)

    @pytest.fixture
    def store_url(self, tmp_path: Path) -> str:
        return f"sqlite:{tmp_path / 'store.db'}"
