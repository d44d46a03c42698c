"""Looks at a store again and again, and shows what is there."""

import asyncio
import contextlib
import os
import signal
import sys
import termios
import tty
from collections.abc import Iterator
from typing import Any, Final

import msgspec
from rich.console import Console, Group
from rich.live import Live

from aiotracker import BaseTracker, StoreUnavailableError, Where, analytics

from . import render
from .remembered import RESERVED
from .screen import Look, lines

__all__ = ["KEYS", "Watch"]

WIDTH: Final = 120  # where there is no terminal
PATIENCE: Final = 4  # of its time, a watch looks at the store for one part in so many
KEYS: Final = "q or Ctrl-C: leave"


class Watch:
    """Looks at a store, and shows what is there."""

    def __init__(self, tracker: BaseTracker[Any, Any], filters: Where, store: str, interval: float) -> None:
        self._tracker = tracker
        self._filters = filters
        self._store = store
        self._interval = interval
        self._pause = interval

    async def _look(self) -> analytics.Summary:
        loop = asyncio.get_running_loop()
        begin = loop.time()
        found = await analytics.summary(self._tracker, skip={RESERVED}, **self._filters)
        self._pause = max(self._interval, (PATIENCE - 1) * (loop.time() - begin))
        return found

    async def print_json(self, *, for_ever: bool) -> None:
        """One document, or line after line."""
        while True:
            found = await self._look()
            if not for_ever:
                render.json_document(msgspec.structs.asdict(found))
                return
            render.json_line(msgspec.json.encode(found))
            sys.stdout.flush()
            await asyncio.sleep(self._pause)

    async def print_text(self, *, for_ever: bool) -> None:
        """The whole summary, coloured on a terminal."""
        is_terminal = render.is_terminal()
        console = Console(width=None if is_terminal else WIDTH, soft_wrap=True, highlight=False)
        look = Look(console.width, None, sys.stdout.encoding)
        while True:
            for line in lines(await self._look(), self._store, look):
                if is_terminal:
                    console.print(line)
                else:
                    sys.stdout.write(line.plain.rstrip() + "\n")
            if not for_ever:
                return
            sys.stdout.write("\n")
            sys.stdout.flush()
            await asyncio.sleep(self._pause)

    async def on_screen(self) -> None:
        """On a terminal's second screen, until somebody leaves; the terminal is given back as it was."""
        first = await self._look()  # what goes wrong here is told where it stays
        console = Console(highlight=False)
        left, resized = asyncio.Event(), asyncio.Event()
        with _keys(left), _signals(resized):
            live = Live(console=console, screen=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
            live.start()
            try:
                drawing = asyncio.create_task(self._draw(live, console, first, resized))
                leaving = asyncio.create_task(left.wait())
                try:
                    await asyncio.wait({drawing, leaving}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for task in (drawing, leaving):
                        task.cancel()
                    await asyncio.wait({drawing, leaving})
                if not drawing.cancelled():
                    drawing.result()
            finally:
                live.stop()

    async def _draw(self, live: Any, console: Console, found: analytics.Summary, resized: asyncio.Event) -> None:
        footer = KEYS
        while True:
            resized.clear()  # before it is looked at: what comes while we draw counts
            await asyncio.to_thread(self._show, live, console, found, footer)
            try:
                async with asyncio.timeout(self._pause):
                    await resized.wait()
                continue
            except TimeoutError:
                pass
            try:
                found = await self._look()
                footer = KEYS
            except StoreUnavailableError as exc:
                footer = f"as of {found.time.astimezone():%H:%M:%S}, trying again: {render.safe(str(exc))}"

    def _show(self, live: Any, console: Console, found: analytics.Summary, footer: str) -> None:
        width, height = console.size
        look = Look(width, height, sys.stdout.encoding)
        live.update(Group(*lines(found, self._store, look, footer=footer)), refresh=True)


@contextlib.contextmanager
def _keys(left: asyncio.Event) -> Iterator[None]:
    """Single keys from the terminal, not shown there; without one nothing is read."""
    if not sys.stdin.isatty():
        yield
        return
    loop = asyncio.get_running_loop()
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)

    def read() -> None:
        try:
            keys = os.read(fd, 1024)
        except OSError:  # the terminal has gone
            keys = b""
        if not keys:
            loop.remove_reader(fd)
        if b"q" in keys.lower() and not keys.startswith(b"\x1b"):
            left.set()

    tty.setcbreak(fd, termios.TCSANOW)
    try:
        loop.add_reader(fd, read)
        try:
            yield
        finally:
            loop.remove_reader(fd)
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


@contextlib.contextmanager
def _signals(resized: asyncio.Event) -> Iterator[None]:
    """Draws anew in another size, and gives the terminal back when we are asked to end."""
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None
    loop.add_signal_handler(signal.SIGWINCH, resized.set)
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGWINCH)
        loop.remove_signal_handler(signal.SIGTERM)
