"""What every command needs: the store's URL, and one place where errors become messages and exit statuses."""

import asyncio
import os
import shlex
import sys
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

import msgspec
import typer

from aiotracker import InvalidValueError, TrackerError, UnsupportedError
from aiotracker.urls import shown

from .command import CannotStart
from .remembered import OtherCommand
from .render import say

__all__ = ["FAILED", "INTERRUPTED", "USAGE", "Settings", "line_for", "refuse", "run", "store_url"]

T = TypeVar("T")

FAILED: Final = 1
USAGE: Final = 2
INTERRUPTED: Final = 130  # as shells have it
DEFAULT_STORE: Final = "file:.aiotracker"


class Settings(msgspec.Struct):
    """What stands before the command's name."""

    store: str | None = None
    debug: bool = False


def store_url(ctx: typer.Context, store: str | None) -> str:
    """The store's URL, as given behind the command's name or before it, or by AIOTRACKER_STORE."""
    return store or ctx.obj.store or DEFAULT_STORE


def line_for(url: str, *words: str) -> str:
    """A line to type, about this store. It never shows a password, which is to be in AIOTRACKER_STORE."""
    is_known = shown(url) != url == os.environ.get("AIOTRACKER_STORE")
    return shlex.join(["aiotracker", *words, *([] if is_known else ["--store", shown(url)])])


def refuse(message: str) -> typer.Exit:
    """Says what is wrong with the command line; to be raised."""
    say(message)
    return typer.Exit(USAGE)


def run(ctx: typer.Context, work: Coroutine[Any, Any, T]) -> T:
    """Runs a command's work; errors end the process with one clear line, and a traceback after `--debug` alone."""
    try:
        result = asyncio.run(work)
        sys.stdout.flush()
        return result
    except BrokenPipeError:
        # Whoever read our output has seen enough. Python's own flush at the end must not meet it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(141) from None
    except (KeyboardInterrupt, asyncio.CancelledError):
        raise typer.Exit(INTERRUPTED) from None
    except (TrackerError, OtherCommand, CannotStart, ModuleNotFoundError) as exc:
        if ctx.obj.debug or (isinstance(exc, ModuleNotFoundError) and "aiotracker[" not in str(exc)):
            raise  # a missing driver says what to install; any other missing module is a fault
        say(str(exc))
        is_usage = not isinstance(exc, TrackerError) or isinstance(exc, InvalidValueError | UnsupportedError)
        raise typer.Exit(USAGE if is_usage else FAILED) from None
