"""The Redis server of a tracker: how it is found and talked to, what its errors mean, and its clock."""

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, Final

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

from ..clock import Clock, SystemClock
from ..errors import (
    InvalidValueError,
    OutcomeUnknownError,
    StoreError,
    StoreUnavailableError,
)

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

__all__ = [
    "ANSWER_TIME",
    "Command",
    "Redis",
    "Server",
    "ServerTime",
    "client_of",
    "decodes",
    "errors",
    "pairs_of",
    "settings_of",
]

Command = tuple[Any, ...]
ANSWER_TIME: Final = 5.0  # seconds without an answer after which a connection is given up, at the most
MEASURE_EVERY: Final = 30.0  # seconds after which the server's clock is looked at again
DRIFT: Final = 2e-4  # seconds a second that two clocks may drift apart
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


def client_of(url: str) -> Redis:
    """A client that answers in bytes, and tries nothing twice."""
    try:
        # Retries and time-outs are ours.
        client: Redis = Redis.from_url(url, socket_timeout=None, retry=Retry(NoBackoff(), 0), **DRIVER)
    except ValueError as exc:
        raise InvalidValueError(f"the url cannot be used: {exc}") from exc  # without it: a password may be in it
    if decodes(client):
        raise InvalidValueError("decode_responses in the URL must be false")
    return client


def decodes(client: Redis) -> bool:
    """Whether it answers in text."""
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
        if isinstance(reply, Exception):
            raise reply  # without the server's time, leases would end by our own, which anybody may have set
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


def pairs_of(reply: Any) -> dict[str, str]:
    """A map, which older protocols give as a list."""
    items = reply.items() if isinstance(reply, dict) else zip(reply[::2], reply[1::2], strict=True)
    return {key.decode(errors="replace"): value.decode(errors="replace") for key, value in items}


def settings_of(info: bytes) -> dict[str, str]:
    """What INFO says."""
    lines = (line.partition(":") for line in info.decode(errors="replace").splitlines())
    return {name: value for name, colon, value in lines if colon}
