"""S3Tracker: one object a task.

    PREFIX/aiotracker.json              the marker: format, layout, and what the service was found to do; written once
    PREFIX/tasks/3f/order-17.json       the record of "order-17"; 3f is the beginning of the SHA-256 of the id
    PREFIX/tasks/c0/a%2Fb.json          the record of "a/b"
    PREFIX/tasks/9e/=9e12...json        the record of an id that is too long for a key: "=" and the SHA-256
    PREFIX/snapshot.jsonl.z             what somebody saw when they last looked at all tasks: a cache, never the truth
    PREFIX/probe/...                    an object of the probe, for a moment

Each write is one PUT under a condition. What this process has seen before saves the read before it: the condition
finds out whether that still is so.
"""

import asyncio
import heapq
import logging
import random
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import AsyncExitStack
from datetime import datetime, timedelta
from hashlib import sha256
from typing import Any, Final
from urllib.parse import quote

import msgspec
from typing_extensions import TypeVar

from .._core.query import Query
from .._core.task import Status, Task
from .._core.transitions import PURGE_AGE
from ..contract import UNKNOWN, Claimable, Transition, _Unknown, in_order
from ..errors import (
    ConflictError,
    InvalidValueError,
    RecordTooLargeError,
    StoreCorruptedError,
    StoreError,
    StoreUnavailableError,
)
from ..tracker import BaseTracker
from ._aws_requests import TaskTurns
from ._s3 import CONNECTIONS, KEY_BYTES, REQUEST_TIME, Entry, OnS3, S3Options, S3Store, together
from ._s3_seen import PURGED, Cache, Seen, Snapshot

__all__ = ["S3Tracker"]

D = TypeVar("D", default=Any)
R = TypeVar("R", default=Any)

logger = logging.getLogger("aiotracker")

LAYOUT: Final = "objects"
TASKS: Final = "tasks/"
HEX: Final = "0123456789abcdef"
CACHE_BYTES: Final = 64 * 1024 * 1024
CHUNK: Final = 500  # records that are decoded before others have their turn
CANDIDATES: Final = 10_000  # claimable tasks that a look keeps at the most
TOMBSTONES: Final = 1000  # that one look removes at the most
SHARE_OF_LOOKING: Final = 10  # a look may be used for this many times as long as it took
MIN_USE: Final = 0.5  # seconds
CLOSE: Final = timedelta(seconds=10)  # by which the views that two machines have of the store's time may differ
OPEN: Final = frozenset({Status.PENDING, Status.FAILED, Status.IN_PROGRESS})


class S3Tracker(OnS3, BaseTracker[D, R]):
    """Keeps each task in an object of its own. For many small workers that know their task's id, such as functions
    behind a queue; for crawlers with many tasks a second, `S3LogTracker` needs a hundredth of the requests.

    A lifecycle on a new id is two requests: PUT with `If-None-Match: *`, PUT with `If-Match`. So it is on an id that
    this tracker has added or seen; on other ids there is a GET before. Renewals are one more PUT each, at a third of
    the lease: none for tasks that take less.

    Needs a service that honours conditions on PUT. That is tried when a store is first opened, and a service that does
    not is refused with `StoreUnsafeError`. The store's own clock, as its answers tell it, decides about leases.

    Args:
        bucket: Its name; it must exist.
        prefix: Of all keys of this store; nothing outside of it is touched.
        client: An aiobotocore client for S3 to use, with its own settings; it is not closed.
        session: An aioboto3 or aiobotocore session to make the client with.
        endpoint_url: Of another service than AWS.
        region: Of the bucket.
        profile: A name in `~/.aws/config`.
        path_style: `endpoint/bucket/key` instead of `bucket.endpoint/key`; by default where `endpoint_url` is given.
        put_options: More arguments of PutObject, such as `{"ServerSideEncryption": "aws:kms"}`.
        connections: Requests under way at once.
        cache_bytes: How much of what was seen is kept in memory, to spare reading it again.
        **options: As for `BaseTracker`.

    Raises:
        InvalidValueError: An argument cannot be taken.
    """

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        *,
        client: Any = None,
        session: Any = None,
        endpoint_url: str | None = None,
        region: str | None = None,
        profile: str | None = None,
        path_style: bool | None = None,
        put_options: Mapping[str, Any] | None = None,
        connections: int = CONNECTIONS,
        cache_bytes: int = CACHE_BYTES,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        s3_options = S3Options(
            client=client,
            session=session,
            endpoint_url=endpoint_url,
            region=region,
            profile=profile,
            path_style=path_style,
            put_options=put_options or {},
            connections=connections,
            request_time=min(REQUEST_TIME, max(0.2, self._patience / 2)),
        )
        self._store = S3Store(bucket, prefix, s3_options, self.clock)
        self._cache = Cache(cache_bytes)
        self._snapshot = Snapshot(self._store, self._cache)
        self._turns = TaskTurns(self._patience)
        # Whether an id that nobody here has seen is likely to be new; learned from how the last guess went.
        self._guesses_absent = True
        self._ready: deque[Task] = deque()  # claimable ones of the last look
        self._ready_until = 0.0
        self._has_more = False  # the last look saw more than it kept
        self._next_due: datetime | None = None
        self._is_contended = False

    # -- the contract

    async def connect(self, stack: AsyncExitStack) -> None:
        await self._store.connect(stack)
        await self._store.identify(LAYOUT, read_only=self.read_only)
        self.clock_uncertainty = self._store.uncertainty

    async def load(self, task_id: str) -> Task | None:
        task_id = self._check_id(task_id)
        key = self._key(task_id)
        began = asyncio.get_running_loop().time()
        stored = await self._store.patiently(lambda: self._store.get(key))
        if stored is None:
            self._cache.drop(key)
            self._guesses_absent = True
            return None
        self._cache.keep(key, stored.etag, stored.body, began)
        return self._decoded(key, stored.etag, stored.body)

    async def dump(self, task: Task) -> Task:
        self._check_writable("dump")
        self._check_id(task.id)
        key = self._key(task.id)
        seen = self._cache.get(key)
        new = task
        if seen is None or not seen.is_purged:
            # The same write_id again would not show that anything was written.
            is_old = seen is not None and seen.etag == task.version and task.write_id.encode() in seen.body
            if is_old or not task.write_id:
                new = task.replace(write_id=self.new_id())
        raw = self._encoded(new)
        match = seen.etag if task.version is None and seen is not None and seen.is_purged else task.version
        began = asyncio.get_running_loop().time()
        try:
            etag = await self._store.put(key, raw, absent=match is None, match=match)
        except ConflictError as exc:
            self._cache.drop(key)
            self._is_contended = True
            if task.version is None:
                self._guesses_absent = False
            return await self._after_conflict(new, exc)
        self._cache.keep(key, etag, raw, began)
        if task.version is None:
            self._guesses_absent = True
            if new.status is Status.PENDING:
                self._ready.clear()  # it may be the best one to claim
        return new.replace(version=etag)

    async def _after_conflict(self, new: Task, exc: ConflictError) -> Task:
        """What is stored instead. Our own write, if something between us and the store has sent it twice."""
        if exc.known:
            raise exc
        try:
            stored = await self.load(new.id)
        except StoreUnavailableError:
            raise exc from None
        if stored is not None and stored.write_id == new.write_id:
            return stored
        raise ConflictError(f"another version of {new.id!r} is stored", stored, known=True) from exc

    def update(
        self, task_id: str, transition: Transition, *, known: Task | _Unknown | None = UNKNOWN
    ) -> Awaitable[Task | None]:
        key = self._key(task_id)

        def rule(task: Task | None, now: datetime) -> Task | None:
            # Two machines know the store's time to a second or so. What one has written comes before what the next
            # one makes of it; that also keeps fences growing when a task is purged and made again.
            before = self._purged_at(key) if task is None else task.update_time
            if before is not None and timedelta() < before - now <= CLOSE:
                now = before
            return transition(task, now)

        return self._update_in_turn(task_id, key, rule, known)

    async def _update_in_turn(
        self, task_id: str, key: str, rule: Transition, known: Task | _Unknown | None
    ) -> Task | None:
        asked = asyncio.get_running_loop().time()
        async with self._turns.turn(task_id):
            seen = self._cache.get(key)
            if seen is not None and seen.began > asked:
                # Read or written after this was asked for, by the one whose turn it was before: as good as a read.
                stored = self._decoded(key, seen.etag, seen.body)
                if rule(stored, self.now()) is stored:
                    return stored
                known = stored
            elif not isinstance(known, Task) or known.version is None:
                known = self._guess(seen, key, known)
            return await self._update(task_id, rule, known)

    async def delete(self, task: Task) -> None:
        self._check_writable("delete")
        key = self._key(task.id)
        if task.version is None:
            if (stored := await self.load(task.id)) is not None:
                raise ConflictError(f"{task.id!r} is stored", stored, known=True)
            return
        try:
            if self._store.facts.guards_delete and self.now() - task.update_time >= PURGE_AGE:
                await self._store.delete(key, match=task.version)
                self._cache.drop(key)
            else:
                # Whoever makes the task again puts it in the place of this. Until then a write that is late is refused.
                body = msgspec.json.encode(_Purged(max(self.now(), task.update_time), self.new_id()))
                began = asyncio.get_running_loop().time()
                self._cache.keep(key, await self._store.put(key, body, match=task.version), body, began)
        except ConflictError:
            self._cache.drop(key)
            raise

    async def scan(self, query: Query) -> AsyncIterator[Task]:
        async for task in in_order(query, self._scan(query)):
            yield task

    async def claimable(self, limit: int) -> Claimable:
        loop = asyncio.get_running_loop()
        if not self._ready or loop.time() >= self._ready_until:
            began = loop.time()
            await self._look_for_work(limit)
            took = loop.time() - began
            self._ready_until = loop.time() + max(MIN_USE, SHARE_OF_LOOKING * took)
        tasks = [self._ready.popleft() for _ in range(min(limit, len(self._ready)))]
        return Claimable(tasks, self.now() if self._ready or self._has_more else self._next_due)

    # -- records and their keys

    def _key(self, task_id: str) -> str:
        digest = sha256(task_id.encode()).hexdigest()
        key = f"{TASKS}{digest[:2]}/{quote(task_id, safe='')}.json"
        if len(self._store.prefix.encode()) + len(key) > KEY_BYTES:
            key = f"{TASKS}{digest[:2]}/={digest}.json"  # "=" is in no other key
        return key

    def _decoded(self, key: str, etag: str, body: bytes) -> Task | None:
        if body.startswith(PURGED):
            return None
        path = f"{self._store!r}{key}"
        try:
            task = Task.decode(body, version=etag)
        except ValueError as exc:
            raise StoreCorruptedError(
                f"{path} is damaged, or no task at all: {exc}. Repair it, or move it away", path
            ) from exc
        if self._key(task.id) != key:
            raise StoreCorruptedError(
                f"{path} holds the task {task.id!r}, whose key must be {self._key(task.id)}: move it there, or away",
                path,
            )
        return task

    def _encoded(self, task: Task) -> bytes:
        try:
            raw = task.encode()
        except ValueError as exc:
            raise InvalidValueError(str(exc)) from exc
        if len(raw) > self.max_record_bytes:
            raise RecordTooLargeError(
                f"the record of {task.id!r} would take {len(raw):,} bytes, and {self.max_record_bytes:,} are the most; "
                "keep large values elsewhere, and their path here",
                task.id,
                len(raw),
                self.max_record_bytes,
            )
        return raw

    def _purged_at(self, key: str) -> datetime | None:
        seen = self._cache.get(key)
        if seen is None or not seen.is_purged:
            return None
        return msgspec.json.decode(seen.body, type=_Purged).purged

    def _guess(self, seen: Seen | None, key: str, known: Task | _Unknown | None) -> Task | _Unknown | None:
        """What an update may start from. A wrong guess costs one request; nothing is refused on one."""
        if seen is not None:
            return self._decoded(key, seen.etag, seen.body)
        return None if known is None and self._guesses_absent else UNKNOWN

    # -- looking at all of them

    async def _scan(self, query: Query) -> AsyncIterator[Task]:
        start = quote(query.prefix, safe="")
        reads, listed = self._store.requests["GetObject"], 0
        purged: list[tuple[str, str, bytes]] = []
        async for entries in self._listing():
            listed += len(entries)
            if start:
                entries = [entry for entry in entries if _may_begin(entry.key, start)]
            for first in range(0, len(entries), CHUNK):
                for key, etag, body in await self._bodies(entries[first : first + CHUNK]):
                    if body.startswith(PURGED):
                        purged.append((key, etag, body))
                    elif _may_have_status(body, query.statuses):
                        task = self._decoded(key, etag, body)
                        if task is not None:
                            yield task
        if not self.read_only:
            await self._snapshot.write(self._store.requests["GetObject"] - reads, listed)
        await self._remove_tombstones(purged)

    async def _remove_tombstones(self, purged: list[tuple[str, str, bytes]]) -> None:
        """Removes those that are old, where the condition of a DELETE is kept: whoever makes the task again in this
        moment is faster, or finds nothing. Elsewhere it could hit the new task, however long one waits before.
        """
        if self.read_only or not self._store.facts.guards_delete:
            return
        now, decode = self.now(), msgspec.json.Decoder(_Purged).decode
        old = [(key, etag) for key, etag, body in purged if now - decode(body).purged >= PURGE_AGE]

        async def remove(key: str, etag: str) -> None:
            try:
                await self._store.delete(key, match=etag)
            except (ConflictError, StoreError) as exc:
                extra = {"event": "tombstone_kept", "where": repr(self._store), "error_type": type(exc).__name__}
                logger.info("what is left of a purged task stays in %r for now: %s", self._store, exc, extra=extra)
            self._cache.drop(key)

        await together(remove(key, etag) for key, etag in old[:TOMBSTONES])

    async def _listing(self) -> AsyncIterator[list[Entry]]:
        """All objects of tasks, in several parts. Nothing is under way between two of them."""
        store = self._store
        entries, token = await store.patiently(lambda: store.page(TASKS))
        if self._snapshot.is_worth_reading(entry.key for entry in entries):
            await self._snapshot.read()
        yield entries
        if token is None:
            return
        last = entries[-1].key
        parts: list[tuple[str, str, str | None]] = []  # prefix, the key that was seen last, what to go on with
        for prefix in (TASKS + digit for digit in HEX):
            if last.startswith(prefix) or prefix > last:
                parts.append((prefix, last if last.startswith(prefix) else "", None))
        while parts:
            pages = await together(self._page(*part) for part in parts)
            yield [entry for entries, _ in pages for entry in entries]
            parts = [
                (prefix, "", token)
                for (prefix, _, _), (_, token) in zip(parts, pages, strict=True)
                if token is not None
            ]

    async def _page(self, prefix: str, after: str, token: str | None) -> tuple[list[Entry], str | None]:
        return await self._store.patiently(lambda: self._store.page(prefix, after=after, token=token))

    async def _bodies(self, entries: list[Entry]) -> list[tuple[str, str, bytes]]:
        """What is stored, with key and ETag: read where it has changed since it was last seen."""
        found: list[tuple[str, str, bytes]] = []
        changed: list[str] = []
        for entry in entries:
            seen = self._cache.get(entry.key)
            if seen is not None and seen.etag == entry.etag:
                found.append((entry.key, seen.etag, seen.body))
            else:
                changed.append(entry.key)
        if changed:
            found += [read for read in await together(map(self._read, changed)) if read is not None]
        else:
            await asyncio.sleep(0)
        return found

    async def _read(self, key: str) -> tuple[str, str, bytes] | None:
        began = asyncio.get_running_loop().time()
        stored = await self._store.patiently(lambda: self._store.get(key))
        if stored is None:
            return None
        self._cache.keep(key, stored.etag, stored.body, began)
        return key, stored.etag, stored.body

    # -- looking for work

    async def _look_for_work(self, limit: int) -> None:
        """Finds the best tasks to claim. A look at a large store is used for a while."""
        now, keep = self.now(), max(CANDIDATES, limit)
        best: list[Task] = []
        next_due: datetime | None = None
        others = self._is_contended
        self._is_contended = self._has_more = False
        async for task in self._scan(Query(statuses=OPEN)):
            if task.status.is_final:
                continue
            due = task.not_before
            if task.lease is not None:
                due = task.lease.expires_at
                others = others or task.lease.worker != self.worker
            if due is not None and due > now:
                next_due = due if next_due is None else min(due, next_due)
                continue
            best.append(task)
            if len(best) > 2 * keep:
                best = heapq.nsmallest(keep, best, key=_urgency)
                self._has_more = True
        best.sort(key=_urgency)
        if len(best) > keep:
            del best[keep:]
            self._has_more = True
        if others:
            # Where others look for work too, all would fight for the same first tasks.
            best.sort(key=lambda task: (-task.priority, random.random()))
        self._ready, self._next_due = deque(best), next_due


class _Purged(msgspec.Struct, frozen=True):
    """What is left of a task that was purged young, or where DELETE cannot be guarded."""

    purged: datetime
    write_id: str  # no two of them are alike, nor are their ETags


def _may_begin(key: str, start: str) -> bool:
    name = key[len(TASKS) + 3 :]
    return name.startswith((start, "="))  # a name with a hash may have any id


def _may_have_status(body: bytes, statuses: frozenset[Status] | None) -> bool:
    """Whether a record may have one of them; told without decoding it, but where a person has written it."""
    if statuses is None or b'"status":"' not in body:
        return True
    return any(b'"status":"%b"' % status.encode() in body for status in statuses)


def _urgency(task: Task) -> tuple[int, datetime, str]:
    return -task.priority, task.create_time, task.id
