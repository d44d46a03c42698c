"""A client for a service of AWS: how it is made, and what it raises."""

import asyncio
import contextlib
import functools
import socket
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from typing import Any, Final, NamedTuple

import msgspec

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
    "CONNECTIONS",
    "NO_ANSWER",
    "ClientError",
    "ClientOptions",
    "Connection",
    "connect",
    "no_answer",
]

CONNECT_TIME: Final = 3.0  # seconds
CONNECTIONS: Final = 64  # requests under way at once


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


class _Session(AIOHTTPSession):  # type: ignore[misc]  # ships no types
    """Does not wait for an answer longer than the service needs.

    Many services send the head of an answer, and its body only once the head has been acknowledged (Nagle's
    algorithm; Ceph does unless told otherwise). The system puts off acknowledging, since it may be done for free
    with the next request: one read in ten took 40 ms instead of one.
    """

    async def send(self, request: Any) -> Any:
        is_streamed, request.stream_output = request.stream_output, True
        answer = await super().send(request)
        _acknowledge(answer.raw)
        if not is_streamed:
            await answer.content
        return answer


def _acknowledge(answer: aiohttp.ClientResponse) -> None:
    connection = answer.connection  # None: all of it has come
    if _QUICKACK is None or connection is None or connection.transport is None:
        return
    if (connected := connection.transport.get_extra_info("socket")) is not None:
        with contextlib.suppress(OSError):  # it was closed
            connected.setsockopt(socket.IPPROTO_TCP, _QUICKACK, 1)


_QUICKACK: Final = getattr(socket, "TCP_QUICKACK", None)  # Linux


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
        made.append(_Session(**arguments))
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
