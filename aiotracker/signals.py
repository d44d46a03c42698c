"""Ctrl-C and SIGTERM as an event."""

import asyncio
import logging
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

__all__ = ["stop_on_signals"]

logger = logging.getLogger("aiotracker")


@asynccontextmanager
async def stop_on_signals(*signals: signal.Signals) -> AsyncIterator[asyncio.Event]:
    """Yields an event for `work(stop=...)` that the first signal sets; a second one does what it did before.

    Args:
        *signals: By default SIGINT and SIGTERM.

    Raises:
        RuntimeError: Not in the main thread, where signals arrive.
    """
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    wanted = signals or (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in wanted}

    def restore() -> None:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)

    def caught(number: signal.Signals) -> None:
        logger.warning("%s: finishing what is under way; once more to stop at once", number.name)
        restore()
        stop.set()

    for number in wanted:
        loop.add_signal_handler(number, caught, number)
    try:
        yield stop
    finally:
        if not stop.is_set():
            restore()
