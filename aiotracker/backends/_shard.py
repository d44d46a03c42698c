"""One shard of a log on an object store: what one process knows of it, and how it writes to it.

`Shard.commit` is what a group commit calls. One at a time: the transitions of a batch are run on the index, what they
come to is put as the next segment, and only then is the index changed and anybody answered. Where somebody else was
faster, the new segments are read and the transitions are run again. A batch that writes nothing is answered when a
look, made after it was asked, has found no further segment.

Beside that, now and then, a checkpoint is written, and old segments are deleted.
"""

import asyncio
import contextlib
import itertools
import logging
import random
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Final

import msgspec

from ..errors import ConflictError, OutcomeUnknownError, StoreCorruptedError, StoreError, StoreUnavailableError
from ._archive import Archive, Objects, Tries
from ._log import Batch, Index, Wanted
from ._order import Order
from ._s3 import BusyError, together
from ._segments import (
    CLOSE,
    PART_BYTES,
    Floor,
    Request,
    Segment,
    Times,
    part_key,
    read_segment,
    request_key,
    segment_key,
    split,
    write_segment,
)

__all__ = ["Shard"]

logger = logging.getLogger("aiotracker")

FIRST_LOOK: Final = 4  # segments that are asked for at once by whoever reads a shard for the first time
WIDEST: Final = 32  # segments that are asked for at once
TAIL_BYTES: Final = 4 * 1024 * 1024  # of segments behind a checkpoint, before there is another one
WORTH: Final = 16  # segments for each request that a checkpoint takes, so that it costs a sixteenth at the most
LISTEN: Final = 8  # segments at the most, after which it is looked whether somebody asks for a turn
FEW: Final = 2  # segments at first without such a look: who comes for one task needs no further requests
RARER: Final = 4  # the part of the segments since the first one, after which there is the next look: a fourth
ASK: Final = 3  # segments of others that come before one of ours, until a turn is asked for by who is reckoned with
ASKS: Final = 3  # tries, where others ask at the same time
CLOSE_TIME: Final = 5.0  # seconds that closing waits for a checkpoint


class _State:
    """A shard as of one of its segments."""

    def __init__(self, floor: Floor | None, known_at: float | None) -> None:
        self.index = Index()
        self.number = 0 if floor is None else floor.floor
        self.nonce = "" if floor is None else floor.nonce
        self.time = None if floor is None else floor.time
        self.known_at = known_at  # when, by the store's clock, it was certain that what follows is not deleted
        self.floor = self.number  # as far as is known
        self.tail_bytes = 0  # of the segments behind the floor


class _Pending:
    """A segment that is on its way."""

    def __init__(self, about: Segment, body: bytes, batch: Batch) -> None:
        self.about = about
        self.body = body
        self.batch = batch
        self.may_be_stored = False  # an earlier try was not answered


class Shard:
    """One shard of a log.

    Args:
        objects: Where it is stored.
        number: Which one.
        writer: Names this tracker; no other one has it.
        now: Gives the store's time as best known.
        patience: Seconds for which a request is tried again.
        limit: Bytes of a record.
        read_only: Nothing is written.
        times: How long things count.
        committed: Is told of each commit that was stored: operations, bytes, and seconds.
        conflicted: Is told of each task whose change is made again, since somebody else was faster.
    """

    def __init__(
        self,
        objects: Objects,
        number: int,
        *,
        writer: str,
        now: Callable[[], datetime],
        patience: float,
        limit: int,
        read_only: bool = False,
        times: Times | None = None,
        committed: Callable[[int, int, float], None] | None = None,
        conflicted: Callable[[str], None] | None = None,
    ) -> None:
        self.number = number
        self._committed = committed
        self._conflicted = conflicted
        self._objects = objects
        self._writer = writer
        self._now = now
        self._patience = patience
        self._limit = limit
        self._read_only = read_only
        self._times = times or Times()
        self._nonces = itertools.count(1)
        self._state: _State | None = None
        self._pending: _Pending | None = None
        self._mismatch: str | None = None  # the key of a segment that did not follow the one before it
        self._doing = "it was not asked yet"
        self._order = Order(writer)
        self._looked_at: float | None = None  # when the latest look at what is new began, after our latest PUT
        self._found = 0  # segments, by the latest such look
        self._listened_at: int | None = None  # at which segment it was last looked whether somebody asks for a turn
        self._listened_from = 0  # the first such segment
        self._archive = Archive(objects, number, writer=writer, patience=patience, times=self._times)
        self._asking: asyncio.Task[None] | None = None
        self._checkpoint: asyncio.Task[None] | None = None
        self._haste = random.uniform(1.0, 1.5)  # so that not all processes write a checkpoint at once

    def blame(self) -> str:
        """Why a commit may take long."""
        return f"{self._objects!r}: {self._doing}"

    async def aclose(self) -> None:
        """Ends what goes on beside the commits."""
        # Of trackers that live for a moment each, one must come to the end of a checkpoint.
        for task, patience in ((self._asking, 0.0), (self._checkpoint, CLOSE_TIME)):
            if task is not None:
                await asyncio.wait({task}, timeout=patience)
                task.cancel()
                await asyncio.wait({task})

    # -- committing

    async def pace(self) -> None:
        """Before a batch is taken: lets others who write have their turn."""
        self._order.begins()
        with contextlib.suppress(StoreError):  # a commit will tell
            await self._listen()
            await self._turn()

    async def _turn(self) -> None:
        """Waits while it is the turn of others."""
        state, order = self._state, self._order
        if state is None:
            return
        until = state.number + order.ahead()
        while pause := order.wait(until - state.number):
            await asyncio.sleep(pause)
            await self._follow(max(1, until - state.number), to_the_end=False)
            if self._state is not state:
                return

    async def _listen(self) -> None:
        """Looks now and then whether somebody asks for a turn."""
        state = self._state
        if state is None:
            return
        if self._listened_at is None:
            self._listened_from = state.number
            self._listened_at = state.number + FEW
        # Often at first: those who have come with us may be in need.
        if state.number < self._listened_at + min(LISTEN, 1 + (state.number - self._listened_from) // RARER):
            return
        self._listened_at = state.number
        for request in (await self._requests())[0]:
            self._order.let_in(request)

    async def _requests(self) -> tuple[list[Request], str | None]:
        """Those of others who wait for a turn, and the version of the object that says so."""
        stored, _ = await self._archive.get(request_key(self.number))
        if stored is None:
            return [], None
        requests: list[Request] = []
        with contextlib.suppress(msgspec.DecodeError):  # it counts for nothing but that
            requests = msgspec.json.decode(stored.body, type=list[Request])
        now = self._now()
        return [request for request in requests if self._order.waits(request, now)], stored.etag

    def _ask(self, state: _State) -> None:
        """Asks for a turn, beside the races that go on."""
        if self._asking is None or self._asking.done():
            ours = Request(self._nonce(), state.number, self._order.need, self._now())
            name = f"{self._objects!r}: asks for a turn in shard {self.number}"
            self._asking = asyncio.create_task(self._put_request(ours), name=name)

    async def _put_request(self, ours: Request) -> None:
        with contextlib.suppress(StoreError):
            for _ in range(ASKS):
                others, etag = await self._requests()
                body = msgspec.json.encode([*others, ours])
                with contextlib.suppress(ConflictError):
                    await self._objects.put(request_key(self.number), body, absent=etag is None, match=etag)
                    break

    async def commit(self, wanted: list[Wanted]) -> None:
        """Stores what waits, and answers it. See `_pump.Pump`.

        Raises:
            StoreError: Nothing of it is stored, or whether it is stored is not known.
        """
        loop = asyncio.get_running_loop()
        began = loop.time()
        if self._pending is not None:
            await self._settle(self._pending)
        is_known, races, overtaken = False, 0, 0  # whether what we know was so after we were asked
        bearable = ASK if self._order.is_known else 1
        while True:
            if self._state is None:
                await self._load()
                is_known = True
                continue
            state = self._state
            for want in wanted:
                want.answer = want.error = None
            now = self._monotone(state)
            batch = state.index.batch(wanted, now, self._limit)
            if not batch.data:
                if is_known or await self._is_latest(state):
                    break
                is_known = self._state is not None
                continue
            number = state.number
            if await self._append(state, batch, now, wanted):
                break
            races += 1
            if self._conflicted is not None:
                for task_id in batch.changes:
                    self._conflicted(task_id)
            if loop.time() > began + self._patience:
                raise StoreUnavailableError(f"{races} races were lost in a row: {self.blame()}")
            overtaken += 1 if self._state is None else max(1, self._state.number - number)
            if self._state is not None and overtaken >= bearable:
                self._ask(self._state)
                overtaken, bearable = 0, ASK
            await self._turn()
        index = (await self._known()).index
        self._mismatch = None
        # Where others look for work too, all would fight for the same first tasks.
        index.first_share = random.random() if self._order.is_contended else 0.0
        index.look(wanted[: batch.taken])
        for want in wanted[batch.taken :]:
            want.again = 0.0
        if batch.data:
            if self._committed is not None:
                self._committed(batch.taken, len(batch.data), loop.time() - began)
            self._consider_checkpoint()

    async def _known(self) -> _State:
        while self._state is None:  # what was written has counted, and was forgotten with what stood before it
            await self._load()
        return self._state

    def _monotone(self, state: _State) -> datetime:
        # What one machine has written comes before what the next one makes of it, although their clocks differ.
        now, before = self._now(), state.time
        return before if before is not None and timedelta() < before - now <= CLOSE else now

    async def _append(self, state: _State, batch: Batch, now: datetime, wanted: list[Wanted]) -> bool:
        """Puts the next segment; `False` where somebody else has, and its number is taken."""
        turn = round(self._order.need, 3)
        about = Segment(state.number + 1, self.number, self._nonce(), state.nonce, now, turn)
        pending = self._pending = _Pending(about, write_segment(about, batch.data), batch)
        try:
            return await self._settle(pending)
        except StoreError as exc:
            if pending.may_be_stored:
                for want in wanted:
                    if want.task_id in batch.changes:
                        want.error = OutcomeUnknownError(
                            f"the store did not tell whether a write to {want.task_id!r} landed: {exc}", want.task_id
                        )
            raise

    def _nonce(self) -> str:
        return f"{self._writer}-{next(self._nonces):x}"

    async def _settle(self, pending: _Pending) -> bool:
        """Puts a segment until it is known whether it counts. While that is not known no other one is put.

        Raises:
            StoreError: It is not known yet, or it was not put.
        """
        state = self._state
        if state is None:  # what was known turned out to be wrong meanwhile
            await self._load()
            state = self._state
            if state is None or state.number + 1 != pending.about.segment:
                self._pending = None  # its number is taken: it is in what was read, or nowhere
                return False
        try:
            is_landed = await self._put_segment(state, pending)
        except StoreError:
            if not pending.may_be_stored:
                self._pending = None
            raise
        self._pending = None
        return is_landed

    async def _put_segment(self, state: _State, pending: _Pending) -> bool:
        loop = asyncio.get_running_loop()
        key = segment_key(self.number, pending.about.segment)
        tries = Tries(self._patience)
        while True:
            self._doing = f"{key} is being written"
            began = loop.time()
            try:
                await self._objects.put(key, pending.body, absent=True)
            except ConflictError as exc:
                self._answered(began)
                # By somebody else, or by ourselves before the answer was lost.
                nonces = await self._read_after_conflict(state)
                self._order.needed(loop.time() - began)  # of the next turn: to read, and to write
                if nonces is not None:
                    if pending.about.nonce in nonces or self._state is state or not pending.may_be_stored:
                        return pending.about.nonce in nonces
                    return await self._has_counted(pending.about, pending.about.time.timestamp())
                await tries.again(StoreUnavailableError(f"{exc}, and is not stored: {self.blame()}"))
            except BusyError as exc:
                await tries.again(exc)
            except StoreUnavailableError as exc:
                pending.may_be_stored = True
                await tries.again(exc)
            else:
                answered = self._objects.answered
                break
        since = pending.about.time.timestamp() if pending.may_be_stored else answered
        pending.may_be_stored = True
        self._answered(began)
        if not await self._counts(state, (answered,)):
            return await self._has_counted(pending.about, since)
        state.index.apply(pending.batch)
        self._advance(state, pending.about, len(pending.body))
        state.known_at = answered if answered is not None else state.known_at
        self._order.saw([pending.about])
        return True

    async def _has_counted(self, about: Segment, since: float | None) -> bool:
        """Whether a segment of ours, which may be stored, is one that others have followed, or a ghost.

        Args:
            about: The segment, of which only a checkpoint tells by now.
            since: The store's time, before which it cannot have been stored.

        Raises:
            StoreUnavailableError: That cannot be told any more.
        """
        stood = await self._archive.floor()
        if stood.floor is not None and stood.floor.floor == about.segment:
            return stood.floor.nonce == about.nonce
        key = segment_key(self.number, about.segment + 1)
        follower, at = await self._archive.get(key)
        if follower is not None:
            return split(self._archive.path(key), follower.body)[0].before == about.nonce
        # One that had followed ours would have been kept for longer than this.
        if since is not None and at is not None and abs(at - since) <= self._times.trust:
            return False
        raise StoreUnavailableError(
            f"whether {segment_key(self.number, about.segment)} counted cannot be told any more"
        )

    async def _read_after_conflict(self, state: _State) -> set[str] | None:
        """The nonces of the segments that follow; `None` where there are none."""
        before = state.number
        found = await self._follow(2)  # the second tells whether there are more
        return {one.nonce for one in found} if self._state is not state or state.number > before else None

    def _answered(self, began: float) -> None:
        self._order.answered(self._looked_at, began)
        self._looked_at = None

    # -- which answers count

    async def _counts(self, state: _State, answered: Sequence[float | None]) -> bool:
        """Whether answers about what follows count. If not, all that is known of the shard is forgotten."""
        known_at, trust = state.known_at, self._times.trust
        if known_at is not None and all(at is not None and abs(at - known_at) <= trust for at in answered):
            return True
        stood = await self._archive.floor()
        if stood.floor is not None and stood.floor.floor > state.number:
            extra = {"event": "shard_read_again", "where": repr(self._objects), "shard": self.number}
            logger.info(
                "%r: shard %d is read again: its log was deleted behind us", self._objects, self.number, extra=extra
            )
            self._state = None
            return False
        state.known_at = stood.at
        return True

    def _advance(self, state: _State, about: Segment, size: int) -> None:
        state.number, state.nonce, state.time = about.segment, about.nonce, about.time
        state.tail_bytes += size

    # -- reading

    async def _is_latest(self, state: _State) -> bool:
        """Whether no segment follows. Those that do have been read when this returns."""
        before = state.number
        await self._follow(1)
        return self._state is state and state.number == before

    async def _follow(self, width: int, *, to_the_end: bool = True) -> list[Segment]:
        """Reads the segments that follow, and takes note of who has written them.

        Args:
            width: How many are asked for at once, to begin with.
            to_the_end: Until there is no further one.
        """
        self._looked_at = asyncio.get_running_loop().time()
        found: list[Segment] = []
        await self._read_on(width if self._found <= width else min(WIDEST, self._found + 1), found, to_the_end)
        self._found = len(found)
        if found:
            self._order.saw(found)
        return found

    async def _read_on(self, width: int, segments: list[Segment] | None = None, to_the_end: bool = True) -> bool:
        """Reads the segments that follow.

        Args:
            width: How many are asked for at once, to begin with.
            segments: Takes those that were read.
            to_the_end: Until there is no further one; else once.

        Returns:
            Whether what is known is so as of now; `False` where all must be read again.
        """
        state = self._state
        assert state is not None
        while True:
            first = state.number + 1
            self._doing = f"{segment_key(self.number, first)} is being looked for"
            keys = [segment_key(self.number, first + more) for more in range(width)]
            answers = await together(map(self._archive.get, keys))
            found = list(itertools.takewhile(lambda answer: answer[0] is not None, answers))
            is_end = len(found) < len(answers)
            relevant = answers[: len(found) + 1] if is_end else answers
            if not await self._counts(state, [at for _, at in relevant]):
                return False
            for number, (stored, _) in enumerate(found, first):
                assert stored is not None
                about = self._read_one(state, number, stored.body)
                if about is None:
                    return False
                if segments is not None:
                    segments.append(about)
                if len(found) > 1:
                    await asyncio.sleep(0)
            if is_end:
                at = relevant[-1][1]
                state.known_at = at if at is not None else state.known_at
            if is_end or not to_the_end:
                return True
            width = min(WIDEST, 2 * width)

    def _read_one(self, state: _State, number: int, body: bytes) -> Segment | None:
        key = segment_key(self.number, number)
        path = f"{self._objects!r}{key}"
        try:
            about, begin = split(path, body)
            if (about.segment, about.shard) != (number, self.number):
                raise StoreCorruptedError(f"{path} is segment {about.segment} of shard {about.shard}", path)
            if about.before != state.nonce:
                if self._mismatch == key:
                    raise StoreCorruptedError(f"{path} does not follow the segment before it", path)
                extra = {"event": "shard_read_again", "where": path, "shard": self.number}
                logger.warning("%s does not follow what was read before; the shard is read again", path, extra=extra)
                self._mismatch = key
                self._state = None
                return None
            read_segment(path, body, begin, state.index)
        except StoreCorruptedError:
            self._state = None
            raise
        self._advance(state, about, len(body))
        return about

    async def _load(self) -> None:
        """Reads the latest checkpoint, and what follows it."""
        missing: str | None = None
        while True:
            self._doing = "its checkpoint is being read"
            floor, _, _, at = await self._archive.floor()
            state = _State(floor, at)
            if floor is None or await self._archive.read(floor, state.index):
                break
            if floor.checkpoint == missing:
                path = self._archive.path(part_key(self.number, missing, 0))
                raise StoreCorruptedError(f"{path}, or another part beside it, is missing", path)
            missing = floor.checkpoint  # there is a later one, or somebody has deleted it
        self._state = state
        found: list[Segment] = []
        await self._read_on(FIRST_LOOK, found)
        self._order.saw_at_first(found, self._now())

    # -- checkpoints

    def _consider_checkpoint(self) -> None:
        state = self._state
        if state is None or self._read_only or self._checkpoint is not None or not self._is_due(state, self._haste):
            return
        # What it says is read before anybody else has a turn.
        task = asyncio.create_task(
            self._write_checkpoint(state), name=f"{self._objects!r}: checkpoint of shard {self.number}"
        )
        self._checkpoint = task
        task.add_done_callback(self._checkpoint_ended)

    def _is_due(self, state: _State, haste: float = 1.0) -> bool:
        live = state.index.live_bytes
        requests = 5 + 2 * (live // PART_BYTES)
        tail = state.number - state.floor
        is_long = state.tail_bytes >= haste * max(TAIL_BYTES, live) and tail >= WORTH // 4 * requests
        return is_long or tail >= haste * WORTH * requests

    def _checkpoint_ended(self, task: "asyncio.Task[None]") -> None:
        self._checkpoint = None
        if task.cancelled():
            return
        self._haste = random.uniform(1.0, 1.5)
        if (exc := task.exception()) is not None:
            self._haste *= 4  # not with every segment from now on
            extra = {
                "event": "checkpoint_failed",
                "where": repr(self._objects),
                "shard": self.number,
                "error_type": type(exc).__name__,
            }
            logger.warning(
                "%r: no checkpoint of shard %d was written: %s", self._objects, self.number, exc, extra=extra
            )

    async def _write_checkpoint(self, state: _State) -> None:
        number, nonce, time, size = state.number, state.nonce, state.time, state.tail_bytes
        entries = state.index.snapshot()
        floor = (await self._archive.floor()).floor
        if floor is not None and floor.floor > state.floor:
            # Another process has written one meanwhile.
            state.tail_bytes = state.tail_bytes * (state.number - floor.floor) // (state.number - state.floor)
            state.floor = floor.floor
            if not self._is_due(state):
                return
        assert time is not None
        if await self._archive.write(number, nonce, time, entries):
            state.floor = max(state.floor, number)
            state.tail_bytes -= min(size, state.tail_bytes)
