"""What may be stored: ids, and values as strict JSON."""

from collections.abc import Callable
from typing import Any, Final

import msgspec

__all__ = ["FORMAT", "MAX_DEPTH", "MAX_ID_BYTES", "MAX_RECORD_BYTES", "check_id", "find_problem", "plain", "typed"]

FORMAT: Final = 1  # of records and stores; an older release never writes a newer one
MAX_ID_BYTES: Final = 2048
MAX_RECORD_BYTES: Final = 1024 * 1024
MAX_DEPTH: Final = 100
_INT_MIN, _INT_MAX = -(2**63), 2**64 - 1


def check_id(task_id: str) -> str:
    """The id, if it can be one: a str of 1 to 2,048 bytes of UTF-8, any character.

    Raises:
        TypeError: It is no str.
        ValueError: It is empty, too long, or no Unicode text.
    """
    if not isinstance(task_id, str):
        raise TypeError(f"a task's id is a str, not {type(task_id).__name__}: use str(id) for {task_id!r}")
    if task_id.isascii():
        size = len(task_id)
    else:
        try:
            size = len(task_id.encode())
        except UnicodeEncodeError:
            raise ValueError(f"a task's id must be Unicode text; {task_id!r} has a lone surrogate") from None
    if not 1 <= size <= MAX_ID_BYTES:
        shown = task_id if size < 80 else task_id[:60] + "..."
        raise ValueError(f"a task's id takes 1 to {MAX_ID_BYTES} bytes of UTF-8; {shown!r} has {size}")
    return task_id


def find_problem(value: Any, path: str) -> str | None:
    """What of this value JSON cannot hold, with the path to it; `None` where all of it can be stored as it is.

    Tuples are taken as arrays. Everything that an encoder would silently change (NaN, bytes, sets, keys that are no
    str) is a problem.
    """
    return _problem(value, path, MAX_DEPTH)


def _problem(value: Any, path: str, depth: int) -> str | None:
    kind = type(value)
    if value is None or kind is bool:
        return None
    if kind is str:
        return None if value.isascii() or _is_text(value) else f"{path} is no Unicode text (a lone surrogate)"
    if kind is int:
        return None if _INT_MIN <= value <= _INT_MAX else f"{path} is an int beyond 64 bits; store it as a str"
    if kind is float:
        return f"{path} is {value}, which JSON cannot hold" if value - value != 0 else None
    if depth == 0:
        return f"{path} is nested more than {MAX_DEPTH} deep, or holds itself"
    if kind is dict:
        for key, inner in value.items():
            if type(key) is not str:
                return f"{path} has the key {key!r} of type {type(key).__name__}; JSON's keys are str"
            if not (key.isascii() or _is_text(key)):
                return f"{path} has the key {key!r}, which is no Unicode text (a lone surrogate)"
            if found := _problem(inner, f"{path}[{key!r}]", depth - 1):
                return found
        return None
    if kind is list or kind is tuple:
        for index, inner in enumerate(value):
            if found := _problem(inner, f"{path}[{index}]", depth - 1):
                return found
        return None
    return f"{path} is of type {kind.__name__}, which JSON cannot hold{_hint(value)}"


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _hint(value: Any) -> str:
    if isinstance(value, bytes | bytearray):
        return "; decode it, or store a path to it"
    if isinstance(value, set | frozenset):
        return "; use sorted(...)"
    if hasattr(value, "isoformat"):
        return "; use .isoformat()"
    if hasattr(value, "__dataclass_fields__") or hasattr(value, "__struct_fields__") or hasattr(value, "model_dump"):
        return "; name the type: data_type= or result_type= of the tracker, or the function's return annotation"
    return ""


def plain(value: Any, kind: Any, path: str) -> Any:
    """A value as plain JSON, as it is stored.

    Args:
        value: What the user gave.
        kind: The declared type; `Any` where there is none.
        path: What to call the value in errors.

    Raises:
        ValueError: JSON cannot hold it, or it is not of the declared type.
    """
    if value is None:
        return None
    if kind is not Any and not _is_json(value):
        try:
            dump = getattr(value, "model_dump", None)
            value = dump(mode="json") if callable(dump) else msgspec.to_builtins(value)
        except (TypeError, ValueError, OverflowError, RecursionError) as exc:
            raise ValueError(f"{path} cannot be stored: {exc}") from exc
    if (problem := find_problem(value, path)) is not None:
        raise ValueError(problem)
    if kind is not Any:
        typed(value, kind, path)
    return value


def _is_json(value: Any) -> bool:
    return type(value) in (bool, int, float, str, list, dict, tuple)


def typed(value: Any, kind: Any, path: str) -> Any:
    """A stored value as the declared type: a msgspec Struct, dataclass, TypedDict, pydantic model, or any of Python's.

    Raises:
        ValueError: What is stored does not fit the type.
    """
    if kind is Any or value is None:
        return value
    validate: Callable[[Any], Any] | None = getattr(kind, "model_validate", None)
    try:
        return validate(value) if callable(validate) else msgspec.convert(value, kind)
    except (msgspec.ValidationError, ValueError, TypeError) as exc:
        raise ValueError(f"{path} does not fit {getattr(kind, '__name__', kind)}: {exc}") from exc
