"""RedisTracker: records in Redis or Valkey, one server or a cluster. All keys of a namespace have one hash tag:

    {aiotracker:default}:store             hash: format, layout; written once
    {aiotracker:default}:task:ID           hash: version, record (JSON)
    {aiotracker:default}:status:STATUS     sorted set of ids, all with score 0
    {aiotracker:default}:ready             sorted set of what is pending or failed and need not wait: the score is the
                                           negated priority, a member is the time of creation and the id
    {aiotracker:default}:scheduled         sorted set of ids: when a pending or failed task is due, when a lease ends;
                                           microseconds since 1970

A write is one script, which changes the record and its indexes if the stored version is the expected one. The rules
are applied here, on the record as it was last seen; a script that is refused gives the stored record back, and they
are applied to that. All who wait share a pipeline, in which each script succeeds or fails by itself.
"""

import asyncio
import hashlib
import logging
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec
from msgspec.structs import force_setattr
from typing_extensions import TypeVar, Unpack

from .._core.codec import FORMAT
from .._core.query import GroupBy, Query
from .._core.task import Status, Task
from ..contract import UNKNOWN, Claimable, in_order
from ..errors import (
    InvalidValueError,
    OutcomeUnknownError,
    StoreCorruptedError,
    StoreError,
    StoreUnavailableError,
    UnsupportedError,
)
from ..tracker import Options
from ._pump import Operation, PumpTracker, Round, Write
from ._redis import ANSWER_TIME, Command, Redis, Server, ServerTime, client_of, decodes, errors, pairs_of, settings_of
from ._sql import check_namespace, statements

__all__ = ["RedisTracker"]

logger = logging.getLogger("aiotracker")

D = TypeVar("D", default=Any)
R = TypeVar("R", default=Any)


LAYOUT: Final = "redis"
PAGE: Final = 250  # ids that a scan asks for at once, and records that it then reads
MAX_READS: Final = 500  # records read in one pipeline, which may be large
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_WAITING: Final = (Status.PENDING, Status.FAILED)
_decode: Final = msgspec.json.Decoder(Task).decode


class _Told(msgspec.Struct, frozen=True, gc=False):
    """What the store has said for one operation, after that was asked."""

    record: Task | None


class RedisTracker(PumpTracker[D, R]):
    """Keeps tasks in Redis or Valkey, for any number of machines.

    What was acknowledged survives a crash of the server if that has `appendonly yes` and `appendfsync always`, keeps
    its keys (`maxmemory-policy noeviction`), and is not replaced by a replica that lags behind. `open` warns where it
    is otherwise; leases and fences rely on it too. A namespace lives on one node of a cluster.

    Args:
        url: `redis://[[USER]:PASSWORD@]HOST[:PORT][/DATABASE]`, `rediss://...` with TLS, `unix://[...@]PATH`. In a
            cluster any node will do.
        namespace: Separates several jobs in one database: 1 to 100 letters, digits, `-`, `_` and `.`.
        client: Used instead of one made from `url`, and not closed: a `redis.asyncio.Redis`, of any node in a cluster,
            which does not decode responses.
        wait_replicas: Replicas that must have each write (WAIT) before it is acknowledged. Where fewer have it in
            time, the outcome is unknown: `OutcomeUnknownError`.
        wait_time: Seconds that WAIT waits.
        **options: As for `BaseTracker`. Leases are judged by the server's clock, unless `clock` is one of yours.

    Raises:
        InvalidValueError: An argument cannot be taken.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        namespace: str = "default",
        client: "Redis | None" = None,
        wait_replicas: int = 0,
        wait_time: float = 1.0,
        **options: Unpack[Options[D, R]],
    ) -> None:
        super().__init__(**options)
        if (url is None) == (client is None):
            raise InvalidValueError("RedisTracker takes a url, e.g. redis://localhost, or else client=")
        if url is not None and (not isinstance(url, str) or urlsplit(url).scheme not in ("redis", "rediss", "unix")):
            raise InvalidValueError(f"url takes redis://..., rediss://... or unix://..., not {url!r}")
        if client is not None and (not isinstance(client, Redis) or decodes(client)):
            raise InvalidValueError("client takes a redis.asyncio.Redis with decode_responses=False")
        if isinstance(wait_replicas, bool) or not isinstance(wait_replicas, int) or wait_replicas < 0:
            raise InvalidValueError(f"wait_replicas takes an int of 0 or more, not {wait_replicas!r}")
        if isinstance(wait_time, bool) or not isinstance(wait_time, int | float) or not 0 < wait_time < 3600:
            raise InvalidValueError(f"wait_time takes a positive number of seconds, not {wait_time!r}")
        self.namespace = check_namespace(namespace)
        self._url = url
        self._client = client
        self._wait_replicas = wait_replicas
        self._wait_time = float(wait_time)
        self._server: Server | None = None
        self._scripts: dict[str, bytes] = {}  # names and their SHA-1
        prefix = f"{{aiotracker:{self.namespace}}}:"
        self._marker = prefix + "store"
        self._task_prefix = prefix + "task:"
        self._ready = prefix + "ready"
        self._scheduled = prefix + "scheduled"
        self._status_keys = {status: f"{prefix}status:{status.value}" for status in Status}

    # -- opening

    async def connect(self, stack: AsyncExitStack) -> None:
        texts = await asyncio.to_thread(statements, "redis.lua")
        self._scripts = {name: hashlib.sha1(text.encode()).hexdigest().encode() for name, text in texts.items()}
        server = Server(
            self._client or client_of(self._url or ""),
            scripts=list(texts.values()),
            patience=self._patience,
            time=ServerTime(self.clock),
            is_ours=self._client is None,
        )
        stack.push_async_callback(self._disconnect, server)
        self._server = server
        await server.find(self._marker)
        await self._check_server(server)
        await self._identify(server)
        await server.measure()
        self.clock_uncertainty = server.time.uncertainty
        server.answer_time = min(ANSWER_TIME, max(0.2, self._patience / 3))
        self._start_pumps(stack, f"aiotracker redis {self.namespace}")

    async def _disconnect(self, server: "Server") -> None:
        self._server = None
        await server.aclose()

    async def _check_server(self, server: "Server") -> None:
        def about(setting: str) -> dict[str, str]:
            return {"event": "store_settings", "where": str(server), "setting": setting}

        info, settings = await server.talk([("INFO",), ("CONFIG", "GET", "appendfsync")])
        if isinstance(info, errors.NoPermissionError):
            logger.warning(
                "%s does not let us look at its settings; see what they must be in the docs", server, extra=about("all")
            )
            return
        if isinstance(info, Exception):
            raise server.explained(info)
        info = settings_of(info)
        if info.get("role") == "slave":
            primary = f"{info.get('master_host')}:{info.get('master_port')}"
            if not self.read_only:
                raise StoreError(f"{server} is a read-only replica; connect to its primary, {primary}")
            logger.warning(
                "%s is a replica of %s: what it shows may be out of date", server, primary, extra=about("role")
            )
        fsync = None if isinstance(settings, Exception) else pairs_of(settings).get("appendfsync")
        if info.get("aof_enabled") != "1":
            logger.warning(
                "%s has appendonly no: a crash of the server loses what was acknowledged",
                server,
                extra=about("appendonly"),
            )
        elif fsync is None:
            logger.warning(
                "%s does not tell its appendfsync; with all but `always` a crash loses writes",
                server,
                extra=about("appendfsync"),
            )
        elif fsync != "always":
            logger.warning(
                "%s has appendfsync %s: a crash of the server loses the latest writes that were acknowledged; "
                "set appendfsync always",
                server,
                fsync,
                extra=about("appendfsync"),
            )
        policy = info.get("maxmemory_policy", "noeviction")
        if policy != "noeviction":
            logger.warning(
                "%s has maxmemory-policy %s, which may drop tasks; set noeviction",
                server,
                policy,
                extra=about("maxmemory-policy"),
            )
        if info.get("connected_slaves", "0") != "0" and not self._wait_replicas:
            logger.warning(
                "%s has replicas: if one that lags behind takes over, acknowledged writes are lost; see wait_replicas",
                server,
                extra=about("replicas"),
            )

    async def _identify(self, server: "Server") -> None:
        commands: list[Command] = [("HGETALL", self._marker)]
        if not self.read_only:
            commands[:0] = [("HSETNX", self._marker, "layout", LAYOUT), ("HSETNX", self._marker, "format", FORMAT)]
        replies = await server.talk(commands)
        for reply in replies:
            if isinstance(reply, Exception):
                raise server.explained(reply)
        marker = pairs_of(replies[-1])
        if not marker:
            raise StoreError(f"{server} has no namespace {self.namespace!r}; nothing is created with read_only=True")
        if marker.get("layout") != LAYOUT:
            raise StoreError(
                f"{self._marker} at {server} belongs to a store of another kind, {marker.get('layout')!r}: "
                "choose another namespace"
            )
        if marker.get("format") != str(FORMAT):
            raise StoreError(
                f"the namespace {self.namespace!r} at {server} has format {marker.get('format')!r}, and this release "
                f"of aiotracker knows format {FORMAT}: use the release that wrote it, or a newer one"
            )

    # -- the contract

    def now(self) -> datetime:
        server = self._server
        return self.clock.now() if server is None else server.time.now()

    async def scan(self, query: Query) -> AsyncIterator[Task]:
        pages = self._pages(query)
        if query.order_by == "id" and not query.descending:
            async for task in pages:
                yield task
        else:
            async for task in in_order(query, pages):
                yield task

    async def tally(self, query: Query, by: GroupBy) -> Counter[str]:
        if by != "status" or query != Query(statuses=query.statuses):
            return await super().tally(query, by)
        statuses = [status for status in Status if query.statuses is None or status in query.statuses]
        counts = await self._ask("count", [self._status_keys[status] for status in statuses])
        return Counter({status: count for status, count in zip(statuses, counts, strict=True) if count})

    async def claimable(self, limit: int) -> Claimable:
        now = _microseconds(self.now())
        ready, due, later = await self._ask("claimable", [self._ready, self._scheduled], now, limit)
        ids = [member.partition(b":")[2].decode() for member in ready] + [task_id.decode() for task_id in due]
        tasks = [task for task in await self._load_all(ids) if not task.status.is_final]
        tasks.sort(key=lambda task: (-task.priority, task.create_time, task.id))
        next_due: datetime | None = None
        if len(ready) + len(due) >= limit:
            next_due = self.now()
        elif later:
            next_due = datetime.fromtimestamp(float(later[1]) / 1e6, UTC)
        return Claimable(tasks[:limit], next_due)

    async def _pages(self, query: Query) -> AsyncIterator[Task]:
        """In the order of ids: that of their bytes is that of their characters."""
        statuses = list(Status) if query.statuses is None else sorted(query.statuses)
        keys = [self._status_keys[status] for status in statuses]
        prefix = query.prefix.encode()
        start, end = (b"[" + prefix, b"(" + prefix + b"\xff") if prefix else (b"-", b"+")
        while True:
            pages = await self._ask("page", keys, start, end, PAGE)
            ids = sorted(task_id for page in pages for task_id in page)[:PAGE]
            for task in await self._load_all(task_id.decode() for task_id in ids):
                if query.statuses is None or task.status in query.statuses:
                    yield task
            if len(ids) < PAGE:
                return
            start = b"(" + ids[-1]

    async def _load_all(self, ids: Iterable[str]) -> list[Task]:
        looks = [self._submit(Operation(task_id)) for task_id in ids]
        try:
            return [task for look in looks if (task := await look) is not None]
        finally:
            for look in looks:
                if not look.cancel() and not look.cancelled():
                    look.exception()  # one was raised, and asyncio need not complain of the others

    async def _ask(self, script: str, keys: Sequence[str], *args: Any) -> Any:
        server = self._server
        if server is None:
            raise StoreError("this RedisTracker is not open; use `async with`, or await open()")
        (reply,) = await server.talk([("EVALSHA", self._scripts[script], len(keys), *keys, *args)])
        if isinstance(reply, Exception):
            raise server.explained(reply)
        return reply

    # -- committing

    async def _commit(self, operations: list[Operation]) -> None:
        """One pipeline: the writes of those who know or believe what is stored, then the reads of the others."""
        server = self._server
        if server is None:
            raise StoreError("the tracker is closed")
        await server.measure_if_due()
        told: dict[str, Task] = {}
        asking: list[Operation] = []
        ready: list[Operation] = []
        answered = {operation.task_id for operation in operations if type(operation.known) is _Told}
        undecided = {o.task_id for o in operations if o.known is UNKNOWN and o.transition is not None}
        for operation in operations:
            known = operation.known
            if type(known) is _Told:
                operation.known = UNKNOWN
                if known.record is not None:
                    told[operation.task_id] = known.record
                ready.append(operation)
            elif operation.transition is None and operation.task_id in undecided and not operation.races:
                # Once: so that a cancelled claim is undone before anybody who asks later is answered.
                operation.races, operation.again = 1, 0.0
            elif known is UNKNOWN or operation.task_id in answered:
                # What another one was told may be older than this question.
                asking.append(operation)
            else:
                ready.append(operation)
        work = Round(ready, self.max_record_bytes)
        work.found(told)
        writes = work.decide(self.now())
        # Those whose guess would refuse them.
        asking += [operation for operation in ready if operation.again is not None and operation.known is UNKNOWN]
        for operation in asking[MAX_READS:]:
            operation.known, operation.again = UNKNOWN, 0.0
        del asking[MAX_READS:]
        reads = list({operation.task_id: None for operation in asking})
        seen = [*told.values(), *(operation.known for operation in ready if isinstance(operation.known, Task))]
        before = {(task.id, task.version): task for task in seen}
        commands = [self._writing(write, before.get((write.task_id, write.expected))) for write in writes.values()]
        commands += [("HGET", self._task_prefix + task_id, "record") for task_id in reads]
        if not commands:
            return
        replies = await server.talk(commands, writing=bool(writes), wait=self._wait if writes else None)
        self._settle(server, work, ready, list(writes), replies[: len(writes)])
        self._answer(server, asking, dict(zip(reads, replies[len(writes) :], strict=True)))

    @property
    def _wait(self) -> Command | None:
        if not self._wait_replicas:
            return None
        return ("WAIT", self._wait_replicas, max(1, round(self._wait_time * 1000)))

    def _settle(
        self, server: "Server", work: Round, operations: list[Operation], ids: list[str], replies: list[Any]
    ) -> None:
        landed: set[str] = set()
        failed: dict[str, Exception] = {}
        stored: dict[str, Task | None] = {}
        for task_id, reply in zip(ids, replies, strict=True):
            if reply == 1:
                landed.add(task_id)
                continue
            try:
                stored[task_id] = self._record(task_id, server.value(reply))
            except (StoreError, OutcomeUnknownError) as exc:
                failed[task_id] = exc
        work.settle(landed, failed)
        for operation in operations:
            if operation.again is not None and operation.known is UNKNOWN and operation.task_id in stored:
                operation.known = _Told(stored[operation.task_id])
                if operation.races <= 1:
                    operation.again = 0.0

    def _answer(self, server: "Server", asking: list[Operation], replies: Mapping[str, Any]) -> None:
        for operation in asking:
            task_id = operation.task_id
            operation.again = None
            try:
                record = self._record(task_id, server.value(replies[task_id]))
            except OutcomeUnknownError as exc:
                operation.error = StoreUnavailableError(str(exc))
            except StoreError as exc:
                operation.error = exc
            else:
                if operation.transition is None:
                    operation.answer = record
                else:
                    operation.known, operation.again = _Told(record), 0.0

    def _writing(self, write: Write, old: Task | None) -> Command:
        new = write.task
        task_id = write.task_id.encode()
        before = None if old is None else old.status
        after = before if new is None else new.status
        if before is None:
            before = after
        assert before is not None
        assert after is not None
        was, is_ready = _member(old, task_id), _member(new, task_id)
        return (
            "EVALSHA",
            self._scripts["write"],
            5,
            self._task_prefix + write.task_id,
            self._status_keys[before],
            self._status_keys[after],
            self._ready,
            self._scheduled,
            write.expected or b"",
            b"removed" if new is None else new.write_id,
            write.raw,
            task_id,
            was if was != is_ready else b"",
            is_ready,
            b"" if new is None else -new.priority,
            _due(new),
        )

    def _record(self, task_id: str, raw: bytes | None) -> Task | None:
        if raw is None:
            return None
        try:
            task = _decode(raw)
        except (ValueError, RecursionError) as exc:
            key = self._task_prefix + task_id
            raise StoreCorruptedError(f"{key} holds no record of ours: {exc}", key) from exc
        force_setattr(task, "version", task.write_id)
        return task

    async def _read_many(self, task_ids: list[str]) -> dict[str, Task]:
        raise UnsupportedError("reads and writes share a pipeline here: see _commit", "_read_many")

    async def _write_many(self, writes: Mapping[str, Write]) -> tuple[set[str], dict[str, Exception]]:
        raise UnsupportedError("reads and writes share a pipeline here: see _commit", "_write_many")

    def _blame(self) -> str:
        return "Redis does not answer" if self._server is None else self._server.blame()


def _member(task: Task | None, task_id: bytes) -> bytes:
    """What stands in `ready` for a task; empty if nothing."""
    if task is None or task.status not in _WAITING or task.not_before is not None:
        return b""
    return b"%016d:%b" % (_microseconds(task.create_time), task_id)


def _due(task: Task | None) -> int | bytes:
    if task is None:
        return b""
    if task.lease is not None:
        return _microseconds(task.lease.expires_at)
    if task.not_before is not None and task.status in _WAITING:
        return _microseconds(task.not_before)
    return b""


def _microseconds(moment: datetime) -> int:
    since = moment - _EPOCH
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds
