"""Opens a store by a reference that another process, or the command line, can be given."""

import re
from collections.abc import Callable
from importlib import import_module
from typing import Any
from urllib.parse import quote

from ..errors import InvalidValueError
from ..tracker import BaseTracker
from ..urls import open_tracker

__all__ = ["another_store", "open_store"]

_FACTORY = re.compile(
    r"(?P<module>[A-Za-z_]\w*(\.[A-Za-z_]\w*)*):(?P<function>[A-Za-z_]\w*)(:(?P<name>.*))?", re.DOTALL
)


def open_store(reference: str, **options: Any) -> BaseTracker[Any, Any]:
    """A tracker of a store; open it with `async with`.

    Args:
        reference: A URL as `open_tracker` takes it, or `module:function:name`. The function is called with the name
            (a str that may be empty) and the options, and gives a tracker that is not open; the same name is the same
            store, in every process.
        **options: Of the tracker.

    Raises:
        InvalidValueError: There is no such store.
    """
    try:
        return open_tracker(reference, **options)
    except InvalidValueError as exc:
        found = _FACTORY.fullmatch(reference)
        if found is None:
            raise
        try:
            factory: Callable[..., Any] = getattr(import_module(found["module"]), found["function"])
        except (ImportError, AttributeError) as error:
            raise InvalidValueError(f"{exc}; nor is it module:function, since {error}") from error
    tracker: BaseTracker[Any, Any] = factory(found["name"] or "", **options)
    return tracker


def another_store(reference: str, name: str) -> str:
    """The reference of another store in the same place, such as one for each test.

    Args:
        reference: As for `open_store`.
        name: Letters, digits, `-` and `_`.
    """
    if _FACTORY.fullmatch(reference) and not _is_url(reference):
        module, function, *rest = reference.split(":", 2)
        return f"{module}:{function}:{'/'.join([*rest, name])}"
    base, question, query = reference.partition("?")
    scheme = base.partition(":")[0]
    if scheme == "memory":
        return reference
    if scheme in ("postgresql", "redis", "rediss", "dynamodb"):
        joined = f"{query}&" if question else ""
        return f"{base}?{joined}namespace={quote(name)}"
    return f"{base.rstrip('/')}/{name}{question}{query}"


def _is_url(reference: str) -> bool:
    try:
        open_tracker(reference)
    except InvalidValueError:
        return False
    return True
