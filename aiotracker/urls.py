"""Opens a tracker by the URL of its store."""

from collections.abc import Callable
from difflib import get_close_matches
from importlib import import_module
from inspect import Parameter, signature
from typing import Any
from urllib.parse import parse_qsl, unquote

from .errors import InvalidValueError
from .tracker import BaseTracker

__all__ = ["open_tracker"]

# scheme: (module, class, what stands behind the colon, parameters that a URL may give and how they are read)
_SCHEMES: dict[str, tuple[str, str, str, dict[str, Callable[[str], Any]]]] = {}


def _truth(text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
        return False
    raise ValueError("takes true or false")


_COMMON: dict[str, Callable[[str], Any]] = {
    "lease": float,
    "clock_skew": float,
    "worker": str,
    "read_only": _truth,
}

_SCHEMES |= {
    "memory": ("memory", "MemoryTracker", "", {}),
    "file": ("file", "FileTracker", "PATH", {"fsync": _truth, "allow_unsafe": _truth}),
    "folder": ("folder", "FolderTracker", "PATH", {"allow_unsafe": _truth}),
}


def open_tracker(url: str, **options: Any) -> BaseTracker[Any, Any]:
    """The tracker of a store; open it with `async with` or `open()`.

    Args:
        url: `memory:`, `file:PATH` or `folder:PATH`. Options of the tracker may follow as `?name=value&...`: `lease`,
            `clock_skew`, `worker`, `read_only`, and the store's own, such as `fsync` for files. In a path, `%3F`
            stands for a question mark.
        **options: Of the tracker, such as `retry=`, `lease=`, `data_type=`.

    Raises:
        InvalidValueError: The URL or an option is not known; the message says what is.
    """
    if not isinstance(url, str):
        raise InvalidValueError(f"open_tracker takes a URL as str, not {url!r}")
    scheme, colon, rest = url.partition(":")
    if not colon or scheme not in _SCHEMES:
        raise InvalidValueError(_no_scheme(url, scheme if colon else ""))
    module_name, class_name, what, parameters = _SCHEMES[scheme]
    path, _, query = rest.partition("?")
    path = unquote(path)
    if what and not path:
        raise InvalidValueError(f"{url!r} names no store; write {scheme}:{what}")
    if not what and path:
        raise InvalidValueError(f"nothing follows {scheme}: in {url!r}")
    settings = _read(url, query, _COMMON | parameters)
    cls = getattr(import_module(f".backends.{module_name}", __package__), class_name)
    known = _options(cls)
    for name in options:
        if name not in known:
            raise InvalidValueError(f"{class_name} has no option {name!r}{_hint(name, known)}")
    tracker: BaseTracker[Any, Any] = cls(*([path] if what else []), **(settings | options))
    return tracker


def _read(url: str, query: str, readers: dict[str, Callable[[str], Any]]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for name, text in parse_qsl(query, keep_blank_values=True):
        if name not in readers:
            raise InvalidValueError(f"{url!r} has an unknown parameter {name!r}{_hint(name, list(readers))}")
        try:
            settings[name] = readers[name](text)
        except ValueError as exc:
            raise InvalidValueError(f"{name} in {url!r} cannot be {text!r}: {exc}") from exc
    return settings


def _options(cls: type) -> list[str]:
    names: list[str] = []
    for base in cls.__mro__:
        if "__init__" in base.__dict__:
            parameters = signature(base.__dict__["__init__"]).parameters.values()
            names += [p.name for p in parameters if p.kind is Parameter.KEYWORD_ONLY]
    return names


def _no_scheme(url: str, scheme: str) -> str:
    known = ", ".join(f"{name}:{what}" for name, (_, _, what, _) in _SCHEMES.items())
    if not scheme:
        return f"{url!r} is no URL of a store; for a local folder write file:{url}. There are: {known}"
    return f"unknown kind of store {scheme!r} in {url!r}{_hint(scheme, list(_SCHEMES))}. There are: {known}"


def _hint(name: str, known: list[str]) -> str:
    close = get_close_matches(name, known, 1)
    return f"; did you mean {close[0]!r}?" if close else f"; there are: {', '.join(known)}"
