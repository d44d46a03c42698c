"""What tables need: packages that are imported when they are needed, and threads that are waited for."""

import asyncio
from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar

__all__ = ["driver", "in_thread"]

T = TypeVar("T")


def driver(name: str) -> Any:
    """A module of the `analytics` extra.

    Raises:
        ModuleNotFoundError: It is not installed; the message says how to install it.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as exc:
        package = (exc.name or "").partition(".")[0]
        if package not in ("duckdb", "pyarrow"):
            raise
        raise ModuleNotFoundError(f'this needs {package}; pip install "aiotracker[analytics]"', name=exc.name) from exc


async def in_thread(fn: Callable[[], T], *, interrupt: Callable[[], object] = lambda: None) -> T:
    """Runs a function on a thread, and has waited for its end also when it is cancelled.

    Args:
        fn: What to run.
        interrupt: Makes it end sooner; called when we are cancelled, until it has ended.
    """
    call = asyncio.ensure_future(asyncio.to_thread(fn))
    try:
        return await asyncio.shield(call)
    except asyncio.CancelledError:
        while not call.done():
            interrupt()
            try:
                await asyncio.wait({call}, timeout=0.05)
            except asyncio.CancelledError:
                pass  # the first one is raised on
        call.exception()  # nobody else asks for it
        raise
