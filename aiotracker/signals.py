"""Ctrl-C and SIGTERM as an event."""

import asyncio
import logging
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

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
    before: dict[signal.Signals, Any] = {}

    def restore() -> None:
        while before:
            number, handler = before.popitem()
            loop.remove_signal_handler(number)
            # None: it was not set by Python, which cannot set it again.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def caught(number: signal.Signals) -> None:
        extra = {"event": "stopping", "signal": number.name}
        logger.warning("%s: finishing what is under way; once more to stop at once", number.name, extra=extra)
        restore()
        stop.set()

    try:
        for number in signals or (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            loop.add_signal_handler(number, caught, number)
            before[number] = handler
        yield stop
    finally:
        restore()
