"""PUT and GET of an object without what the client does anew for each request.

From models of the service, botocore works out where a request goes and with which headers: three quarters of what a
request costs. Here it does so once, for a sample of each kind, which is caught just before it is sent. What all
requests of that kind have in common is kept; the key, the condition, the body and the signature are put to it. They
are sent through the client's own HTTP session, with its connections, proxies, certificates and time-outs.

    direct = await learn(connection, "bucket", put_options, get_options)     # None: not here, use the client
    answer = await direct.put("jobs/a.json", body, {"if-none-match": "*"})   # as client.put_object: a dict, ClientError
    answer = await direct.get("jobs/a.json")                                 # answer["Body"] is bytes

Whether it signs as botocore does is tried on the samples. Where it does not, or where there is more to a request than
is known here (checksums, sessions of directory buckets, signatures of another kind), the client does it all.
"""

import hmac
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from hashlib import sha256
from typing import Any, Final, NamedTuple
from urllib.parse import quote, urlsplit
from xml.etree import ElementTree

from botocore.awsrequest import AWSPreparedRequest  # type: ignore[import-untyped]  # ships no types

from ._aws import ClientError, Connection

__all__ = ["DirectRequests", "learn"]

ALGORITHM: Final = "AWS4-HMAC-SHA256"
SAMPLE_KEY: Final = "sample/a %2F=~+é.json"  # with all that can be quoted in more than one way
SAMPLE_BODY: Final = b"{}"
DIRECTORY_BUCKET: Final = "--x-s3"  # how the names of these end; they have sessions instead of credentials

# Of a request alone: made anew, or not needed.
_OWN: Final = frozenset(
    {
        "accept-encoding",
        "amz-sdk-invocation-id",
        "amz-sdk-request",
        "authorization",
        "content-length",
        "expect",
        "host",
        "x-amz-content-sha256",
        "x-amz-date",
        "x-amz-security-token",
    }
)
# More depends on the body than is known here.
_UNKNOWN: Final = ("content-md5", "transfer-encoding", "x-amz-checksum-", "x-amz-decoded-", "x-amz-s3session-",
                   "x-amz-sdk-checksum-", "x-amz-trailer")  # fmt: skip
_UNSIGNED: Final = frozenset({"user-agent"})


class _Kind(NamedTuple):
    """What all requests of one kind have in common."""

    method: str
    start: str  # of the URL, up to the key
    path: str  # the same without scheme and host
    headers: dict[str, str]  # names in lower case
    signed: dict[str, str]  # those that are signed, and the host


class _Caught(Exception):
    """The sample was caught."""


class DirectRequests:
    """Sends requests of the kinds that were learned. Use `learn` to make it."""

    def __init__(self, connection: Connection, region: str, service: str, put: _Kind, get: _Kind) -> None:
        self._http = connection.http
        self._credentials = connection.credentials
        self._region = region
        self._service = service
        self._put = put
        self._get = get
        self._second = 0
        self._date = ""  # of that second
        self._key_of: tuple[str, str] = ("", "")  # secret and scope of `_key`
        self._key = b""

    async def put(self, key: str, body: bytes, condition: Mapping[str, str]) -> dict[str, Any]:
        """As `client.put_object`.

        Args:
            key: The whole key.
            body: What is to be stored.
            condition: As headers, with names in lower case.

        Raises:
            ClientError: An error was answered.
        """
        status, headers, answered = await self._send(self._put, key, body, condition)
        if status >= 300 or b"<Error" in answered[:200]:
            raise _error("PutObject", status, headers, answered)
        return {"ETag": headers.get("etag", ""), "ResponseMetadata": {"HTTPHeaders": headers}}

    async def get(self, key: str) -> dict[str, Any]:
        """As `client.get_object`, but the body has been read.

        Args:
            key: The whole key.

        Raises:
            ClientError: An error was answered.
        """
        status, headers, body = await self._send(self._get, key, b"", {})
        if status >= 300:
            raise _error("GetObject", status, headers, body)
        modified = headers.get("last-modified")
        return {
            "Body": body,
            "ETag": headers.get("etag", ""),
            "LastModified": None if modified is None else parsedate_to_datetime(modified),
            "ResponseMetadata": {"HTTPHeaders": headers},
        }

    async def _send(
        self, kind: _Kind, key: str, body: bytes, condition: Mapping[str, str]
    ) -> tuple[int, dict[str, str], bytes]:
        name = _quoted(key)
        credentials = await self._credentials.get_frozen_credentials()
        now = int(time.time())
        if now != self._second:
            self._second, self._date = now, time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now))
        own = {"x-amz-content-sha256": sha256(body).hexdigest(), "x-amz-date": self._date, **condition}
        if credentials.token:
            own["x-amz-security-token"] = credentials.token
        scope = f"{self._date[:8]}/{self._region}/{self._service}/aws4_request"
        if self._key_of != (credentials.secret_key, scope):
            self._key_of, self._key = (credentials.secret_key, scope), _signing_key(credentials.secret_key, scope)
        names, signature = _signature(kind.method, kind.path + name, kind.signed | own, scope, self._key)
        headers = kind.headers | own
        headers["authorization"] = (
            f"{ALGORITHM} Credential={credentials.access_key}/{scope}, SignedHeaders={names}, Signature={signature}"
        )
        request = AWSPreparedRequest(kind.method, kind.start + name, headers, body or None, False)
        answer = await self._http.send(request)
        return answer.status_code, answer.headers, await answer.content


async def learn(
    connection: Connection, bucket: str, put_options: Mapping[str, Any], get_options: Mapping[str, Any]
) -> DirectRequests | None:
    """Lets the client make a sample of each kind, and takes over what they have in common.

    Args:
        connection: The client, and what it was made of.
        bucket: Where all objects are.
        put_options: That go with each PUT.
        get_options: That go with each GET.

    Returns:
        `None` where requests need more than is known here, or the samples could not be made.
    """
    if connection.http is None or connection.credentials is None or bucket.endswith(DIRECTORY_BUCKET):
        return None
    client = connection.client
    where = {"Bucket": bucket, "Key": SAMPLE_KEY}
    put = await _caught(client, "PutObject", client.put_object(Body=SAMPLE_BODY, **where, **put_options))
    get = await _caught(client, "GetObject", client.get_object(**where, **get_options))
    if put is None or get is None:
        return None
    credentials = await connection.credentials.get_frozen_credentials()
    learned_put = _kind(put, SAMPLE_BODY, credentials.secret_key)
    learned_get = _kind(get, b"", credentials.secret_key)
    if learned_put is None or learned_get is None:
        return None
    put_kind, region, service = learned_put
    get_kind, *same = learned_get
    return DirectRequests(connection, region, service, put_kind, get_kind) if same == [region, service] else None


async def _caught(client: Any, operation: str, request: Any) -> Any:
    """The request as the client would have sent it; `None` where it did not come so far."""
    found: list[Any] = []

    def catch(request: Any, **_: Any) -> None:
        found.append(request)
        raise _Caught

    event = f"before-send.s3.{operation}"
    client.meta.events.register(event, catch)
    try:
        await request
    except Exception:  # whatever it is, the client will meet it again, and then it is told
        pass
    finally:
        client.meta.events.unregister(event, catch)
    return found[0] if found else None


def _kind(sample: Any, body: bytes, secret: str) -> tuple[_Kind, str, str] | None:
    """What the sample has in common with others, its region and service."""
    headers = {name.lower(): _text(value) for name, value in sample.headers.items()}
    algorithm, *parts = headers.get("authorization", "").replace(",", " ").split() or [""]
    said = dict(part.partition("=")[::2] for part in parts)
    scope = said.get("Credential", "").split("/", 1)[-1]
    url = urlsplit(sample.url)
    name = _quoted(SAMPLE_KEY)
    is_known = (
        algorithm == ALGORITHM
        and scope.count("/") == 3
        and not url.query
        and url.path.endswith(f"/{name}")
        and headers.get("x-amz-content-sha256") == sha256(body).hexdigest()
        and not any(header.startswith(_UNKNOWN) for header in headers)
    )
    if not is_known:
        return None
    headers["host"] = url.netloc.removesuffix(":443" if url.scheme == "https" else ":80")
    signed = {header: " ".join(headers.get(header, "").split()) for header in said["SignedHeaders"].split(";")}
    _, signature = _signature(sample.method, url.path, signed, scope, _signing_key(secret, scope))
    if signature != said["Signature"]:
        return None
    _, region, service, _ = scope.split("/")
    kept = {header: value for header, value in headers.items() if header not in _OWN}
    signed = {header: " ".join(value.split()) for header, value in kept.items() if header not in _UNSIGNED}
    start, path = sample.url.removesuffix(name), url.path.removesuffix(name)
    return _Kind(sample.method, start, path, kept, signed | {"host": headers["host"]}), region, service


def _signature(method: str, path: str, headers: Mapping[str, str], scope: str, key: bytes) -> tuple[str, str]:
    """Signature version 4: the names of the signed headers, and the signature.

    Args:
        method: Of the request.
        path: As it stands in the URL.
        headers: That are signed; without spaces around the values.
        scope: Date, region, service.
        key: The signing key of the scope.
    """
    ordered = sorted(headers.items())
    names = ";".join([name for name, _ in ordered])
    lines = "".join([f"{name}:{value}\n" for name, value in ordered])
    request = f"{method}\n{path}\n\n{lines}\n{names}\n{headers['x-amz-content-sha256']}"
    text = f"{ALGORITHM}\n{headers['x-amz-date']}\n{scope}\n{sha256(request.encode()).hexdigest()}"
    return names, hmac.digest(key, text.encode(), "sha256").hex()


def _signing_key(secret: str, scope: str) -> bytes:
    key = f"AWS4{secret}".encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    return key


def _error(operation: str, status: int, headers: Mapping[str, str], body: bytes) -> Exception:
    found = {"Code": str(status), "Message": ""}
    try:
        found |= {child.tag: child.text or "" for child in ElementTree.fromstring(body)}
    except ElementTree.ParseError:
        pass  # of something between us and the store
    error: Exception = ClientError(
        {"Error": found, "ResponseMetadata": {"HTTPStatusCode": status, "HTTPHeaders": headers}}, operation
    )
    return error


def _quoted(key: str) -> str:
    return quote(key, safe="/~")


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
