import pytest

from aiotracker import MemoryTracker
from aiotracker.testing import ConformanceSuite
from aiotracker.testing.conformance import MakeTracker


class TestMemory(ConformanceSuite):
    has_processes = False

    @pytest.fixture
    def make_tracker(self) -> MakeTracker:
        return MemoryTracker().peer
