from pathlib import Path
from typing import Any

import pytest

from aiotracker.backends.sqlite import SqliteTracker
from aiotracker.testing import ConformanceSuite
from aiotracker.testing.conformance import MakeTracker


def open_sqlite(path: str, **options: Any) -> SqliteTracker:
    return SqliteTracker(path, **options)


class TestSqlite(ConformanceSuite):
    @pytest.fixture
    def make_tracker(self, tmp_path: Path) -> MakeTracker:
        return lambda **options: SqliteTracker(tmp_path / "store.db", **options)

    @pytest.fixture
    def store_url(self, tmp_path: Path) -> str:
        return f"tests.conformance.test_sqlite:open_sqlite:{tmp_path / 'store.db'}"
