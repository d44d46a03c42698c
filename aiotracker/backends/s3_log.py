"""S3LogTracker: a log in numbered objects, a thousand claims in one request.

    PREFIX/aiotracker.json                  the marker: format, layout, how many shards, and what the service can do
    PREFIX/log/03/000000000017.jsonl        segment 17 of shard 3; see `_segments.py` for these three
    PREFIX/checkpoints/03/...
    PREFIX/floor/03.json
    PREFIX/probe/...                        an object of the probe, for a moment

What waits while one request is in flight goes into the next one, of each shard. See `_shard.py` for how.
"""

import asyncio
import secrets
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from typing import Any, Final

from typing_extensions import TypeVar

from .._core.transitions import Renew
from ..errors import InvalidValueError, StoreError
from ._log import Index, LogTracker, Wanted, orphaned
from ._pump import Pump
from ._s3 import CONNECTIONS, REQUEST_TIME, OnS3, S3Options, S3Store
from ._segments import Times, shard_of
from ._shard import Shard

__all__ = ["S3LogTracker"]

D = TypeVar("D", default=Any)
R = TypeVar("R", default=Any)

LAYOUT: Final = "log"
SHARDS: Final = 2
MAX_SHARDS: Final = 64
MAX_ITEMS: Final = 2_000  # operations of a segment; more at once would keep the event loop for too long


class S3LogTracker(OnS3, LogTracker[D, R]):
    """Keeps all tasks in a log of few objects: for crawlers and other workers with many tasks at once. For small
    functions that know their task's id and run one at a time, `S3Tracker` is simpler, and reads less to begin with.

    What is asked for while a PUT is in flight goes into the next PUT, so a thousand coroutines need about ten requests
    for a thousand tasks; a coroutine alone needs two for each. Tasks are spread over shards by a hash of their ids. A
    shard is read when one of its tasks is first asked for: its latest checkpoint, and the segments behind that. All
    records of the shards that were read are kept in memory, about 600 bytes a task.

    Any number of processes can work on one store; each commit of a shard is won by one of them, and read by the
    others. Needs a service that honours conditions on PUT. That is tried when a store is first opened, and a service
    that does not is refused with `StoreUnsafeError`. The store's own clock, as its answers tell it, decides about
    leases.

    Args:
        bucket: Its name; it must exist.
        prefix: Of all keys of this store; nothing outside of it is touched.
        shards: Into how many logs the tasks are spread, fixed when the store is made; by default 2. More of them
            let a function that needs one task read less, and each commit of many tasks takes as many requests.
        client: An aiobotocore client for S3 to use, with its own settings; it is not closed.
        session: An aioboto3 or aiobotocore session to make the client with.
        endpoint_url: Of another service than AWS.
        region: Of the bucket.
        profile: A name in `~/.aws/config`.
        path_style: `endpoint/bucket/key` instead of `bucket.endpoint/key`; by default where `endpoint_url` is given.
        put_options: More arguments of PutObject, such as `{"ServerSideEncryption": "aws:kms"}`.
        connections: Requests under way at once.
        **options: As for `BaseTracker`.

    Raises:
        InvalidValueError: An argument cannot be taken.
    """

    _times: Times | None = None

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        *,
        shards: int | None = None,
        client: Any = None,
        session: Any = None,
        endpoint_url: str | None = None,
        region: str | None = None,
        profile: str | None = None,
        path_style: bool | None = None,
        put_options: Mapping[str, Any] | None = None,
        connections: int = CONNECTIONS,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if shards is not None and (
            isinstance(shards, bool) or not isinstance(shards, int) or not 1 <= shards <= MAX_SHARDS
        ):
            raise InvalidValueError(f"shards takes an int from 1 to {MAX_SHARDS}, not {shards!r}")
        s3_options = S3Options(
            client=client,
            session=session,
            endpoint_url=endpoint_url,
            region=region,
            profile=profile,
            path_style=path_style,
            put_options=put_options or {},
            connections=connections,
            request_time=min(REQUEST_TIME, max(0.2, self._patience / 2)),
        )
        self._wanted_shards = shards
        self._store = S3Store(bucket, prefix, s3_options, self.clock)
        self._pumps: list[Pump[Wanted]] = []

    @property
    def shards(self) -> int:
        """How many logs the store has.

        Raises:
            StoreError: The tracker is not open.
        """
        return len(self._opened())

    # -- the contract

    async def connect(self, stack: AsyncExitStack) -> None:
        store = self._store
        await store.connect(stack)
        wanted = self._wanted_shards
        new = None if self.read_only else {"shards": wanted or SHARDS}
        settings = await store.identify(LAYOUT, new, read_only=self.read_only)
        if not settings:
            raise StoreError(f"there is no store at {store!r}; nothing is created with read_only=True")
        count = settings.get("shards")
        if not isinstance(count, int) or not 1 <= count <= MAX_SHARDS:
            raise StoreError(f"{store!r} has {count!r} shards, which no release of aiotracker makes")
        if wanted not in (None, count):
            raise StoreError(
                f"{store!r} was made with shards={count}, which cannot be changed: leave shards= away, or copy its "
                "tasks to a new store"
            )
        self.clock_uncertainty = store.uncertainty
        writer, observer = secrets.token_hex(6), self.observer
        shards = [
            Shard(
                store,
                number,
                writer=writer,
                now=self.now,
                patience=self._patience,
                limit=self.max_record_bytes,
                read_only=self.read_only,
                times=self._times,
                committed=None if observer is None else observer.committed,
                conflicted=None if observer is None else observer.conflicted,
            )
            for number in range(count)
        ]
        pumps = [
            Pump(
                shard.commit,
                orphaned=lambda want: orphaned(want, self.new_id()),
                blame=shard.blame,
                patience=self._patience,
                name=f"{store!r}: commits of shard {shard.number}",
                max_items=MAX_ITEMS,
                pace=shard.pace,
            )
            for shard in shards
        ]

        async def close() -> None:
            self._pumps = []
            await asyncio.gather(*(pump.aclose() for pump in pumps))
            await asyncio.gather(*(shard.aclose() for shard in shards))

        stack.push_async_callback(close)
        self._pumps = pumps

    def submit(self, want: Wanted) -> "asyncio.Future[Any]":
        pumps = self._opened()
        pump = pumps[shard_of(want.task_id, len(pumps))]
        return pump.submit(want, urgent=type(want.transition) is Renew)

    async def _look(self, look: Callable[[Index], Any]) -> list[Any]:
        answers = [pump.submit(Wanted(look=look)) for pump in self._opened()]
        return list(await asyncio.gather(*answers))

    def _opened(self) -> list[Pump[Wanted]]:
        if not self._pumps:
            raise StoreError("this S3LogTracker is not open; use `async with`, or await open()")
        return self._pumps
