"""What users hand in: values, functions, lengths of time; checked before anything is done with them."""

import asyncio
import functools
import inspect
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final, get_type_hints
from typing import TypeVar as StandardTypeVar

from typing_extensions import TypeVar

from ._core.codec import copied, plain, typed
from .errors import InvalidValueError, RecordTooLargeError

__all__ = ["check_async", "check_room", "check_seconds", "fitting_value", "plain_value", "return_type"]

# Bytes of a record that are kept for errors, ends, lease and note, so that each end can be recorded.
RESERVE: Final = 32 * 1024


def plain_value(value: Any, kind: Any, path: str) -> Any:
    """A value of a user as plain JSON.

    Raises:
        InvalidValueError: JSON cannot hold it; the message names the path to what it cannot.
    """
    try:
        return plain(value, kind, path)
    except ValueError as exc:
        raise InvalidValueError(str(exc)) from exc


def fitting_value(stored: Any, kind: Any, path: str) -> Any:
    """A copy of a stored value, as the user's type.

    Raises:
        InvalidValueError: It does not fit.
    """
    try:
        return typed(copied(stored), kind, path)
    except ValueError as exc:
        raise InvalidValueError(str(exc)) from exc


def check_async(fn: object, user: str) -> None:
    """Refuses what is not an async function, before anything is called.

    Raises:
        TypeError: With what to write instead.
    """
    inner = fn
    while isinstance(inner, functools.partial):
        inner = inner.func
    if not callable(inner):
        raise TypeError(f"{user} takes an async function, not {fn!r}")
    if inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(type(inner).__call__):
        return
    name = getattr(inner, "__name__", repr(inner))
    example = (
        f'task.step("{name}", asyncio.to_thread, {name}, ...)'
        if user == "step"
        else (f"an async def that awaits asyncio.to_thread({name}, ...)")
    )
    raise TypeError(f"{user} takes an async function, and {name} is a plain one; use {example}")


def return_type(fn: Callable[..., Any], *args: object) -> Any:
    """What an async function says that it returns; `Any` where it says nothing that can be used.

    Args:
        fn: The function. Of `asyncio.to_thread`, the function that it calls counts.
        *args: What `fn` is called with.
    """
    while isinstance(fn, functools.partial):
        args = (*fn.args, *args)
        fn = fn.func
    if fn is asyncio.to_thread and args and callable(args[0]):
        return return_type(args[0], *args[1:])
    if not (inspect.isfunction(fn) or inspect.ismethod(fn)):
        fn = type(fn).__call__
    try:
        fn = inspect.unwrap(fn)
        kind = fn.__annotations__["return"]
        if isinstance(kind, str):
            # The return alone: names of other parameters may exist for the type checker only.
            kind = get_type_hints(_Returns(kind, getattr(fn, "__globals__", {})))["return"]
    except Exception:
        return Any
    return Any if isinstance(kind, TypeVar | StandardTypeVar) or kind in (None, type(None)) else kind


class _Returns:
    def __init__(self, kind: str, names: dict[str, Any]) -> None:
        self.__annotations__ = {"return": kind}
        self.__globals__ = names


def check_seconds(name: str, value: float) -> float:
    """A length of time that was given by a user.

    Raises:
        InvalidValueError: It is not a positive, finite number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= timedelta.max.total_seconds():
        raise InvalidValueError(f"{name} takes a positive number of seconds, not {value!r}")
    return float(value)


def check_room(task_id: str, size: int, limit: int) -> None:
    """Raises `RecordTooLargeError` where a record leaves no room for how a run ends."""
    limit -= RESERVE
    if size > limit:
        raise RecordTooLargeError(
            f"the record of {task_id!r} would take {size:,} bytes, and {limit:,} are the most: "
            "keep large values elsewhere, and their path here",
            task_id,
            size,
            limit,
        )
