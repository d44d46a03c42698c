"""What may be stored: ids, and values as strict JSON."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any, Final

import msgspec

__all__ = [
    "FORMAT",
    "MAX_DEPTH",
    "MAX_ID_BYTES",
    "MAX_RECORD_BYTES",
    "check_id",
    "copied",
    "find_problem",
    "plain",
    "typed",
]

FORMAT: Final = 1  # of records and stores; an older release never writes a newer one
MAX_ID_BYTES: Final = 2048
MAX_RECORD_BYTES: Final = 1024 * 1024
MAX_DEPTH: Final = 100
_INT_MIN, _INT_MAX = -(2**63), 2**64 - 1
_SCALARS: Final = frozenset({type(None), bool, int, float, str})


def check_id(task_id: str) -> str:
    """The id, if it can be one: a str of 1 to 2,048 bytes of UTF-8, any character; a plain one, whatever it was.

    Raises:
        TypeError: It is no str.
        ValueError: It is empty, too long, or no Unicode text.
    """
    if type(task_id) is not str:
        if not isinstance(task_id, str):
            raise TypeError(f"a task's id is a str, not {type(task_id).__name__}: {_way_to_id(task_id)} {task_id!r}")
        # A parser's text or a member of an enum, say. An encoder would refuse it, in the middle of others' commit.
        task_id = str.__str__(task_id)
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


def _way_to_id(value: object) -> str:
    if isinstance(value, bytes | bytearray):
        return "use str(id, 'utf-8') for"
    return "give ids one by one, instead of" if isinstance(value, Iterable) else "use str(id) for"


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
    if isinstance(value, str) or hasattr(value, "__fspath__"):
        return "; use str(...)"
    if hasattr(value, "isoformat"):
        return "; use .isoformat()"
    if hasattr(value, "__dataclass_fields__") or hasattr(value, "__struct_fields__") or hasattr(value, "model_dump"):
        return "; name the type: data_type= or result_type= of the tracker, or the function's return annotation"
    return ""


def copied(value: Any) -> Any:
    """A copy of a plain JSON value, which shares nothing with it."""
    return value if type(value) in _SCALARS else msgspec.json.decode(msgspec.json.encode(value))


def plain(value: Any, kind: Any, path: str) -> Any:
    """A value as plain JSON, as it is stored; a copy, which shares nothing with it.

    Args:
        value: What the user gave.
        kind: The declared type; `Any` where there is none.
        path: What to call the value in errors.

    Raises:
        ValueError: JSON cannot hold it, it is not of the declared type, or it would come back as something else.
    """
    problem = find_problem(value, path)
    if kind is Any or value is None:
        if problem is not None:
            raise ValueError(problem)
        return copied(value)
    if problem is None:
        stored = copied(value)
        typed(stored, kind, path)
        return stored
    try:
        stored = msgspec.to_builtins(value, str_keys=True, enc_hook=_dump)
    except (TypeError, ValueError, OverflowError, RecursionError) as exc:
        raise ValueError(f"{path} cannot be stored: {exc}") from exc
    if (found := find_problem(stored, path)) is not None:
        raise ValueError(found)
    stored = copied(stored)
    if (change := _difference(value, typed(stored, kind, path), path)) is not None:
        raise ValueError(change)
    return stored


def typed(value: Any, kind: Any, path: str) -> Any:
    """A stored value as the declared type: a msgspec Struct, dataclass, TypedDict, pydantic model, path, or any of
    Python's.

    Raises:
        ValueError: What is stored does not fit the type.
    """
    if kind is Any or value is None:
        return value
    try:
        return msgspec.convert(value, kind, str_keys=True, dec_hook=_load)
    except (ValueError, TypeError, RecursionError) as exc:
        raise ValueError(f"{path} does not fit {getattr(kind, '__name__', kind)}: {exc}") from exc


def _dump(value: Any) -> Any:
    """What msgspec does not know: a path, a pydantic model."""
    if isinstance(value, PurePath):
        return str(value)
    dump = getattr(value, "model_dump", None)
    if not callable(dump):
        raise TypeError(f"JSON cannot hold a {type(value).__name__}")
    return dump(mode="json")


def _load(kind: Any, value: Any) -> Any:
    if isinstance(kind, type) and issubclass(kind, PurePath):
        return kind(value)
    validate = getattr(kind, "model_validate", None)
    return validate(value) if callable(validate) else value


def _difference(value: Any, back: Any, path: str) -> str | None:
    """Where a value would come back as something else: a set as a list, say, in a field that may hold anything."""
    if type(value) is type(back) or (isinstance(value, list | tuple) and isinstance(back, list | tuple)):
        mine, others = _parts(value, path), _parts(back, path)
        if mine is not None and others is not None and mine.keys() == others.keys():
            changes = (_difference(inner, others[name], name) for name, inner in mine.items())
            return next((change for change in changes if change is not None), None)
    # What says nothing about equality cannot be compared.
    is_same = value == back or (type(value) is type(back) and not _has_equality(type(value)))
    if is_same and isinstance(value, bool) == isinstance(back, bool):
        return None
    return f"{path} is {value!r}, and would come back as {back!r}; name its type, or convert it"


def _has_equality(kind: type) -> bool:
    return any("__eq__" in vars(base) for base in kind.__mro__ if base is not object)


def _parts(value: Any, path: str) -> dict[str, Any] | None:
    """What a value is made of, by path; `None`: it is one."""
    if isinstance(value, Mapping):
        return {f"{path}[{key!r}]": inner for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return {f"{path}[{index}]": inner for index, inner in enumerate(value)}
    if isinstance(value, msgspec.Struct):
        names: Iterable[str] = value.__struct_fields__
    elif dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
    elif hasattr(type(value), "model_fields"):
        names = type(value).model_fields
    else:
        return None
    return {f"{path}.{name}": getattr(value, name) for name in names}
