"""Seen: a hook that keeps what it is told."""

import asyncio
from collections.abc import Callable

import pytest

from aiotracker import Event, RunningTask


class Seen(list[Event]):
    """All events so far."""

    def __call__(self, event: Event) -> None:
        self.append(event)

    @property
    def names(self) -> list[str]:
        """Of their kinds, in order; without those that come by time."""
        return [type(event).__name__ for event in self if type(event).__name__ != "LoopLagged"]

    def of(self, kind: type) -> list[Event]:
        return [event for event in self if isinstance(event, kind)]


@pytest.fixture
def seen() -> Seen:
    return Seen()


async def until(condition: Callable[[], object]) -> None:
    """Gives the event loop turns until something is so."""
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - what is waited for sets no event
            await asyncio.sleep(0)


# Bodies and steps.


async def one() -> int:
    return 1


async def broken() -> int:
    raise ValueError("broken")


async def fail(task: RunningTask) -> None:
    raise ValueError("broken")


async def be_cancelled(task: RunningTask) -> None:
    me = asyncio.current_task()
    assert me is not None
    me.cancel()
    await asyncio.sleep(0)
