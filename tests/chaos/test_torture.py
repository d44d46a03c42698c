"""Workers that are killed and paused at random, on real stores."""

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from aiotracker import BaseTracker, Task
from aiotracker.testing._torture import torture


@pytest.mark.parametrize("scheme", ["file", "folder"])
async def test_every_promise_is_kept_while_workers_are_killed_and_paused(scheme: str, tmp_path: Path) -> None:
    histories = tmp_path / "histories"
    histories.mkdir()
    report = await torture(f"{scheme}:{tmp_path / 'store'}", workers=3, tasks=150, seconds=5, seed=1, folder=histories)
    assert report.ok, str(report)
    assert report.kills > 0
    assert report.events["succeeded"] > 0


class Unguarded(BaseTracker):
    """A store that anybody would write first: it does not compare versions."""

    def __init__(self, folder: str, **options: Any) -> None:
        super().__init__(**options)
        self.folder = Path(folder)

    async def load(self, task_id: str) -> Task | None:
        return await asyncio.to_thread(self._load, task_id)

    def _load(self, task_id: str) -> Task | None:
        path = self.folder / task_id
        return Task.decode(path.read_bytes(), version="1") if path.exists() else None

    async def dump(self, task: Task) -> Task:
        await asyncio.to_thread(self._dump, task)
        return task.replace(version="1")

    def _dump(self, task: Task) -> None:
        new = self.folder / f"{task.id}.{task.write_id}"
        new.write_bytes(task.encode())
        new.replace(self.folder / task.id)


async def test_a_store_without_a_guard_is_found_out(tmp_path: Path) -> None:
    store, histories = tmp_path / "store", tmp_path / "histories"
    store.mkdir()
    histories.mkdir()
    reference = f"{__name__}:Unguarded:{store}"
    report = await torture(reference, workers=3, tasks=60, seconds=3, folder=histories)
    assert not report.ok
    assert {violation.rule for violation in report.violations} & {"fences grow", "one live lease", "one outcome"}


@pytest.mark.chaos
@pytest.mark.parametrize("scheme", ["file", "folder"])
async def test_every_promise_is_kept_for_longer(scheme: str, tmp_path: Path) -> None:
    seed = random.randrange(1_000_000)
    histories = tmp_path / "histories"
    histories.mkdir()
    report = await torture(
        f"{scheme}:{tmp_path / 'store'}", workers=6, tasks=4000, seconds=90, seed=seed, folder=histories
    )
    assert report.ok, f"seed {seed}: {report}"
