"""Real worker processes on one store, killed and paused at random; what they did is judged afterwards.

Run as a program, this is one of the workers.
"""

import asyncio
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from .._core.retry import Retry
from .._core.task import Task
from ..errors import LeaseLostError, OutcomeUnknownError, StoreUnavailableError, TaskUnavailableError
from ..running import RunningTask
from ..tracker import BaseTracker
from ._history import Event, Violation, check_history, read_history
from ._spawn import command
from ._stores import open_store

__all__ = ["Report", "torture"]

LEASE = 2.0  # seconds
MAX_ATTEMPTS = 100
DRAIN_TIME = 120.0  # seconds in which workers that nobody disturbs bring everything to its end
CONCURRENCY = 16
MAX_PACE = 1.0  # seconds that a body takes on average, at the most


class Report(msgspec.Struct):
    """What a torture came to."""

    tasks: int
    kills: int
    pauses: int
    events: Counter[str]
    seconds: float
    violations: list[Violation]
    folder: str  # where the histories are

    @property
    def ok(self) -> bool:
        """Every promise was kept."""
        return not self.violations

    def __str__(self) -> str:
        lines = [
            f"{self.tasks:,} tasks, {self.kills} kills, {self.pauses} pauses, {self.seconds:.1f} s: "
            + ", ".join(f"{count:,} {kind}" for kind, count in sorted(self.events.items()))
        ]
        lines += [f"BROKEN {violation}" for violation in self.violations]
        lines.append("every promise was kept" if self.ok else f"the histories are in {self.folder}")
        return "\n".join(lines)


async def torture(
    reference: str,
    *,
    workers: int = 4,
    tasks: int = 500,
    seconds: float = 20.0,
    seed: int = 0,
    folder: Path | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> Report:
    """Lets workers loose on a store, kills and pauses them, and judges what they did.

    Args:
        reference: Of an empty store, as for `open_store`.
        workers: Processes at once; a killed one is replaced.
        tasks: How many.
        seconds: How long they are disturbed; then they have time to finish.
        seed: Of the disturbances.
        folder: Where the histories are written; by default a temporary one, which is kept if a promise was broken.
        say: Is told how it goes.
    """
    began = time.monotonic()
    chance = random.Random(seed)
    ids = [f"task-{index}" for index in range(tasks)]
    async with open_store(reference, lease=LEASE) as tracker:
        added = await _add(tracker, ids)
    histories = folder or Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="aiotracker-torture-"))
    # So that there is something to disturb all the time.
    pace = min(MAX_PACE, workers * CONCURRENCY * seconds / tasks / 2)
    crew = _Crew(reference, histories, tasks, seed, pace)
    try:
        await asyncio.to_thread(crew.start, workers)
        until = began + seconds
        while time.monotonic() < until and not crew.is_done():
            await asyncio.sleep(chance.uniform(0.05, 0.5))
            if chance.random() < 0.7:
                await asyncio.to_thread(crew.kill_and_replace, chance)
            else:
                crew.pause(chance, LEASE * chance.uniform(0.5, 2.0))
        say(f"disturbed for {time.monotonic() - began:.1f} s; now they may finish")
        finished = await asyncio.to_thread(crew.finish, DRAIN_TIME)
    finally:
        await asyncio.to_thread(crew.end)
    events = added + await asyncio.to_thread(crew.histories)
    async with open_store(reference, lease=LEASE) as tracker:
        records: dict[str, Task | None] = {task_id: await tracker.load(task_id) for task_id in ids}
    violations = check_history(events, records, max_attempts=MAX_ATTEMPTS)
    if not finished:
        violations.append(Violation("*", "nothing is stuck", f"workers did not finish within {DRAIN_TIME:g} s"))
    violations += [Violation("*", "workers end well", error) for error in crew.errors]
    counts = Counter(event.kind if event.kind != "ended" else event.outcome for event in events)
    if folder is None and not violations:
        await asyncio.to_thread(shutil.rmtree, histories)
    return Report(tasks, crew.kills, crew.pauses, counts, time.monotonic() - began, violations, str(histories))


async def _add(tracker: BaseTracker[Any, Any], ids: list[str]) -> list[Event]:
    await tracker.add_many(ids)
    events = []
    for task_id in ids:
        task = await tracker.load(task_id)
        if task is not None:
            events.append(Event(kind="added", task=task_id, fence=task.fence, time=time.monotonic()))
    return events


class _Crew:
    """The worker processes, and what is done to them. Used by one thread at a time."""

    def __init__(self, reference: str, folder: Path, tasks: int, seed: int, pace: float) -> None:
        self._args = [reference, str(folder), str(tasks), str(pace)]
        self._folder = folder
        self._seed = seed
        self._workers: list[subprocess.Popen[bytes]] = []
        self._paused: dict[int, float] = {}  # by pid: until when
        self._started = 0
        self.kills = 0
        self.pauses = 0
        self.errors: list[str] = []

    def start(self, count: int) -> None:
        for _ in range(count):
            self._started += 1
            with (self._folder / f"worker-{self._started}.err").open("wb") as errors:
                program = command(__name__, *self._args, str(self._started), str(self._seed))
                self._workers.append(subprocess.Popen(program, stderr=errors))

    def is_done(self) -> bool:
        """A worker that ends by itself has seen that every task is final."""
        self._wake()
        return any(worker.poll() is not None for worker in self._workers)

    def kill_and_replace(self, chance: random.Random) -> None:
        victim = chance.choice(self._workers)
        if victim.poll() is None:
            victim.kill()
            victim.wait()
            self._workers.remove(victim)
            self._paused.pop(victim.pid, None)
            self.kills += 1
            self.start(1)

    def pause(self, chance: random.Random, seconds: float) -> None:
        victim = chance.choice(self._workers)
        if victim.poll() is None and victim.pid not in self._paused:
            victim.send_signal(signal.SIGSTOP)
            self._paused[victim.pid] = time.monotonic() + seconds
            self.pauses += 1

    def _wake(self, *, all_of_them: bool = False) -> None:
        for worker in self._workers:
            until = self._paused.get(worker.pid)
            if until is not None and (all_of_them or until <= time.monotonic()):
                del self._paused[worker.pid]
                worker.send_signal(signal.SIGCONT)

    def finish(self, seconds: float) -> bool:
        """Whether all workers ended by themselves in time."""
        deadline = time.monotonic() + seconds
        while any(worker.poll() is None for worker in self._workers):
            if time.monotonic() > deadline:
                return False
            self._wake()
            time.sleep(0.05)
        for worker in self._workers:
            if worker.returncode:
                self.errors.append(f"a worker ended with {worker.returncode}: {self._complaint()}")
        return True

    def _complaint(self) -> str:
        texts = [path.read_text(errors="replace") for path in sorted(self._folder.glob("worker-*.err"))]
        return next((text[-1000:] for text in texts if "Traceback" in text), "see the files beside the histories")

    def end(self) -> None:
        self._wake(all_of_them=True)
        for worker in self._workers:
            if worker.poll() is None:
                worker.kill()
            worker.wait()

    def histories(self) -> list[Event]:
        events: list[Event] = []
        for path in sorted(self._folder.glob("worker-*.jsonl")):
            with path.open("rb") as file:
                events += read_history(file)
        return events


class _Worker:
    """One worker process: it runs every task that it can get, until all are final, and writes down what it does."""

    def __init__(
        self, tracker: BaseTracker[Any, Any], history: int, name: str, pace: float, chance: random.Random
    ) -> None:
        self._tracker = tracker
        self._history = history
        self._name = name
        self._pace = pace
        self._chance = chance

    async def run(self, tasks: int) -> None:
        ids = [f"task-{index}" for index in range(tasks)]
        self._chance.shuffle(ids)
        left = asyncio.Queue[str]()
        for task_id in ids:
            left.put_nowait(task_id)
        await asyncio.gather(*(self._pull(left) for _ in range(CONCURRENCY)))

    async def _pull(self, left: asyncio.Queue[str]) -> None:
        while not left.empty():
            task_id = left.get_nowait()
            pause = await self._once(task_id)
            if pause is not None:
                left.put_nowait(task_id)
                await asyncio.sleep(pause)

    async def _once(self, task_id: str) -> float | None:
        """One try; seconds until the next one, or `None` where the task is final."""
        asked, entered = time.monotonic(), 0
        try:
            async with self._tracker.run(task_id) as task:
                entered = task.fence
                self._write("claimed", task, asked=asked, lease_left=task.lease_left)
                await self._body(task)
            self._tell("ended", task_id, entered, "succeeded")
        except TaskUnavailableError as exc:
            return None if exc.retry_after is None else min(exc.retry_after, 0.2)
        except LeaseLostError:
            if entered:
                self._tell("ended", task_id, entered, "lost")
            return 0.0
        except (OutcomeUnknownError, StoreUnavailableError):
            if entered:
                self._tell("unknown", task_id, entered, "")
            return 0.1
        except (asyncio.CancelledError, TimeoutError):
            self._tell("ended", task_id, entered, "released")
            return 0.0
        except ValueError:
            self._tell("ended", task_id, entered, "failed")
            return 0.0
        return None

    async def _body(self, task: RunningTask[Any]) -> None:
        dice = self._chance.random()
        outcome = "released"
        try:
            await asyncio.sleep(self._chance.uniform(0, 2 * self._pace))
            self._write("effect", task)
            if dice < 0.1:
                await asyncio.sleep(self._chance.uniform(0, LEASE))
                await task.save()
                self._write("alive", task, lease_left=task.lease_left)
            elif dice < 0.2:
                outcome = "failed"
                raise ValueError("as the dice say")
            elif dice < 0.25:
                async with asyncio.timeout(0.01):
                    await asyncio.sleep(1)
            task.result = task.fence
            outcome = "succeeded"
        except LeaseLostError:
            outcome = "lost"
            raise
        except TimeoutError:
            outcome = "failed"
            raise ValueError("a time-out of its own") from None
        finally:
            self._write("ending", task, outcome=outcome)

    def _write(self, kind: Any, task: RunningTask[Any], **more: Any) -> None:
        self._put(Event(kind=kind, task=task.id, fence=task.fence, time=time.monotonic(), worker=self._name, **more))

    def _tell(self, kind: Any, task_id: str, fence: int, outcome: str) -> None:
        self._put(
            Event(kind=kind, task=task_id, fence=fence, time=time.monotonic(), outcome=outcome, worker=self._name)
        )

    def _put(self, event: Event) -> None:
        # One write a line, so that a kill cuts off the last line at most.
        os.write(self._history, msgspec.json.encode(event) + b"\n")


async def _work(reference: str, folder: str, tasks: str, pace: str, number: str, seed: str) -> None:
    name = f"worker-{number}"
    history = os.open(Path(folder) / f"{name}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    retry = Retry(MAX_ATTEMPTS, delay=0)
    async with open_store(reference, lease=LEASE, retry=retry, worker=name) as tracker:
        await _Worker(tracker, history, name, float(pace), random.Random(f"{seed}/{number}")).run(int(tasks))
    with contextlib.suppress(OSError):
        os.close(history)


if __name__ == "__main__":
    asyncio.run(_work(*sys.argv[1:]))
