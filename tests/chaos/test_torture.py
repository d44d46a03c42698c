"""Workers that are killed and paused at random, on real stores."""

import asyncio
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from aiotracker import BaseTracker, Task
from aiotracker.testing._torture import Rates, Report, torture

from .stores import KINDS, LOCAL, Store, a_store


# Several at once: most of the time they wait for leases that run out. The servers of the others are too slow here.
@pytest.mark.parametrize("kinds", [LOCAL, ("postgres", "redis")])
def test_every_promise_is_kept_while_everything_bad_happens(kinds: Sequence[str], tmp_path: Path) -> None:
    with ExitStack() as stack:
        folders = [tmp_path / kind.partition(" ")[0] for kind in kinds]
        for folder in folders:
            folder.joinpath("histories").mkdir(parents=True)
        stores = [stack.enter_context(a_store(kind, folder)) for kind, folder in zip(kinds, folders, strict=True)]
        with ThreadPoolExecutor(len(kinds)) as threads:
            tortures = [
                threads.submit(_short, store, folder / "histories")
                for store, folder in zip(stores, folders, strict=True)
            ]
            reports = [one.result() for one in tortures]
    for report in reports:
        assert report.ok, str(report)
        assert report.kills > 0
        assert report.statuses == {"succeeded": report.tasks - 1, "exhausted": 1}


def _short(store: Store, histories: Path) -> Report:
    return asyncio.run(
        torture(
            store.reference,
            workers=3,
            tasks=40,
            seconds=2.5,
            seed=1,
            folder=histories,
            rates=Rates(kills=3, blocks=0.6, shifts=2, cuts=1, restarts=0.5),
            restart=store.restart,
            lease=1.0,
        )
    )


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
@pytest.mark.parametrize("kind", KINDS)
def test_every_promise_is_kept_for_a_minute_of_five_kills_a_second(kind: str, tmp_path: Path) -> None:
    histories = tmp_path / "histories"
    histories.mkdir()
    with a_store(kind, tmp_path) as store:
        report = asyncio.run(
            torture(
                store.reference,
                workers=8,
                tasks=1500 if kind in (*LOCAL, "postgres", "redis") else 150,
                seconds=60,
                seed=random.randrange(1_000_000_000),
                folder=histories,
                restart=store.restart,
                lease=2.0 if kind in (*LOCAL, "postgres", "redis") else 8.0,
            )
        )
    print(kind, report.line())
    assert report.ok, str(report)
    assert report.kills >= 200
    assert report.statuses.keys() == {"succeeded", "exhausted"}
