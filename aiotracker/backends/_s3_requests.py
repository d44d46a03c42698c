"""The guarded requests that both S3 trackers are made of; `_s3` tells how they are used.

Errors are told apart by their code, never by the status alone: a 200 can carry one.
"""

import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple, TypeVar

import msgspec

from ..clock import Clock
from ..errors import ConflictError, InvalidValueError, StoreError, StoreUnavailableError, StoreUnsafeError
from ._aws import ClientError, ClientOptions, connect
from ._aws_requests import BusyError, Refusal, Sender, ServiceTime, meaning, patiently
from ._s3_direct import DirectRequests, learn

__all__ = ["KEY_BYTES", "REQUEST_TIME", "DeniedError", "Entry", "Facts", "S3Options", "S3Requests", "Stored"]

T = TypeVar("T")

REQUEST_TIME: Final = 10.0  # seconds for one request at the most, once it has its turn
PAGE: Final = 1000  # entries of a listing; what S3 gives at the most
KEY_BYTES: Final = 1024  # of a whole key, prefix included
CONTENT: Final = {"ContentType": "application/json"}

_REGION: Final = frozenset(
    {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "TemporaryRedirect"}
)
# To which the client may have an answer of its own.
_FOR_THE_CLIENT: Final = _REGION | {"SignatureDoesNotMatch", "301", "307"}
_ACTIONS: Final = {
    "GetObject": "s3:GetObject",
    "PutObject": "s3:PutObject",
    "DeleteObject": "s3:DeleteObject",
    "ListObjectsV2": "s3:ListBucket",
}
_HEADERS: Final = {"IfNoneMatch": "if-none-match", "IfMatch": "if-match"}
_CODE: Final = re.compile(rb"<Code>\s*([^<]+?)\s*</Code>")


class DeniedError(StoreError):
    """The credentials do not have the permission; nothing was changed."""


class _NoSuchKey(StoreError):
    """Nothing is stored under the key."""


class Stored(NamedTuple):
    """One object."""

    body: bytes
    etag: str  # without quotes
    modified: datetime | None  # by the store's clock, in whole seconds


class Entry(NamedTuple):
    """One line of a listing."""

    key: str  # without the store's prefix
    etag: str  # without quotes
    size: int
    modified: datetime


class S3Options(ClientOptions, frozen=True, kw_only=True):
    """How the client is made, and what goes with its requests."""

    path_style: bool | None = None  # None: where an endpoint is given
    put_options: Mapping[str, Any] = {}  # more arguments of PutObject: server-side encryption, storage class, tags
    request_time: float = REQUEST_TIME  # seconds

    def __post_init__(self) -> None:
        super().__post_init__()
        if wrong := self.put_options.keys() & {"Bucket", "Key", "Body", "IfMatch", "IfNoneMatch"}:
            raise InvalidValueError(f"put_options cannot hold {', '.join(sorted(wrong))}")


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What a probe found out about a store that honours conditions on PUT."""

    quotes: bool = False  # If-Match takes the ETag in quotes only
    guards_delete: bool = False  # DELETE honours If-Match, and is allowed


class S3Requests:
    """One bucket and prefix, through one client.

    Args:
        bucket: Its name.
        prefix: What all keys begin with; a slash is put behind it.
        options: How the client is made.
        clock: Ours.

    Attributes:
        requests: How many were sent, by operation (`PutObject`, `GetObject`, ...).
        facts: What the store can do.
    """

    def __init__(self, bucket: str, prefix: str, options: S3Options, clock: Clock) -> None:
        if not isinstance(bucket, str) or not bucket or "/" in bucket:
            raise InvalidValueError(f"bucket takes the name of a bucket, not {bucket!r}")
        prefix = prefix.strip("/")
        self.bucket = bucket
        self.prefix = f"{prefix}/" if prefix else ""
        if len(self.prefix.encode()) > KEY_BYTES // 2:
            raise InvalidValueError(f"the prefix may have {KEY_BYTES // 2} bytes, and {prefix!r} has more")
        self.options = options
        self.requests: Counter[str] = Counter()
        self.facts = Facts()
        self.time = ServiceTime(clock)
        self._client: Any = None
        self._direct: DirectRequests | None = None
        self._put_options: dict[str, Any] = CONTENT | dict(options.put_options)
        # Whoever encrypts with a key of their own, or pays for requests, says so with every request.
        self._get_options = {
            name: value
            for name, value in options.put_options.items()
            if name.startswith("SSECustomer") or name in ("RequestPayer", "ExpectedBucketOwner")
        }
        self._list_options = {name: value for name, value in self._get_options.items() if name[:3] != "SSE"}
        self._sender = Sender(options, self.time)

    def __repr__(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}"

    @property
    def endpoint(self) -> str:
        """Which service answers; "" while there is no client."""
        return "" if self._client is None else str(self._client.meta.endpoint_url)

    def now(self) -> datetime:
        """The store's time as best known, without I/O."""
        return self.time.now()

    @property
    def uncertainty(self) -> float:
        """Seconds by which `now` may be off, on both sides together."""
        return self.time.uncertainty

    @property
    def date(self) -> float | None:
        """Of the latest answer: whole seconds since 1970."""
        return self.time.date

    @property
    def answered(self) -> float | None:
        """The `Date` of the answer that came last: directly after a request returns or raises, its own; `None` where
        it did not tell, or a cache has told.
        """
        return self.time.answered

    # -- the client

    async def connect(self, stack: AsyncExitStack) -> None:
        """Makes the client, or takes the one that was given.

        Raises:
            StoreError: There is no such profile, no region, or another setting is wrong.
        """
        options = self.options
        self._sender = Sender(options, self.time)
        path_style = options.endpoint_url is not None if options.path_style is None else options.path_style
        connection = await connect(
            "s3",
            options,
            stack,
            # What is sent is signed with its SHA-256, and what is received is checked where it is read.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            s3={"addressing_style": "path" if path_style else "auto"},
        )
        stack.callback(self._disconnect)
        self._client = connection.client
        if connection.http is not None:
            # Asking whether a body of some hundred bytes would be welcome costs a round trip with each write.
            self._client.meta.events.register("request-created.s3.PutObject", _do_not_ask_first)
            self._direct = await learn(connection, self.bucket, self._put_options, self._get_options)

    def _disconnect(self) -> None:
        self._client = self._direct = None

    # -- requests

    async def get(self, key: str) -> Stored | None:
        """The object; `None` where there is none."""

        async def read() -> tuple[Any, Stored]:
            name = self.prefix + key
            if self._direct is not None:
                try:
                    answer = await self._direct.get(name)
                except ClientError as exc:
                    self._leave_to_the_client(exc)
                else:
                    return answer, _stored(answer, answer["Body"])
            answer = await self._client.get_object(Bucket=self.bucket, Key=name, **self._get_options)
            async with answer["Body"] as stream:
                return answer, _stored(answer, await stream.read())

        try:
            return await self._send("GetObject", key, read)
        except _NoSuchKey:
            return None

    async def put(self, key: str, body: bytes, *, absent: bool = False, match: str | None = None) -> str:
        """Writes the object if the condition holds.

        Args:
            key: Its key.
            body: What is to be stored.
            absent: Only where nothing is stored.
            match: Only where this ETag is stored.

        Returns:
            The new ETag.
        """
        condition: dict[str, str] = {}
        if absent:
            condition["IfNoneMatch"] = "*"
        elif match is not None:
            condition["IfMatch"] = self._quoted(match)

        async def write() -> tuple[Any, str]:
            answer = await self._write(self.prefix + key, body, condition)
            if not (etag := _etag(answer)):
                raise StoreUnavailableError(f"{self!r}{key}: a PUT was answered without an ETag")
            return answer, etag

        try:
            return await self._send("PutObject", key, write)
        except _NoSuchKey as exc:
            raise ConflictError(f"{self!r}{key} is gone", known=True) from exc

    async def _write(self, name: str, body: bytes, condition: dict[str, str]) -> Any:
        if self._direct is not None:
            try:
                return await self._direct.put(name, body, {_HEADERS[key]: value for key, value in condition.items()})
            except ClientError as exc:
                self._leave_to_the_client(exc)
        options = self._put_options | condition
        return await self._client.put_object(Bucket=self.bucket, Key=name, Body=body, **options)

    def _leave_to_the_client(self, exc: Any) -> None:
        """From now on, where it may know what to do: the bucket is in another region, or signatures are not as usual.
        Nothing was done.
        """
        if str(exc.response["Error"]["Code"]) not in _FOR_THE_CLIENT:
            raise exc
        self._direct = None

    async def delete(self, key: str, *, match: str | None = None) -> None:
        """Removes the object. That it is not there is no error, unless a condition was given.

        Args:
            key: Its key.
            match: Only where this ETag is stored. Stores that do not guard a DELETE take no notice: see `facts`.
        """
        condition = {} if match is None else {"IfMatch": self._quoted(match)}

        async def remove() -> tuple[Any, None]:
            options = self._list_options | condition
            return await self._client.delete_object(Bucket=self.bucket, Key=self.prefix + key, **options), None

        try:
            await self._send("DeleteObject", key, remove)
        except _NoSuchKey as exc:
            if match is not None:
                raise ConflictError(f"{self!r}{key} is gone", known=True) from exc

    async def pages(self, prefix: str, *, after: str = "", limit: int = PAGE) -> AsyncIterator[list[Entry]]:
        """The entries of all keys that begin like this, in their order, page by page.

        Args:
            prefix: What the keys begin with.
            after: Only keys behind this one.
            limit: Entries a page, at the most.
        """
        token: str | None = None
        while True:
            entries, token = await self.page(prefix, after=after, token=token, limit=limit)
            if entries:
                yield entries
            if token is None:
                return

    async def page(
        self, prefix: str, *, after: str = "", token: str | None = None, limit: int = PAGE
    ) -> tuple[list[Entry], str | None]:
        """One page of a listing, and what to ask the next one with; `None` behind the last."""
        start = len(self.prefix)
        where: dict[str, Any] = {"Bucket": self.bucket, "Prefix": self.prefix + prefix, "MaxKeys": limit}
        if token is not None:
            where["ContinuationToken"] = token
        elif after:
            where["StartAfter"] = self.prefix + after

        async def look() -> tuple[Any, tuple[list[Entry], str | None]]:
            answer = await self._client.list_objects_v2(**where, **self._list_options)
            entries = [
                Entry(
                    found["Key"][start:], found["ETag"].strip('"'), found["Size"], found["LastModified"].astimezone(UTC)
                )
                for found in answer.get("Contents", ())
            ]
            return answer, (entries, answer.get("NextContinuationToken") if answer.get("IsTruncated") else None)

        return await self._send("ListObjectsV2", prefix, look)

    def _quoted(self, etag: str) -> str:
        return f'"{etag}"' if self.facts.quotes else etag

    async def _send(self, operation: str, key: str, request: Callable[[], Coroutine[Any, Any, tuple[Any, T]]]) -> T:
        """Sends a request when it has its turn, and translates what goes wrong."""
        if self._client is None:
            raise StoreError(f"{self!r} is not open")

        async def counted() -> tuple[Any, T]:
            self.requests[operation] += 1
            return await request()

        said = f"{self!r}: {operation} of {key!r}{self._where()}"
        return await self._sender.send(said, counted, lambda refusal: self._means(operation, key, said, refusal))

    def _means(self, operation: str, key: str, said: str, refusal: Refusal) -> Exception:
        code, status = refusal.code, refusal.status
        if code in ("PreconditionFailed", "412"):
            return ConflictError(f"{self!r}{key} has changed")
        if code in ("ConditionalRequestConflict", "OperationAborted", "409"):
            return BusyError(f"two writes met: {said}: {refusal}")
        if code in ("NoSuchKey", "404") or (code == "NotFound" and status == 404):
            return _NoSuchKey(f"{said}: {refusal}")
        if code == "NoSuchBucket":
            return StoreError(
                f"there is no bucket {self.bucket!r}{self._where()}: create it, or correct the name, the region or the "
                "endpoint"
            )
        if code in ("AccessDenied", "403", "Forbidden", "AllAccessDisabled"):
            return DeniedError(self._denied(operation, key, refusal.message))
        if code in _REGION or status in (301, 307):
            region = refusal.response.get("Error", {}).get("Region") or refusal.headers.get("x-amz-bucket-region")
            here = f"in {region}: give region={region!r}" if region else "in another region: give region="
            return StoreError(f"the bucket {self.bucket!r} is {here} ({said}: {refusal})")
        if code == "RequestTimeTooSkewed":
            return StoreError(f"this machine's clock is too far from the store's; set it: {said}: {refusal}")
        if code in ("NotImplemented", "501"):
            return StoreUnsafeError(f"the store does not know a request that is needed: {said}: {refusal}")
        return meaning(said, refusal)

    def _where(self) -> str:
        return f" at {self.endpoint}" if self.options.endpoint_url else ""

    def _denied(self, operation: str, key: str, message: str) -> str:
        action = _ACTIONS[operation]
        resource = f"arn:aws:s3:::{self.bucket}" + ("" if action == "s3:ListBucket" else f"/{self.prefix}*")
        hint = ""
        if action == "s3:GetObject":
            hint = f" (and s3:ListBucket on arn:aws:s3:::{self.bucket}: without that, a missing object is denied too)"
        return (
            f"no permission for {operation} of {self.prefix + key!r} in {self.bucket!r}: {action} on {resource} is "
            f"needed{hint}. The store said: {message or 'access denied'}"
        )

    async def patiently(self, request: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Asks again while there is no answer, for a while."""
        return await patiently(request, 2 * self.options.request_time)


def _do_not_ask_first(request: Any, **_: Any) -> None:
    del request.headers["Expect"]


def _stored(answer: Mapping[str, Any], body: bytes) -> Stored:
    """Raises `ClientError` where the answer is an error in spite of its status: nothing of ours begins like that."""
    if body[:1] == b"<" and (found := _CODE.search(body[:2000])) is not None:
        error = {"Code": found[1].decode("utf-8", "replace"), "Message": "in a 200 answer"}
        meta = answer["ResponseMetadata"] | {"HTTPStatusCode": 500}
        raise ClientError({"Error": error, "ResponseMetadata": meta}, "GetObject")
    return Stored(body, _etag(answer), _modified(answer))


def _etag(answer: Mapping[str, Any]) -> str:
    return str(answer.get("ETag", "")).strip('"')


def _modified(answer: Mapping[str, Any]) -> datetime | None:
    modified: datetime | None = answer.get("LastModified")
    return None if modified is None else modified.astimezone(UTC)
