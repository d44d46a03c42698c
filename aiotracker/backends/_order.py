"""Whose turn it is to write to a log on an object store, where several processes write to it.

All who have written lately take turns, in the order of their names: after a segment of one, the next one writes. It
must see that segment first, and each segment says how long its writer needs for that: so long the others leave it its
turn. Whoever lets its turn pass is passed over, and not reckoned with until it writes again. All processes see the same
segments, so they agree, more or less; where they do not, one of them loses a race.

Whoever is not reckoned with, and too slow to win a race, asks for a turn; those who write look for that now and then.
"""

import asyncio
import random
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Final, NamedTuple

from ._segments import Request, Segment

__all__ = ["Order"]

FORGOTTEN: Final = 600.0  # seconds after which a writer that was not seen is not reckoned with
ROUND_TRIPS: Final = 2.0  # that a turn takes at the least: to see that it has come, and to write
MARGIN: Final = 2.0  # times what somebody needs
LONGEST: Final = 2.0  # seconds that a turn is left to anybody
STALE: Final = timedelta(seconds=30)  # after which a request for a turn is that of somebody who has gone


class _Writer(NamedTuple):
    need: float  # seconds
    number: int  # of its latest segment
    seen_at: float


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
        self._put_time = 0.0  # seconds; of late
        self._let_in: str | None = None  # who has asked for a turn
        self._let_in_until = 0.0
        self._granted = ""  # the nonce of the latest request that was

    @property
    def is_contended(self) -> bool:
        """Whether others have written lately."""
        since = _now() - FORGOTTEN
        return any(writer.seen_at > since for name, writer in self._writers.items() if name != self._writer)

    def ahead(self) -> int:
        """How many others have their turn before us."""
        return len(self._ahead())

    def wait(self, ahead: int) -> float:
        """Seconds after which to look whether somebody has written; 0: it is our turn.

        Args:
            ahead: How many others at the most have their turn before us.
        """
        names = self._ahead()[-ahead:] if ahead > 0 else []
        until = max(self._since + sum(map(self._patience, names)), self._let_in_until)
        pause = ROUND_TRIPS * self._put_time * max(0, len(names) - 1) + self._put_time * random.uniform(0.2, 0.4)
        return max(0.0, min(pause, until - _now()))

    def saw(self, segments: Iterable[Segment]) -> None:
        """What is new in the log, in order."""
        self._since = now = _now()
        for segment in segments:
            if self._latest in self._writers and segment.writer in self._writers:
                for passed_over in self._between(self._latest, segment.writer):
                    del self._writers[passed_over]
            self._latest = segment.writer
            self._writers[self._latest] = _Writer(segment.turn, segment.segment, now)
            if self._latest == self._let_in:
                self._let_in, self._let_in_until = None, 0.0

    def asked(self, request: Request, now: datetime) -> None:
        """Somebody asks for a turn.

        Args:
            request: Says who.
            now: The store's time.
        """
        known = self._writers.get(request.writer)
        is_late = known is not None and known.number > request.after
        if is_late or request.nonce == self._granted or request.writer == self._writer:
            return
        self._granted = request.nonce
        if abs(now - request.time) <= STALE:
            self._let_in = request.writer
            self._let_in_until = _now() + min(LONGEST, MARGIN * request.turn)

    def answered(self, looked_at: float | None, began: float) -> None:
        """A PUT of ours was.

        Args:
            looked_at: When the look before it began, if there was one.
            began: When that PUT did.
        """
        now = _now()
        put_time = min(LONGEST, now - began)
        self._put_time += (put_time - self._put_time) * (0.2 if self._put_time else 1.0)
        need = ROUND_TRIPS * put_time if looked_at is None else min(LONGEST, now - looked_at)
        self.need = max(need, 0.9 * self.need + 0.1 * need)

    def _patience(self, name: str) -> float:
        return min(LONGEST, MARGIN * max(self._writers[name].need, ROUND_TRIPS * self._put_time))

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
