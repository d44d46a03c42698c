"""What the two S3 trackers share: one bucket and prefix, behind a few guarded requests.

    store = S3Store("bucket", "jobs", S3Options(endpoint_url=...), clock)
    await store.connect(stack)                               # one client; nothing is asked yet
    settings = await store.identify("log", {"shards": 4})    # the marker: format, layout, and the settings that it has
    store.facts                                              # what this service can do, as probed once

    await store.put(key, body, absent=True)                  # If-None-Match: *  -> the new ETag
    await store.put(key, body, match=etag)                   # If-Match          -> the new ETag
    await store.get(key)                                     # Stored(body, etag, modified), or None
    await store.delete(key, match=etag)                      # guarded only where facts.guards_delete
    async for page in store.pages("log/", after="log/17"):   # up to 1,000 entries a page, in the order of keys
        for entry in page: entry.key, entry.etag, entry.size, entry.modified
    store.now(), store.uncertainty                           # the store's time as best known, and how far it may be off
    store.date                                               # of the latest answer: whole seconds since 1970
    store.requests                                           # a Counter by operation

Keys are given and told without the store's prefix, which nothing here ever leaves. Every request is sent once: whoever
asks decides whether to send it again. What it may raise:

* `ConflictError`: refused, nothing was changed. `known=True` and `current=None`: nothing is stored under the key.
* `BusyError`, a `StoreUnavailableError`: refused for now, nothing was changed (409 of two writes that met, slow down).
* `StoreUnavailableError`: no answer, or none that says so; a write may have landed.
* `StoreError`: it would not help to ask again; the message says what to do.
"""

import asyncio
import random
import secrets
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final

import msgspec

from .._core.codec import FORMAT
from ..errors import ConflictError, StoreCorruptedError, StoreError, StoreUnavailableError, StoreUnsafeError
from ._aws import CONNECTIONS
from ._aws_requests import BusyError, together
from ._s3_requests import KEY_BYTES, REQUEST_TIME, DeniedError, Entry, Facts, S3Options, S3Requests, Stored

__all__ = [
    "CONNECTIONS",
    "KEY_BYTES",
    "MARKER",
    "REQUEST_TIME",
    "BusyError",
    "Entry",
    "Facts",
    "OnS3",
    "S3Options",
    "S3Store",
    "Stored",
    "together",
]

MARKER: Final = "aiotracker.json"
PROBES: Final = "probe/"
RACERS: Final = 10  # of the probe
STORES_KEPT: Final = 8  # endpoints whose facts are remembered in the marker


class _Marker(msgspec.Struct, kw_only=True):
    """What stands in the marker."""

    format: int
    layout: str
    settings: dict[str, Any] = {}
    stores: dict[str, Facts] = {}  # by endpoint: a bucket may be copied to a store of another kind


class S3Store(S3Requests):
    """One bucket and prefix: its requests, what kind of store is there, and what the service can do."""

    # -- the marker

    async def identify(
        self, layout: str, settings: Mapping[str, Any] | None = None, *, read_only: bool = False
    ) -> dict[str, Any]:
        """Reads the marker, or writes it; finds out what the store can do unless that stands there.

        Args:
            layout: Which kind of store must be here.
            settings: Of a new store.
            read_only: Nothing is written, and nothing is tried.

        Returns:
            The settings that the store has.

        Raises:
            StoreError: Another kind of store is here, or one of another format.
            StoreUnsafeError: This service does not honour conditions.
        """
        deadline = asyncio.get_running_loop().time() + 2 * self.options.request_time
        facts: Facts | None = None
        while True:
            stored = await self.patiently(lambda: self.get(MARKER))
            marker = None if stored is None else self._read_marker(stored.body, layout)
            if read_only:
                return dict(settings or {}) if marker is None else marker.settings
            known = None if marker is None else marker.stores.get(self.endpoint)
            if marker is not None and known is not None:
                self.facts = known
                return marker.settings
            facts = self.facts = facts or await self._probe()
            if marker is None:
                marker = _Marker(format=FORMAT, layout=layout, settings=dict(settings or {}))
            stores = {**marker.stores, self.endpoint: facts}
            marker.stores = dict(list(stores.items())[-STORES_KEPT:])
            body = msgspec.json.format(msgspec.json.encode(marker), indent=2) + b"\n"
            try:
                await self.put(MARKER, body, absent=stored is None, match=None if stored is None else stored.etag)
            except ConflictError:
                pass  # somebody else was faster, or it was us
            except StoreUnavailableError:
                if asyncio.get_running_loop().time() > deadline:
                    raise
            else:
                return marker.settings
            await asyncio.sleep(random.uniform(0, 0.1))

    def _read_marker(self, raw: bytes, layout: str) -> _Marker:
        path = f"{self!r}{MARKER}"
        try:
            marker = msgspec.json.decode(raw, type=_Marker)
        except msgspec.DecodeError as exc:
            raise StoreCorruptedError(f"{path} cannot be read: {exc}", path) from exc
        if marker.format != FORMAT:
            raise StoreError(
                f"{self!r} has format {marker.format}, and this release of aiotracker knows format {FORMAT}: use the "
                "release that wrote it, or a newer one; nothing was changed"
            )
        if marker.layout != layout:
            raise StoreError(f"{self!r} holds a store of another kind, {marker.layout!r}: open it as that")
        return marker

    # -- the probe

    async def _probe(self) -> Facts:
        """Finds out whether the store keeps its conditions, on an object of its own.

        Raises:
            StoreUnsafeError: It does not on PUT.
        """
        key = f"{PROBES}{secrets.token_hex(8)}"
        self.facts = Facts()
        etag = await self._race(key, None)
        if await self._tries(key, absent=True):
            raise self._unsafe("a second If-None-Match: * replaced what was stored")
        old = etag
        new = await self._tries(key, match=etag)
        if new is None:
            self.facts = Facts(quotes=True)
            new = await self._tries(key, match=etag)
        if new is None:
            raise self._unsafe("If-Match with the ETag that is stored was refused")
        if await self._tries(key, match=old):
            raise self._unsafe("If-Match with an ETag that is no longer stored was taken")
        new = await self._race(key, new)
        self.facts = msgspec.structs.replace(self.facts, guards_delete=await self._probe_delete(key, old, new))
        return self.facts

    async def _race(self, key: str, match: str | None) -> str:
        """Ten writes at once, of which one may win; the ETag that is stored."""
        answers = await together(self._tries(key, absent=match is None, match=match) for _ in range(RACERS))
        winners = [etag for etag in answers if etag is not None]
        stored = await self.patiently(lambda: self.get(key))
        if len(winners) != 1:
            raise self._unsafe(f"of {RACERS} writes at once under one condition, {len(winners)} were taken")
        if stored is None or stored.etag != winners[0]:
            raise self._unsafe("a read after a write did not show what was written")
        return stored.etag

    async def _tries(self, key: str, *, absent: bool = False, match: str | None = None) -> str | None:
        """One guarded write; the new ETag, or `None` where it was refused. Sent again until it is answered."""
        body = msgspec.json.encode({"probe": secrets.token_hex(8)})

        async def write() -> str | None:
            try:
                return await self.put(key, body, absent=absent, match=match)
            except ConflictError:
                # It may have landed all the same: its reply was lost, or something between us and the store (aiohttp,
                # where a connection has ended) has sent it twice.
                stored = await self.get(key)
                return stored.etag if stored is not None and stored.body == body else None

        return await self.patiently(write)

    async def _probe_delete(self, key: str, old: str, new: str) -> bool:
        async def delete(etag: str) -> bool:
            try:
                await self.delete(key, match=etag)
            except ConflictError:
                return False
            return True

        try:
            await self.patiently(lambda: delete(old))
            if await self.patiently(lambda: self.get(key)) is None:
                return False
            await self.patiently(lambda: delete(new))
            return await self.patiently(lambda: self.get(key)) is None
        except DeniedError:
            return False  # without the permission, nothing is ever deleted

    def _unsafe(self, what: str) -> StoreUnsafeError:
        return StoreUnsafeError(
            f"the store at {self.endpoint} does not honour conditional writes ({what}): two workers could hold one "
            "task. Use a service that does, such as AWS S3, or another kind of store; nothing but a probe object was "
            "written"
        )


class OnS3:
    """What both trackers tell of their store."""

    _store: S3Store

    @property
    def bucket(self) -> str:
        """Its name."""
        return self._store.bucket

    @property
    def prefix(self) -> str:
        """What all keys begin with."""
        return self._store.prefix

    @property
    def requests(self) -> int:
        """How many requests this tracker has sent."""
        return self._store.requests.total()

    @property
    def requests_by_operation(self) -> Mapping[str, int]:
        """The same by operation: `PutObject`, `GetObject`, `ListObjectsV2`, `DeleteObject`."""
        return dict(self._store.requests)

    def now(self) -> datetime:
        return self._store.now()
