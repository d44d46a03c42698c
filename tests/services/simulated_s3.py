"""An object store in memory, in a time of its own: an hour passes in a moment, and the same seed gives the same run.

with simulated_time() as runner:
    runner.run(main())                              # in there, waiting takes no time at all

store = SimulatedStore(seed)
process = Process(store)                            # a client, and the shards of a log on it
"""

import asyncio
import itertools
import random
import selectors
from collections import Counter
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from typing import Any, NamedTuple, TypeVar

from aiotracker import ConflictError, StoreUnavailableError
from aiotracker.backends._log import Wanted
from aiotracker.backends._pump import Pump
from aiotracker.backends._s3 import BusyError
from aiotracker.backends._segments import shard_of
from aiotracker.backends._shard import Shard

__all__ = ["BEGIN", "Object", "Process", "SimulatedClient", "SimulatedStore", "simulated_time"]

T = TypeVar("T")

BEGIN = 1_800_000_000.0  # the store's time in seconds since 1970, when the loop's is 0


class _Selector(selectors.SelectSelector):
    """Does not wait: the time is over at once."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise RuntimeError("everybody waits, and nothing will happen")
        self.now += max(0.0, timeout)
        return []


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
        dateless: The share of answers that do not tell the store's time.

    Attributes:
        objects: What is stored, by key.
        shift: Seconds by which the store's clock is ahead of what it would be.
        trace: Where it is noted, what was asked and answered.
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
        dateless: float = 0.0,
    ) -> None:
        self.objects: dict[str, Object] = {}
        self.chance = random.Random(seed)
        self.latency = latency
        self.lost, self.late, self.late_by, self.refused = lost, late, late_by, refused
        self.dateless = dateless
        self.shift = 0.0
        self.trace: list[str] | None = None
        self._hanging: list[asyncio.Future[None]] = []
        self._is_over = False
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

    async def hang(self) -> None:
        """Where the code of a process that is dead stays."""
        if not self._is_over:
            self._hanging.append(asyncio.get_running_loop().create_future())
            await self._hanging[-1]
        raise asyncio.CancelledError

    def end(self) -> None:
        """Nobody needs it any more, nor what hangs."""
        self._is_over = True
        for future in self._hanging:
            future.cancel()


class SimulatedClient:
    """The store, as one process sees it.

    Attributes:
        requests: How many were sent, by operation.
        stall: Seconds by which the next PUT arrives late.
        frozen_until: By the loop's time: until then the process stands still, but not what it has sent.
        skew: Seconds by which what it takes for the store's time is off.
        shift: Of the store's clock, as the latest answer told it.
        dies_at: The how manyeth of its requests is the last: it is lost, done, or done some time later.
        killed: Is done when the process is dead: it is not answered any more.
    """

    def __init__(self, store: SimulatedStore, name: str = "") -> None:
        self.store = store
        self.name = name
        self.answered: float | None = None
        self.requests: Counter[str] = Counter()
        self.stall = self.frozen_until = self.skew = 0.0
        self.dies_at: int | None = None
        self.killed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.shift = store.shift

    def __repr__(self) -> str:
        return "s3://simulated/"

    def now(self) -> datetime:
        """The store's time as its answers tell it."""
        seconds = BEGIN + asyncio.get_running_loop().time() + self.shift + self.skew
        return datetime.fromtimestamp(seconds, UTC)

    def die(self) -> None:
        """As by SIGKILL: what was sent may still arrive."""
        if not self.killed.done():
            self.killed.set_result(None)
            self._note("is killed")

    async def get(self, key: str) -> Object | None:
        return await self._send("get", key, lambda: self.store.get(key))

    async def put(self, key: str, body: bytes, *, absent: bool = False, match: str | None = None) -> str:
        stall, self.stall = self.stall, 0.0
        return await self._send("put", key, lambda: self.store.put(key, body, absent, match), stall)

    async def delete(self, key: str) -> None:
        await self._send("delete", key, lambda: self.store.delete(key))

    async def pages(self, prefix: str) -> AsyncIterator[list[Entry]]:
        keys: list[str] = await self._send("list", prefix, lambda: self.store.keys(prefix))
        for first in range(0, len(keys), 1000):
            yield [Entry(key) for key in keys[first : first + 1000]]

    async def _send(self, operation: str, key: str, act: Callable[[], T], stall: float = 0.0) -> T:
        store, chance, loop = self.store, self.store.chance, asyncio.get_running_loop()
        await self._go_on()
        self.requests[operation] += 1
        there, back = (chance.uniform(*store.latency) / 2 for _ in range(2))
        if self.dies_at is not None and self.requests.total() >= self.dies_at:
            if chance.random() < 0.7:
                loop.call_later(there + stall + chance.choice((0.0, store.late_by)), _swallow, act)
            self._note(f"{operation} {key}: its last")
            self.die()
            await store.hang()
        await asyncio.sleep(there + stall)
        fate = chance.random()
        if (fate := fate - store.late) < 0:
            loop.call_later(chance.uniform(0, store.late_by), _swallow, act)
            self._note(f"{operation} {key}: is late, and given up")
            await self._go_on()
            raise StoreUnavailableError("no answer")
        if (fate := fate - store.refused) < 0:
            self._note(f"{operation} {key}: slow down")
            await self._go_on()
            raise BusyError("slow down")
        result, error = None, None
        try:
            result = act()
        except ConflictError as exc:
            error = exc
        self._note(f"{operation} {key}: {'there' if error else 'nothing' if result is None else 'done'}")
        date, shift = float(int(store.now().timestamp())), store.shift
        await asyncio.sleep(back)
        await self._go_on()
        if fate - store.lost < 0:
            self._note(f"{operation} {key}: the answer was lost")
            raise StoreUnavailableError("the answer was lost")
        if store.dateless and chance.random() < store.dateless:
            self.answered = None
        else:
            self.answered, self.shift = date, shift
        if error is not None:
            raise error
        return result  # type: ignore[return-value]  # there was no error

    async def _go_on(self) -> None:
        if (pause := self.frozen_until - asyncio.get_running_loop().time()) > 0:
            await asyncio.sleep(pause)
        if self.killed.done():
            await self.store.hang()

    def _note(self, what: str) -> None:
        if self.store.trace is not None:
            self.store.trace.append(f"{asyncio.get_running_loop().time():10.3f} {self.name} {what}")


def _swallow(act: Callable[[], object]) -> None:
    try:
        act()
    except ConflictError:
        pass


class Process:
    """A process that uses a log.

    Args:
        store: Where that is.
        shards: Of the log.
        writer: Names it; by default, as no other one in this run of the tests.
        patience: Seconds for which a request is tried again.
        **options: Of each `Shard`.
    """

    names = itertools.count()

    def __init__(
        self, store: SimulatedStore, *, shards: int = 1, writer: str = "", patience: float = 20.0, **options: Any
    ) -> None:
        writer = writer or f"w{next(self.names):03}"
        self.client = SimulatedClient(store, writer)
        self.shards = [
            Shard(self.client, n, writer=writer, now=self.client.now, patience=patience, limit=1 << 20, **options)
            for n in range(shards)
        ]
        self.pumps: list[Pump[Wanted]] = [
            Pump(
                shard.commit,
                orphaned=lambda want: None,
                blame=shard.blame,
                patience=patience,
                name="a process",
                pace=shard.pace,
            )
            for shard in self.shards
        ]

    @property
    def shard(self) -> Shard:
        """The first one."""
        return self.shards[0]

    def submit(self, want: Wanted) -> "asyncio.Future[Any]":
        """Commits in the shard that the id is in."""
        return self.pumps[shard_of(want.task_id, len(self.pumps))].submit(want)

    async def aclose(self) -> None:
        for pump in self.pumps:
            await pump.aclose()
        for shard in self.shards:
            await shard.aclose()
