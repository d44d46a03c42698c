"""Many changes at once: in windows, so that they share commits, and never all of them are under way."""

import asyncio
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable
from datetime import datetime
from typing import Any, Final

from ._core.task import Task
from ._core.transitions import Rule
from .errors import InvalidValueError

__all__ = ["WINDOW", "Witness", "in_windows"]

WINDOW: Final = 1000  # updates that are under way at once


async def in_windows(
    items: Iterable[Any] | AsyncIterable[Any], change: Callable[[Any], Awaitable[bool]]
) -> AsyncIterator[bool]:
    """Applies `change` to all items, many at once but never all, so that they share commits."""
    waiting: deque[asyncio.Task[bool]] = deque()
    try:
        async for item in _each(items):
            waiting.append(asyncio.ensure_future(change(item)))
            if len(waiting) >= WINDOW:
                while len(waiting) > WINDOW // 2:
                    yield await waiting.popleft()
        while waiting:
            yield await waiting.popleft()
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def _each(items: Iterable[Any] | AsyncIterable[Any]) -> AsyncIterator[Any]:
    if isinstance(items, str):
        raise InvalidValueError(f"takes an iterable of ids, and {items!r} is one str; put it in a list")
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item


class Witness:
    """A rule that says whether it changed something when it was last applied."""

    def __init__(self, rule: Rule) -> None:
        self._rule = rule
        self.is_made = False

    def __call__(self, task: Task | None, now: datetime) -> Task | None:
        new = self._rule(task, now)
        self.is_made = new is not task
        return new
