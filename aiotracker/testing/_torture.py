"""Real worker processes on one store, to which everything bad happens at random; what they did is judged afterwards."""

import asyncio
import functools
import heapq
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AsyncExitStack
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import msgspec

from .._core.task import Task
from ..errors import StoreUnavailableError
from ..tracker import BaseTracker
from ._history import Event, Violation, check_history, read_history
from ._nursery import Nursery
from ._proxy import CutProxy, can_be_cut
from ._stores import open_store
from ._worker import FINAL, LEDGER, POISON_ATTEMPTS, SLOT, Settings, task_ids

__all__ = ["Rates", "Report", "torture"]

TASKS: Final = 2000
MIN_TASKS: Final = 100  # by default
MIN_LEASE: Final = 2.0  # seconds, by default
MAX_LEASE: Final = 30.0  # seconds, by default
CLOCK_SKEW: Final = 0.5  # seconds
MAX_ATTEMPTS: Final = 200
STALL_TIME: Final = 60.0  # seconds, and some leases, in which workers that nobody disturbs bring some task to its end
STALL_LEASES: Final = 10
IN_TURNS: Final = "s3+log:"  # each write takes a request, and only one writer at a time makes one
CONCURRENCY: Final = 16
LOW_CONCURRENCY: Final = 4  # where the store is too slow for that
MAX_PACE: Final = 0.6  # seconds that a body takes on average, at the most
WINDOW: Final = 100  # tasks that are read at once
NAMED: Final = 3  # violations of each promise that are printed
DRIVERS: Final = {
    "postgresql": "asyncpg",
    "postgres": "asyncpg",
    "redis": "redis",
    "s3": "aioboto3",
    "s3+log": "aioboto3",
    "dynamodb": "aioboto3",
}


class Rates(msgspec.Struct, frozen=True):
    """How often what is done, in times a second.

    Attributes:
        kills: SIGKILL, of workers that are neither stopped nor blocked.
        stops: SIGSTOP, mostly for longer than a lease, then SIGCONT.
        blocks: Of an event loop, mostly for longer than a lease.
        shifts: Of a worker's wall clock, half of them beyond `clock_skew`.
        cancels: Of a body, a third of them twice.
        cuts: Of the network, where there is one.
        restarts: Of the server, where it is known how.
    """

    kills: float = 5.0
    stops: float = 0.5
    blocks: float = 0.3
    shifts: float = 1.0
    cancels: float = 3.0
    cuts: float = 0.2
    restarts: float = 0.1


USUAL: Final = Rates()


class Report(msgspec.Struct):
    """What a torture came to."""

    store: str  # the scheme of its URL
    workers: int
    tasks: int
    seconds: float  # all of it
    kills: int = 0
    poisoned: int = 0  # workers killed by a task
    stops: int = 0
    blocks: int = 0
    shifts: int = 0
    cancels: int = 0
    cuts: int = 0
    restarts: int = 0
    ops: int = 0  # events that workers wrote down
    events: dict[str, int] = {}
    statuses: dict[str, int] = {}  # of the tasks in the end
    slow: int = 0  # times that the store did not answer, or too late for a lease
    lease: float = 0.0  # seconds
    refused_effects: int = 0  # effects of stale holders, refused by their fence
    violations: list[Violation] = []
    seed: int = 0
    folder: str = ""  # where the histories are
    versions: dict[str, str] = {}

    @property
    def ok(self) -> bool:
        """Every promise was kept."""
        return not self.violations

    def __str__(self) -> str:
        faults = ("kills", "poisoned", "stops", "blocks", "shifts", "cancels", "cuts", "restarts")
        lines = [
            f"{self.tasks:,} tasks, {self.workers} workers, {self.seconds:.1f} s: "
            + ", ".join(f"{getattr(self, name)} {name}" for name in faults),
            f"leases of {self.lease:g} s; the store answered too late {self.slow:,} times",
            "events: " + ", ".join(f"{count:,} {kind}" for kind, count in sorted(self.events.items())),
            "tasks: " + ", ".join(f"{count:,} {status}" for status, count in sorted(self.statuses.items())),
        ]
        by_rule: dict[str, list[Violation]] = {}
        for violation in self.violations:
            by_rule.setdefault(violation.rule, []).append(violation)
        for rule, found in by_rule.items():
            lines.append(f"BROKEN {rule}: {len(found):,}")
            lines += [f"  {violation.task}: {violation.reason}" for violation in found[:NAMED]]
        lines.append("every promise was kept" if self.ok else f"seed {self.seed}; the histories are in {self.folder}")
        return "\n".join(lines)

    def line(self) -> str:
        """All of it as a line of JSON."""
        return msgspec.json.encode(self).decode()


async def torture(
    reference: str,
    *,
    workers: int = 8,
    tasks: int | None = None,
    seconds: float = 60.0,
    seed: int = 0,
    folder: Path | None = None,
    say: Callable[[str], object] = lambda line: None,
    rates: Rates = USUAL,
    restart: str | Callable[[], object] | None = None,
    lease: float | None = None,
) -> Report:
    """Lets workers loose on a store, does to them what machines and networks do, and judges what they did.

    Args:
        reference: Of an empty store, as for `open_store`.
        workers: Processes at once; a killed one is replaced.
        tasks: How many; one in 400 kills whoever runs it. By default 2,000, and fewer where the store is slow.
        seconds: How long they are disturbed; then they may finish, for as long as they get anywhere.
        seed: Of the disturbances.
        folder: Where the histories are written; by default a temporary one, which is kept if a promise was broken.
        say: Is told how it goes.
        rates: How often what is done.
        restart: Restarts the store's server, and returns when it answers again: a function, called in a thread, or a
            command of the shell.
        lease: Of the workers, in seconds. By default 2, and longer where the store is slow.
    """
    histories = folder or Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="aiotracker-torture-"))
    async with await asyncio.to_thread(open_store, reference) as tracker:  # it may import a driver
        speed = await _measure(tracker)
        settings = _settings(
            reference,
            str(histories),
            workers=workers,
            tasks=tasks,
            seconds=seconds,
            seed=seed,
            lease=lease,
            speed=speed,
        )
        ids = task_ids(settings)
        added = await _add(tracker, ids)
    tasks = settings.tasks
    say(f"{tasks:,} tasks and leases of {settings.lease:g} s, since the store takes {speed}")
    began = time.monotonic()
    async with AsyncExitStack() as stack:
        proxy = await stack.enter_async_context(CutProxy(reference)) if can_be_cut(reference) else None
        through = reference if proxy is None else proxy.reference
        settings = msgspec.structs.replace(settings, begun=began, reference=through)
        crew = _Crew(settings, workers, rates, proxy, restart, asyncio.get_running_loop())
        await asyncio.to_thread(crew.run, seconds, say)
    events = added + await asyncio.to_thread(_histories, histories)
    async with open_store(reference) as tracker:
        records = await _records(tracker, ids)
    poison = {task_id: POISON_ATTEMPTS for task_id in ids if task_id.startswith("poison")}
    violations = await asyncio.to_thread(
        functools.partial(
            check_history,
            events,
            records,
            max_attempts=MAX_ATTEMPTS,
            # Tasks that nobody ends although the store answers are stuck.
            finished=crew.stalled_at is None or not _slow_since(events, crew.stalled_at),
            poison=poison,
        )
    )
    if crew.stalled_at is not None:
        violations.append(_stalled(records, events, crew.stalled_at))
    violations += [Violation("*", "workers end well", error) for error in crew.errors]
    if folder is None and not violations:
        await asyncio.to_thread(shutil.rmtree, histories)
    kinds = Counter(event.kind for event in events)
    return Report(
        store=reference.partition(":")[0],
        workers=workers,
        tasks=tasks,
        seconds=round(time.monotonic() - began, 1),
        kills=crew.done["kills"],
        poisoned=crew.done["poisoned"],
        stops=crew.done["stops"],
        blocks=kinds["blocked"],
        shifts=kinds["shifted"] + kinds["shifted_beyond"],
        cancels=kinds["cancelled"],
        cuts=crew.done["cuts"],
        restarts=crew.done["restarts"],
        ops=len(events),
        events=dict(Counter(event.outcome if event.kind == "ended" else event.kind for event in events if event.task)),
        statuses=dict(Counter("gone" if task is None else str(task.status) for task in records.values())),
        slow=kinds["slow"],
        lease=settings.lease,
        refused_effects=sum(event.kind == "effect" and not event.accepted for event in events),
        violations=violations,
        seed=seed,
        folder=str(histories),
        versions=await asyncio.to_thread(_versions, reference),
    )


def _versions(reference: str) -> dict[str, str]:
    found = {"python": sys.version.split()[0], "aiotracker": version("aiotracker")}
    driver = DRIVERS.get(reference.partition(":")[0])
    if driver is not None:
        try:
            found[driver] = version(driver)
        except PackageNotFoundError:
            found[driver] = "?"
    return found


class _Speed(msgspec.Struct, frozen=True):
    """Of a store that nobody else uses, in seconds."""

    write: float  # one alone
    read: float  # each of many at once

    def __str__(self) -> str:
        return f"{self.write * 1000:.1f} ms a write and {self.read * 1000:.1f} ms a read"


async def _measure(tracker: BaseTracker[Any, Any]) -> _Speed:
    writes = []
    for number in range(5):
        began = time.perf_counter()
        await tracker.add(f"measured-{number}")
        writes.append(time.perf_counter() - began)
    began = time.perf_counter()
    await asyncio.gather(*(tracker.load(f"task-{number}") for number in range(WINDOW)))
    return _Speed(sorted(writes)[2], (time.perf_counter() - began) / WINDOW)


def _settings(
    reference: str,
    folder: str,
    *,
    workers: int,
    tasks: int | None,
    seconds: float,
    seed: int,
    lease: float | None,
    speed: _Speed,
) -> Settings:
    """What suits the store's speed, as far as nobody has said otherwise.

    Within a sixth of a lease, an S3 store has to answer a request: here also where all bodies ask at once, and four
    times over, since the machine has other things to do. Where writers take turns, all have theirs within a third.
    """
    concurrency = CONCURRENCY if 24 * speed.read * workers * CONCURRENCY <= MIN_LEASE else LOW_CONCURRENCY
    if lease is None:
        in_turns = 40 * speed.write * workers if reference.startswith(IN_TURNS) else 0.0
        lease = round(min(MAX_LEASE, max(MIN_LEASE, 24 * speed.read * workers * concurrency, in_turns)), 1)
    if tasks is None:
        # A task takes about five requests, and as many again for those who ask in vain; or five commits of a log.
        each = 10 * speed.read + (5 * speed.write if reference.startswith(IN_TURNS) else 0.0)
        tasks = int(min(TASKS, max(MIN_TASKS, seconds / each)))
    return Settings(
        reference=reference,
        folder=folder,
        tasks=tasks,
        poison=max(1, tasks // 400),
        seed=seed,
        # So that there is something to disturb all the time.
        pace=min(MAX_PACE, workers * concurrency * seconds / tasks / 4),
        begun=0.0,
        seconds=0.9 * seconds,
        lease=lease,
        clock_skew=CLOCK_SKEW,
        max_attempts=MAX_ATTEMPTS,
        concurrency=concurrency,
    )


def _slow_since(events: list[Event], since: float) -> int:
    """How often the store did not answer in time."""
    return sum(event.time >= since and (event.kind == "slow" or event.outcome == "lost") for event in events)


def _stalled(records: dict[str, Task | None], events: list[Event], since: float) -> Violation:
    left = sum(task is None or not task.status.is_final for task in records.values())
    slow = _slow_since(events, since)
    reason = (
        f"no task came to its end any more, and {left:,} of {len(records):,} are not at theirs; the store answered too "
        f"late {slow:,} times meanwhile"
    )
    if slow:
        reason += ": this says nothing about the store's promises; take a longer lease, or fewer workers and tasks"
    return Violation("*", "not finished in time", reason)


async def _add(tracker: BaseTracker[Any, Any], ids: list[str]) -> list[Event]:
    await tracker.add_many(ids)
    found = await _records(tracker, ids)
    now = time.monotonic()
    return [
        Event(kind="added", task=task.id, fence=task.fence, time=now) for task in found.values() if task is not None
    ]


async def _records(tracker: BaseTracker[Any, Any], ids: list[str]) -> dict[str, Task | None]:
    """What the store holds, however often it has to be asked: whoever disturbs it may disturb us too."""
    found: dict[str, Task | None] = {}

    async def look(task_id: str) -> None:
        until = time.monotonic() + STALL_TIME
        while task_id not in found:
            try:
                found[task_id] = await tracker.load(task_id)
            except StoreUnavailableError:
                if time.monotonic() > until:
                    raise
                await asyncio.sleep(0.1)

    for begin in range(0, len(ids), WINDOW):
        await asyncio.gather(*(look(task_id) for task_id in ids[begin : begin + WINDOW]))
    return found


def _histories(folder: Path) -> list[Event]:
    events: list[Event] = []
    for path in sorted(folder.glob("worker-*.jsonl")):
        with path.open("rb") as file:
            events += read_history(file)
    return events


class _Crew:
    """The worker processes, and what is done to them. Used by one thread."""

    def __init__(
        self,
        settings: Settings,
        workers: int,
        rates: Rates,
        proxy: CutProxy | None,
        restart: str | Callable[[], object] | None,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._settings = settings
        self._workers = workers
        self._rates = rates
        self._proxy = proxy
        self._restart = restart
        self._loop = loop
        self._chance = random.Random(settings.seed)
        self._alive: set[int] = set()
        self._killed: set[int] = set()
        self._spared: dict[int, float] = {}  # stopped or blocked: until when
        self._stopped: dict[int, float] = {}
        self._started = 0
        self._is_done = False
        self.done: Counter[str] = Counter()
        self.errors: list[str] = []
        self.stalled_at: float | None = None  # since when no task came to its end, where they did not finish

    def run(self, seconds: float, say: Callable[[str], object]) -> None:
        """Disturbs workers for some seconds, and lets them finish, for as long as they get anywhere."""
        with open(Path(self._settings.folder, LEDGER), "wb") as ledger:
            ledger.truncate(self._settings.tasks * SLOT)
        self._nursery = Nursery(self._settings)
        try:
            for _ in range(self._workers):
                self._start()
            self._disturb(time.monotonic() + seconds)
            say(f"disturbed for {time.monotonic() - self._settings.begun:.1f} s; now they may finish")
            self._finish()
        finally:
            self._nursery.close()

    def _start(self) -> None:
        self._started += 1
        self._alive.add(self._started)
        self._nursery.start(self._started)

    def _disturb(self, until: float) -> None:
        planned: list[tuple[float, str]] = []
        now = time.monotonic()
        for name, rate in msgspec.structs.asdict(self._rates).items():
            if rate > 0 and self._can(name):
                heapq.heappush(planned, (now + 1 / rate, name))
        while (now := time.monotonic()) < until and not self._is_done:
            self._wake(now)
            self._look(0.0)
            if planned and planned[0][0] <= now:
                due, name = heapq.heappop(planned)
                getattr(self, f"_{name}")(now)
                # Kills come like a clock, the rest at random.
                rate = getattr(self._rates, name)
                pause = 1 / rate if name == "kills" else self._chance.expovariate(rate)
                heapq.heappush(planned, (max(due + pause, now), name))
                continue
            self._look(0.01)

    def _can(self, name: str) -> bool:
        return {"cuts": self._proxy is not None, "restarts": self._restart is not None}.get(name, True)

    def _victim(self, now: float) -> int | None:
        for number in [number for number, until in self._spared.items() if until <= now]:
            del self._spared[number]
        free = sorted(self._alive - self._spared.keys() - self._killed)
        return self._chance.choice(free) if free else None

    def _kills(self, now: float) -> None:
        if (victim := self._victim(now)) is not None:
            self._killed.add(victim)
            self._nursery.signal(victim, signal.SIGKILL)

    def _stops(self, now: float) -> None:
        # Most are left to be killed.
        if len(self._spared) < self._workers // 2 and (victim := self._victim(now)) is not None:
            seconds = self._settings.lease * self._chance.uniform(0.5, 2.0)
            self._nursery.signal(victim, signal.SIGSTOP)
            self._stopped[victim] = now + seconds
            self._spared[victim] = now + seconds + self._settings.lease / 2
            self.done["stops"] += 1

    def _blocks(self, now: float) -> None:
        if len(self._spared) < self._workers // 2 and (victim := self._victim(now)) is not None:
            seconds = self._settings.lease * self._chance.uniform(0.5, 2.0)
            self._nursery.tell(victim, do="block", seconds=seconds)
            self._spared[victim] = now + seconds + self._settings.lease / 2

    def _shifts(self, now: float) -> None:
        if (victim := self._victim(now)) is not None:
            skew, sign = self._settings.clock_skew, self._chance.choice((-1, 1))
            within = self._chance.random() < 0.5
            most = self._chance.uniform(0, skew / 2) if within else self._chance.uniform(skew, 3 * self._settings.lease)
            self._nursery.tell(victim, do="shift", offset=sign * most)

    def _cancels(self, now: float) -> None:
        if (victim := self._victim(now)) is not None:
            self._nursery.tell(victim, do="cancel", twice=self._chance.random() < 0.33)

    def _cuts(self, now: float) -> None:
        assert self._proxy is not None
        cut = self._proxy.reset if self._chance.random() < 0.6 else self._proxy.swallow
        asyncio.run_coroutine_threadsafe(cut(self._chance.uniform(0.05, 0.75 * self._settings.lease)), self._loop)
        self.done["cuts"] += 1

    def _restarts(self, now: float) -> None:
        assert self._restart is not None
        if isinstance(self._restart, str):
            done = subprocess.run(self._restart, shell=True, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{self._restart!r} ended with {done.returncode}: {done.stderr[-500:]}")
        else:
            self._restart()
        self.done["restarts"] += 1

    def _wake(self, now: float) -> None:
        for number in [number for number, until in self._stopped.items() if until <= now]:
            del self._stopped[number]
            self._nursery.signal(number, signal.SIGCONT)

    def _look(self, seconds: float) -> None:
        """Replaces those that have ended, unless by themselves: those have seen that every task is final."""
        while (ended := self._nursery.ended(seconds)) is not None:
            seconds = 0.0
            self._alive.discard(ended.number)
            self._spared.pop(ended.number, None)
            self._stopped.pop(ended.number, None)
            if ended.number in self._killed:
                self.done["kills"] += ended.status == -signal.SIGKILL
            elif ended.status == -signal.SIGKILL:
                self.done["poisoned"] += 1
            elif ended.status == 0:
                self._is_done = True
                continue
            else:
                self.errors.append(f"a worker ended with {ended.status}: {self._complaint(ended.number)}")
                if len(self.errors) > self._workers:
                    self._is_done = True
                    continue
            if not self._is_done:
                self._start()

    def _complaint(self, number: int) -> str:
        text = Path(self._settings.folder, f"worker-{number}.err").read_text(errors="replace")
        return text[-1500:] or "without a word"

    def _finish(self) -> None:
        patience = STALL_TIME + STALL_LEASES * self._settings.lease
        final, since, look_at = -1, 0.0, 0.0
        while self._alive:
            now = time.monotonic()
            self._wake(now)
            if now >= look_at:
                look_at = now + 1
                if (found := self._final()) != final:
                    final, since = found, now
                elif now > since + patience:
                    self.stalled_at = since
                    return
            self._look(0.05)

    def _final(self) -> int:
        """How many tasks are known to be final."""
        ledger = Path(self._settings.folder, LEDGER).read_bytes()
        return sum(ledger[FINAL::SLOT])
