"""Whose turn it is to write to a log on an object store, where several processes write to it.

All who have written lately take turns, in the order of their names: after a segment of one, the next one writes. It
must see that segment first, and each segment says how long its writer needs for that: so long the others leave it its
turn. Whoever lets its turn pass is passed over, and not reckoned with until it writes again. All processes see the same
segments, so they agree, more or less; where they do not, one of them loses a race.

Whoever is not reckoned with, and too slow to win a race, asks for a turn; those who write look for that now and then,
often at first. Where several come at once, whoever has won the first race waits a little, so that others can win one.
"""

import asyncio
import random
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Final, NamedTuple

from ._segments import Request, Segment

__all__ = ["Order"]

LATELY: Final = 30.0  # seconds
ROUND_TRIPS: Final = 2.0  # that a turn takes at the least: to see that it has come, and to write
MARGIN: Final = 2.0  # times what somebody needs
SOONEST: Final = 0.35  # the same, when a look is worth it
AGAIN: Final = 0.2  # of the rest of a turn, when another look is worth it
UNLUCKY: Final = 2.0  # times what somebody needs who has asked: it was wrong about that until now
ANYBODY: Final = ""  # who has come at the same time as we have
LONGEST: Final = 2.0  # seconds that a turn is left to anybody
RECENT: Final = timedelta(seconds=LONGEST)  # before we came: who has written since then is there still, we suppose
STALE: Final = timedelta(seconds=30)  # after which a request for a turn is that of somebody who has gone


class _Writer(NamedTuple):
    need: float  # seconds
    number: int  # of its latest segment


class _Turn(NamedTuple):
    """A turn that is left to others. Times of the event loop."""

    first_look: float  # when a look is worth it
    end: float


def _turn(since: float, need: float) -> _Turn:
    return _Turn(since + SOONEST * need, since + MARGIN * need)


def _bounded(seconds: float) -> float:
    """So that nobody is left a turn for longer than anybody may have, whatever it says that it needs."""
    return max(0.0, min(LONGEST / MARGIN, seconds))


class Order:
    """Who writes, and whose turn it is.

    Args:
        writer: Who asks.

    Attributes:
        need: Seconds that we need from a look at what is new until our segment is stored.
    """

    def __init__(self, writer: str) -> None:
        self.need = 0.0
        self._writer = writer
        self._writers: dict[str, _Writer] = {}  # who is reckoned with
        self._latest = ""
        self._since = 0.0  # when something new was seen
        self._others_at = -float("inf")  # when something of others was
        self._wrote_at = -float("inf")  # when we have
        self._is_rested = False  # there was nothing to write for a while
        self._put_time = 0.0  # seconds; of late
        self._let_in: dict[str, _Turn] = {}  # who is left a turn although it is not reckoned with
        self._granted: dict[str, float] = {}  # the nonces of their requests, and until when these are remembered

    @property
    def is_contended(self) -> bool:
        """Whether others have written lately."""
        return _now() - self._others_at < LATELY

    @property
    def is_known(self) -> bool:
        """Whether the others reckon with us."""
        return self._writer in self._writers

    def begins(self) -> None:
        """There is something to write."""
        if _now() - self._wrote_at > self._least_turn():
            self._is_rested = True

    def ahead(self) -> int:
        """How many others have their turn before us."""
        return len(self._ahead())

    def wait(self, ahead: int) -> float:
        """Seconds after which to look whether somebody has written; 0: it is our turn.

        Args:
            ahead: How many others at the most have their turn before us.
        """
        names = self._ahead()[-ahead:] if ahead > 0 else []
        needs = sum(max(self._writers[name].need, ROUND_TRIPS * self._put_time) for name in names)
        turns = [_turn(self._since, needs), *self._let_in.values()]
        first_look = max(turn.first_look for turn in turns)
        end = max(turn.end for turn in turns)
        another_look = random.uniform(0.2, 0.4) * max(self._put_time, AGAIN * (end - first_look))
        return max(0.0, min(end - _now(), max(first_look - _now(), another_look)))

    def saw(self, segments: Iterable[Segment]) -> None:
        """What is new in the log, in order."""
        self._since = now = _now()
        for segment in segments:
            name = segment.writer
            if self._latest in self._writers and name in self._writers:
                for passed_over in self._between(self._latest, name):
                    del self._writers[passed_over]
            self._latest = name
            self._writers[name] = _Writer(_bounded(segment.turn), segment.segment)
            self._let_in.pop(name, None)
            if name != self._writer:
                self._others_at = now
                self._let_in.pop(ANYBODY, None)
            else:
                self._wrote(now)

    def saw_at_first(self, segments: Iterable[Segment], now: datetime) -> None:
        """What was in the log when we came.

        Args:
            segments: In order.
            now: The store's time.
        """
        self.saw(segment for segment in segments if abs(now - segment.time) <= RECENT)

    def waits(self, request: Request, now: datetime) -> bool:
        """Whether somebody else still waits for a turn that it has asked for.

        Args:
            request: Says who.
            now: The store's time.
        """
        known = self._writers.get(request.writer)
        has_written = known is not None and known.number > request.after
        return request.writer != self._writer and not has_written and abs(now - request.time) <= STALE

    def let_in(self, request: Request) -> None:
        """Leaves a turn to somebody, once for each time that it asks."""
        now = _now()
        self._granted = {nonce: until for nonce, until in self._granted.items() if until > now}
        if request.nonce not in self._granted:
            self._granted[request.nonce] = now + 2 * STALE.total_seconds()
            self._let_in = {name: turn for name, turn in self._let_in.items() if turn.end > now}
            self._let_in[request.writer] = _turn(now, _bounded(UNLUCKY * request.turn))

    def answered(self, looked_at: float | None, began: float) -> None:
        """A PUT of ours was.

        Args:
            looked_at: When the look before it began, if there was one.
            began: When that PUT did.
        """
        now = _now()
        put_time = min(LONGEST, now - began)
        self._put_time += (put_time - self._put_time) * (0.2 if self._put_time else 1.0)
        self.needed(ROUND_TRIPS * put_time if looked_at is None else now - looked_at)

    def needed(self, seconds: float) -> None:
        """So long a turn of ours took, or would have taken."""
        seconds = _bounded(seconds)
        self.need = max(seconds, 0.9 * self.need + 0.1 * seconds)

    def _wrote(self, now: float) -> None:
        is_first = self._wrote_at == -float("inf")
        if self._is_rested and len(self._writers) == 1 and (is_first or self.is_contended):
            end = now + self._least_turn()  # others may have begun at the same time, and cannot say so
            self._let_in[ANYBODY] = _Turn(end, end)
        self._wrote_at, self._is_rested = now, False

    def _least_turn(self) -> float:
        return MARGIN * ROUND_TRIPS * self._put_time

    def _ahead(self) -> list[str]:
        if self._writer not in self._writers or self._latest not in self._writers:
            return []  # nobody waits for us: whoever comes to them takes the first chance
        return self._between(self._latest, self._writer)

    def _between(self, first: str, last: str) -> list[str]:
        """Who is reckoned with after the first one, and before the last one."""
        names = sorted(self._writers)
        if first < last:
            return [name for name in names if first < name < last]
        return [name for name in names if name > first] + [name for name in names if name < last]


def _now() -> float:
    return asyncio.get_running_loop().time()
