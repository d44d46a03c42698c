"""Errors as they are kept in a record."""

import asyncio
import traceback
from typing import Final

from ._core.fingerprint import fingerprint
from ._core.retry import leaves
from ._core.transitions import Cause

__all__ = ["describe", "describe_briefly"]

MAX_MESSAGE: Final = 2_000  # characters
MAX_TRACEBACK: Final = 8_000


def describe(exc: BaseException, task_id: str) -> Cause:
    """With the traceback. Reads source files: not on the event loop's thread."""
    text = _storable("".join(traceback.format_exception(exc)))
    kind, message = type(exc).__name__, _message(exc)
    name = fingerprint(kind, message, text, task_id)
    if len(text) > MAX_TRACEBACK:
        text = (
            f"{text[:1000]}\n... {len(text) - MAX_TRACEBACK:,} characters left out ...\n{text[1000 - MAX_TRACEBACK :]}"
        )
    return Cause(kind, message, text, name)


def describe_briefly(exc: BaseException, task_id: str) -> Cause:
    """Without lines of source code, which would have to be read."""
    frames = (
        f'  File "{frame.f_code.co_filename}", line {n}, in {frame.f_code.co_name}'
        for frame, n in traceback.walk_tb(exc.__traceback__)
    )
    text = "" if isinstance(exc, asyncio.CancelledError) else _storable("\n".join(frames)[-MAX_TRACEBACK:])
    kind, message = type(exc).__name__, _message(exc) or "cancelled"
    return Cause(kind, message, text, fingerprint(kind, message, text, task_id))


def _message(exc: BaseException) -> str:
    """What an error says; of a group, what its first error says too."""
    try:
        text = str(exc)
        if isinstance(exc, BaseExceptionGroup):
            inner = next(inner for inner in leaves(exc) if not isinstance(inner, BaseExceptionGroup))
            text = f"{text}: {type(inner).__name__}: {inner}"
    except Exception as error:
        text = f"<{type(exc).__name__} without a text: {type(error).__name__}>"
    return _storable(text[:MAX_MESSAGE])


def _storable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()
