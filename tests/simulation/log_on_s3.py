"""The log on S3 in simulated time: writers that stall, freeze and die, on a store that loses answers.

Everything follows from one seed. What must hold is said by `Oracle`, and, of leases, by `Leases`.
"""

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from types import SimpleNamespace
from typing import Any, Final
from unittest import mock

from aiotracker import OutcomeUnknownError, Status, StoreUnavailableError, Task
from aiotracker.backends import _archive, _pump, _segments, _shard
from aiotracker.backends._log import Index, Wanted
from aiotracker.backends._segments import Times, number_of, shard_of
from tests.services.simulated_s3 import Process, SimulatedStore, simulated_time

from .oracle import Broken, Oracle, Seen, seen_of

__all__ = ["simulate"]

TIMES: Final = Times(trust=20.0, keep=120.0)
MARGIN: Final = 10.0  # seconds for which nobody takes over a lease that has run out: no two clocks differ by more
SKEW: Final = 1.0  # seconds by which a process's view of the store's time is off, at the most
# Longer than what is trusted, and than what is kept.
LONG: Final = (8.0, 25.0, 60.0, 150.0, 400.0, 7200.0)
JUMPS: Final = (-2.0, 30.0, 130.0, 3600.0, 4 * 3600.0)


class Step:
    """One thing that happens to a task: its lease is taken, kept or given back, or a word is added.

    Done once only; where `again`, whether it was done is asked first.
    """

    def __init__(self, task_id: str, kind: str, who: str, name: str, ttl: float) -> None:
        self.task_id = task_id
        self.kind = kind
        self.who = who
        self.name = name
        self.ttl = ttl
        self.again = False

    def __call__(self, task: Task | None, now: datetime) -> Task | None:
        seen = seen_of(task)
        if self.again and self.name in seen:
            return task
        holder, until = holder_of(task)
        at = now.timestamp()
        if self.kind == "take" and at < until + MARGIN:
            return task
        if self.kind in ("keep", "give") and (holder != self.who or at >= until):
            return task
        if self.kind != "add":
            holder, until = (self.who, at + self.ttl) if self.kind != "give" else ("", 0.0)
        data = {"seen": [*seen, self.name], "held": [holder, until]}
        if task is None:
            return Task(id=self.task_id, status=Status.PENDING, data=data, create_time=now, update_time=now)
        return task.replace(data=data)


def holder_of(task: Task | None) -> tuple[str, float]:
    """Who holds its lease, and until when by the store's clock."""
    return ("", 0.0) if task is None else tuple(task.data["held"])


class Leases:
    """What those who hold a lease rely on: until their own clock says that it has run out nobody else is let in."""

    def __init__(self, store: "Store") -> None:
        self._store = store
        self._live: dict[str, dict[str, tuple[float, float]]] = {}  # by id and holder: until when, and by which clock
        self._leaving: Counter[tuple[str, str]] = Counter()

    def entered(self, task_id: str, who: str, until: float, shift: float) -> None:
        now = asyncio.get_running_loop().time()
        if until <= now or self._leaving[task_id, who]:
            return  # answered too late: not entered
        live = self._live.setdefault(task_id, {})
        for other, (end, clock) in live.items():
            # A clock that was set ahead ends all leases: that is not the log's fault.
            if other != who and end > now and clock == self._store.shift:
                raise Broken(f"{task_id} is held by {other} for {end - now:.1f} s, and {who} was let in")
        live[who] = (until, shift)

    def leaves(self, task_id: str, who: str) -> None:
        """It will not rely on it any more, until `left`, which whoever is not answered does not come to."""
        self._leaving[task_id, who] += 1
        self._live.get(task_id, {}).pop(who, None)

    def left(self, task_id: str, who: str) -> None:
        self._leaving[task_id, who] -= 1


class Store(SimulatedStore):
    """One that may keep only the half of what it is to keep, and counts what happens to it."""

    def __init__(self, seed: int, **options: Any) -> None:
        super().__init__(seed, **options)
        self.spoilt = 0.0  # the share of checkpoints that are not stored as they were sent
        self.ghosts = self.deleted = self.segments = 0
        self._highest: dict[str, int] = {}

    def put(self, key: str, body: bytes, absent: bool, match: str | None) -> str:
        if self.spoilt and key.startswith("checkpoints/") and self.chance.random() < self.spoilt:
            body = body[: len(body) // 2]
        etag = super().put(key, body, absent, match)
        if key.startswith("log/"):
            prefix = key[:7]
            number = number_of(key, prefix)
            assert number is not None
            highest = self._highest.get(prefix, 0)
            self.segments += 1
            self.ghosts += number <= highest
            self._highest[prefix] = max(number, highest)
        return etag

    def delete(self, key: str) -> None:
        self.deleted += key in self.objects and key.startswith("log/")
        super().delete(key)

    def jump(self, seconds: float) -> None:
        self.shift += seconds
        assert self.trace is not None
        self.trace.append(f"{asyncio.get_running_loop().time():10.3f} the store's clock is set by {seconds:+g} s")


class Run:
    """One seed.

    Attributes:
        trace: What happened, for people.
        losses: Of processes, by kills.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        chance = self.chance = random.Random(seed)
        self.trace: list[str] = []
        self.store = store = Store(
            seed,
            lost=chance.choice((0.0, 0.02, 0.1)),
            late=chance.choice((0.0, 0.02, 0.1)),
            late_by=chance.choice((1.0, 20.0, 400.0)),
            refused=chance.choice((0.0, 0.05)),
            dateless=chance.choice((0.0, 0.0, 0.1, 0.4)),
        )
        store.spoilt = chance.choice((0.0, 0.0, 0.3))
        store.trace = self.trace
        self.oracle = Oracle()
        self.leases = Leases(store)
        self.losses = 0
        self._serial = 0
        self._names = 0
        self._last: list[Process] = []  # those that live until the end
        self._shards = chance.choice((1, 1, 2))
        self._ids = [f"task-{n}" for n in range(chance.choice((1, 2, 3)))]
        self._slots = chance.choice((2, 2, 3))
        self._lives = chance.choice((1, 2, 3))
        self._rounds = chance.randrange(6, 24)
        self._patience = chance.choice((0.5, 5.0, 10_000.0))
        self._ttl = chance.choice((3.0, 20.0, 200.0))
        self._sleepy = chance.choice((0.03, 0.1))
        self._stalls = chance.choice((0.0, 0.05, 0.1))
        self._freezes = chance.choice((0.0, 0.03))
        self._kills = chance.choice((0.0, 0.5, 0.9))
        self._jumps = chance.choice((0, 0, 1, 3))
        # So that a log of some segments goes through all that a large one does.
        self.worth = chance.choice((0.4, 1.0))

    @property
    def commits(self) -> int:
        """Segments that were put."""
        return self.store.segments

    async def main(self) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)  # of what is left behind
        tasks = [asyncio.create_task(self._slot()) for _ in range(self._slots)]
        clock = asyncio.create_task(self._set_clock())
        try:
            await asyncio.gather(*tasks)
            clock.cancel()
            await self._end()
        finally:
            self.store.end()
            for task in (*tasks, clock):
                task.cancel()
            for _ in range(5):
                await asyncio.sleep(0)

    async def _set_clock(self) -> None:
        for _ in range(self._jumps):
            await asyncio.sleep(self.chance.expovariate(1 / 60))
            self.store.jump(self.chance.choice(JUMPS))

    async def _end(self) -> None:
        """Whatever has happened: those who are left and who comes now find all that was promised, and the same."""
        store = self.store
        store.lost = store.late = store.refused = store.dateless = store.spoilt = 0.0
        last = [*self._last, self._process(read_only=True)]
        for process in last:
            process.client.stall = 0.0
        if self.chance.random() < 0.5:
            await asyncio.sleep(max(LONG))
        for process in (*last, *last):
            for _ in range(1000):
                if await self._look(process):
                    break
                await asyncio.sleep(max(LONG) / 100)
            else:
                raise Broken(f"{process.client.name} is not answered, although nothing is wrong any more")
        for process in last:
            await process.aclose()

    # -- processes

    def _process(self, **options: Any) -> Process:
        self._names += 1
        process = Process(
            self.store,
            shards=self._shards,
            writer=f"w{self._names}",
            patience=self._patience,
            times=TIMES,
            **options,
        )
        process.client.skew = self.chance.uniform(-SKEW, SKEW)
        return process

    async def _slot(self) -> None:
        for life in range(self._lives):
            process = self._process(read_only=self.chance.random() < 0.1)
            client = process.client
            if self.chance.random() < self._kills:
                client.dies_at = self.chance.randrange(1, 100)
            living = asyncio.create_task(self._live(process))
            try:
                await asyncio.wait({living, client.killed}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                if not living.done():
                    living.cancel()
                    await asyncio.wait({living})
            if not living.cancelled():
                living.result()
            if client.killed.done():
                self.losses += 1
            elif life + 1 == self._lives:
                client.dies_at = None
                self._last.append(process)
            elif self.chance.random() < 0.5:
                await process.aclose()
            else:
                self.losses += 1
                client.die()

    async def _live(self, process: Process) -> None:
        chance, client, loop = self.chance, process.client, asyncio.get_running_loop()
        for _ in range(self._rounds):
            if chance.random() < self._sleepy:
                await asyncio.sleep(chance.choice(LONG))
            elif chance.random() < 0.5:
                await asyncio.sleep(chance.uniform(0, 4))
            if chance.random() < self._stalls:
                client.stall = chance.choice(LONG)
            if chance.random() < self._freezes:
                loop.call_later(chance.uniform(0, 0.1), self._freeze, process, chance.choice(LONG))
            if chance.random() < 0.2 or process.shard._read_only:
                await self._look(process)
            elif chance.random() < 0.8:
                await self._act(process)
            else:
                await asyncio.gather(*(self._act(process) for _ in range(3)))

    def _freeze(self, process: Process, seconds: float) -> None:
        process.client.frozen_until = asyncio.get_running_loop().time() + seconds
        self._note(process, f"stands still for {seconds:g} s")

    async def _act(self, process: Process) -> None:
        chance, who = self.chance, process.client.name
        kind = chance.choice(("add", "take", "take", "keep", "give"))
        task_id, self._serial = chance.choice(self._ids), self._serial + 1
        step = Step(task_id, kind, who, f"{kind} {who} {self._serial}", self._ttl)
        if kind == "give":
            self.leases.leaves(task_id, who)
        while True:
            promised = {task_id: self.oracle.told.get(task_id, ())}
            until, shift = asyncio.get_running_loop().time() + self._ttl, process.client.shift
            self._note(process, f"asks for {step.name!r} of {task_id}")
            try:
                task = await process.submit(Wanted(task_id, step, f"{step.name} {step.again}"))
            except (StoreUnavailableError, OutcomeUnknownError) as exc:
                self._note(process, f"is told of {step.name!r}: {type(exc).__name__}: {exc}")
                if chance.random() < 0.5:
                    return
                step.again = True
                continue
            break
        seen = seen_of(task)
        self._note(process, f"is told of {step.name!r}: {list(seen[-3:])}")
        self._check(who, task_id, seen, promised)
        if kind == "give":
            self.leases.left(task_id, who)
        if step.name not in seen:
            if kind == "add":
                raise Broken(f"{who} was told that {step.name!r} is done, and it is not in {seen}")
        elif kind in ("take", "keep") and not step.again and seen[-1] == step.name:
            self.leases.entered(task_id, who, until, shift)

    async def _look(self, process: Process) -> bool:
        """Whether it was told what is there."""
        is_told = True
        for number, pump in enumerate(process.pumps):
            promised = {
                task_id: seen for task_id, seen in self.oracle.told.items() if shard_of(task_id, self._shards) == number
            }
            try:
                state = await pump.submit(Wanted(look=_state))
            except (StoreUnavailableError, OutcomeUnknownError) as exc:
                self._note(process, f"is not told what is there: {exc}")
                is_told = False
                continue
            self._note(
                process, f"sees shard {number}: { {task_id: list(seen[-2:]) for task_id, seen in state.items()} }"
            )
            for task_id in sorted(promised.keys() | state.keys()):
                self._check(process.client.name, task_id, state.get(task_id, ()), promised)
        return is_told

    def _check(self, who: str, task_id: str, seen: Seen, promised: dict[str, Seen]) -> None:
        if len(set(seen)) != len(seen):
            raise Broken(f"{who} sees that something was done twice: {seen}")
        self.oracle.answer(who, task_id, seen, promised)

    def _note(self, process: Process, what: str) -> None:
        self.trace.append(f"{asyncio.get_running_loop().time():10.3f} {process.client.name} {what}")


def _state(index: Index) -> dict[str, Seen]:
    return {task_id: seen_of(index.get(task_id)) for task_id in index.entries}


@contextmanager
def _simulated(run: Run, loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    tokens = random.Random(run.seed)
    with (
        mock.patch.multiple(_shard, WORTH=run.worth),
        mock.patch.multiple(_segments, SPACING=10.0, PART_BYTES=700, CHUNK_BYTES=300, LINES=2),
        mock.patch.object(
            _archive, "secrets", SimpleNamespace(token_hex=lambda size: f"{tokens.getrandbits(8 * size):x}")
        ),
        mock.patch.object(_pump, "time", SimpleNamespace(monotonic=loop.time)),
    ):
        yield


def simulate(seed: int) -> Run:
    """Runs one seed.

    Raises:
        AssertionError: A promise was broken, with `trace`: what led to it.
    """
    run = Run(seed)
    logger = logging.getLogger("aiotracker")
    was_off, logger.disabled = logger.disabled, True  # checkpoints that fail and logs read again are what this is about
    state = random.getstate()
    random.seed(seed)  # of the pauses between tries
    try:
        with simulated_time() as runner, _simulated(run, runner.get_loop()):
            runner.run(run.main())
    except Exception as exc:
        exc.trace = run.trace  # type: ignore[attr-defined]  # for who replays it
        raise
    finally:
        random.setstate(state)
        logger.disabled = was_off
    return run
