"""A network that can be cut: a proxy on loopback, between workers and the server of their store."""

import asyncio
import contextlib
from types import TracebackType
from typing import Final, Self
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from ..errors import InvalidValueError

__all__ = ["CutProxy", "can_be_cut"]

CHUNK: Final = 64 * 1024
PORTS: Final = {"postgresql": 5432, "postgres": 5432, "redis": 6379, "http": 80}
BY_ENDPOINT: Final = ("s3", "s3+log", "dynamodb")


def can_be_cut(reference: str) -> bool:
    """Whether this is the URL of a store whose server is reached over TCP without TLS."""
    return _address(reference) is not None


class CutProxy:
    """Passes bytes on, until it is told not to. Use it with `async with`.

    Args:
        reference: The URL of a store.

    Attributes:
        reference: The URL of the same store through this proxy.

    Raises:
        InvalidValueError: There is no network to that store, or one with TLS, which nothing may stand in.
    """

    def __init__(self, reference: str) -> None:
        address = _address(reference)
        if address is None:
            raise InvalidValueError(f"there is no plain TCP connection to cut on the way to {reference!r}")
        self._target = address
        self._original = reference
        self.reference = ""
        self._connections: set[asyncio.StreamWriter] = set()
        self._passing: set[asyncio.Task[None]] = set()
        self._flows = asyncio.Event()
        self._flows.set()
        self._refuses = False

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.reference = _moved(self._original, self._server.sockets[0].getsockname()[1])
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._server.close()
        self._abort()
        for task in self._passing:
            task.cancel()
        if self._passing:
            await asyncio.wait(self._passing)

    async def reset(self, seconds: float) -> None:
        """All connections end in the middle, and new ones do for some seconds."""
        self._refuses = True
        self._abort()
        await asyncio.sleep(seconds)
        self._refuses = False

    async def swallow(self, seconds: float) -> None:
        """Nothing arrives, in either direction, for some seconds; then all connections end."""
        self._flows.clear()
        await asyncio.sleep(seconds)
        self._abort()
        self._flows.set()

    def _abort(self) -> None:
        for writer in list(self._connections):
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._passing.add(task)
        task.add_done_callback(self._passing.discard)
        self._connections.add(writer)
        server: asyncio.StreamWriter | None = None
        try:
            await self._flows.wait()
            if self._refuses:
                return
            answers, server = await asyncio.open_connection(*self._target)
            self._connections.add(server)
            passing = [
                asyncio.create_task(self._pass(reader, server)),
                asyncio.create_task(self._pass(answers, writer)),
            ]
            try:
                await asyncio.wait(passing, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for one in passing:
                    one.cancel()
                await asyncio.wait(passing)
        except (OSError, asyncio.CancelledError):
            pass  # the server is down, or we are: the connection ends
        finally:
            for one_writer in (writer, server):
                if one_writer is not None:
                    self._connections.discard(one_writer)
                    one_writer.transport.abort()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(CHUNK):
                await self._flows.wait()
                writer.write(data)
                await writer.drain()


def _address(reference: str) -> tuple[str, int] | None:
    url = urlsplit(reference)
    if url.scheme in BY_ENDPOINT:
        url = urlsplit(dict(parse_qsl(url.query)).get("endpoint_url", ""))
        if url.scheme != "http":
            return None
    if url.scheme not in PORTS or url.hostname is None:
        return None
    return url.hostname, url.port or PORTS[url.scheme]


def _moved(reference: str, port: int) -> str:
    """The same URL, to a port of this machine."""
    url = urlsplit(reference)
    if url.scheme in BY_ENDPOINT:
        query = [(k, f"http://127.0.0.1:{port}" if k == "endpoint_url" else v) for k, v in parse_qsl(url.query)]
        return urlunsplit(url._replace(query=urlencode(query)))
    user, at, _ = url.netloc.rpartition("@")
    return urlunsplit(url._replace(netloc=f"{user}{at}127.0.0.1:{port}"))
