"""What trackers on services of AWS share: how a client is made, what its errors mean, and the service's clock."""

import asyncio
import functools
import random
from collections import deque
from collections.abc import Coroutine, Mapping
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Final, NamedTuple

import msgspec

from ..clock import Clock, SystemClock
from ..errors import InvalidValueError, StoreError, StoreUnavailableError

try:
    import aioboto3  # type: ignore[import-untyped]  # ships no types
    import aiobotocore  # type: ignore[import-untyped]  # ships no types
    import aiohttp
    from aiobotocore.config import AioConfig  # type: ignore[import-untyped]  # ships no types
    from aiobotocore.httpsession import AIOHTTPSession  # type: ignore[import-untyped]  # ships no types
    from aiobotocore.session import AioSession  # type: ignore[import-untyped]  # ships no types
    from botocore.exceptions import (  # type: ignore[import-untyped]  # ships no types
        BotoCoreError,
        ClientError,
        ConnectionError,
        CredentialRetrievalError,
        HTTPClientError,
        IncompleteReadError,
        NoCredentialsError,
        NoRegionError,
        PartialCredentialsError,
        ProfileNotFound,
    )
    from botocore.loaders import create_loader  # type: ignore[import-untyped]  # ships no types
    from botocore.parsers import ResponseParserError  # type: ignore[import-untyped]  # ships no types
except ModuleNotFoundError as exc:
    if (exc.name or "").partition(".")[0] == "aiotracker":
        raise
    raise ModuleNotFoundError(
        f'stores on AWS need {exc.name}: pip install "aiotracker[s3]" or "aiotracker[dynamodb]"',
        name=exc.name,
        path=exc.path,
    ) from exc

__all__ = [
    "CREDENTIALS_REFUSED",
    "NO_ANSWER",
    "SLOW_DOWN",
    "UNANSWERED",
    "BusyError",
    "ClientError",
    "ClientOptions",
    "Connection",
    "Pace",
    "ServiceTime",
    "Turns",
    "connect",
    "connect_client",
    "no_answer",
]

CONNECT_TIME: Final = 3.0  # seconds
CONNECTIONS: Final = 64  # requests under way at once
MAX_PAUSE: Final = 5.0  # seconds between two requests to a service that says to slow down
DRIFT: Final = 2e-4  # seconds by which two clocks may part in a second

SLOW_DOWN: Final = frozenset(
    {
        "BandwidthLimitExceeded",
        "LimitExceededException",
        "ProvisionedThroughputExceededException",
        "RequestLimitExceeded",
        "SlowDown",
        "SlowDownRead",
        "SlowDownWrite",
        "Throttling",
        "ThrottlingException",
        "TooManyRequests",
        "TooManyRequestsException",
        "429",
    }
)
UNANSWERED: Final = frozenset(
    {"InternalError", "InternalServerError", "InternalFailure", "ServiceUnavailable", "RequestTimeout", "408"}
)
CREDENTIALS_REFUSED: Final = frozenset(
    {
        "ExpiredToken",
        "ExpiredTokenException",
        "IncompleteSignature",
        "InvalidAccessKeyId",
        "InvalidClientTokenId",
        "InvalidSecurity",
        "InvalidSignatureException",
        "InvalidToken",
        "MissingAuthenticationToken",
        "MissingAuthenticationTokenException",
        "NotSignedUp",
        "SignatureDoesNotMatch",
        "TokenRefreshRequired",
        "UnrecognizedClientException",
    }
)


class BusyError(StoreUnavailableError):
    """The service refused for now, and changed nothing."""


class ClientOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a client is made."""

    client: Any = None  # an aiobotocore client of the service, which is not closed
    session: Any = None  # an aioboto3 session, or an aiobotocore one
    endpoint_url: str | None = None
    region: str | None = None
    profile: str | None = None
    connections: int = CONNECTIONS
    request_time: float = 5.0  # seconds for one request at the most, once it has its turn

    def __post_init__(self) -> None:
        if self.client is not None and (self.session, self.profile, self.region, self.endpoint_url) != (None,) * 4:
            raise InvalidValueError("client= is used as it is: give session, profile, region and endpoint to it")
        if self.session is not None and self.profile is not None:
            raise InvalidValueError("session= has its own profile: give one of the two")
        if isinstance(self.connections, bool) or not isinstance(self.connections, int) or self.connections < 1:
            raise InvalidValueError(f"connections takes an int of 1 or more, not {self.connections!r}")


class Connection(NamedTuple):
    """A client, and what it was made of: `None` where it was given."""

    client: Any
    http: Any = None  # the session through which it sends its requests
    credentials: Any = None  # as they are refreshed


async def connect_client(service: str, options: ClientOptions, stack: AsyncExitStack, **config: Any) -> Any:
    """The client of `connect`."""
    return (await connect(service, options, stack, **config)).client


async def connect(service: str, options: ClientOptions, stack: AsyncExitStack, **config: Any) -> Connection:
    """A client that sends every request once; the stack closes it, unless it was given.

    Args:
        service: As botocore names it.
        options: How it is made.
        stack: What is closed when the tracker is.
        **config: More for botocore's Config.

    Raises:
        StoreError: There is no such profile, no region, or another setting is wrong.
    """
    if options.client is not None:
        return Connection(options.client)
    made: list[Any] = []

    def make_http(**arguments: Any) -> Any:
        made.append(AIOHTTPSession(**arguments))
        return made[-1]

    settings = {
        "http_session_cls": make_http,
        "connect_timeout": CONNECT_TIME,
        "read_timeout": options.request_time,
        "retries": {"total_max_attempts": 1, "mode": "standard"},  # else a write that has landed comes back refused
        "max_pool_connections": options.connections,
        "parameter_validation": False,  # a fifth of what a request costs; what goes in is ours
        "tcp_keepalive": True,
        "user_agent": f"aiotracker aiobotocore/{aiobotocore.__version__}",  # botocore puts its own together each time
    } | config
    try:
        # Reads many files, and takes up to two seconds. Nothing of it is bound to the thread's event loop: the
        # connections are made with the first request.
        session, making = await asyncio.to_thread(_prepare_client, service, options, AioConfig(**settings))
        client = await asyncio.to_thread(asyncio.run, making)
        credentials = await asyncio.to_thread(asyncio.run, session.get_credentials())
    except NoRegionError as exc:
        raise StoreError("no region is set: give region=, or set AWS_DEFAULT_REGION") from exc
    except ProfileNotFound as exc:
        raise StoreError(f"{exc}; profile= takes a name from ~/.aws/config") from exc
    except (BotoCoreError, ValueError) as exc:
        raise StoreError(f"the client for {service} cannot be made: {exc}") from exc
    stack.push_async_callback(client.__aexit__, None, None, None)
    return Connection(client, made[0] if len(made) == 1 else None, credentials)


def _prepare_client(service: str, options: ClientOptions, config: Any) -> tuple[Any, Coroutine[Any, Any, Any]]:
    session = _new_session(options.profile) if options.session is None else options.session
    make = session.client if hasattr(session, "client") else session.create_client
    is_plain = (options.endpoint_url or "").startswith("http://")
    context = make(
        service,
        endpoint_url=options.endpoint_url,
        region_name=options.region,
        config=config,
        verify=False if is_plain else None,  # loading certificates for nothing takes 20 ms
    )
    return session, context.__aenter__()


def _new_session(profile: str | None) -> Any:
    """One with settings and credentials as they are now, and with the models of the services that others have read:
    that takes 0.1 s of CPU for each session otherwise.
    """
    session = AioSession(profile=profile)
    session.register_component("data_loader", _loader(session.get_config_variable("data_path")))
    return aioboto3.Session(botocore_session=session)


_loader = functools.cache(create_loader)


NO_ANSWER: Final = (BotoCoreError, ResponseParserError, aiohttp.ClientError, OSError)
"""What the client raises where the service has not answered; see `no_answer`."""


def no_answer(said: str, exc: Exception) -> StoreError:
    """What it means that the client raised one of `NO_ANSWER`.

    Args:
        said: What was asked of whom, for the message.
        exc: What was raised.
    """
    if isinstance(exc, NoCredentialsError | PartialCredentialsError):
        return StoreError(
            f"{said}: there are no credentials ({exc}): set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, give "
            "profile=, or a role to the machine"
        )
    is_unanswered = isinstance(
        exc,
        ConnectionError
        | HTTPClientError
        | IncompleteReadError
        | ResponseParserError
        | CredentialRetrievalError
        | aiohttp.ClientError
        | OSError,
    )
    return StoreUnavailableError(f"{said}: {exc}") if is_unanswered else StoreError(f"{said}: {exc}")


class Pace:
    """How fast the service wants to be asked: all requests of a tracker slow down together, as it counts them
    together.
    """

    def __init__(self) -> None:
        self._pause = 0.0  # seconds
        self._resume_at = 0.0

    async def wait(self) -> None:
        """Before a request."""
        if self._pause and (wait := self._resume_at - asyncio.get_running_loop().time()) > 0:
            await asyncio.sleep(wait * random.uniform(0.5, 1.5))

    def slower(self) -> None:
        """After a request that was refused because there are too many."""
        now = asyncio.get_running_loop().time()
        if self._resume_at <= now:  # else it was said to all that were under way
            self._pause = min(MAX_PAUSE, self._pause * 2 or 0.05)
            self._resume_at = now + self._pause

    def well(self) -> None:
        """After a request that was not refused."""
        self._pause = 0.0


class Turns:
    """How many requests may be under way at once: fewer while they are not answered in time.

    A service that is sent more than it can answer within our time-outs would else answer nothing in time, for good:
    each request is given up while it waits there, and sent again behind the others. Of those under way, half are too
    many then; each answer lets a part of one more through, as TCP has it.

    Args:
        most: Of them, at any time.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._limit = float(most)
        self._under_way = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._lowered_at = -float("inf")

    async def __aenter__(self) -> None:
        if self._under_way < int(self._limit) and not self._waiting:
            self._under_way += 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except BaseException:
            if turn.done() and not turn.cancelled():
                self._leave()  # it came, and nobody was there any more
            raise

    async def __aexit__(self, *exc: object) -> None:
        self._leave()

    def _leave(self) -> None:
        self._under_way -= 1
        while self._waiting and self._under_way < int(self._limit):
            turn = self._waiting.popleft()
            if not turn.done():
                self._under_way += 1
                turn.set_result(None)

    def answered(self) -> None:
        """After a request that was answered, whatever the answer."""
        if self._limit < self._most:
            self._limit = min(self._most, self._limit + 1 / self._limit)

    def unanswered(self, began: float) -> None:
        """After a request that was not answered in time.

        Args:
            began: When it was sent, by the event loop's clock. One that was under way when this last happened tells
                nothing new.
        """
        if began > self._lowered_at:
            self._lowered_at = asyncio.get_running_loop().time()
            self._limit = max(1.0, min(self._limit, self._under_way) / 2)


class ServiceTime:
    """The service's clock, as its answers tell it.

    An answer says the second in which it was made, and was made while we waited for it. What several answers leave
    possible together is narrower than what one of them does.

    Args:
        clock: Ours. One that is not the system's stands for the service's too.

    Attributes:
        date: Of the latest answer that told it: whole seconds since 1970.
        answered: Of the very latest answer; `None` where it did not tell, or a cache has told.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._is_system = isinstance(clock, SystemClock)
        self._low = -float("inf")  # the service's time minus our own lies between these
        self._high = float("inf")
        self._seen_at = 0.0
        self._round_trip = 0.0  # seconds, of the quickest answer
        self.date: float | None = None
        self.answered: float | None = None

    def local(self) -> float:
        """Our own time, which nobody sets."""
        boot = self._clock.boot()
        return boot.seconds if boot.boot_id else self._clock.monotonic()

    def saw(self, headers: Mapping[str, str], asked: float) -> None:
        """Takes the time from an answer.

        Args:
            headers: Of the answer, in lower case.
            asked: When it was asked, by `local`.
        """
        self.answered = None
        text = headers.get("date")
        if text is None or "age" in headers:  # a cache tells when it got the answer, not when we did
            return
        try:
            date = parsedate_to_datetime(text).timestamp()
        except ValueError:
            return
        self.answered = date
        now = self.local()
        low, high = date - now, date + 1 - asked
        widened = DRIFT * (now - self._seen_at)
        self._low, self._high = max(low, self._low - widened), min(high, self._high + widened)
        is_first = self.date is None
        if self._low >= self._high:  # one of the clocks was set, or a machine with another clock has answered
            self._low, self._high = low, high
        self._seen_at = now
        self._round_trip = now - asked if is_first else min(self._round_trip, now - asked)
        self.date = date

    def now(self) -> datetime:
        """The service's time, as best known: our own wall clock's, as far as the answers leave that possible.

        So the workers of one machine agree to the microsecond, and a clock that is wrong does no harm.
        """
        now = self._clock.now()
        if not self._is_system or self.date is None:
            return now
        local = self.local()
        wall, low, high = now.timestamp(), local + self._low, local + self._high
        return now if low <= wall <= high else datetime.fromtimestamp(low if wall < low else high, UTC)

    @property
    def uncertainty(self) -> float:
        """Seconds by which two workers' views of it may differ: a second and a round trip on each side."""
        return 2 * (1 + self._round_trip) if self._is_system and self.date is not None else 0.0
