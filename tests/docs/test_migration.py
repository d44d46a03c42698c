"""The page about pynamodb_mate, on a table that pynamodb_mate has written to."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aiotracker import MemoryTracker, TaskExhaustedError, TaskSucceededError

from .run_page import blocks

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "migrate-from-pynamodb-mate.md"


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The names of the page's first and last program, after the first has run."""
    pytest.importorskip("pynamodb_mate", reason="pynamodb_mate is not installed")
    from moto import mock_aws

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    programs = [block.text for block in blocks(PAGE.read_text()) if block.language == "python"]
    model, _, run = programs[0].partition("\nTask.make_and_save")
    names: dict[str, Any] = {"__name__": "page"}
    with mock_aws():
        exec(model, names)
        names["Task"].Meta.billing_mode = "PAY_PER_REQUEST"
        names["Task"].create_table(wait=True)
        exec("Task.make_and_save" + run, names)
        old_table = names["Task"]
        exec(programs[-1], names)
        yield SimpleNamespace(old=old_table, **names)


@pytest.mark.filterwarnings("ignore:datetime.datetime.utcnow:DeprecationWarning")
def test_what_pynamodb_mate_knew_is_there_afterwards(page: Any) -> None:
    old = page.old
    old.make_and_save(task_id="new", data={"country": "FR"})
    old.make_and_save(task_id="broken")
    for _ in range(3):
        with pytest.raises(ValueError, match="no rows"), old.start(task_id="broken"):
            raise ValueError("no rows")

    async def migrate() -> None:
        async with MemoryTracker() as tracker:
            assert await page.migrate(old, tracker) == 3
            assert await page.migrate(old, tracker) == 3  # again: the same are there

            with pytest.raises(TaskSucceededError) as done:
                async with tracker.run("order-17"):
                    pass
            assert done.value.task.data == {"country": "DE", "rows": 3}
            with pytest.raises(TaskExhaustedError) as failed:
                async with tracker.run("broken"):
                    pass
            assert [error.type for error in failed.value.task.errors] == ["ValueError"] * 3
            assert "no rows" in failed.value.task.errors[-1].message
            async with tracker.run("new") as task:
                assert task.data == {"country": "FR"}

    asyncio.run(migrate())
