"""Time under control."""

import asyncio
import heapq
import itertools
from datetime import UTC, datetime, timedelta

from .._core.task import BootTime
from ..clock import Clock

__all__ = ["FakeClock"]

_boots = itertools.count(1)


class FakeClock(Clock):
    """A clock that stands still until it is moved. Share it between trackers that are on one machine.

    Args:
        start: What the wall clock shows first; aware.
    """

    def __init__(self, start: datetime = datetime(2026, 1, 1, tzinfo=UTC)) -> None:
        self._now = start
        self._monotonic = 1000.0
        self._boot = 5000.0
        self._boot_id = f"fake-boot-{next(_boots)}"
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._order = itertools.count()

    def now(self) -> datetime:
        return self._now

    def monotonic(self) -> float:
        return self._monotonic

    def boot(self) -> BootTime:
        return BootTime(self._boot_id, self._boot)

    async def sleep(self, seconds: float) -> None:
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self._monotonic + seconds, next(self._order), future))
        await future

    def jump(self, seconds: float) -> None:
        """Time passes, on all clocks; sleepers whose time has come wake up."""
        self._boot += seconds
        self.shift(seconds)
        self._pass(seconds)

    def suspend(self, seconds: float) -> None:
        """The machine sleeps: the monotonic clock stands still, the others go on."""
        self._boot += seconds
        self.shift(seconds)

    def shift(self, seconds: float) -> None:
        """Somebody sets the wall clock; the others do not care."""
        self._now += timedelta(seconds=seconds)

    def reboot(self) -> None:
        """The machine starts again: another boot, counted from 0."""
        self._boot_id = f"fake-boot-{next(_boots)}"
        self._boot = 0.0

    def _pass(self, seconds: float) -> None:
        self._monotonic += seconds
        while self._sleepers and self._sleepers[0][0] <= self._monotonic:
            future = heapq.heappop(self._sleepers)[2]
            if not future.done():
                future.get_loop().call_soon_threadsafe(_wake, future)


def _wake(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)
