"""An object store in memory, in a time of its own: an hour passes in a moment, and the same seed gives the same run.

with simulated_time() as runner:
    runner.run(main())                              # in there, waiting takes no time at all

store = SimulatedStore(seed)
Shard(SimulatedClient(store), ...)                  # one client for each process
"""

import asyncio
import random
import selectors
from collections import Counter
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from typing import Any, NamedTuple, TypeVar

from aiotracker import ConflictError, StoreUnavailableError
from aiotracker.backends._s3 import BusyError

__all__ = ["BEGIN", "Object", "SimulatedClient", "SimulatedStore", "simulated_time"]

T = TypeVar("T")

BEGIN = 1_800_000_000.0  # the store's time in seconds since 1970, when the loop's is 0


class _Selector(selectors.SelectSelector):
    """Does not wait: the time is over at once."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        found = super().select(0)
        if not found and timeout is not None:
            self.now += max(0.0, timeout)
        elif not found:
            raise RuntimeError("everybody waits, and nothing will happen")
        return found


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._simulated = _Selector()
        super().__init__(self._simulated)

    def time(self) -> float:
        return self._simulated.now

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> "asyncio.Future[T]":  # type: ignore[override]  # typeshed has it as a coroutine's type variables
        future = self.create_future()
        future.set_result(func(*args))
        return future


def simulated_time() -> asyncio.Runner:
    """Runs coroutines where waiting takes no time, and threads do their work at once."""
    return asyncio.Runner(loop_factory=_Loop)


class Object(NamedTuple):
    """What is stored under a key."""

    body: bytes
    etag: str
    modified: datetime


class Entry(NamedTuple):
    """A line of a listing."""

    key: str


class SimulatedStore:
    """The store.

    Args:
        seed: Of latencies and faults.
        latency: Seconds for a request there and back, at the least and at the most.
        lost: The share of requests that are done, and whose answers are lost.
        late: The share of requests that are given up, and are done some time later.
        late_by: Seconds, at the most.
        refused: The share that is refused for now.

    Attributes:
        objects: What is stored, by key.
        shift: Seconds by which the store's clock is ahead of what it would be.
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        latency: tuple[float, float] = (0.004, 0.012),
        lost: float = 0.0,
        late: float = 0.0,
        late_by: float = 5.0,
        refused: float = 0.0,
    ) -> None:
        self.objects: dict[str, Object] = {}
        self.chance = random.Random(seed)
        self.latency = latency
        self.lost, self.late, self.late_by, self.refused = lost, late, late_by, refused
        self.shift = 0.0
        self._etags = 0

    def now(self) -> datetime:
        """Its own time."""
        return datetime.fromtimestamp(BEGIN + asyncio.get_running_loop().time() + self.shift, UTC)

    def get(self, key: str) -> Object | None:
        return self.objects.get(key)

    def put(self, key: str, body: bytes, absent: bool, match: str | None) -> str:
        stored = self.objects.get(key)
        if (absent and stored is not None) or (match is not None and (stored is None or stored.etag != match)):
            raise ConflictError(f"{key} has changed")
        self._etags += 1
        self.objects[key] = Object(bytes(body), f"e{self._etags}", self.now().replace(microsecond=0))
        return f"e{self._etags}"

    def delete(self, key: str) -> None:
        self.objects.pop(key, None)

    def keys(self, prefix: str) -> list[str]:
        return sorted(key for key in self.objects if key.startswith(prefix))


class SimulatedClient:
    """The store, as one process sees it.

    Attributes:
        requests: How many were sent, by operation.
        stall: Seconds by which the next PUT arrives late.
    """

    def __init__(self, store: SimulatedStore) -> None:
        self.store = store
        self.answered: float | None = None
        self.requests: Counter[str] = Counter()
        self.stall = 0.0

    def __repr__(self) -> str:
        return "s3://simulated/"

    async def get(self, key: str) -> Object | None:
        return await self._send("get", lambda: self.store.get(key))

    async def put(self, key: str, body: bytes, *, absent: bool = False, match: str | None = None) -> str:
        stall, self.stall = self.stall, 0.0
        return await self._send("put", lambda: self.store.put(key, body, absent, match), stall)

    async def delete(self, key: str) -> None:
        await self._send("delete", lambda: self.store.delete(key))

    async def pages(self, prefix: str) -> AsyncIterator[list[Entry]]:
        keys: list[str] = await self._send("list", lambda: self.store.keys(prefix))
        for first in range(0, len(keys), 1000):
            yield [Entry(key) for key in keys[first : first + 1000]]

    async def _send(self, operation: str, act: Callable[[], T], stall: float = 0.0) -> T:
        store, chance, loop = self.store, self.store.chance, asyncio.get_running_loop()
        self.requests[operation] += 1
        there, back = (chance.uniform(*store.latency) / 2 for _ in range(2))
        await asyncio.sleep(there + stall)
        fate = chance.random()
        if (fate := fate - store.late) < 0:
            loop.call_later(chance.uniform(0, store.late_by), _swallow, act)
            raise StoreUnavailableError("no answer")
        if (fate := fate - store.refused) < 0:
            raise BusyError("slow down")
        result, error = None, None
        try:
            result = act()
        except ConflictError as exc:
            error = exc
        date = float(int(store.now().timestamp()))
        await asyncio.sleep(back)
        if fate - store.lost < 0:
            raise StoreUnavailableError("the answer was lost")
        self.answered = date
        if error is not None:
            raise error
        return result  # type: ignore[return-value]  # there was no error


def _swallow(act: Callable[[], object]) -> None:
    try:
        act()
    except ConflictError:
        pass
