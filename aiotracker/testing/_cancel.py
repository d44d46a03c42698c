"""Runs a coroutine and cancels it where it waits, at a chosen one of its waits."""

import asyncio
import types
from collections.abc import Callable, Coroutine, Generator
from typing import Any

__all__ = ["Waits"]


class Waits:
    """Counts the waits (suspensions) of a coroutine, and acts at chosen ones.

    Args:
        at: At which waits to act, from 1.
        act: What to do there; by default the asyncio task that awaits is cancelled.
        late: Act when what is waited for has come, just before the coroutine learns of it.

    Attributes:
        count: How many waits there were.
        acted: How many times it acted.
    """

    def __init__(self, *at: int, act: Callable[[], object] | None = None, late: bool = False) -> None:
        self.count = 0
        self.acted = 0
        self._at = at
        self._act = act
        self._late = late

    @types.coroutine
    def watch(self, coroutine: Coroutine[Any, Any, Any]) -> Generator[Any, Any, Any]:
        """Awaits the coroutine, in the same asyncio task."""
        send, value = coroutine.send, None
        while True:
            try:
                waited_for = send(value)
            except StopIteration as stop:
                return stop.value
            self._suspended(waited_for)
            try:
                send, value = coroutine.send, (yield waited_for)
            except BaseException as exc:
                send, value = coroutine.throw, exc

    def _suspended(self, waited_for: object) -> None:
        self.count += 1
        if self.count not in self._at:
            return
        task = asyncio.current_task()
        assert task is not None

        def act() -> None:
            self.acted += 1
            (self._act or task.cancel)()

        if self._late and isinstance(waited_for, asyncio.Future) and not waited_for.done():
            # Added before the task adds its own: runs when the answer is there and the task does not know it yet.
            waited_for.add_done_callback(lambda _: act())
        else:
            asyncio.get_running_loop().call_soon(act)
