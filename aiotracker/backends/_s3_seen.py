"""What was seen of the objects of a store: in memory, bounded, and in a snapshot for others."""

import asyncio
import logging
import zlib
from collections import OrderedDict
from collections.abc import Iterable
from typing import Final, NamedTuple

import msgspec

from .._core.codec import FORMAT
from ..errors import ConflictError, StoreError
from ._s3 import S3Store

__all__ = ["ENTRY_BYTES", "PURGED", "Cache", "Seen", "Snapshot", "packed", "unpacked"]

logger = logging.getLogger("aiotracker")

SNAPSHOT: Final = "snapshot.jsonl.z"
WORTH_A_SNAPSHOT: Final = 200  # records that had to be read one by one
SNAPSHOT_PAUSE: Final = 60.0  # seconds between two snapshots of one tracker
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


class Snapshot:
    """What one process saw, for those who come later: a cache, never the truth. A listing tells what of it still is so.

    Args:
        store: Where it is kept.
        cache: What is put into it, and filled from it.
    """

    def __init__(self, store: S3Store, cache: Cache) -> None:
        self._store = store
        self._cache = cache
        self._etag: str | None = None
        self._is_read = False
        self._written_at: float | None = None

    def is_worth_reading(self, keys: Iterable[str]) -> bool:
        """Whether so much of what is stored was not seen."""
        return not self._is_read and sum(self._cache.get(key) is None for key in keys) >= WORTH_A_SNAPSHOT

    async def read(self) -> None:
        """Fills the cache with what another process saw."""
        self._is_read = True
        try:
            stored = await self._store.get(SNAPSHOT)
            if stored is None:
                return
            self._etag = stored.etag
            for key, etag, body in await asyncio.to_thread(unpacked, stored.body):
                if self._cache.get(key) is None:
                    self._cache.keep(key, etag, body)
        except (StoreError, ValueError, zlib.error) as exc:
            logger.info("the snapshot of %r cannot be used: %s", self._store, exc, extra=self._event(exc))

    async def write(self, reads: int, listed: int) -> None:
        """Keeps what this process saw for others, if it was dear.

        Args:
            reads: Records that it had to read one by one.
            listed: Of so many.
        """
        now = asyncio.get_running_loop().time()
        if reads < max(WORTH_A_SNAPSHOT, listed // 20):
            return
        if self._written_at is not None and now - self._written_at < SNAPSHOT_PAUSE:
            return
        self._written_at = now
        body = await asyncio.to_thread(packed, self._cache.all())
        try:
            self._etag = await self._store.put(SNAPSHOT, body, absent=self._etag is None, match=self._etag)
        except (ConflictError, StoreError) as exc:
            self._etag, self._is_read = None, False
            logger.info("the snapshot of %r was not written: %s", self._store, exc, extra=self._event(exc))

    def _event(self, exc: Exception) -> dict[str, str]:
        return {"event": "snapshot_failed", "where": repr(self._store), "error_type": type(exc).__name__}
