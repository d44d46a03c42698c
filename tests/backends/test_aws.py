"""The connections to services of AWS, and to those that are like them."""

import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
from botocore.awsrequest import AWSPreparedRequest  # type: ignore[import-untyped]  # ships no types

from aiotracker.backends._aws import ClientOptions, connect

BODY = b"what was asked for"


class Service:
    """Sends the head of each answer, and its body when told."""

    def __init__(self) -> None:
        self.url = ""
        self.goes_on = asyncio.Event()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError), contextlib.closing(writer):
            while await reader.readuntil(b"\r\n\r\n"):
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(BODY))
                await writer.drain()
                await self.goes_on.wait()
                self.goes_on.clear()
                writer.write(BODY)


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    service = Service()
    async with await asyncio.start_server(service.answer, "127.0.0.1", 0) as server:
        service.url = "http://{}:{}".format(*server.sockets[0].getsockname())
        yield service
        service.goes_on.set()


def quick_acknowledgements(url: str) -> list[int]:
    """Of each of our connections, whether what comes is acknowledged at once."""
    port = int(url.rpartition(":")[2])
    found = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:  # it is no socket, or not connected
            ours = socket.socket(fileno=int(number))
            stack.callback(ours.detach)
            if ours.family is socket.AF_INET and ours.getpeername()[1] == port:
                found.append(ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it cannot be asked for")
async def test_the_head_of_an_answer_is_acknowledged_at_once(service: Service) -> None:
    """A service that uses Nagle's algorithm sends no body before that, and the system would put it off for 40 ms."""
    options = ClientOptions(endpoint_url=service.url, region="us-east-1")
    async with AsyncExitStack() as stack:
        connection = await connect("s3", options, stack)
        for _ in range(10):  # the system begins to put it off when it has seen some questions and answers
            request = AWSPreparedRequest("GET", f"{service.url}/key", {}, None, True)
            answer = await connection.http.send(request)
            found = quick_acknowledgements(service.url)
            service.goes_on.set()
            assert await answer.content == BODY
            assert found == [1]


async def test_an_answer_that_is_not_streamed_is_whole(service: Service) -> None:
    options = ClientOptions(endpoint_url=service.url, region="us-east-1")
    async with AsyncExitStack() as stack:
        connection = await connect("s3", options, stack)
        request = AWSPreparedRequest("GET", f"{service.url}/key", {}, None, False)
        service.goes_on.set()
        answer = await connection.http.send(request)
        assert answer._content == BODY
