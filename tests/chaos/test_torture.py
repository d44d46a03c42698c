"""Workers that are killed and paused at random, on real stores."""

import asyncio
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from aiotracker import BaseTracker, ConflictError, Lease, Status, StoreUnavailableError, Task
from aiotracker.testing import _torture
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


async def test_a_store_without_a_guard_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Its lost writes keep some tasks from their end.
    monkeypatch.setattr(_torture, "STALL_TIME", 1.0)
    monkeypatch.setattr(_torture, "STALL_LEASES", 0)
    store, histories = tmp_path / "store", tmp_path / "histories"
    store.mkdir()
    histories.mkdir()
    reference = f"{__name__}:Unguarded:{store}"
    report = await torture(reference, workers=3, tasks=60, seconds=1, lease=1.0, folder=histories)
    assert not report.ok
    assert {violation.rule for violation in report.violations} & {"fences grow", "one live lease", "one outcome"}


class Deaf(Unguarded):
    """It answers no worker."""

    async def dump(self, task: Task) -> Task:
        if self.worker.startswith("worker-"):
            raise StoreUnavailableError("nobody is there")
        return await super().dump(task)


class Stuck(Unguarded):
    """It answers each worker that somebody else holds the task."""

    async def load(self, task_id: str) -> Task | None:
        task = await super().load(task_id)
        if task is None or not self.worker.startswith("worker-"):
            return task
        now = self.now()
        lease = Lease("token", "nobody", now, now + timedelta(hours=1), 3600.0)
        return task.replace(status=Status.IN_PROGRESS, lease=lease)

    async def dump(self, task: Task) -> Task:
        if self.worker.startswith("worker-"):
            raise ConflictError("another version is stored", await self.load(task.id), known=True)
        return await super().dump(task)


@pytest.mark.parametrize(
    ("store", "rules"),
    [(Deaf, {"not finished in time"}), (Stuck, {"not finished in time", "nothing is stuck", "crashes count"})],
)
async def test_a_store_that_is_too_slow_is_told_from_one_that_keeps_tasks_stuck(
    store: type[Unguarded], rules: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_torture, "STALL_TIME", 2.0)
    monkeypatch.setattr(_torture, "STALL_LEASES", 0)
    folder, histories = tmp_path / "store", tmp_path / "histories"
    folder.mkdir()
    histories.mkdir()
    reference = f"{__name__}:{store.__name__}:{folder}"
    calm = Rates(kills=0, stops=0, blocks=0, shifts=0, cancels=0)
    report = await torture(reference, workers=1, tasks=3, seconds=0.2, lease=0.6, folder=histories, rates=calm)
    assert {violation.rule for violation in report.violations} == rules, str(report)
    assert (report.slow > 0) == (store is Deaf)


def test_a_slow_store_gets_longer_leases_and_fewer_tasks() -> None:
    def chosen(reference: str, write: float, read: float, **more: Any) -> tuple[float, int]:
        settings = _torture._settings(
            reference,
            "",
            workers=8,
            seconds=60.0,
            seed=1,
            speed=_torture._Speed(write, read),
            **{"tasks": None, "lease": None} | more,
        )
        return settings.lease, settings.tasks

    assert chosen("file:x", 0.002, 0.0001) == (2.0, 2000)
    assert chosen("s3://b", 0.02, 0.01) == (7.7, 600)
    assert chosen("s3+log://b", 0.02, 0.001) == (6.4, 545)
    assert chosen("s3://b", 0.5, 0.5) == (30.0, 100)
    assert chosen("s3://b", 0.5, 0.5, tasks=7, lease=1.5) == (1.5, 7)


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
                seconds=60,
                seed=random.randrange(1_000_000_000),
                folder=histories,
                restart=store.restart,
            )
        )
    print(kind, report.line())
    assert report.ok, str(report)
    assert report.kills >= 200
    assert report.statuses.keys() == {"succeeded", "exhausted"}
