"""A backend that somebody writes in a quarter of an hour: `load` and `dump`, and everything but queries works."""

from typing import Any

import pytest

from aiotracker import BaseTracker, ConflictError, RecordTooLargeError, Task
from aiotracker.testing import ConformanceSuite
from aiotracker.testing.conformance import MakeTracker


class DictTracker(BaseTracker):
    def __init__(self, store: dict[str, bytes], **options: Any) -> None:
        super().__init__(**options)
        self.store = store

    async def load(self, task_id: str) -> Task | None:
        raw = self.store.get(task_id)
        if raw is None:
            return None
        task = Task.decode(raw)
        return task.replace(version=task.write_id)

    async def dump(self, task: Task) -> Task:
        current = await self.load(task.id)
        if (current.version if current else None) != task.version:
            raise ConflictError(f"{task.id!r} was changed by somebody else", current, known=True)
        raw = task.encode()
        if len(raw) > self.max_record_bytes:
            raise RecordTooLargeError(f"{task.id!r} is too large", task.id, len(raw), self.max_record_bytes)
        self.store[task.id] = raw
        return task.replace(version=task.write_id)


class TestDict(ConformanceSuite):
    has_scan = has_delete = has_processes = False

    @pytest.fixture
    def make_tracker(self) -> MakeTracker:
        store: dict[str, bytes] = {}
        return lambda **options: DictTracker(store, **options)
