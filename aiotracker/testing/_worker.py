"""One of torture's workers: it runs every task that it can get, and writes down what it does."""

import asyncio
import contextlib
import fcntl
import json
import mmap
import os
import random
import signal
import struct
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import msgspec

from .._core.retry import Retry
from ..clock import BootTime, SystemClock
from ..errors import (
    LeaseLostError,
    OutcomeUnknownError,
    StoreCorruptedError,
    StoreError,
    StoreUnavailableError,
    TaskUnavailableError,
    UnsupportedError,
)
from ..running import RunningTask
from ..tracker import BaseTracker
from ._history import Event
from ._stores import open_store

__all__ = ["FINAL", "LEDGER", "POISON_ATTEMPTS", "SLOT", "Settings", "ShiftedClock", "task_ids", "work"]

LEDGER: Final = "ledger"
SLOT: Final = 16  # bytes of a task in the ledger: the fence of its latest effect, and whether it is known to be final
FINAL: Final = 8  # where in its slot it says so
POISON_ATTEMPTS: Final = 3
OPEN_TIME: Final = 60.0  # seconds in which a store may come back
MAX_PAUSE: Final = 0.5  # seconds before a held task is tried again
_FENCE: Final = struct.Struct("<q")


class Settings(msgspec.Struct, frozen=True):
    """What all workers of a torture share."""

    reference: str
    folder: str  # of the histories and the ledger
    tasks: int
    poison: int  # tasks that kill whoever runs them
    seed: int
    pace: float  # seconds that a body takes on average
    begun: float  # monotonic
    seconds: float  # over which tasks come up
    lease: float
    clock_skew: float
    max_attempts: int
    concurrency: int


class ShiftedClock(SystemClock):
    """A wall clock that somebody sets.

    Args:
        is_elsewhere: It is another machine's: its boot is not the one of the others.
    """

    def __init__(self, is_elsewhere: bool) -> None:
        self.offset = 0.0
        self._is_elsewhere = is_elsewhere

    def now(self) -> datetime:
        return datetime.now(UTC) + timedelta(seconds=self.offset)

    def boot(self) -> BootTime:
        return BootTime("", 0.0) if self._is_elsewhere else super().boot()

    def moment(self) -> Any:
        moment = super().moment()
        return type(moment)(moment.monotonic, moment.boot, moment.wall + self.offset)


def task_ids(settings: Settings) -> list[str]:
    """All of them, in the order in which they come up."""
    poisoned = {int((n + 0.5) * settings.tasks / settings.poison) for n in range(settings.poison)}
    return [f"poison-{n}" if n in poisoned else f"task-{n}" for n in range(settings.tasks)]


class _Ledger:
    """The world outside of the store, where effects cannot be taken back: it refuses those of an older fence."""

    def __init__(self, folder: Path) -> None:
        self._fd = os.open(folder / LEDGER, os.O_RDWR | os.O_CLOEXEC)
        self._map = mmap.mmap(self._fd, 0)

    def effect(self, index: int, fence: int) -> tuple[bool, float]:
        """Whether it was accepted, and when that was decided."""
        place = index * SLOT
        fcntl.lockf(self._fd, fcntl.LOCK_EX, SLOT, place)
        try:
            accepted = fence >= _FENCE.unpack_from(self._map, place)[0]
            if accepted:
                _FENCE.pack_into(self._map, place, fence)
            return accepted, time.monotonic()
        finally:
            fcntl.lockf(self._fd, fcntl.LOCK_UN, SLOT, place)

    def is_final(self, index: int) -> bool:
        """Whether some worker has seen that it is. A hint, which spares tries."""
        return self._map[index * SLOT + FINAL] != 0

    def set_final(self, index: int) -> None:
        self._map[index * SLOT + FINAL] = 1

    def close(self) -> None:
        self._map.close()
        os.close(self._fd)


class _Worker:
    def __init__(
        self,
        settings: Settings,
        tracker: BaseTracker[Any, Any],
        clock: ShiftedClock,
        history: int,
        chance: random.Random,
    ) -> None:
        self._settings = settings
        self._tracker = tracker
        self._clock = clock
        self._history = history
        self._chance = chance
        self._ledger = _Ledger(Path(settings.folder))
        self._ids = task_ids(settings)
        self._queue: list[int] = []
        self._not_before: dict[int, float] = {}
        self._running: dict[int, asyncio.Task[float | None]] = {}
        self._over = False
        self._slow_in_a_row = 0

    async def run(self) -> None:
        pullers = [asyncio.create_task(self._pull()) for _ in range(self._settings.concurrency)]
        while not self._over:
            self._over = self._refill()
            await asyncio.sleep(0.05)
        await asyncio.wait(pullers)
        for puller in pullers:
            puller.result()
        self._ledger.close()

    def _refill(self) -> bool:
        """Looks what there is to do; whether all is done."""
        settings, now = self._settings, time.monotonic()
        share = (now - settings.begun) / settings.seconds if settings.seconds > 0 else 1.0
        due = min(settings.tasks, int(share * settings.tasks) + 1)
        left = [index for index in range(due) if not self._ledger.is_final(index)]
        if not left and due == settings.tasks:
            return not self._running
        if self._chance.random() < 0.2:
            left.append(self._chance.randrange(due))  # what is final stays so
        self._queue = [n for n in left if n not in self._running and self._not_before.get(n, 0.0) <= now]
        self._chance.shuffle(self._queue)
        return False

    # -- what is done to it

    def disturb(self, what: dict[str, Any]) -> None:
        if what["do"] == "block":
            self._note("blocked")
            time.sleep(what["seconds"])
        elif what["do"] == "shift":
            offset = what["offset"]
            beyond = abs(offset) > self._settings.clock_skew / 2
            if beyond:  # said before it is so, and taken back after it was so
                self._note("shifted_beyond")
            self._clock.offset = offset
            if not beyond:
                self._note("shifted")
        elif self._running:
            self._note("cancelled")
            victim = self._chance.choice(list(self._running.values()))
            victim.cancel()
            if what["twice"]:
                asyncio.get_running_loop().call_soon(victim.cancel)

    # -- what it does

    async def _pull(self) -> None:
        while not self._over:
            try:
                index = self._queue.pop() if self._queue else -1
                if index < 0 or index in self._running:
                    await asyncio.sleep(0.02)
                    continue
                task = asyncio.create_task(self._once(index))
                self._running[index] = task
                try:
                    pause = await task
                finally:
                    del self._running[index]
                if pause is None:
                    self._ledger.set_final(index)
                else:
                    self._not_before[index] = time.monotonic() + pause
            except asyncio.CancelledError:
                me = asyncio.current_task()
                if me is None or me.cancelling():
                    raise
                # The one that it waited for was cancelled.

    async def _once(self, index: int) -> float | None:
        """One try; seconds until the next one, or `None` where the task is final."""
        task_id, settings = self._ids[index], self._settings
        poison = task_id.startswith("poison")
        asked, entered, ends = time.monotonic(), 0, [""]
        retry = Retry(POISON_ATTEMPTS, delay=0) if poison else None
        try:
            async with self._tracker.run(task_id, retry=retry) as task:
                entered, self._slow_in_a_row = task.fence, 0
                self._write("claimed", task, asked=asked, lease_left=task.lease_left, boot=self._clock.boot().boot_id)
                await self._body(index, task, ends, poison)
            self._tell("ended", task_id, entered, "succeeded")
            return None
        except TaskUnavailableError as exc:
            self._slow_in_a_row = 0
            return None if exc.retry_after is None else min(exc.retry_after, MAX_PAUSE)
        except LeaseLostError:
            if entered:
                self._tell("ended", task_id, entered, "lost")
            else:
                return self._slow()
        except (StoreCorruptedError, UnsupportedError):
            raise
        except (OutcomeUnknownError, StoreError):
            if entered:
                self._tell("unknown", task_id, entered, "")
            return self._slow()
        except asyncio.CancelledError:
            if entered:
                # One that comes while the end is written is raised when that is recorded, or cannot be.
                self._tell("ended" if ends[0] == "released" else "unknown", task_id, entered, ends[0])
        except ValueError:
            self._tell("ended", task_id, entered, "failed")
        return settings.pace * self._chance.random()

    def _slow(self) -> float:
        """Seconds until the next try: the longer, the longer the store has not answered anything in time."""
        self._note("slow")
        self._slow_in_a_row += 1
        return self._chance.random() * min(self._settings.lease, 0.1 * 2.0 ** min(self._slow_in_a_row, 8))

    async def _body(self, index: int, task: RunningTask[Any], ends: list[str], poison: bool) -> None:
        dice, lease = self._chance.random(), self._settings.lease
        outcome = "released"
        try:
            await asyncio.sleep(self._chance.uniform(0, 2 * self._settings.pace))
            accepted, when = self._ledger.effect(index, task.fence)
            self._write("effect", task, time=when, accepted=accepted)
            if poison:
                os.kill(os.getpid(), signal.SIGKILL)
            if dice < 0.1:
                await asyncio.sleep(self._chance.uniform(0, 1.2 * lease))
                await (task.save() if dice < 0.05 else task.renew())
                self._write("alive", task, lease_left=task.lease_left)
            elif dice < 0.2:
                outcome = "failed"
                raise ValueError("as the dice say")
            elif dice < 0.22:
                async with asyncio.timeout(0.01):
                    await asyncio.sleep(1)
            elif dice < 0.25:
                task.progress = dice
                await asyncio.sleep(self._chance.uniform(0, lease))
            task.result = task.fence
            outcome = "succeeded"
        except LeaseLostError:
            outcome = "lost"
            raise
        except TimeoutError:
            outcome = "failed"
            raise ValueError("a time-out of its own") from None
        finally:
            ends[0] = outcome
            self._write("ending", task, outcome=outcome)

    # -- what it writes down

    def _write(self, kind: Any, task: RunningTask[Any], **more: Any) -> None:
        self._put(kind, task.id, task.fence, **more)

    def _tell(self, kind: Any, task_id: str, fence: int, outcome: str) -> None:
        self._put(kind, task_id, fence, outcome=outcome)

    def _note(self, kind: Any) -> None:
        self._put(kind, "", 0)

    def _put(self, kind: Any, task_id: str, fence: int, **more: Any) -> None:
        fields: dict[str, Any] = {
            "time": time.monotonic(),
            "wall": self._clock.now().timestamp(),
            "worker": self._tracker.worker,
        }
        event = Event(kind=kind, task=task_id, fence=fence, **(fields | more))
        # One write a line, so that a kill cuts off the last line at most.
        os.write(self._history, msgspec.json.encode(event) + b"\n")


async def work(settings: Settings, number: int, ear: int, session: Any = None) -> None:
    """Works until every task is final.

    Args:
        settings: Of all workers.
        number: Its own.
        ear: A pipe from which it is told to disturb itself; its end is the worker's end.
        session: Of the AWS driver, for stores that take one.
    """
    name, chance = f"worker-{number}", random.Random(f"{settings.seed}/{number}")
    clock = ShiftedClock(is_elsewhere=chance.random() < 0.3)
    history = os.open(Path(settings.folder, f"{name}.jsonl"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    options: dict[str, Any] = {
        "lease": settings.lease,
        "retry": Retry(settings.max_attempts, delay=0),
        "worker": name,
        "clock": clock,
        "clock_skew": settings.clock_skew,
    }
    if session is not None:
        options["session"] = session
    tracker = await _opened(settings.reference, options)
    worker = _Worker(settings, tracker, clock, history, chance)
    heard = bytearray()

    def listen() -> None:
        data = os.read(ear, 4096)
        if not data:
            os._exit(3)  # whoever started us is gone
        heard.extend(data)
        while (end := heard.find(b"\n")) >= 0:
            line = bytes(heard[:end])
            del heard[: end + 1]
            worker.disturb(json.loads(line))

    loop = asyncio.get_running_loop()
    loop.add_reader(ear, listen)
    try:
        await worker.run()
    finally:
        loop.remove_reader(ear)
        await tracker.aclose()
        os.close(history)


async def _opened(reference: str, options: dict[str, Any]) -> BaseTracker[Any, Any]:
    until = time.monotonic() + OPEN_TIME
    while True:
        with contextlib.suppress(StoreUnavailableError):
            return await open_store(reference, **options).open()
        if time.monotonic() > until:
            return await open_store(reference, **options).open()
        await asyncio.sleep(0.1)
