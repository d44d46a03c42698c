"""Leases as their holder sees them, and the keeper that renews them."""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable

from ._core.task import Task
from ._core.transitions import Changes, Renew, Rule, Terms
from .clock import Clock, Moment, wait_until
from .errors import TrackerError

__all__ = ["Held", "Keeper"]

logger = logging.getLogger("aiotracker")

Update = Callable[[str, Rule, Task | None], Awaitable[Task | None]]

RENEW_AT = 1 / 3  # of the lease
JITTER = 0.1  # of that third, so that workers that started together drift apart
LAG_TICKS = 12  # looks at the clock in a lease, so that lag is measured to a twelfth of it
CLOSE_TIME = 5.0  # seconds
NAMED = 5  # tasks named in a warning


class Held:
    """One lease that this process holds: how long it lasts by our own clocks, and what to do when it is over.

    Attributes:
        record: As last read or written under this lease.
        lost: Why the lease is over; `None` while it is not.
        timed_out: The run's own `timeout` is over.
        interrupted: The body was cancelled by us, once.
        unreachable: The latest renewal got no answer from the store.
    """

    __slots__ = (
        "_clock",
        "_granted",
        "body",
        "changes",
        "interrupted",
        "lost",
        "record",
        "renew_at",
        "renewing",
        "task_id",
        "terms",
        "timed_out",
        "timeout_at",
        "unreachable",
    )

    def __init__(self, clock: Clock, record: Task, terms: Terms, taken: Moment, changes: Changes) -> None:
        self._clock = clock
        self.task_id = record.id
        self.record = record
        self.terms = terms
        self.changes = changes
        self.body: asyncio.Task[object] | None = None
        self.timeout_at: float | None = None
        self.renewing: asyncio.Future[Task | None] | None = None
        self.lost: str | None = None
        self.timed_out = False
        self.interrupted = False
        self.unreachable = False
        self.grant(taken)

    def grant(self, asked: Moment) -> None:
        """A full term, counted from before the request that took it."""
        self._granted = asked
        self.renew_at = asked.monotonic + self.terms.ttl * RENEW_AT * (1 - JITTER * random.random())

    @property
    def left(self) -> float:
        """Seconds until the lease ends, by the least favourable of our clocks."""
        now, granted = self._clock.moment(), self._granted
        passed = max(now.monotonic - granted.monotonic, now.boot - granted.boot, now.wall - granted.wall)
        return self.terms.ttl - passed

    def check(self) -> bool:
        """Whether a write still makes sense; notes the loss where not."""
        if self.lost is None and self.left <= 0:
            self.lost = "not renewed before its end: this process was paused, blocked, or cut off from the store"
        return self.lost is None

    def interrupt(self) -> None:
        """Cancels the body, once."""
        if not self.interrupted and self.body is not None:
            self.interrupted = True
            self.body.cancel()


class Keeper:
    """One plain asyncio task renews all entered leases of a tracker, and measures the lag of the event loop."""

    def __init__(self, clock: Clock, update: Update) -> None:
        self._clock = clock
        self._update = update
        self._held: dict[str, Held] = {}
        self._orphans: dict[str, tuple[str, Rule, float]] = {}  # by token: whose, how, until when
        self._task: asyncio.Task[None] | None = None
        self._wake_at = 0.0
        self._poke: asyncio.Event | None = None
        self._ending: set[asyncio.Future[Task | None]] = set()

    @property
    def held(self) -> dict[str, Held]:
        """The entered leases, by token."""
        return self._held

    def enter(self, held: Held) -> None:
        """Renews this lease from now on."""
        self._held[held.terms.token] = held
        wake_at = held.renew_at if held.timeout_at is None else min(held.renew_at, held.timeout_at)
        self._look_at(min(wake_at, self._clock.monotonic() + held.terms.ttl / LAG_TICKS))

    def leave(self, held: Held) -> None:
        """The body has ended: from now on the store's answer alone decides."""
        self._held.pop(held.terms.token, None)
        if held.renewing is not None:
            held.renewing.cancel()

    def give_back(self, task_id: str, token: str, release: Rule, seconds: float) -> None:
        """Tries to release a claim that nobody uses, until the store answers or some seconds are over."""
        self._orphans[token] = (task_id, release, self._clock.monotonic() + seconds)
        self._look_at(self._clock.monotonic())

    async def aclose(self) -> None:
        """Ends the keeper's own task, after a bounded last try to release what is unused."""
        task, self._task = self._task, None
        if task is not None and not task.done() and task.get_loop() is asyncio.get_running_loop():
            task.cancel()
            await asyncio.wait({task})
        if self._orphans:
            for token, (task_id, release, _) in self._orphans.items():
                self._release(token, task_id, release)
            await asyncio.wait(self._ending, timeout=CLOSE_TIME)
        if self._held:
            names = [held.task_id for held in self._held.values()][:NAMED]
            logger.warning(
                "the tracker was closed while %d tasks ran, %s among them: their leases run out",
                len(self._held),
                ", ".join(map(repr, names)),
            )

    def _look_at(self, when: float) -> None:
        if self._task is None or self._task.done():
            self._poke = asyncio.Event()
            self._wake_at = when
            self._task = asyncio.create_task(self._keep(), name="aiotracker lease keeper")
        elif when < self._wake_at and self._poke is not None:
            self._wake_at = when
            self._poke.set()

    async def _keep(self) -> None:
        poke = self._poke
        assert poke is not None
        while True:
            planned, now = self._wake_at, self._clock.monotonic()
            if planned <= now:
                await asyncio.sleep(0)
            elif await wait_until(self._clock, poke, planned - now):
                self._measure_lag(self._clock.monotonic() - planned)
            poke.clear()
            try:
                self._wake_at = self._tend()
            except Exception:
                # Whatever is wrong with one lease must not end the renewal of all others.
                logger.exception("leases could not be renewed")
                self._wake_at = self._clock.monotonic() + 1.0

    def _measure_lag(self, lag: float) -> None:
        slow = [held.task_id for held in self._held.values() if lag > held.terms.ttl * RENEW_AT]
        if slow:
            more = f" and {len(slow) - NAMED} more" if len(slow) > NAMED else ""
            logger.warning(
                "the event loop was blocked for %.3f s, over a third of a lease, while these tasks ran: %s%s; "
                "a body must not block (use asyncio.to_thread)",
                lag,
                ", ".join(map(repr, slow[:NAMED])),
                more,
                extra={"lag": lag, "task_ids": slow},
            )

    def _tend(self) -> float:
        """Renews what is due, interrupts what is over, and says when to look again."""
        now = self._clock.monotonic()
        wake_at = now + 60.0
        for held in list(self._held.values()):
            if not held.check():
                held.interrupt()
                continue
            if held.timeout_at is not None and not held.timed_out:
                if held.timeout_at <= now:
                    held.timed_out = True
                    held.interrupt()
                else:
                    wake_at = min(wake_at, held.timeout_at)
            left = held.left
            if held.renew_at <= now + held.terms.ttl * RENEW_AT * JITTER:
                if held.renewing is not None:  # no answer to the last one in half of what was left then
                    held.renewing.cancel()
                    held.unreachable = True
                self._renew(held, left)
            wake_at = min(wake_at, held.renew_at, now + left, now + held.terms.ttl / LAG_TICKS)
        for token, (task_id, release, until) in list(self._orphans.items()):
            if until <= now:
                del self._orphans[token]
            else:
                self._release(token, task_id, release)
                wake_at = min(wake_at, now + 1.0)
        return wake_at

    def _renew(self, held: Held, left: float) -> None:
        asked = self._clock.moment()
        # The next try, should this one not be answered; well inside of what is left, and never spinning.
        held.renew_at = asked.monotonic + max(left / 2, held.terms.ttl / 100)
        terms = held.terms

        def answered(future: asyncio.Future[Task | None]) -> None:
            if held.renewing is future:
                held.renewing = None
            if future.cancelled() or held.terms.token not in self._held:
                if not future.cancelled():
                    future.exception()  # looked at, so that asyncio does not complain
                return
            if (exc := future.exception()) is not None:
                held.unreachable = True
                held.renew_at = min(held.renew_at, self._clock.monotonic() + terms.ttl / LAG_TICKS)
                self._look_at(held.renew_at)
                level = logging.WARNING if isinstance(exc, TrackerError) else logging.ERROR
                logger.log(level, "the lease of %r could not be renewed: %s", held.task_id, exc)
                return
            held.unreachable = False
            record = future.result()
            if record is None or record.lease is None or record.lease.token != terms.token:
                holder = "nobody" if record is None or record.lease is None else record.lease.worker
                held.lost = f"taken away or taken over; it is now held by {holder}"
                held.interrupt()
                return
            held.record = record
            if held.terms is terms:
                held.grant(asked)

        held.renewing = asyncio.ensure_future(self._update(held.task_id, Renew(terms, held.changes), held.record))
        held.renewing.add_done_callback(answered)

    def _release(self, token: str, task_id: str, release: Rule) -> None:
        def answered(future: asyncio.Future[Task | None]) -> None:
            self._ending.discard(future)
            if not future.cancelled() and future.exception() is None:
                self._orphans.pop(token, None)

        future = asyncio.ensure_future(self._update(task_id, release, None))
        self._ending.add(future)
        future.add_done_callback(answered)
