"""Opens a tracker by the URL of its store."""

import os
import re
from collections.abc import Callable
from difflib import get_close_matches
from importlib import import_module
from inspect import Parameter, signature
from typing import Any
from urllib.parse import parse_qsl, unquote, urlencode

import msgspec

from .errors import InvalidValueError
from .tracker import BaseTracker

__all__ = ["open_tracker", "path_of", "shown"]

Reader = Callable[[str], Any]


def open_tracker(url: str, **options: Any) -> BaseTracker[Any, Any]:
    """The tracker of a store; open it with `async with` or `open()`.

    Args:
        url: `memory:`, `file:PATH`, `folder:PATH`, `sqlite:PATH`, `postgresql://...`, `redis://...`,
            `dynamodb://TABLE`, `s3://BUCKET/PREFIX` or `s3+log://BUCKET/PREFIX`. Options of the tracker may follow as
            `?name=value&...`: `lease`, `clock_skew`, `worker`, `read_only`, and the store's own, such as `namespace`,
            `endpoint_url`, `region` or `shards`. In a path, `%3F` stands for a question mark, and `~/` or `~USER/` at
            its beginning for a home folder.
        **options: Of the tracker, such as `retry=`, `lease=`, `data_type=`. They win over those in the URL.

    Raises:
        InvalidValueError: The URL or an option is not known; the message says what is.
        ImportError: The store's driver is not installed; the message says how to install it.
    """
    if not isinstance(url, str):
        raise InvalidValueError(f"open_tracker takes a URL as str, not {url!r}")
    name, colon, rest = url.partition(":")
    if not colon or name not in _SCHEMES:
        raise InvalidValueError(_no_scheme(url, name if colon else ""))
    scheme = _SCHEMES[name]
    address, _, query = rest.partition("?")
    settings, others = _read(url, query, _COMMON | scheme.parameters, scheme.takes_others)
    target = scheme.target(f"{name}:{address}{'?' if others else ''}{urlencode(others)}")
    if target is None:
        raise InvalidValueError(f"{shown(url)!r} does not name a store; write {name}:{scheme.shape}")
    cls = getattr(import_module(f".backends.{scheme.module}", __package__), scheme.tracker)
    known = _options(cls)
    for option in options:
        if option not in known:
            if option == "namespace":
                raise InvalidValueError(f"{scheme.tracker} has no namespaces: give each of them a store of its own")
            raise InvalidValueError(f"{scheme.tracker} has no option {option!r}{_hint(option, known)}")
    tracker: BaseTracker[Any, Any] = cls(*target, **(settings | options))
    return tracker


def shown(url: str) -> str:
    """A store's URL without user and password: as messages, logs and screens have it."""
    return re.sub(r"(?<=://)[^/?#]*@", "", url)


def path_of(address: str) -> str:
    """The path that stands in a URL, between the colon and a question mark, with the home folder for `~/`."""
    first, slash, rest = address.partition("/")
    if slash and first.startswith("~") and (home := os.path.expanduser(first + slash)) != first + slash:
        return home + unquote(rest)
    return unquote(address)


def _truth(text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
        return False
    raise ValueError("takes true or false")


# What stands in a URL, as the first arguments of a tracker; None: nothing that could be one.


def _nothing(url: str) -> tuple[()] | None:
    return None if url.partition(":")[2] else ()


def _path(url: str) -> tuple[str] | None:
    rest = url.partition(":")[2]
    if rest.startswith("//") and not rest.startswith("///"):
        return None  # what is meant as a relative path, as in s3://, would be one from the root
    return (path_of(rest),) if rest else None


def _name(url: str) -> tuple[str] | None:
    rest = url.partition(":")[2]
    name = unquote(rest.removeprefix("//").rstrip("/"))
    return (name,) if rest.startswith("//") and name else None


def _bucket(url: str) -> tuple[str, str] | None:
    rest = url.partition(":")[2]
    bucket, _, prefix = rest.removeprefix("//").partition("/")
    return (unquote(bucket), unquote(prefix)) if rest.startswith("//") and bucket else None


def _whole(url: str) -> tuple[str] | None:
    return (url,) if url.partition(":")[2].startswith("//") else None


class _Scheme(msgspec.Struct, frozen=True):
    module: str
    tracker: str
    shape: str  # of what stands behind the colon
    target: Callable[[str], tuple[str, ...] | None]
    parameters: dict[str, Reader]  # of its own, and how they are read
    takes_others: bool = False  # parameters that we do not know are the driver's


_COMMON: dict[str, Reader] = {"lease": float, "clock_skew": float, "worker": str, "read_only": _truth}
_SPACE: dict[str, Reader] = {"namespace": str}
_AWS: dict[str, Reader] = {"endpoint_url": str, "region": str, "profile": str}
_POSTGRES = _Scheme(
    "postgres",
    "PostgresTracker",
    "//USER:PASSWORD@HOST/DATABASE",
    _whole,
    _SPACE | {"schema": str, "max_connections": int},
    takes_others=True,
)
_REDIS = _Scheme(
    "redis", "RedisTracker", "//HOST:PORT/NUMBER", _whole, _SPACE | {"wait_replicas": int, "wait_time": float}
)
_REDIS_SOCKET = _Scheme("redis", "RedisTracker", "///PATH", _whole, _REDIS.parameters)
_SCHEMES: dict[str, _Scheme] = {
    "memory": _Scheme("memory", "MemoryTracker", "", _nothing, {}),
    "file": _Scheme("file", "FileTracker", "PATH", _path, {"fsync": _truth, "allow_unsafe": _truth}),
    "folder": _Scheme("folder", "FolderTracker", "PATH", _path, {"allow_unsafe": _truth}),
    "sqlite": _Scheme("sqlite", "SqliteTracker", "PATH", _path, _SPACE | {"synchronous": str, "allow_unsafe": _truth}),
    "postgresql": _POSTGRES,
    "postgres": _POSTGRES,
    "redis": _REDIS,
    "rediss": _REDIS,
    "unix": _REDIS_SOCKET,
    "dynamodb": _Scheme(
        "dynamodb",
        "DynamoDBTracker",
        "//TABLE",
        _name,
        _SPACE | _AWS | {"ttl": float, "consistent_queries": _truth},
    ),
    "s3": _Scheme("s3", "S3Tracker", "//BUCKET/PREFIX", _bucket, _AWS | {"path_style": _truth}),
    "s3+log": _Scheme(
        "s3_log", "S3LogTracker", "//BUCKET/PREFIX", _bucket, _AWS | {"path_style": _truth, "shards": int}
    ),
}


def _read(
    url: str, query: str, readers: dict[str, Reader], takes_others: bool
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    settings: dict[str, Any] = {}
    others: list[tuple[str, str]] = []
    for name, text in parse_qsl(query, keep_blank_values=True):
        if name not in readers:
            if not takes_others:
                raise InvalidValueError(f"{shown(url)!r} has an unknown parameter {name!r}{_hint(name, list(readers))}")
            others.append((name, text))
            continue
        try:
            settings[name] = readers[name](text)
        except ValueError as exc:
            raise InvalidValueError(f"{name} in {shown(url)!r} cannot be {text!r}: {exc}") from exc
    return settings, others


def _options(cls: type) -> list[str]:
    names: list[str] = []
    for base in cls.__mro__:
        if "__init__" in base.__dict__:
            parameters = signature(base.__dict__["__init__"]).parameters.values()
            names += [p.name for p in parameters if p.kind is Parameter.KEYWORD_ONLY]
    return names


def _no_scheme(url: str, name: str) -> str:
    known = ", ".join(f"{name}:{scheme.shape}" for name, scheme in _SCHEMES.items())
    if not name:
        return f"{url!r} is no URL of a store; for a local folder write file:{url}. There are: {known}"
    close = get_close_matches(name, list(_SCHEMES), 1)
    meant = f"; did you mean {close[0]!r}?" if close else "."
    return f"unknown kind of store {name!r} in {shown(url)!r}{meant} There are: {known}"


def _hint(name: str, known: list[str]) -> str:
    close = get_close_matches(name, known, 1)
    return f"; did you mean {close[0]!r}?" if close else f"; there are: {', '.join(known)}"
