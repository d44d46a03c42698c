"""The suite against whatever store the command line names. Collected by `python -m aiotracker.testing check`."""

import re
from typing import Any

import pytest

from . import ConformanceSuite
from ._stores import another_store, open_store

__all__ = ["Target", "TestStore"]


class Target:
    """The plugin that tells the suite which store is meant."""

    def __init__(self, url: str, *, has_scan: bool, has_delete: bool, has_processes: bool) -> None:
        self.url = url
        self._numbers: dict[str, int] = {}
        TestStore.has_scan, TestStore.has_delete, TestStore.has_processes = has_scan, has_delete, has_processes

    def pytest_configure(self, config: pytest.Config) -> None:
        config.stash[_target] = self


_target = pytest.StashKey[Target]()


class TestStore(ConformanceSuite):
    """Each test has a store of its own, named after it."""

    @pytest.fixture
    def store_url(self, request: pytest.FixtureRequest) -> str:
        target = request.config.stash[_target]
        name = re.sub(r"\W+", "-", request.node.name)[:60]
        number = target._numbers[name] = target._numbers.get(name, 0) + 1
        return another_store(target.url, f"{name}-{number}")

    @pytest.fixture
    def make_tracker(self, store_url: str) -> Any:
        if store_url.startswith("memory:"):
            from ..backends.memory import MemoryTracker

            return MemoryTracker().peer
        return lambda **options: open_store(store_url, **options)
