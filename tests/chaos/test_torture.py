"""Workers that are killed and paused at random, on real stores."""

import random
from pathlib import Path

import pytest

from aiotracker.testing._torture import torture


@pytest.mark.parametrize("scheme", ["file", "folder"])
async def test_every_promise_is_kept_while_workers_are_killed_and_paused(scheme: str, tmp_path: Path) -> None:
    histories = tmp_path / "histories"
    histories.mkdir()
    report = await torture(f"{scheme}:{tmp_path / 'store'}", workers=3, tasks=150, seconds=5, seed=1, folder=histories)
    assert report.ok, str(report)
    assert report.kills > 0
    assert report.events["succeeded"] > 0


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
