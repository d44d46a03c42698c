"""How far it is: a bar on a terminal, a line now and then elsewhere, on standard error."""

import asyncio
import logging
import sys
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from aiotracker import Status, Task, WorkSummary

from .ids import IdReader
from .render import safe, span

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["Bar", "Display", "Lines", "LogLines", "Tally"]

TICK: Final = 0.2  # seconds
LINE_EVERY: Final = 5.0  # seconds between lines
WINDOW: Final = 30.0  # seconds that the rate is measured over
FAILURES_TOLD: Final = 20


class Tally:
    """What has happened so far, in this process."""

    def __init__(self, ids: IdReader, jobs: int) -> None:
        self._ids = ids
        self._jobs = jobs
        self._exact: int | None = None
        self._running = 0
        self._waiting: set[str] = set()  # failed here, and to be tried again
        self._history: deque[tuple[float, int]] = deque()
        self.succeeded = 0
        self.exhausted = 0
        self.retried = 0
        self.released = 0

    def summary(self, seconds: float) -> WorkSummary:
        """Where the work was cut short, and has none of its own."""
        return WorkSummary(
            self.succeeded,
            self.exhausted,
            released=self.released,
            retried=self.retried,
            seconds=seconds,
            stopped=True,
        )

    @property
    def running(self) -> int:
        return self._running

    @property
    def total(self) -> int | None:
        return self._ids.total

    @property
    def completed(self) -> int:
        """Ids that need nothing more from us: done here, done before, or held by another worker.

        Of those that were taken and do not run, some are about to: as many as there are jobs, at the most.
        """
        if self._exact is not None:
            return self._exact
        surely = self._ids.taken - self._running - len(self._waiting) - self._jobs
        return max(surely, self.succeeded + self.exhausted)

    def finish(self, summary: WorkSummary) -> None:
        """At the end the numbers are known."""
        self._exact = summary.succeeded + summary.exhausted + summary.skipped

    def began(self, task_id: str) -> None:
        self._running += 1
        self._waiting.discard(task_id)

    def ended(self) -> None:
        self._running -= 1

    def failed(self, task_id: str, *, again: bool) -> None:
        if again:
            self.retried += 1
            self._waiting.add(task_id)

    def put_off(self, task_id: str, *, released: bool) -> None:
        """A run that ended without an outcome."""
        self._waiting.add(task_id)
        self.released += released

    def done(self, task: Task) -> None:
        self._waiting.discard(task.id)
        if task.status is Status.SUCCEEDED:
            self.succeeded += 1
        else:
            self.exhausted += 1

    def rate(self, now: float) -> float:
        """Ids completed a second, lately."""
        history = self._history
        history.append((now, self.completed))
        while now - history[0][0] > WINDOW:
            history.popleft()
        (since, before), (_, after) = history[0], history[-1]
        return max(0, after - before) / (now - since) if now > since else 0.0


class Display:
    """Draws from another thread: a terminal that is stopped must not stop the event loop."""

    def __init__(self, tally: Tally) -> None:
        self.tally = tally
        self._said: deque[str] = deque()
        self._over = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._told = 0

    def say(self, line: str) -> None:
        """A line of its own, soon."""
        self._said.append(safe(line))

    def failure(self, task: Task) -> None:
        """Tells of a task that will not be tried again; of many, only the first."""
        self._told += 1
        if self._told <= FAILURES_TOLD and task.errors:
            self.say(f"{task.id} is {task.status}: {task.errors[-1].message}")
        elif self._told == FAILURES_TOLD + 1:
            self.say("and more; see `aiotracker errors`")

    async def __aenter__(self) -> "Display":
        self._task = asyncio.create_task(self._draw())
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._over.set()
        if self._task is not None:
            await asyncio.wait({self._task})

    async def _draw(self) -> None:
        # Without a reader the work goes on, and what it did is in the store.
        with suppress(OSError):
            await asyncio.to_thread(self.open)
            while not self._over.is_set():
                with suppress(TimeoutError):
                    async with asyncio.timeout(TICK):
                        await self._over.wait()
                await asyncio.to_thread(self._tick, self._over.is_set())

    def _tick(self, last: bool) -> None:
        while self._said:
            self.line(self._said.popleft())
        self.show(last)

    def open(self) -> None:
        """Before all else."""

    def line(self, line: str) -> None:
        """Prints a line."""
        sys.stderr.write(f"aiotracker: {line}\n")
        sys.stderr.flush()

    def show(self, last: bool) -> None:
        """Shows how far it is; called every few moments, and at the end."""


class Lines(Display):
    """For logs: a line every few seconds."""

    def __init__(self, tally: Tally) -> None:
        super().__init__(tally)
        self._loop = asyncio.get_running_loop()
        self._next = self._loop.time() + LINE_EVERY

    def show(self, last: bool) -> None:
        now, tally = self._loop.time(), self.tally
        rate = tally.rate(now)
        if now < self._next and not last:
            return
        self._next = now + LINE_EVERY
        of = "" if tally.total is None else f" of {tally.total:,}"
        parts = [f"{tally.completed:,}{of} done", f"{tally.running} running"]
        if tally.exhausted or tally.retried:
            parts.insert(1, f"{tally.exhausted:,} failed, {tally.retried:,} tried again")
        if not last:  # the summary, which follows, has the rate of the whole
            parts.append(f"{rate:,.1f}/s")
            if tally.total is not None and rate > 0:
                parts.append(f"{span((tally.total - tally.completed) / rate)} left")
        self.line(", ".join(parts))


class Bar(Display):
    """For a person: a bar, with rate, failures and the time left."""

    _progress: "Progress"

    def open(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TextColumn("{task.fields[failures]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._bar = self._progress.add_task("", total=None, rate="", failures="")
        self._progress.start()

    def line(self, line: str) -> None:
        from rich.text import Text

        self._progress.console.print(Text(line), soft_wrap=True)

    def show(self, last: bool) -> None:
        tally = self.tally
        rate = tally.rate(self._progress.get_time())
        failures = [f"{tally.exhausted:,} failed"] if tally.exhausted else []
        if tally.retried:
            failures.append(f"{tally.retried:,} tried again")
        self._progress.update(
            self._bar,
            completed=tally.completed,
            total=tally.total,
            rate=f"{rate:,.1f}/s",
            failures=f"[red]{', '.join(failures)}[/red]" if failures else f"{tally.running} running",
        )
        self._progress.refresh()
        if last:
            self._progress.stop()


class LogLines(logging.Handler):
    """The library's warnings, between the lines of the display."""

    def __init__(self, display: Display) -> None:
        super().__init__(logging.WARNING)
        self._display = display

    def emit(self, record: logging.LogRecord) -> None:
        self._display.say(record.getMessage())
