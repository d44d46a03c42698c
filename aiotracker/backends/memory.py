"""MemoryTracker: a store in this process, for tests and for trying things out."""

import asyncio
import threading
from typing import Any, Self

from typing_extensions import TypeVar, Unpack

from ..errors import StoreError
from ..tracker import Options
from ._log import Index, LogTracker, Wanted

__all__ = ["MemoryTracker"]

D = TypeVar("D", default=Any)
R = TypeVar("R", default=Any)


class MemoryTracker(LogTracker[D, R]):
    """Keeps tasks in memory: nothing outlives the process. Otherwise a store like the others.

    Nothing here ever waits: a claim or an end never gives the event loop a turn.

    Args:
        **options: As for `BaseTracker`.
    """

    def __init__(self, **options: Unpack[Options[D, R]]) -> None:
        super().__init__(**options)
        self._options = options
        self._index = Index()
        self._mutex = threading.Lock()

    def peer(self, **options: Unpack[Options[D, R]]) -> Self:
        """Another worker on the same store, with the same options but for those given; open it like any tracker."""
        peer = type(self)(**(self._options | options))
        peer._index, peer._mutex = self._index, self._mutex
        return peer

    def submit(self, want: Wanted) -> "asyncio.Future[Any]":
        loop = asyncio.get_running_loop()
        answer = loop.create_future()
        if self._stack is None:
            answer.set_exception(StoreError("this MemoryTracker is not open; use `async with`, or await open()"))
            return answer
        if loop is not self.loop:
            raise RuntimeError("a tracker is used on the event loop that opened it")
        with self._mutex:
            self._index.apply(self._index.batch([want], self.now(), self.max_record_bytes))
            self._index.look([want])
        if want.error is not None:
            answer.set_exception(want.error)
        else:
            answer.set_result(want.answer)
        return answer
