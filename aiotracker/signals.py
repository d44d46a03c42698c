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

    They may be nested: the first signal sets the inner event, the second one the outer. What was added before with the
    event loop's `add_signal_handler` also hears the first one.

    Args:
        *signals: By default SIGINT and SIGTERM.

    Raises:
        RuntimeError: Not in the main thread, where signals arrive; or one that cannot be caught.
    """
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    before: dict[int, Any] = {}
    is_over = False

    def put_back(number: int) -> None:
        # None: it was not set by Python, which cannot set it again.
        signal.signal(number, signal.SIG_DFL if before[number] is None else before[number])

    def restore() -> None:
        nonlocal is_over
        is_over = True
        for number in before:
            if signal.getsignal(number) is caught:  # else somebody has put another one over it since
                put_back(number)

    def caught(number: int, frame: object) -> None:
        if is_over:  # whoever came after us put us back
            put_back(number)
            signal.raise_signal(number)
            return
        restore()
        loop.call_soon_threadsafe(tell, signal.Signals(number).name)

    def tell(name: str) -> None:
        extra = {"event": "stopping", "signal": name}
        logger.warning("%s: finishing what is under way; once more to stop at once", name, extra=extra)
        stop.set()

    try:
        # The event loop's own `add_signal_handler` has room for one a signal, and nobody can ask what it was before.
        for number in signals or (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.getsignal(number)
            try:
                signal.signal(number, caught)
            except (ValueError, OSError) as exc:
                raise RuntimeError(f"{number.name} cannot be caught: {exc}") from exc
        yield stop
    finally:
        restore()
