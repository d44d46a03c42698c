"""What the two S3 trackers share: one bucket and prefix, behind a few guarded requests.

    store = S3Store("bucket", "jobs", S3Options(endpoint_url=...), clock)
    await store.connect(stack)                               # one client; nothing is asked yet
    settings = await store.identify("log", {"shards": 4})    # the marker: format, layout, and the settings that it has
    store.facts                                              # what this service can do, as probed once

    await store.put(key, body, absent=True)                  # If-None-Match: *  -> the new ETag
    await store.put(key, body, match=etag)                   # If-Match          -> the new ETag
    await store.get(key)                                     # Stored(body, etag, modified), or None
    await store.delete(key, match=etag)                      # guarded only where facts.guards_delete
    async for page in store.pages("log/", after="log/17"):   # up to 1,000 entries a page, in the order of keys
        for entry in page: entry.key, entry.etag, entry.size, entry.modified
    store.now(), store.uncertainty                           # the store's time as best known, and how far it may be off
    store.date                                               # of the latest answer: whole seconds since 1970
    store.requests                                           # a Counter by operation

Keys are given and told without the store's prefix, which nothing here ever leaves. Every request is sent once: whoever
asks decides whether to send it again. What it may raise:

* `ConflictError`: refused, nothing was changed. `known=True` and `current=None`: nothing is stored under the key.
* `BusyError`, a `StoreUnavailableError`: refused for now, nothing was changed (409 of two writes that met, slow down).
* `StoreUnavailableError`: no answer, or none that says so; a write may have landed.
* `StoreError`: it would not help to ask again; the message says what to do.

Errors are told apart by their code, never by the status alone: a 200 can carry one.
"""

import asyncio
import random
import re
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Final, NamedTuple, TypeVar

import msgspec

from .._core.codec import FORMAT
from ..clock import Clock, SystemClock
from ..errors import (
    ConflictError,
    InvalidValueError,
    StoreCorruptedError,
    StoreError,
    StoreUnavailableError,
    StoreUnsafeError,
)

try:
    import aioboto3  # type: ignore[import-untyped]  # ships no types
    import aiohttp
    import botocore  # type: ignore[import-untyped]  # ships no types
    from botocore.config import Config  # type: ignore[import-untyped]  # ships no types
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
    from botocore.parsers import ResponseParserError  # type: ignore[import-untyped]  # ships no types
except ModuleNotFoundError as exc:
    if (exc.name or "").partition(".")[0] == "aiotracker":
        raise
    raise ModuleNotFoundError(
        f'stores on S3 need {exc.name}: pip install "aiotracker[s3]"', name=exc.name, path=exc.path
    ) from exc

__all__ = ["BusyError", "Entry", "Facts", "S3Options", "S3Store", "StoreTime", "Stored", "together"]

T = TypeVar("T")

MARKER: Final = "aiotracker.json"
PROBES: Final = "probe/"
CONNECTIONS: Final = 64  # requests under way at once
CONNECT_TIME: Final = 3.0  # seconds
REQUEST_TIME: Final = 10.0  # seconds for one request at the most, once it has its turn
PAGE: Final = 1000  # entries of a listing; what S3 gives at the most
RACERS: Final = 10  # of the probe
KEY_BYTES: Final = 1024  # of a whole key, prefix included
MAX_PAUSE: Final = 5.0  # seconds between two requests to a store that says to slow down
STORES_KEPT: Final = 8  # endpoints whose facts are remembered in the marker
DRIFT: Final = 2e-4  # seconds by which two clocks may part in a second

_SLOW: Final = frozenset(
    {
        "SlowDown",
        "SlowDownRead",
        "SlowDownWrite",
        "Throttling",
        "ThrottlingException",
        "TooManyRequests",
        "TooManyRequestsException",
        "RequestLimitExceeded",
        "BandwidthLimitExceeded",
        "429",
    }
)
_UNANSWERED: Final = frozenset({"InternalError", "ServiceUnavailable", "RequestTimeout", "IncompleteBody", "408"})
_CREDENTIALS: Final = frozenset(
    {
        "InvalidAccessKeyId",
        "SignatureDoesNotMatch",
        "ExpiredToken",
        "InvalidToken",
        "TokenRefreshRequired",
        "InvalidSecurity",
        "NotSignedUp",
    }
)
_REGION: Final = frozenset(
    {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "TemporaryRedirect"}
)
_ACTIONS: Final = {
    "GetObject": "s3:GetObject",
    "PutObject": "s3:PutObject",
    "DeleteObject": "s3:DeleteObject",
    "ListObjectsV2": "s3:ListBucket",
}
_CODE: Final = re.compile(rb"<Code>\s*([^<]+?)\s*</Code>")


class BusyError(StoreUnavailableError):
    """The store refused for now, and changed nothing: two writes met, or it asks for fewer requests."""


class DeniedError(StoreError):
    """The credentials do not have the permission; nothing was changed."""


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


class S3Options(msgspec.Struct, frozen=True, kw_only=True):
    """How the client is made, and what goes with its requests."""

    client: Any = None  # an aiobotocore client for S3, which is not closed
    session: Any = None  # an aioboto3 session, or an aiobotocore one
    endpoint_url: str | None = None
    region: str | None = None
    profile: str | None = None
    path_style: bool | None = None  # None: where an endpoint is given
    put_options: Mapping[str, Any] = {}  # more arguments of PutObject: server-side encryption, storage class, tags
    connections: int = CONNECTIONS
    request_time: float = REQUEST_TIME  # seconds

    def __post_init__(self) -> None:
        if self.client is not None and (self.session, self.profile, self.region, self.endpoint_url) != (None,) * 4:
            raise InvalidValueError("client= is used as it is: give session, profile, region and endpoint to it")
        if self.session is not None and self.profile is not None:
            raise InvalidValueError("session= has its own profile: give one of the two")
        if isinstance(self.connections, bool) or not isinstance(self.connections, int) or self.connections < 1:
            raise InvalidValueError(f"connections takes an int of 1 or more, not {self.connections!r}")
        if wrong := self.put_options.keys() & {"Bucket", "Key", "Body", "IfMatch", "IfNoneMatch"}:
            raise InvalidValueError(f"put_options cannot hold {', '.join(sorted(wrong))}")


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What a probe found out about a store that honours conditions on PUT."""

    quotes: bool = False  # If-Match takes the ETag in quotes only
    guards_delete: bool = False  # DELETE honours If-Match, and is allowed


class _Marker(msgspec.Struct, kw_only=True):
    """What stands in the marker."""

    format: int
    layout: str
    settings: dict[str, Any] = {}
    stores: dict[str, Facts] = {}  # by endpoint: a bucket may be copied to a store of another kind


class StoreTime:
    """The store's clock, as its answers tell it.

    An answer says the second in which it was made, and was made while we waited for it. What several answers leave
    possible together is narrower than what one of them does.

    Args:
        clock: Ours. One that is not the system's stands for the store's too.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._is_system = isinstance(clock, SystemClock)
        self._low = -float("inf")  # the store's time minus our own lies between these
        self._high = float("inf")
        self._seen_at = 0.0
        self._round_trip = 0.0  # seconds, of the quickest answer
        self.date: float | None = None

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
        text = headers.get("date")
        if text is None or "age" in headers:  # a cache tells when it got the answer, not when we did
            return
        try:
            date = parsedate_to_datetime(text).timestamp()
        except ValueError:
            return
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
        """The store's time, as best known: our own wall clock's, as far as the answers leave that possible.

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


class S3Store:
    """One bucket and prefix, through one client.

    Args:
        bucket: Its name.
        prefix: What all keys begin with; a slash is put behind it.
        options: How the client is made.
        clock: Ours.

    Attributes:
        requests: How many were sent, by operation (`PutObject`, `GetObject`, ...).
        facts: What the store can do; known after `identify`.
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
        self.time = StoreTime(clock)
        self._client: Any = None
        self._put_options: dict[str, Any] = dict(options.put_options)
        # Whoever encrypts with a key of their own, or pays for requests, says so with every request.
        self._get_options = {
            name: value
            for name, value in options.put_options.items()
            if name.startswith("SSECustomer") or name in ("RequestPayer", "ExpectedBucketOwner")
        }
        self._list_options = {name: value for name, value in self._get_options.items() if name[:3] != "SSE"}
        self._turns = asyncio.Semaphore(options.connections)
        self._slow = 0.0  # seconds to wait, while the store says to slow down
        self._resume_at = 0.0

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

    # -- the client

    async def connect(self, stack: AsyncExitStack) -> None:
        """Makes the client, or takes the one that was given.

        Raises:
            StoreError: There is no such profile, no region, or another setting is wrong.
        """
        self._turns = asyncio.Semaphore(self.options.connections)
        if self.options.client is not None:
            self._client = self.options.client
            return
        try:
            making = await asyncio.to_thread(self._prepare_client)
            # Reads many files, and takes up to two seconds. Nothing of it is bound to the thread's event loop: the
            # connections are made with the first request.
            client = await asyncio.to_thread(asyncio.run, making)
        except (BotoCoreError, ValueError) as exc:
            raise self._setting_error(exc) from exc

        async def close() -> None:
            self._client = None
            await client.__aexit__(None, None, None)

        stack.push_async_callback(close)
        # Asking whether a body of some hundred bytes would be welcome costs a round trip with each write.
        client.meta.events.register("request-created.s3.PutObject", _do_not_ask_first)
        _resolve_once(client)
        self._client = client

    def _prepare_client(self) -> Coroutine[Any, Any, Any]:
        options = self.options
        session = options.session
        if session is None:
            session = aioboto3.Session(profile_name=options.profile)
        make = session.client if hasattr(session, "client") else session.create_client
        is_custom = options.endpoint_url is not None
        path_style = is_custom if options.path_style is None else options.path_style
        settings: dict[str, Any] = {
            "connect_timeout": CONNECT_TIME,
            "read_timeout": options.request_time,
            "retries": {"total_max_attempts": 1, "mode": "standard"},  # else a win comes back as a 412
            "max_pool_connections": options.connections,
            "parameter_validation": False,  # what goes in is ours
            "user_agent": f"aiotracker botocore/{botocore.__version__}",  # else put together anew for each request
            "s3": {"addressing_style": "path" if path_style else "auto"},
        }
        if is_custom:
            settings |= {
                "request_checksum_calculation": "when_required",
                "response_checksum_validation": "when_required",
            }
        is_plain = is_custom and options.endpoint_url.startswith("http://")  # type: ignore[union-attr]  # is_custom says so
        context = make(
            "s3",
            endpoint_url=options.endpoint_url,
            region_name=options.region,
            config=Config(**settings),
            verify=False if is_plain else None,  # loading certificates for nothing takes 20 ms
        )
        making: Coroutine[Any, Any, Any] = context.__aenter__()
        return making

    def _setting_error(self, exc: Exception) -> StoreError:
        if isinstance(exc, NoRegionError):
            return StoreError(f"{self!r}: no region is set; give region=, or set AWS_DEFAULT_REGION")
        if isinstance(exc, ProfileNotFound):
            return StoreError(f"{self!r}: {exc}; profile= takes a name from ~/.aws/config")
        return StoreError(f"{self!r}: the client cannot be made: {exc}")

    # -- requests

    async def get(self, key: str) -> Stored | None:
        """The object; `None` where there is none."""

        async def read() -> tuple[Any, Stored]:
            answer = await self._client.get_object(Bucket=self.bucket, Key=self.prefix + key, **self._get_options)
            async with answer["Body"] as stream:
                body = await stream.read()
            return answer, Stored(body, _etag(answer), _modified(answer))

        try:
            stored: Stored = await self._send("GetObject", key, read)
        except _NoSuchKey:
            return None
        if stored.body[:1] == b"<" and (found := _CODE.search(stored.body[:2000])) is not None:
            # Nothing of ours begins like that.
            raise self._translated("GetObject", key, found[1].decode("utf-8", "replace"), "in a 200 answer", 500, {})
        return stored

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
        options = self._put_options | condition

        async def write() -> tuple[Any, str]:
            answer = await self._client.put_object(
                Bucket=self.bucket, Key=self.prefix + key, Body=body, ContentType="application/json", **options
            )
            if not (etag := _etag(answer)):
                raise StoreUnavailableError(f"{self!r}{key}: a PUT was answered without an ETag")
            return answer, etag

        try:
            etag: str = await self._send("PutObject", key, write)
        except _NoSuchKey as exc:
            raise ConflictError(f"{self!r}{key} is gone", known=True) from exc
        return etag

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

        page: tuple[list[Entry], str | None] = await self._send("ListObjectsV2", prefix, look)
        return page

    def _quoted(self, etag: str) -> str:
        return f'"{etag}"' if self.facts.quotes else etag

    async def _send(self, operation: str, key: str, request: Callable[[], Coroutine[Any, Any, tuple[Any, Any]]]) -> Any:
        """Sends a request when it has its turn, and translates what goes wrong."""
        if self._client is None:
            raise StoreError(f"{self!r} is not open")
        async with self._turns:
            await self._slow_down()
            asked = self.time.local()
            self.requests[operation] += 1
            try:
                async with asyncio.timeout(self.options.request_time):
                    answer, value = await request()
            except ClientError as exc:
                raise self._client_error(operation, key, exc, asked) from exc
            except TimeoutError as exc:
                raise StoreUnavailableError(
                    f"{self!r}: {operation} of {key!r} was not answered within {self.options.request_time:g} s"
                ) from exc
            except (BotoCoreError, ResponseParserError, aiohttp.ClientError, OSError) as exc:
                raise self._connection_error(operation, key, exc) from exc
            self.time.saw(answer["ResponseMetadata"].get("HTTPHeaders", {}), asked)
            self._slow = 0.0
            return value

    async def _slow_down(self) -> None:
        """Waits while the store wants fewer requests: all of them, as it counts them together."""
        loop = asyncio.get_running_loop()
        if self._slow and (wait := self._resume_at - loop.time()) > 0:
            await asyncio.sleep(wait * random.uniform(0.5, 1.5))

    def _client_error(self, operation: str, key: str, exc: Any, asked: float) -> Exception:
        error, meta = exc.response.get("Error", {}), exc.response.get("ResponseMetadata", {})
        headers = meta.get("HTTPHeaders", {})
        self.time.saw(headers, asked)
        details = error | {"Region": error.get("Region") or headers.get("x-amz-bucket-region")}
        code, status = str(error.get("Code", "")), int(meta.get("HTTPStatusCode", 0))
        translated = self._translated(operation, key, code, str(error.get("Message", "")), status, details)
        if not isinstance(translated, StoreUnavailableError):
            self._slow = 0.0
        return translated

    def _translated(
        self, operation: str, key: str, code: str, message: str, status: int, details: Mapping[str, Any]
    ) -> Exception:
        said = f"{self!r}: {operation} of {key!r}: {code or status}{': ' if message else ''}{message}"
        if code in ("PreconditionFailed", "412"):
            return ConflictError(f"{self!r}{key} has changed")
        if code in ("ConditionalRequestConflict", "OperationAborted", "409"):
            return BusyError(f"two writes met: {said}")
        if code in _SLOW:
            loop = asyncio.get_running_loop()
            if self._resume_at <= loop.time():  # else it was said to all that were under way
                self._slow = min(MAX_PAUSE, self._slow * 2 or 0.05)
                self._resume_at = loop.time() + self._slow
            return BusyError(said)
        if code in ("NoSuchKey", "404") or (code == "NotFound" and status == 404):
            return _NoSuchKey(said)
        if code == "NoSuchBucket":
            return StoreError(
                f"there is no bucket {self.bucket!r}{self._where()}: create it, or correct the name, the region or the "
                "endpoint"
            )
        if code in ("AccessDenied", "403", "Forbidden", "AllAccessDisabled"):
            return DeniedError(self._denied(operation, key, message))
        if code in _REGION or status in (301, 307):
            region = details.get("Region")
            here = f"in {region}: give region={region!r}" if region else "in another region: give region="
            return StoreError(f"the bucket {self.bucket!r} is {here} ({said})")
        if code in _CREDENTIALS:
            return StoreError(f"the credentials were refused: {said}")
        if code == "RequestTimeTooSkewed":
            return StoreError(f"this machine's clock is too far from the store's; set it: {said}")
        if code in ("NotImplemented", "501"):
            return StoreUnsafeError(f"the store does not know a request that is needed: {said}")
        if code in _UNANSWERED or status >= 500 or status == 0:
            return StoreUnavailableError(said)
        return StoreError(said)

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

    def _connection_error(self, operation: str, key: str, exc: Exception) -> StoreError:
        said = f"{self!r}: {operation} of {key!r}{self._where()}: {exc}"
        if isinstance(exc, NoCredentialsError | PartialCredentialsError):
            return StoreError(f"there are no credentials ({exc}): set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                              f"give profile=, or a role to the machine; {self!r}")  # fmt: skip
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
        return StoreUnavailableError(said) if is_unanswered else StoreError(said)

    # -- the marker

    async def identify(
        self, layout: str, settings: Mapping[str, Any] | None = None, *, read_only: bool = False
    ) -> dict[str, Any]:
        """Reads the marker, or writes it; finds out what the store can do unless that stands there.

        Args:
            layout: Which kind of store must be here.
            settings: Of a new store.
            read_only: Nothing is written, and nothing is tried.

        Returns:
            The settings that the store has.

        Raises:
            StoreError: Another kind of store is here, or one of another format.
            StoreUnsafeError: This service does not honour conditions.
        """
        deadline = asyncio.get_running_loop().time() + 2 * self.options.request_time
        facts: Facts | None = None
        while True:
            stored = await self.patiently(lambda: self.get(MARKER))
            marker = None if stored is None else self._read_marker(stored.body, layout)
            if read_only:
                return dict(settings or {}) if marker is None else marker.settings
            known = None if marker is None else marker.stores.get(self.endpoint)
            if marker is not None and known is not None:
                self.facts = known
                return marker.settings
            facts = self.facts = facts or await self._probe()
            if marker is None:
                marker = _Marker(format=FORMAT, layout=layout, settings=dict(settings or {}))
            stores = {**marker.stores, self.endpoint: facts}
            marker.stores = dict(list(stores.items())[-STORES_KEPT:])
            body = msgspec.json.format(msgspec.json.encode(marker), indent=2) + b"\n"
            try:
                await self.put(MARKER, body, absent=stored is None, match=None if stored is None else stored.etag)
            except ConflictError:
                pass  # somebody else was faster, or it was us
            except StoreUnavailableError:
                if asyncio.get_running_loop().time() > deadline:
                    raise
            else:
                return marker.settings
            await asyncio.sleep(random.uniform(0, 0.1))

    def _read_marker(self, raw: bytes, layout: str) -> _Marker:
        path = f"{self!r}{MARKER}"
        try:
            marker = msgspec.json.decode(raw, type=_Marker)
        except msgspec.DecodeError as exc:
            raise StoreCorruptedError(f"{path} cannot be read: {exc}", path) from exc
        if marker.format != FORMAT:
            raise StoreError(
                f"{self!r} has format {marker.format}, and this release of aiotracker knows format {FORMAT}: use the "
                "release that wrote it, or a newer one; nothing was changed"
            )
        if marker.layout != layout:
            raise StoreError(f"{self!r} holds a store of another kind, {marker.layout!r}: open it as that")
        return marker

    # -- the probe

    async def _probe(self) -> Facts:
        """Finds out whether the store keeps its conditions, on an object of its own.

        Raises:
            StoreUnsafeError: It does not on PUT.
        """
        key = f"{PROBES}{secrets.token_hex(8)}"
        self.facts = Facts()
        etag = await self._race(key, None)
        if await self._tries(key, absent=True):
            raise self._unsafe("a second If-None-Match: * replaced what was stored")
        old = etag
        new = await self._tries(key, match=etag)
        if new is None:
            self.facts = Facts(quotes=True)
            new = await self._tries(key, match=etag)
        if new is None:
            raise self._unsafe("If-Match with the ETag that is stored was refused")
        if await self._tries(key, match=old):
            raise self._unsafe("If-Match with an ETag that is no longer stored was taken")
        new = await self._race(key, new)
        self.facts = msgspec.structs.replace(self.facts, guards_delete=await self._probe_delete(key, old, new))
        return self.facts

    async def _race(self, key: str, match: str | None) -> str:
        """Ten writes at once, of which one may win; the ETag that is stored."""
        answers = await together(self._tries(key, absent=match is None, match=match) for _ in range(RACERS))
        winners = [etag for etag in answers if etag is not None]
        stored = await self.patiently(lambda: self.get(key))
        if len(winners) != 1:
            raise self._unsafe(f"of {RACERS} writes at once under one condition, {len(winners)} were taken")
        if stored is None or stored.etag != winners[0]:
            raise self._unsafe("a read after a write did not show what was written")
        return stored.etag

    async def _tries(self, key: str, *, absent: bool = False, match: str | None = None) -> str | None:
        """One guarded write; the new ETag, or `None` where it was refused. Sent again until it is answered."""
        body = msgspec.json.encode({"probe": secrets.token_hex(8)})
        is_unknown = False

        async def write() -> str | None:
            nonlocal is_unknown
            try:
                return await self.put(key, body, absent=absent, match=match)
            except ConflictError:
                pass
            except BusyError:
                raise
            except StoreUnavailableError:
                is_unknown = True
                raise
            if is_unknown:  # it may have landed, and its reply have been lost
                stored = await self.get(key)
                if stored is not None and stored.body == body:
                    return stored.etag
            return None

        return await self.patiently(write)

    async def _probe_delete(self, key: str, old: str, new: str) -> bool:
        async def delete(etag: str) -> bool:
            try:
                await self.delete(key, match=etag)
            except ConflictError:
                return False
            return True

        try:
            await self.patiently(lambda: delete(old))
            if await self.patiently(lambda: self.get(key)) is None:
                return False
            await self.patiently(lambda: delete(new))
            return await self.patiently(lambda: self.get(key)) is None
        except DeniedError:
            return False  # without the permission, nothing is ever deleted

    async def patiently(self, request: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Asks again while there is no answer, for a while."""
        deadline = asyncio.get_running_loop().time() + 2 * self.options.request_time
        for count in range(1, 1000):
            try:
                return await request()
            except StoreUnavailableError:
                if asyncio.get_running_loop().time() > deadline:
                    raise
                await asyncio.sleep(random.uniform(0, min(1.0, 0.02 * 2.0 ** min(count, 8))))
        raise AssertionError("unreachable")

    def _unsafe(self, what: str) -> StoreUnsafeError:
        return StoreUnsafeError(
            f"the store at {self.endpoint} does not honour conditional writes ({what}): two workers could hold one "
            "task. Use a service that does, such as AWS S3, or another kind of store; nothing but a probe object was "
            "written"
        )


class _NoSuchKey(StoreError):
    """Nothing is stored under the key."""


def _resolve_once(client: Any) -> None:
    """Where a request goes depends on the bucket. botocore remembers that by bucket and key, which is a quarter of what
    a request on a new key costs; where it does so in another way, it is left as it is.
    """
    resolver = getattr(client, "_ruleset_resolver", None)
    construct = getattr(resolver, "construct_endpoint", None)
    if construct is None:
        return

    async def construct_endpoint(operation_model: Any, call_args: Any, request_context: Any) -> Any:
        if call_args and "Key" in call_args:
            call_args = call_args | {"Key": "key"}
        return await construct(operation_model, call_args, request_context)

    resolver.construct_endpoint = construct_endpoint  # type: ignore[union-attr]  # of a resolver that is there


def _do_not_ask_first(request: Any, **_: Any) -> None:
    del request.headers["Expect"]


async def together(requests: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All answers; where one request fails, the others have ended too when this raises."""
    tasks = [asyncio.ensure_future(request) for request in requests]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def _etag(answer: Mapping[str, Any]) -> str:
    return str(answer.get("ETag", "")).strip('"')


def _modified(answer: Mapping[str, Any]) -> datetime | None:
    modified: datetime | None = answer.get("LastModified")
    return None if modified is None else modified.astimezone(UTC)
