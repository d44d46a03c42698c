"""Requests that are put together without the client are those that it would have sent."""

import asyncio
import functools
import hashlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any, NamedTuple

import aioboto3  # type: ignore[import-untyped]  # ships no types
import pytest
from botocore.auth import S3SigV4Auth  # type: ignore[import-untyped]  # ships no types
from botocore.awsrequest import AWSRequest  # type: ignore[import-untyped]  # ships no types
from botocore.credentials import Credentials  # type: ignore[import-untyped]  # ships no types

from aiotracker import StoreUnsafeError
from aiotracker.backends._aws import ClientError, ClientOptions, Connection, connect
from aiotracker.backends._s3_direct import SAMPLE_KEY, DirectRequests, learn
from aiotracker.backends.s3 import S3Tracker
from tests.services.fault_proxy import FaultProxy
from tests.services.moto import use_credentials
from tests.services.s3 import S3Service, client_of, moto_s3

__all__ = ["moto_s3"]  # fixtures

PLAIN = {"ContentType": "application/json"}


class Answered(NamedTuple):
    """What the wire is made to answer."""

    status_code: int = 200
    headers: dict[str, str] = {"etag": '"e"'}  # noqa: RUF012 - nobody changes it
    body: bytes = b""

    @property
    async def content(self) -> bytes:
        return self.body


class Wire:
    """In the place of a session that sends."""

    def __init__(self, answer: Answered) -> None:
        self.answer = answer
        self.sent: list[Any] = []

    async def send(self, request: Any) -> Answered:
        self.sent.append(request)
        return self.answer


class Rotated:
    """Credentials that are refreshed."""

    def __init__(self) -> None:
        self.now = Credentials("AKID", "secret", "token")

    async def get_frozen_credentials(self) -> Any:
        return self.now.get_frozen_credentials()


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    use_credentials()
    async with AsyncExitStack() as stack:
        yield stack


@functools.cache
def session() -> Any:
    return aioboto3.Session()


async def connected(stack: AsyncExitStack, url: str | None = None, region: str = "eu-central-1", **config: Any) -> Any:
    options = ClientOptions(endpoint_url=url, region=region, session=await asyncio.to_thread(session))
    settings = {"request_checksum_calculation": "when_required", "response_checksum_validation": "when_required"}
    return await connect("s3", options, stack, **(settings | config))


def replaced(connection: Connection, answer: Answered = Answered()) -> tuple[Connection, Wire]:  # noqa: B008 - frozen
    wire = Wire(answer)
    return connection._replace(http=wire), wire


def signed_by_botocore(request: Any, credentials: Any, region: str, body: bytes) -> str:
    """The signature of the same request, by botocore's own code."""
    authorization = request.headers["authorization"]
    names = authorization.partition("SignedHeaders=")[2].partition(",")[0].split(";")
    headers = {name: request.headers[name] for name in names if name != "host"}
    copy = AWSRequest(request.method, request.url, headers=headers, data=body)
    auth = S3SigV4Auth(credentials, "s3", region)
    copy.context["timestamp"] = request.headers["x-amz-date"]
    copy.context["payload_signing_enabled"] = True
    text = auth.string_to_sign(copy, auth.canonical_request(copy))
    return str(auth.signature(text, copy))


@pytest.mark.parametrize(
    ("url", "config", "host"),
    [
        (None, {}, "https://bucket.s3.eu-central-1.amazonaws.com/"),
        (None, {"s3": {"addressing_style": "path"}}, "https://s3.eu-central-1.amazonaws.com/bucket/"),
        (None, {"s3": {"use_dualstack_endpoint": True}}, "https://bucket.s3.dualstack.eu-central-1.amazonaws.com/"),
        ("http://127.0.0.1:9000", {"s3": {"addressing_style": "path"}}, "http://127.0.0.1:9000/bucket/"),
        ("http://store:80/deep", {"s3": {"addressing_style": "path"}}, "http://store:80/deep/bucket/"),
    ],
)
async def test_they_go_where_the_clients_go_and_are_signed_as_botocore_signs(
    stack: AsyncExitStack, url: str | None, config: dict[str, Any], host: str
) -> None:
    credentials = Rotated()
    options = PLAIN | {"ServerSideEncryption": "AES256", "Metadata": {"a": "two  spaces"}, "Tagging": "x=1"}
    real = (await connected(stack, url, **config))._replace(credentials=None)
    assert await learn(real, "bucket", options, {}) is None, "there are no credentials"
    own = await session().get_credentials()
    connection, wire = replaced(real._replace(credentials=own))
    direct = await learn(connection, "bucket", options, {"RequestPayer": "requester"})
    assert direct is not None
    direct._credentials = credentials
    for secret in ("secret", "another"):
        credentials.now = Credentials("AKID", secret, "token")
        await direct.put("jobs/a%2Fb c=.json", b'{"n":1}', {"if-none-match": "*"})
        await direct.get("jobs/é~.json")
        put, get = wire.sent[-2:]
        assert (put.method, put.url) == ("PUT", f"{host}jobs/a%252Fb%20c%3D.json")
        assert (get.method, get.url) == ("GET", f"{host}jobs/%C3%A9~.json")
        assert put.headers["x-amz-server-side-encryption"] == "AES256"
        assert put.headers["x-amz-tagging"] == "x=1"
        assert (put.headers["if-none-match"], put.headers["content-type"]) == ("*", "application/json")
        assert get.headers["x-amz-request-payer"] == "requester"
        for request, body in ((put, b'{"n":1}'), (get, b"")):
            assert request.headers["x-amz-content-sha256"] == hashlib.sha256(body).hexdigest()
            assert request.headers["x-amz-security-token"] == "token"
            expected = signed_by_botocore(request, credentials.now, "eu-central-1", body)
            assert request.headers["authorization"].endswith(f"Signature={expected}")


@pytest.mark.parametrize(
    ("bucket", "options", "config"),
    [
        ("bucket", {"ChecksumAlgorithm": "CRC32"}, {}),
        ("bucket", {}, {"request_checksum_calculation": "when_supported"}),
        ("bucket", {}, {"signature_version": "s3"}),
        ("bucket--use1-az4--x-s3", {}, {}),
    ],
)
async def test_where_there_is_more_to_a_request_the_client_sends_it(
    stack: AsyncExitStack, bucket: str, options: dict[str, Any], config: dict[str, Any]
) -> None:
    connection, wire = replaced(await connected(stack, **config))
    assert await learn(connection, bucket, PLAIN | options, {}) is None
    assert wire.sent == []


async def test_nothing_is_sent_to_learn_it(moto_s3: S3Service, stack: AsyncExitStack) -> None:
    async with FaultProxy(moto_s3.url) as proxy:
        connection = await connected(stack, proxy.url)
        assert isinstance(await learn(connection, moto_s3.bucket, PLAIN, {}), DirectRequests)
        assert proxy.requests == []
        await connection.client.put_object(Bucket=moto_s3.bucket, Key="free again", Body=b"")
        assert [request.method for request in proxy.requests] == ["PUT"]


@pytest.mark.parametrize("method", ["put", "get"])
@pytest.mark.parametrize(
    ("status", "body", "code", "more"),
    [
        (
            412,
            b"<?xml version='1.0'?><Error><Code>PreconditionFailed</Code><Message>no</Message></Error>",
            "PreconditionFailed",
            {"Message": "no"},
        ),
        (301, b"<Error><Code>PermanentRedirect</Code><Region>x</Region></Error>", "PermanentRedirect", {"Region": "x"}),
        (503, b"<html>a gateway's page<br>", "503", {}),
        (304, b"", "304", {}),
    ],
)
async def test_an_error_is_what_the_client_makes_of_it(
    stack: AsyncExitStack, method: str, status: int, body: bytes, code: str, more: dict[str, str]
) -> None:
    connection, _ = replaced(await connected(stack), Answered(status, {"date": "now"}, body))
    direct = await learn(connection, "bucket", PLAIN, {})
    assert direct is not None
    with pytest.raises(ClientError) as caught:
        await (direct.put("key", b"{}", {}) if method == "put" else direct.get("key"))
    assert caught.value.response["Error"]["Code"] == code
    assert caught.value.response["Error"].items() >= more.items()
    assert caught.value.response["ResponseMetadata"] == {"HTTPStatusCode": status, "HTTPHeaders": {"date": "now"}}


async def test_a_client_that_is_given_sends_all_of_them(moto_s3: S3Service) -> None:
    sent: list[str] = []
    async with client_of(moto_s3) as client:
        client.meta.events.register("before-send.s3", lambda request, **_: sent.append(request.method))
        async with S3Tracker(moto_s3.bucket, moto_s3.prefix(), client=client) as tracker, tracker.run("job"):
            pass
        assert len(sent) == tracker.requests


async def test_after_a_redirect_the_client_does_it(moto_s3: S3Service) -> None:
    async with FaultProxy(moto_s3.url) as proxy:
        left = [(307, "TemporaryRedirect")]
        proxy.refuses = lambda request: left.pop() if left else None
        async with S3Service(proxy.url, moto_s3.bucket).tracker(moto_s3.prefix()) as tracker:
            assert tracker._store._direct is None
            async with tracker.run("job"):
                pass


async def test_a_key_that_is_quoted_in_another_way_is_left_to_the_client(
    stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection = await connected(stack)
    monkeypatch.setattr("aiotracker.backends._s3_direct._quoted", lambda key: key.replace(" ", "+"))
    assert "%" in SAMPLE_KEY
    assert await learn(connection, "bucket", PLAIN, {}) is None


async def test_a_signature_that_is_made_in_another_way_is_left_to_the_client(
    stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection = await connected(stack)
    monkeypatch.setattr("aiotracker.backends._s3_direct._signing_key", lambda secret, scope: b"another")
    assert await learn(connection, "bucket", PLAIN, {}) is None


async def test_a_service_that_takes_none_of_it_is_told_by_the_clients_words(moto_s3: S3Service) -> None:
    async with FaultProxy(moto_s3.url) as proxy:
        proxy.refuses = lambda request: (501, "NotImplemented") if request.method == "PUT" else None
        with pytest.raises(StoreUnsafeError, match=r"PutObject of .*: NotImplemented: injected"):
            async with S3Service(proxy.url, moto_s3.bucket).tracker(moto_s3.prefix()):
                pass
