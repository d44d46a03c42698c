"""What goes wrong between a tracker and its store, on purpose."""

import asyncio
import random
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from datetime import datetime
from typing import Any

from typing_extensions import TypeVar

from .._core.query import Query
from .._core.task import Task
from ..contract import Claimable
from ..errors import StoreUnavailableError, TrackerError
from ..tracker import BaseTracker

__all__ = ["Behaviour", "Call", "Faults", "FaultyTracker", "delayed", "reply_lost", "unreachable"]

D = TypeVar("D", default=Any)
R = TypeVar("R", default=Any)

Call = Callable[[], Awaitable[Any]]
Behaviour = Callable[[Call], Awaitable[Any]]
"""What happens to one request: it is given the request, may make it, or not, and answers or raises."""


async def reply_lost(call: Call) -> Any:
    """The request is done, or refused, and nobody learns of it."""
    with suppress(TrackerError):
        await call()
    raise StoreUnavailableError("injected: the reply was lost")


async def unreachable(call: Call) -> Any:
    """The request never arrives."""
    raise StoreUnavailableError("injected: the store cannot be reached")


def delayed(seconds: float) -> Behaviour:
    """The request arrives late.

    Args:
        seconds: Of the event loop's clock.
    """

    async def behave(call: Call) -> Any:
        await asyncio.sleep(seconds)
        return await call()

    return behave


async def _well(call: Call) -> Any:
    return await call()


class Faults:
    """A plan of what goes wrong: first what `script` says, then by chance.

    Args:
        seed: Of the chances; the same seed gives the same faults for the same requests.
        reply_lost: The share of requests that are done without an answer, from 0 to 1.
        unreachable: The share of requests that never arrive.
        delay: Up to how many seconds a request is late.

    Attributes:
        requests: What was asked so far: the method, the id and the name of what happened.
    """

    def __init__(self, seed: int = 0, *, reply_lost: float = 0.0, unreachable: float = 0.0, delay: float = 0.0) -> None:
        self.requests: list[tuple[str, str, str]] = []
        self._random = random.Random(seed)
        self._reply_lost = reply_lost
        self._unreachable = unreachable
        self._delay = delay
        self._scripts: dict[str, deque[Behaviour | None]] = defaultdict(deque)

    def script(self, method: str, *behaviours: Behaviour | None) -> None:
        """What happens to the next requests.

        Args:
            method: `load`, `dump` or `delete`.
            *behaviours: One for each request, in their order; `None`: nothing goes wrong. `reply_lost`,
                `unreachable`, `delayed(...)`, or a function of your own.
        """
        self._scripts[method].extend(behaviours)

    async def request(self, method: str, task_id: str, call: Call) -> Any:
        """Makes a request as the plan says."""
        script = self._scripts[method]
        behaviour = (script.popleft() or _well) if script else self._by_chance()
        self.requests.append((method, task_id, behaviour.__name__.lstrip("_")))
        return await behaviour(call)

    def _by_chance(self) -> Behaviour:
        chance = self._random.random()
        if chance < self._reply_lost:
            return reply_lost
        if chance < self._reply_lost + self._unreachable:
            return unreachable
        return delayed(self._random.uniform(0, self._delay)) if self._delay else _well


class FaultyTracker(BaseTracker[D, R]):
    """A tracker whose `load`, `dump` and `delete` reach another one's as a plan of faults says.

    Everything else is what the contract makes of these three.

    Args:
        inner: Whose store is used; opened and closed with this one.
        faults: The plan.
        **options: As for `BaseTracker`; by default those of `inner`.
    """

    def __init__(self, inner: BaseTracker[D, R], faults: Faults, **options: Any) -> None:
        given = {
            name: getattr(inner, name) for name in ("lease", "retry", "data_type", "result_type", "clock", "worker")
        }
        super().__init__(**(given | options))
        self.inner = inner
        self.faults = faults
        self.clock_uncertainty = inner.clock_uncertainty

    async def connect(self, stack: AsyncExitStack) -> None:
        await stack.enter_async_context(self.inner)

    def now(self) -> datetime:
        return self.inner.now()

    async def load(self, task_id: str) -> Task | None:
        task: Task | None = await self.faults.request("load", task_id, lambda: self.inner.load(task_id))
        return task

    async def dump(self, task: Task) -> Task:
        stored: Task = await self.faults.request("dump", task.id, lambda: self.inner.dump(task))
        return stored

    async def delete(self, task: Task) -> None:
        await self.faults.request("delete", task.id, lambda: self.inner.delete(task))

    def scan(self, query: Query) -> AsyncIterator[Task]:
        return self.inner.scan(query)

    async def claimable(self, limit: int) -> Claimable:
        return await self.inner.claimable(limit)
