"""The floor and the checkpoints of a shard: how they are read and written, and how what is out of use is deleted."""

import asyncio
import contextlib
import logging
import random
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import datetime
from typing import Final, NamedTuple, Protocol, TypeVar

import msgspec

from ..errors import ConflictError, StoreCorruptedError, StoreError, StoreUnavailableError
from ._log import Entry, Index
from ._s3 import together
from ._segments import (
    Floor,
    Times,
    checkpoint_prefix,
    chunks_of,
    floor_key,
    number_of,
    pack_part,
    part_key,
    parts_of,
    raised,
    read_chunk,
    segment_prefix,
)

__all__ = ["Archive", "Objects", "Stood", "Tries"]

logger = logging.getLogger("aiotracker")

T = TypeVar("T")

PARTS: Final = 8  # of a checkpoint that are read at once
DELETES: Final = 16  # at once
MAX_PAUSE: Final = 1.0  # seconds between two tries


class Found(Protocol):
    """An object that is stored."""

    @property
    def body(self) -> bytes: ...
    @property
    def etag(self) -> str: ...
    @property
    def modified(self) -> datetime | None: ...


class Listed(Protocol):
    """An object in a listing."""

    @property
    def key(self) -> str: ...


class Objects(Protocol):
    """What a shard needs of a store; see `_s3.S3Store`, which says what each may raise."""

    @property
    def answered(self) -> float | None: ...
    async def get(self, key: str) -> Found | None: ...
    async def put(self, key: str, body: bytes, *, absent: bool = False, match: str | None = None) -> str: ...
    async def delete(self, key: str) -> None: ...
    def pages(self, prefix: str) -> AsyncIterator[Sequence[Listed]]: ...


class Stood(NamedTuple):
    """The floor as it is stored."""

    floor: Floor | None
    etag: str | None
    modified: datetime | None  # by the store's clock
    at: float | None  # when that was answered, by the store's clock


class Archive:
    """The floor and the checkpoints of one shard.

    Args:
        objects: Where they are stored.
        shard: Of which one.
        writer: Names this tracker; no other one has it.
        patience: Seconds for which a request is tried again.
        times: How long things count.
    """

    def __init__(self, objects: Objects, shard: int, *, writer: str, patience: float, times: Times) -> None:
        self._objects = objects
        self._shard = shard
        self._writer = writer
        self._patience = patience
        self._times = times
        self._swept = 0  # segments up to here were deleted by us
        self._may_delete = True

    # -- reading

    async def get(self, key: str) -> tuple[Found | None, float | None]:
        """An object, and when that was answered, by the store's clock."""

        async def get() -> tuple[Found | None, float | None]:
            stored = await self._objects.get(key)
            return stored, self._objects.answered

        return await self._ask(get)

    async def floor(self) -> Stood:
        """The floor as it is.

        Raises:
            StoreCorruptedError: It cannot be read.
        """
        key = floor_key(self._shard)
        stored, at = await self.get(key)
        if stored is None:
            return Stood(None, None, None, at)
        try:
            return Stood(msgspec.json.decode(stored.body, type=Floor), stored.etag, stored.modified, at)
        except msgspec.DecodeError as exc:
            raise StoreCorruptedError(f"{self.path(key)} cannot be read: {exc}", self.path(key)) from exc

    async def read(self, floor: Floor, index: Index) -> bool:
        """Reads a checkpoint into an empty index; `False` where it is not there.

        Raises:
            StoreCorruptedError: It is damaged.
        """
        for first in range(0, floor.parts, PARTS):
            numbers = range(first, min(floor.parts, first + PARTS))
            keys = [part_key(self._shard, floor.checkpoint, number) for number in numbers]
            for part, key, (stored, _) in zip(numbers, keys, await together(map(self.get, keys)), strict=True):
                if stored is None:
                    return False
                path = self.path(key)
                for chunk in await asyncio.to_thread(chunks_of, path, floor.checkpoint, part, stored.body):
                    read_chunk(path, chunk, index)
                    await asyncio.sleep(0)
        return True

    def path(self, key: str) -> str:
        """How an object is called in messages."""
        return f"{self._objects!r}{key}"

    async def _ask(self, request: Callable[[], Awaitable[T]]) -> T:
        tries = Tries(self._patience)
        while True:
            try:
                return await request()
            except StoreUnavailableError as exc:
                await tries.again(exc)

    # -- writing

    async def write(self, number: int, nonce: str, time: datetime, entries: list[Entry]) -> bool:
        """Writes a checkpoint, reads it back, and raises the floor to it.

        Args:
            number: Of the segment up to which the entries are.
            nonce: Of that segment.
            time: Of that segment.
            entries: All of the shard.

        Returns:
            Whether this is the floor now; `False` where another one as high is.
        """
        name = f"{number:012}-{self._writer}-{secrets.token_hex(4)}"
        count = 0
        for part in parts_of(entries):
            key = part_key(self._shard, name, count)
            body = await asyncio.to_thread(pack_part, name, count, part)
            await self._ask(lambda key=key, body=body: self._put_new(key, body))  # type: ignore[misc]  # mypy infers no type for the defaults
            stored, _ = await self.get(key)
            if stored is None or stored.body != body:
                raise StoreError(f"{self.path(key)} was written, and is not what is read")
            count += 1
        return await self._raise(Floor(number, nonce, time, name, count))

    async def _put_new(self, key: str, body: bytes) -> None:
        with contextlib.suppress(ConflictError):  # by an earlier try: nobody else has this name
            await self._objects.put(key, body, absent=True)

    async def _raise(self, new: Floor) -> bool:
        """Says to all that a checkpoint is there, and deletes what has been out of use for long."""
        key = floor_key(self._shard)
        tries = Tries(self._patience)
        while True:
            old, etag, modified, at = await self.floor()
            if old is not None and old.floor >= new.floor:
                return old.checkpoint == new.checkpoint
            if at is None:
                raise StoreError(f"{self._objects!r} does not tell the time")
            floor = raised(old, modified, msgspec.structs.replace(new, swept=self._swept), at, self._times.keep)
            try:
                await self._objects.put(key, msgspec.json.encode(floor) + b"\n", absent=etag is None, match=etag)
            except ConflictError as exc:
                await tries.again(StoreUnavailableError(str(exc)))
            except StoreUnavailableError as exc:
                await tries.again(exc)
            else:
                break
        if old is not None and (last := old.stood(at, self._times.keep, modified)) > floor.swept:
            await self._sweep(last)
        return True

    async def _sweep(self, last: int) -> None:
        """Deletes segments up to this number, ghosts among them, and the checkpoints of lower ones."""
        if not self._may_delete:
            return
        extra = {"event": "segments_kept", "where": repr(self._objects), "shard": self._shard}
        try:
            await self._delete(segment_prefix(self._shard), last)
            await self._delete(checkpoint_prefix(self._shard), last - 1)
            self._swept = last
        except StoreUnavailableError as exc:
            extra["error_type"] = type(exc).__name__
            logger.info("%r: some old segments are left for later: %s", self._objects, exc, extra=extra)
        except StoreError as exc:
            self._may_delete = False
            extra["error_type"] = type(exc).__name__
            logger.warning("%r: old segments are not deleted: %s", self._objects, exc, extra=extra)

    async def _delete(self, prefix: str, last: int) -> None:
        async for page in self._objects.pages(prefix):
            numbers = [(number_of(entry.key, prefix), entry.key) for entry in page]
            keys = [key for number, key in numbers if number is not None and number <= last]
            for first in range(0, len(keys), DELETES):
                await together(map(self._delete_one, keys[first : first + DELETES]))
            if any(number is not None and number > last for number, _ in numbers):
                return

    async def _delete_one(self, key: str) -> None:
        await self._ask(lambda: self._objects.delete(key))


class Tries:
    """For how long a request is sent again.

    Args:
        patience: Seconds.
    """

    def __init__(self, patience: float) -> None:
        self._deadline = asyncio.get_running_loop().time() + patience
        self._count = 0

    async def again(self, exc: Exception) -> None:
        """Waits a little; raises what is given where the time is over."""
        self._count += 1
        await asyncio.sleep(random.uniform(0, min(MAX_PAUSE, 0.02 * 2.0 ** min(self._count, 8))))
        if asyncio.get_running_loop().time() > self._deadline:
            raise exc
