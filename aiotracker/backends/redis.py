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
import contextlib
import hashlib
import logging
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec
from msgspec.structs import force_setattr
from typing_extensions import TypeVar, Unpack

try:
    from redis import exceptions as errors
    from redis.asyncio import ConnectionPool, Redis
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff
except ModuleNotFoundError as exc:
    if (exc.name or "").partition(".")[0] != "redis":
        raise
    raise ModuleNotFoundError(
        f'stores on Redis need {exc.name}: pip install "aiotracker[redis]"', name=exc.name, path=exc.path
    ) from exc

from .._core.codec import FORMAT
from .._core.query import Query, Where
from .._core.task import Status, Task
from ..clock import Clock, SystemClock
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
from ._sql import check_namespace, statements

try:
    from redis import __version__ as driver_version
    from redis.driver_info import DriverInfo  # type: ignore[import-not-found, unused-ignore]  # in some releases
except ModuleNotFoundError:  # before redis 7.1
    DRIVER: dict[str, Any] = {}
else:
    # Else it looks its version up on the disk, on the event loop, for each new connection.
    DRIVER = {"driver_info": DriverInfo(lib_version=driver_version)}
pack: Callable[[tuple[Any, ...]], bytes] | None
try:
    from hiredis import pack_command as pack
except ModuleNotFoundError:  # it is not there for every platform; the driver does without, too, slower
    pack = None

__all__ = ["RedisTracker"]

logger = logging.getLogger("aiotracker")

D = TypeVar("D", default=Any)
R = TypeVar("R", default=Any)

Command = tuple[Any, ...]

LAYOUT: Final = "redis"
PAGE: Final = 250  # ids that a scan asks for at once, and records that it then reads
MAX_READS: Final = 500  # records read in one pipeline, which may be large
ANSWER_TIME: Final = 5.0  # seconds without an answer after which a connection is given up, at the most
MEASURE_EVERY: Final = 30.0  # seconds after which the server's clock is looked at again
DRIFT: Final = 2e-4  # seconds a second that two clocks may drift apart
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_WAITING: Final = (Status.PENDING, Status.FAILED)
_decode: Final = msgspec.json.Decoder(Task).decode

# Nothing was done, and another try may help: the server is starting, busy, a replica by now, or another node's turn.
_AGAIN: Final = (
    errors.BusyLoadingError,
    errors.NoScriptError,
    errors.ReadOnlyError,
    errors.MaxConnectionsError,
    errors.AskError,  # and MovedError
    errors.ClusterDownError,
    errors.MasterDownError,
    errors.TryAgainError,
)
# Before redis 8 these are not told apart, except by a client for clusters.
_AGAIN_CODES: Final = ("ASK", "BUSY", "CLUSTERDOWN", "MASTERDOWN", "MOVED", "NOREPLICAS", "TRYAGAIN")
_TOO_MANY: Final = "max number of clients reached"
# There was no answer.
_UNKNOWN: Final = (errors.ConnectionError, errors.TimeoutError, errors.InvalidResponse, OSError, TimeoutError)
_REFUSED: Final = (
    errors.AuthenticationError,
    errors.AuthorizationError,
    errors.AuthenticationWrongNumberOfArgsError,
    errors.NoPermissionError,
)


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
        if client is not None and (not isinstance(client, Redis) or _decodes(client)):
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
            self._client or _client_of(self._url or ""),
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
        info, settings = await server.talk([("INFO",), ("CONFIG", "GET", "appendfsync")])
        if isinstance(info, errors.NoPermissionError):
            logger.warning("%s does not let us look at its settings; see what they must be in the docs", server)
            return
        if isinstance(info, Exception):
            raise server.explained(info)
        info = _settings(info)
        if info.get("role") == "slave":
            primary = f"{info.get('master_host')}:{info.get('master_port')}"
            if not self.read_only:
                raise StoreError(f"{server} is a read-only replica; connect to its primary, {primary}")
            logger.warning("%s is a replica of %s: what it shows may be out of date", server, primary)
        fsync = None if isinstance(settings, Exception) else _pairs(settings).get("appendfsync")
        if info.get("aof_enabled") != "1":
            logger.warning("%s has appendonly no: a crash of the server loses what was acknowledged", server)
        elif fsync is None:
            logger.warning("%s does not tell its appendfsync; with all but `always` a crash loses writes", server)
        elif fsync != "always":
            logger.warning(
                "%s has appendfsync %s: a crash of the server loses the latest writes that were acknowledged; "
                "set appendfsync always",
                server,
                fsync,
            )
        policy = info.get("maxmemory_policy", "noeviction")
        if policy != "noeviction":
            logger.warning("%s has maxmemory-policy %s, which may drop tasks; set noeviction", server, policy)
        if info.get("connected_slaves", "0") != "0" and not self._wait_replicas:
            logger.warning(
                "%s has replicas: if one that lags behind takes over, acknowledged writes are lost; see wait_replicas",
                server,
            )

    async def _identify(self, server: "Server") -> None:
        commands: list[Command] = [("HGETALL", self._marker)]
        if not self.read_only:
            commands[:0] = [("HSETNX", self._marker, "layout", LAYOUT), ("HSETNX", self._marker, "format", FORMAT)]
        replies = await server.talk(commands, writing=True)
        for reply in replies:
            if isinstance(reply, Exception):
                raise server.explained(reply)
        marker = _pairs(replies[-1])
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

    async def count(self, **where: Unpack[Where]) -> Counter[str]:
        query = self._query(where)
        if query != Query(statuses=query.statuses):
            return await super().count(**where)
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


def _client_of(url: str) -> Redis:
    try:
        # Retries and time-outs are ours.
        client: Redis = Redis.from_url(url, socket_timeout=None, retry=Retry(NoBackoff(), 0), **DRIVER)
    except ValueError as exc:
        raise InvalidValueError(f"url cannot be {url!r}: {exc}") from exc
    if _decodes(client):
        raise InvalidValueError("decode_responses in the URL must be false")
    return client


def _decodes(client: Redis) -> bool:
    return bool(client.connection_pool.connection_kwargs.get("decode_responses"))


class ServerTime:
    """The server's clock, followed by ours, which nobody sets in between.

    Attributes:
        follows: Whether the server is asked at all.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        # Whoever gives a clock of their own wants time to be read from that.
        self.follows = isinstance(clock, SystemClock)
        self._offset: float | None = None
        self._error = 0.0
        self._measured = 0.0

    def now(self) -> datetime:
        """The server's time."""
        if self._offset is None:
            return self._clock.now()
        return datetime.fromtimestamp(self.ticks() + self._offset, UTC)

    def ticks(self) -> float:
        """Seconds of a clock that nobody sets; where there is one, it runs while the machine sleeps."""
        boot = self._clock.boot()
        return boot.seconds if boot.boot_id else self._clock.monotonic()

    @property
    def is_due(self) -> bool:
        """Whether the server should be asked."""
        return self.follows and (self._offset is None or self.ticks() - self._measured > MEASURE_EVERY)

    def take(self, asked: float, answered: float, seconds: float) -> None:
        """The server has said its time.

        Args:
            asked: Our ticks before the question.
            answered: ... and after the answer.
            seconds: The server's, since 1970.
        """
        error = (answered - asked) / 2
        if self._offset is not None and error > self._error + (answered - self._measured) * DRIFT:
            return  # what was known is better
        self._offset = seconds - (asked + answered) / 2
        self._error, self._measured = error, answered

    @property
    def uncertainty(self) -> float:
        """Seconds by which two workers may differ in what they take for the server's time."""
        return 2 * (self._error + MEASURE_EVERY * DRIFT) if self.follows else 0.0


class Server:
    """The server, or the node of a cluster, that has our keys.

    Attributes:
        time: What its clock shows.
        answer_time: Seconds without an answer after which a connection is given up.
    """

    def __init__(
        self,
        client: Redis,
        *,
        scripts: list[str],
        patience: float,
        time: ServerTime,
        is_ours: bool,
    ) -> None:
        self.time = time
        self.answer_time = ANSWER_TIME
        self._seed = client
        self._redis = client
        self._is_ours = is_ours
        self._scripts = scripts
        self._patience = patience
        self._nodes: list[tuple[str, int]] = []  # of a cluster
        self._trouble: Exception | None = None

    def __str__(self) -> str:
        options = self._redis.connection_pool.connection_kwargs
        return str(options.get("path") or f"{options.get('host', 'localhost')}:{options.get('port', 6379)}")

    async def find(self, key: str) -> None:
        """Connects, and finds the node that has a key.

        Raises:
            StoreError: It cannot be used.
        """
        (reply,) = await self.talk([("EXISTS", key)], is_first=True)
        self.value(reply)
        (nodes,) = await self.talk([("CLUSTER", "NODES")])
        if isinstance(nodes, bytes):  # no error: there is a cluster
            self._nodes = _addresses(nodes.decode())

    async def aclose(self) -> None:
        """Closes its connections, but for those of a client that was passed in."""
        clients = [self._redis] if self._redis is not self._seed else []
        for client in [*clients, self._seed] if self._is_ours else clients:
            with contextlib.suppress(RuntimeError):  # the event loop of its connections is closed, and so are they
                await client.aclose(close_connection_pool=True)

    async def talk(
        self,
        commands: Sequence[Command],
        *,
        writing: bool = False,
        wait: Command | None = None,
        is_first: bool = False,
    ) -> list[Any]:
        """Sends commands in a pipeline, all of which may be sent more than once, and gives their replies.

        Tries again what another try may help, within our patience. Each reply may be an exception: one of ours where
        nothing helped, the server's where it refused the command.

        Args:
            commands: What to send.
            writing: Without an answer, the outcome is unknown.
            wait: A WAIT for what is written; where it falls short, so is the outcome.
            is_first: Where nobody answers, that is told at once.
        """
        deadline = time.monotonic() + self._patience
        replies: list[Any] = [None] * len(commands)
        left, sent, tries = list(range(len(commands))), False, 0
        while True:
            trouble: Exception
            try:
                got = await self._send([commands[index] for index in left] + ([wait] if wait else []))
            except _REFUSED as exc:
                return [exc] * len(commands)
            except (errors.RedisError, OSError, TimeoutError) as exc:
                trouble = exc
                sent = sent or not _is_again(exc)
            except asyncio.CancelledError as exc:
                # The driver's own tasks are cancelled at the end of `asyncio.run`, we are not.
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise
                trouble, sent = ConnectionError(str(exc) or "cancelled"), True
            else:
                short = _shortfall(got.pop(), wait) if wait else None
                again: list[int] = []
                for index, reply in zip(left, got, strict=True):
                    if isinstance(reply, Exception) and _is_again(reply):
                        again.append(index)
                        trouble = reply
                    else:
                        replies[index] = short if short is not None and reply == 1 else reply
                if not again:
                    self._trouble = None
                    return replies
                left = again
            self._trouble = trouble
            if time.monotonic() >= deadline or (is_first and not _is_again(trouble)):
                break
            tries += 1
            try:
                await self._mend(trouble, tries)
            except (errors.RedisError, OSError, TimeoutError) as exc:
                self._trouble = exc
            if not (isinstance(trouble, errors.NoScriptError) or _moved(trouble)):
                await asyncio.sleep(random.uniform(0, min(1.0, 0.02 * 2 ** min(tries, 8))))
        error = self.explained(self._trouble)
        for index in left:
            replies[index] = OutcomeUnknownError(str(error), "") if writing and sent else error
        return replies

    async def _send(self, commands: list[Command]) -> list[Any]:
        # As the driver's pipelines do it, in a fifth of the time: packed in C, and one time-out for all replies.
        pool = self._redis.connection_pool
        replies: list[Any] = []
        async with asyncio.timeout(self.answer_time):
            connection = await pool.get_connection()
            try:
                packed = connection.pack_commands(commands) if pack is None else [b"".join(map(pack, commands))]
                await connection.send_packed_command(packed, check_health=False)
                for _ in commands:
                    try:
                        replies.append(await connection.read_response())
                    except errors.ResponseError as exc:
                        replies.append(exc)
            finally:
                await pool.release(connection)
        return replies

    async def _mend(self, trouble: Exception, tries: int) -> None:
        """Does what may make the next try succeed."""
        if isinstance(trouble, errors.NoScriptError):
            await self._send([("SCRIPT", "LOAD", script) for script in self._scripts])
        elif to := _moved(trouble):
            await self._move(to[0] or _host(self._redis), to[1])
        elif tries > 1 and self._nodes:
            # Another node may have our keys by now, and every node knows which.
            await self._move(*random.choice(self._nodes))
        elif isinstance(trouble, errors.ReadOnlyError):
            await self._redis.connection_pool.disconnect()  # the name may mean another server by now

    async def _move(self, host: str, port: int) -> None:
        """Talks to another node, as to the first one."""
        pool, old = self._seed.connection_pool, self._redis
        options = pool.connection_kwargs | {"host": host, "port": port}
        self._redis = Redis(connection_pool=ConnectionPool(connection_class=pool.connection_class, **options))
        if old is not self._seed:
            await old.aclose(close_connection_pool=True)

    async def measure(self) -> None:
        """Looks at the server's clock, a few times; the quickest answer counts.

        Raises:
            StoreError: It cannot be asked.
        """
        if not self.time.follows:
            return
        try:
            for _ in range(3):
                await self._measure()
        except (errors.RedisError, OSError, TimeoutError) as exc:
            raise self.explained(exc) from exc

    async def measure_if_due(self) -> None:
        """Looks at the server's clock if that was long ago. Without an answer, what was known stands."""
        if self.time.is_due:
            try:
                await self._measure()
            except (errors.RedisError, OSError, TimeoutError, asyncio.CancelledError) as exc:
                if isinstance(exc, asyncio.CancelledError) and (task := asyncio.current_task()) and task.cancelling():
                    raise

    async def _measure(self) -> None:
        asked = self.time.ticks()
        (reply,) = await self._send([("TIME",)])
        if isinstance(reply, list):
            seconds, micros = reply
            self.time.take(asked, self.time.ticks(), int(seconds) + int(micros) / 1e6)

    # -- errors

    def value(self, reply: Any) -> Any:
        """A reply that is no error.

        Raises:
            StoreError: It is one.
            OutcomeUnknownError: It is that.
        """
        if isinstance(reply, OutcomeUnknownError):
            raise reply
        if isinstance(reply, Exception):
            raise self.explained(reply)
        return reply

    def blame(self) -> str:
        """Why there may be no answer."""
        return f"{self} does not answer" if self._trouble is None else str(self.explained(self._trouble))

    def explained(self, exc: Exception | None) -> StoreError:
        """A driver's error as ours, with what to do."""
        if isinstance(exc, StoreError):
            return exc
        ours = self._explained(exc)
        ours.__cause__ = exc
        return ours

    def _explained(self, exc: Exception | None) -> StoreError:
        text = str(exc)
        if isinstance(exc, _REFUSED):
            return StoreError(f"{self} does not let us in: {text}; check user, password and permissions")
        if isinstance(exc, errors.ReadOnlyError):
            return StoreError(f"{self} is a read-only replica by now; connect to its primary")
        if isinstance(exc, errors.OutOfMemoryError):
            return StoreError(f"{self} has no memory left (maxmemory); nothing was changed: {text}")
        if "MISCONF" in text:
            return StoreError(f"{self} cannot write to its disk: {text}")
        if exc is None or isinstance(exc, _UNKNOWN) or _is_again(exc):
            return StoreUnavailableError(f"no answer from Redis at {self}: {text or type(exc).__name__}")
        return StoreError(f"{self} refused: {text}")


def _is_again(exc: Exception) -> bool:
    """Whether nothing was done, and another try may help."""
    text = str(exc)
    return isinstance(exc, _AGAIN) or text.partition(" ")[0] in _AGAIN_CODES or _TOO_MANY in text


def _shortfall(reply: Any, wait: Command) -> OutcomeUnknownError | None:
    if isinstance(reply, int) and reply >= wait[1]:
        return None
    have = reply if isinstance(reply, int) else f"{reply}: 0"
    return OutcomeUnknownError(f"written on the primary, and {have} of {wait[1]} replicas have it within the time", "")


def _moved(exc: Exception) -> tuple[str, int] | None:
    """Which node of a cluster has the keys, if that is what the error says: `MOVED SLOT HOST:PORT`."""
    if isinstance(exc, errors.MovedError):
        return exc.host, exc.port
    words = str(exc).split()
    if len(words) != 3 or words[0] != "MOVED":
        return None
    host, _, port = words[2].rpartition(":")
    return host, int(port)


def _host(client: Redis) -> str:
    return str(client.connection_pool.connection_kwargs.get("host", "localhost"))


def _addresses(nodes: str) -> list[tuple[str, int]]:
    """Of the nodes that CLUSTER NODES names: `ID HOST:PORT@PORT,HOSTNAME FLAGS ...`, a line each."""
    found = []
    for line in nodes.splitlines():
        host, _, port = line.split()[1].partition("@")[0].rpartition(":")
        if host:
            found.append((host, int(port)))
    return found


def _pairs(reply: Any) -> dict[str, str]:
    """A map, which older protocols give as a list."""
    items = reply.items() if isinstance(reply, dict) else zip(reply[::2], reply[1::2], strict=True)
    return {key.decode(errors="replace"): value.decode(errors="replace") for key, value in items}


def _settings(info: bytes) -> dict[str, str]:
    """What INFO says."""
    lines = (line.partition(":") for line in info.decode(errors="replace").splitlines())
    return {name: value for name, colon, value in lines if colon}
