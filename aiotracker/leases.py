"""Leases as their holder sees them, and the keeper that renews them."""

import asyncio
import contextvars
import logging
import random
from collections.abc import Awaitable, Callable, Iterable

import msgspec

from ._core.task import Task
from ._core.transitions import Changes, Renew, Rule, Terms, outcome_of
from .clock import Clock, Moment, wait_until
from .errors import TrackerError

__all__ = ["Held", "Keeper"]

logger = logging.getLogger("aiotracker")

Update = Callable[[str, Rule, Task | None], Awaitable[Task | None]]
Answer = asyncio.Future[Task | None]

RENEW_AT = 1 / 3  # of the lease
JITTER = 0.1  # of that third, so that workers that started together drift apart
LAG_TICKS = 12  # looks at the clock in a lease, so that lag is measured to a twelfth of it
IDLE = 60.0  # seconds
MAX_PAUSE = 10.0  # seconds between two tries to release what nobody uses
CLOSE_TIME = 5.0  # seconds
NAMED = 5  # tasks named in a warning


class Held(msgspec.Struct):
    """One lease that this process holds: how long it lasts by our own clocks, and what to do when it is over.

    Attributes:
        clock: Whose clocks count.
        record: As last read or written under this lease.
        terms: Of the claim.
        taken: When the claim was asked for.
        changes: Of the run; they ride on renewals.
        body: The asyncio task that is cancelled when the lease is over.
        timeout_at: When the run's own `timeout` is over, by the monotonic clock.
        renew_at: When to renew next, by the monotonic clock.
        renewing: The renewal under way.
        lost: Why the lease is over; `None` while it is not.
        timed_out: The run's own `timeout` is over.
        interrupted: The body was cancelled by us, once.
        unreachable: The latest renewal got no answer from the store.
        ending: The body has ended, and its end is being written.
        end: When the lease ends, by each clock.
    """

    clock: Clock
    record: Task
    terms: Terms
    taken: Moment
    changes: Changes
    body: asyncio.Task[object] | None = None
    timeout_at: float | None = None
    renew_at: float = 0.0
    renewing: Answer | None = None
    lost: str | None = None
    timed_out: bool = False
    interrupted: bool = False
    unreachable: bool = False
    ending: bool = False
    end: Moment = Moment(0.0, 0.0, 0.0)

    def __post_init__(self) -> None:
        self.grant(self.taken)

    @property
    def task_id(self) -> str:
        """Whose lease it is."""
        return self.record.id

    def grant(self, asked: Moment) -> None:
        """A full term, counted from before the request that took it."""
        ttl = self.terms.ttl
        self.end = Moment(asked.monotonic + ttl, asked.boot + ttl, asked.wall + ttl)
        self.renew_at = asked.monotonic + ttl * RENEW_AT * (1 - JITTER * random.random())

    def ask(self, asked: Moment) -> None:
        """A term has been asked for. If it is shorter than what is left, it counts before it is granted."""
        ttl, end = self.terms.ttl, self.end
        if asked.monotonic + ttl < end.monotonic:
            self.end = Moment(asked.monotonic + ttl, min(asked.boot + ttl, end.boot), min(asked.wall + ttl, end.wall))

    def saw(self, record: Task) -> None:
        """Keeps the latest of the records that are read or written, in whatever order their answers come."""
        if record.update_time >= self.record.update_time:
            self.record = record

    @property
    def left(self) -> float:
        """Seconds until the lease ends, by the least favourable of our clocks."""
        now, end = self.clock.moment(), self.end
        return min(end.monotonic - now.monotonic, end.boot - now.boot, end.wall - now.wall)

    def check(self) -> bool:
        """Whether a write still makes sense; notes the loss where not."""
        now, end = self.clock.moment(), self.end
        over = now.monotonic >= end.monotonic or now.boot >= end.boot or now.wall >= end.wall
        if over and self.lost is None:
            self.lost = "not renewed before its end: this process was paused, blocked, or cut off from the store"
        return self.lost is None

    def interrupt(self) -> None:
        """Cancels the body, once."""
        if not self.interrupted and self.body is not None:
            self.interrupted = True
            self.body.cancel()


class Orphan:
    """A write for a claim that nobody waits for any more."""

    __slots__ = ("answer", "is_free", "pause", "rule", "task_id", "token", "try_at", "until")

    def __init__(self, task_id: str, token: str, rule: Rule, now: float, seconds: float) -> None:
        self.task_id = task_id
        self.token = token
        self.rule = rule
        self.try_at = now
        self.until = now + seconds
        self.pause = 0.5
        self.is_free = False  # the claim did not hold the task when it was last asked
        self.answer: Answer | None = None


class Keeper:
    """One plain asyncio task renews all entered leases of a tracker, and measures the lag of the event loop."""

    def __init__(self, clock: Clock, update: Update) -> None:
        self._clock = clock
        self._update = update
        self._held: dict[str, Held] = {}
        self._orphans: dict[str, Orphan] = {}  # by token
        self._claiming: set[Answer] = set()  # claims whose claimants have gone before the answer
        self._task: asyncio.Task[None] | None = None
        self._poke: asyncio.Event | None = None
        self._wake_at = 0.0
        self._warned_at: float | None = None  # which planned wake-up was told to be late
        self._unanswered: list[tuple[str, BaseException]] = []
        self._closing = False
        self._closed = False

    @property
    def held(self) -> dict[str, Held]:
        """The entered leases, by token."""
        return self._held

    def enter(self, held: Held) -> None:
        """Renews this lease from now on."""
        self._held[held.terms.token] = held
        wake_at = held.taken.monotonic + held.terms.ttl / LAG_TICKS
        if held.timeout_at is not None and held.timeout_at < wake_at:
            wake_at = held.timeout_at
        if wake_at < self._wake_at or self._task is None or self._task.done():
            self._look_at(wake_at)

    def end(self, held: Held) -> None:
        """The body has ended: nothing is renewed any more, and the store's answer to how it ended decides.

        That answer is waited for until the lease is over.
        """
        held.ending = True
        lag = self._clock.monotonic() - self._wake_at
        if lag > held.terms.ttl * RENEW_AT and self._task is not None and not self._task.done():
            self._warn_of(lag)
        if held.renewing is not None:
            held.renewing.cancel()

    def leave(self, held: Held) -> None:
        """The end is written, or nothing more can be done about it."""
        self._held.pop(held.terms.token, None)

    def renew_soon(self, held: Held) -> None:
        """Renews this lease at once."""
        held.renew_at = self._clock.monotonic()
        self._look_at(held.renew_at)

    def give_back(self, task_id: str, token: str, rule: Rule, seconds: float) -> None:
        """Ends a claim that nobody uses: tries until the record shows that it has ended, or some seconds are over."""
        if self._closed:
            return  # the lease runs out
        self._orphans[token] = Orphan(task_id, token, rule, self._clock.monotonic(), seconds)
        if not self._closing:
            self._look_at(self._clock.monotonic())

    def adopt(self, answer: Answer, task_id: str, token: str, undo: Rule, seconds: float) -> None:
        """Gives a claim back as soon as it is answered; its claimant has gone."""

        def answered(future: Answer) -> None:
            self._claiming.discard(future)
            # Without an answer it may have landed, too.
            if future.cancelled() or future.exception() is not None or _holds(future.result(), token):
                self.give_back(task_id, token, undo, seconds)

        self._claiming.add(answer)
        answer.add_done_callback(answered)

    async def aclose(self) -> None:
        """Ends the keeper's own task, after a bounded last try to give back what is unused."""
        self._closing = True
        loop = asyncio.get_running_loop()
        deadline = loop.time() + CLOSE_TIME
        task = self._task
        if task is not None and not task.done() and task.get_loop() is loop:
            task.cancel()
            await asyncio.wait({task})
        if self._claiming:
            await asyncio.wait(self._claiming, timeout=CLOSE_TIME)
        now = self._clock.monotonic()
        orphans = [orphan for orphan in self._orphans.values() if orphan.until > now]
        for orphan in orphans:
            self._give_back(orphan)
        if answers := [orphan.answer for orphan in orphans if orphan.answer is not None]:
            longest = max(orphan.until for orphan in orphans) - now
            await asyncio.wait(answers, timeout=max(0.1, min(longest, deadline - loop.time())))
        self._closed = True
        if left := [orphan for orphan in self._orphans.values() if not orphan.is_free]:
            logger.warning(
                "claims could not be ended, and run out: %s",
                _named(left),
                extra={"event": "claims_not_ended", "task_ids": [orphan.task_id for orphan in left]},
            )
        self._orphans.clear()
        if self._held:
            logger.warning(
                "the tracker was closed while tasks ran; their leases run out: %s",
                _named(self.held.values()),
                extra={"event": "closed_while_running", "task_ids": [held.task_id for held in self.held.values()]},
            )

    def _look_at(self, when: float) -> None:
        if self._task is None or self._task.done() or self._task.get_loop() is not asyncio.get_running_loop():
            self._poke = asyncio.Event()
            self._wake_at = when
            # A context of its own: what it does for all is no part of what the first of them is in, such as a trace.
            self._task = asyncio.create_task(
                self._keep(self._poke), name="aiotracker lease keeper", context=contextvars.Context()
            )
        elif when < self._wake_at and self._poke is not None:
            self._wake_at = when
            self._poke.set()

    async def _keep(self, poke: asyncio.Event) -> None:
        while True:
            try:
                planned, now = self._wake_at, self._clock.monotonic()
                if planned <= now:
                    await asyncio.sleep(0)
                elif await wait_until(self._clock, poke, planned - now):
                    self._measure(planned)
                poke.clear()
                self._wake_at = self._tend()
            except Exception as exc:
                # Whatever is wrong, other leases must be renewed.
                extra = {"event": "keeper_failed", "error_type": type(exc).__name__}
                logger.exception("the lease keeper failed, and goes on", extra=extra)
                await asyncio.sleep(0.1)

    def _measure(self, planned: float) -> None:
        lag = self._clock.monotonic() - planned
        if planned != self._warned_at and any(lag > held.terms.ttl * RENEW_AT for held in self._held.values()):
            self._warn_of(lag)

    def _warn_of(self, lag: float) -> None:
        if self._warned_at == self._wake_at:
            return
        self._warned_at = self._wake_at
        slow = [held for held in self._held.values() if lag > held.terms.ttl * RENEW_AT]
        logger.warning(
            "the event loop was blocked for %.3f s, over a third of a lease, while these tasks ran: %s; "
            "a body must not block (use asyncio.to_thread)",
            lag,
            _named(slow),
            extra={"event": "loop_blocked", "lag": lag, "task_ids": [held.task_id for held in slow]},
        )

    def _tend(self) -> float:
        """Renews what is due, interrupts what is over, and says when to look again."""
        now = self._clock.monotonic()
        wake_at = now + IDLE
        for held in list(self._held.values()):
            wake_at = min(wake_at, self._tend_one(held, now))
        for orphan in list(self._orphans.values()):
            if orphan.until <= now:
                del self._orphans[orphan.token]
                if not orphan.is_free:
                    extra = {"event": "claims_not_ended", "task_ids": [orphan.task_id]}
                    logger.warning("a claim of %r could not be ended, and runs out", orphan.task_id, extra=extra)
                continue
            if orphan.try_at <= now:
                orphan.try_at = now + orphan.pause
                orphan.pause = min(MAX_PAUSE, orphan.pause * 2)
                self._give_back(orphan)
            wake_at = min(wake_at, orphan.try_at, orphan.until)
        return wake_at

    def _tend_one(self, held: Held, now: float) -> float:
        body, ttl = held.body, held.terms.ttl
        if body is None or body.done():
            # Its task has ended without leaving the run: nobody is there whose lease it could be.
            self.leave(held)
            return now + IDLE
        if held.ending:
            if (left := held.left) > 0:
                return now + left
            held.interrupt()
            return now + IDLE
        if not held.check():
            held.interrupt()
            return now + IDLE
        wake_at = now + min(held.left, ttl / LAG_TICKS)
        if held.timeout_at is not None and not held.timed_out:
            if held.timeout_at <= now:
                held.timed_out = True
                held.interrupt()
            else:
                wake_at = min(wake_at, held.timeout_at)
        # What is due a little later goes into the same commit.
        if held.renew_at <= now + ttl * RENEW_AT * JITTER:
            if held.renewing is not None:  # no answer in half of what was left then
                held.renewing.cancel()
                held.unreachable = True
            self._renew(held)
        return min(wake_at, held.renew_at)

    def _renew(self, held: Held) -> None:
        asked, terms = self._clock.moment(), held.terms
        # The next try, should this one not be answered; well inside of what is left, and never spinning.
        held.renew_at = asked.monotonic + max(held.left / 2, terms.ttl / 100)

        def answered(future: Answer) -> None:
            is_latest = held.renewing is future
            if is_latest:
                held.renewing = None
            if future.cancelled():
                return
            exc = future.exception()
            if held.ending or terms.token not in self._held:
                return
            if exc is not None:
                held.unreachable = True
                held.renew_at = min(held.renew_at, self._clock.monotonic() + terms.ttl / LAG_TICKS)
                self._look_at(held.renew_at)
                if not self._unanswered:
                    asyncio.get_running_loop().call_soon(self._tell_unanswered)
                self._unanswered.append((held.task_id, exc))
                return
            held.unreachable = False
            record = future.result()
            if record is None or not _holds(record, terms.token):
                holder = "nobody" if record is None or record.lease is None else record.lease.worker
                held.lost = f"taken away or taken over; it is now held by {holder}"
                held.interrupt()
                return
            held.saw(record)
            if held.terms is terms:
                held.grant(asked)

        held.renewing = self._ask(held.task_id, Renew(terms, held.changes), held.record)
        held.renewing.add_done_callback(answered)

    def _tell_unanswered(self) -> None:
        unanswered, self._unanswered = self._unanswered, []
        exc = unanswered[0][1]
        logger.log(
            logging.WARNING if isinstance(exc, TrackerError) else logging.ERROR,
            "leases could not be renewed (%d of them, %r among them), and are tried again: %s: %s",
            len(unanswered),
            unanswered[0][0],
            type(exc).__name__,
            exc,
            extra={
                "event": "renewal_failed",
                "task_ids": [task_id for task_id, _ in unanswered],
                "error_type": type(exc).__name__,
            },
        )

    def _give_back(self, orphan: Orphan) -> None:
        if orphan.answer is not None:
            return  # the last try is still under way

        def answered(future: Answer) -> None:
            orphan.answer = None
            if future.cancelled() or future.exception() is not None:
                return
            orphan.is_free = not _holds(future.result(), orphan.token)
            # Without its end in the record, the claim may be on its way to the store still.
            if outcome_of(future.result(), orphan.token) is not None:
                self._orphans.pop(orphan.token, None)

        orphan.answer = self._ask(orphan.task_id, orphan.rule, None)
        orphan.answer.add_done_callback(answered)

    def _ask(self, task_id: str, rule: Rule, known: Task | None) -> Answer:
        try:
            return asyncio.ensure_future(self._update(task_id, rule, known))
        except Exception as exc:
            answer: Answer = asyncio.get_running_loop().create_future()
            answer.set_exception(exc)
            return answer


def _holds(record: Task | None, token: str) -> bool:
    return record is not None and record.lease is not None and record.lease.token == token


def _named(things: Iterable[Held] | Iterable[Orphan]) -> str:
    names = [repr(thing.task_id) for thing in things]
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
