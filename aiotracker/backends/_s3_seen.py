"""What was seen of the objects of a store: in memory, bounded, and packed for others."""

import zlib
from collections import OrderedDict
from typing import Final, NamedTuple

import msgspec

from .._core.codec import FORMAT

__all__ = ["ENTRY_BYTES", "PURGED", "Cache", "Seen", "packed", "unpacked"]

ENTRY_BYTES: Final = 400  # that an entry of the cache takes beside its record
PURGED: Final = b'{"purged":'  # how what is left of a purged task begins


class Seen(NamedTuple):
    """An object as it was when this process last saw it."""

    etag: str
    body: bytes
    began: float  # when it was asked for, by the event loop's clock; -1.0: somebody else saw it

    @property
    def is_purged(self) -> bool:
        """Whether it is what is left of a purged task."""
        return self.body.startswith(PURGED)


class Cache:
    """What was seen, by key; what was not used for the longest time goes first.

    Args:
        limit: Bytes.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._size = 0
        self._seen: OrderedDict[str, Seen] = OrderedDict()

    def get(self, key: str) -> Seen | None:
        """What was seen there; not what is there now."""
        seen = self._seen.get(key)
        if seen is not None:
            self._seen.move_to_end(key)
        return seen

    def keep(self, key: str, etag: str, body: bytes, began: float = -1.0) -> None:
        """Remembers an object.

        Args:
            key: Its key.
            etag: Its ETag.
            body: What is stored.
            began: When it was asked for.
        """
        self.drop(key)
        self._seen[key] = Seen(etag, body, began)
        self._size += len(body) + ENTRY_BYTES
        while self._size > self._limit:
            _, oldest = self._seen.popitem(last=False)
            self._size -= len(oldest.body) + ENTRY_BYTES

    def drop(self, key: str) -> None:
        """Forgets it."""
        if (seen := self._seen.pop(key, None)) is not None:
            self._size -= len(seen.body) + ENTRY_BYTES

    def all(self) -> list[tuple[str, Seen]]:
        """All of it, by key."""
        return list(self._seen.items())


def packed(entries: list[tuple[str, Seen]]) -> bytes:
    """What was seen, as one object."""
    lines = [msgspec.json.encode({"format": FORMAT})]
    lines += [msgspec.json.encode((key, seen.etag, msgspec.Raw(seen.body))) for key, seen in entries]
    return zlib.compress(b"\n".join(lines), 1)


def unpacked(raw: bytes) -> list[tuple[str, str, bytes]]:
    """Key, ETag and body of each; nothing of another format.

    Raises:
        ValueError: It is damaged.
        zlib.error: The same.
    """
    first, *lines = zlib.decompress(raw).split(b"\n")
    if msgspec.json.decode(first, type=dict[str, int]).get("format") != FORMAT:
        return []
    decode = msgspec.json.Decoder(tuple[str, str, msgspec.Raw]).decode
    return [(key, etag, bytes(body)) for key, etag, body in map(decode, lines)]
