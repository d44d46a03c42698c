"""Time, as everything here reads it."""

import asyncio
import time
from abc import ABC, abstractmethod
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Final

import msgspec

from ._core.task import BootTime

__all__ = ["BootTime", "Clock", "Moment", "SystemClock", "wait_until"]


class Moment(msgspec.Struct, frozen=True, gc=False):
    """One moment by all the clocks of this machine: a paused, suspended or shifted process shows on one of them."""

    monotonic: float
    boot: float  # seconds since the machine's boot
    wall: float  # seconds since 1970


class Clock(ABC):
    """Where a tracker reads time from. Replace it in tests: `aiotracker.testing.FakeClock`."""

    @abstractmethod
    def now(self) -> datetime:
        """Wall-clock time, aware, in UTC."""

    @abstractmethod
    def monotonic(self) -> float:
        """Seconds that never go back; may stand still while the machine sleeps."""

    @abstractmethod
    async def sleep(self, seconds: float) -> None:
        """Wait."""

    def boot(self) -> BootTime:
        """Seconds since the machine's boot, sleep included, and which boot that was."""
        return BootTime("", 0.0)

    def moment(self) -> Moment:
        """All three at once."""
        return Moment(self.monotonic(), self.boot().seconds, self.now().timestamp())


# Bound here: what tests put in the place of `datetime` gives times that cannot be stored.
_now: Final = datetime.now


class SystemClock(Clock):
    """The machine's clocks."""

    def now(self) -> datetime:
        return _now(UTC)

    def monotonic(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    if hasattr(time, "CLOCK_BOOTTIME"):

        def boot(self) -> BootTime:
            return BootTime(_boot_id(), time.clock_gettime(time.CLOCK_BOOTTIME))

        def moment(self) -> Moment:
            return Moment(time.monotonic(), time.clock_gettime(time.CLOCK_BOOTTIME), time.time())


@cache
def _boot_id() -> str:
    try:
        # A third of it tells boots apart, and it stands in every lease.
        return Path("/proc/sys/kernel/random/boot_id").read_text().replace("-", "").strip()[:12]
    except OSError:
        return ""


async def wait_until(clock: Clock, event: asyncio.Event, seconds: float | None) -> bool:
    """Waits for the event or until some seconds are over.

    Args:
        clock: Whose seconds.
        event: What ends the wait early.
        seconds: `None`: however long it takes.

    Returns:
        Whether the time was over first.
    """
    if event.is_set():
        return False
    if seconds is None:
        await event.wait()
        return False
    sleeping = asyncio.ensure_future(_sleep_until(clock, clock.monotonic() + seconds))
    waiting = asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait({sleeping, waiting}, return_when=asyncio.FIRST_COMPLETED)
        return not waiting.done()
    finally:
        if not sleeping.get_loop().is_closed():
            sleeping.cancel()
            waiting.cancel()


async def _sleep_until(clock: Clock, end: float) -> None:
    # What is left is read where the sleep begins, which a blocked event loop may put off for as long as it likes.
    await clock.sleep(max(0.0, end - clock.monotonic()))
