import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from aiotracker import Status, Task, open_tracker

NIGHT = "2026-01-31"
CUSTOMERS = ["acme", "bolt", "coil"]


@pytest.mark.parametrize("scheme", ["file", "folder"])
async def test_a_night_with_broken_rows_is_resumed_at_the_failed_step_with_the_mended_parser(
    load_program: Callable[[str], ModuleType],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    scheme: str,
) -> None:
    program = load_program("nightly_pipeline")
    store, inbox = f"{scheme}:{tmp_path / 'store'}", tmp_path / "inbox"
    inbox.mkdir()
    for customer in CUSTOMERS:
        rows = [{"value": "17"}, {"value": "n/a" if customer == "bolt" else "4"}]
        (inbox / f"{customer}.json").write_text(json.dumps(rows))

    assert await program.main(store, inbox, NIGHT, CUSTOMERS) == 1
    out = capsys.readouterr().out
    assert out.startswith(f"{NIGHT}/bolt failed in ['parse'] invalid literal for int()")
    before = await _load(store, "bolt")
    assert (before.status, before.attempts) == (Status.EXHAUSTED, 2)
    assert [(step.name, step.status, step.attempts) for step in before.steps] == [
        ("fetch", Status.SUCCEEDED, 1),
        ("parse", Status.FAILED, 2),
    ]

    await program.morning(store, inbox, NIGHT)
    assert capsys.readouterr().out == "1 to be run again\n"

    def mended(path: str) -> list[dict[str, int]]:
        rows = json.loads(Path(path).read_text())
        return [{"value": int(row["value"])} for row in rows if row["value"].isdigit()]

    monkeypatch.setattr(program, "parse", mended)
    assert await program.main(store, inbox, NIGHT, CUSTOMERS) == 0
    after = await _load(store, "bolt")
    assert (after.status, after.result, after.progress) == (Status.SUCCEEDED, 17, 0.9)
    assert after.steps[0] == before.steps[0], "it was not fetched again"
    assert [(step.name, step.status, step.attempts) for step in after.steps[1:]] == [
        ("parse", Status.SUCCEEDED, 1),
        ("load", Status.SUCCEEDED, 1),
    ]
    assert (await _load(store, "acme")).result == 21


async def test_a_second_run_of_the_same_night_does_nothing_again(
    load_program: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    program = load_program("nightly_pipeline")
    (tmp_path / "acme.json").write_text('[{"value": 1}]')
    store = f"file:{tmp_path / 'store'}"
    assert await program.main(store, tmp_path, NIGHT, ["acme"]) == 0
    before = await _load(store, "acme")
    assert await program.main(store, tmp_path, NIGHT, ["acme"]) == 0
    assert await _load(store, "acme") == before


async def _load(store: str, customer: str) -> Task:
    async with open_tracker(store, read_only=True) as tracker:
        task = await tracker.load(f"{NIGHT}/{customer}")
    assert task is not None
    return task
