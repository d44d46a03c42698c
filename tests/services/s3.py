"""S3 for tests: the services, a bucket in each, and a fresh prefix for each test."""

import asyncio
import contextlib
import functools
import itertools
import os
import uuid
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, AsyncExitStack, ExitStack, asynccontextmanager
from typing import Any, NamedTuple

import aioboto3  # type: ignore[import-untyped]  # ships no types
import boto3  # type: ignore[import-untyped]  # ships no types
import msgspec
import pytest

from aiotracker import SystemClock
from aiotracker._core.codec import FORMAT
from aiotracker.backends._s3 import MARKER, Facts, S3Options, S3Store
from aiotracker.backends.s3 import S3Tracker
from aiotracker.backends.s3_log import S3LogTracker
from tests.conftest import require

from .ceph import ceph_is_installed, ceph_server
from .moto import moto_server, use_credentials

__all__ = [
    "BUCKET",
    "S3Service",
    "ceph_s3",
    "client_of",
    "made_bucket",
    "moto_s3",
    "prepared",
    "raw_client",
    "shared",
]

BUCKET = "tasks"

_prefixes = itertools.count(1)
_shared: dict[str, tuple[ExitStack, str, int]] = {}


class S3Service(NamedTuple):
    """A service that runs, with a bucket."""

    url: str
    bucket: str = BUCKET

    def prefix(self) -> str:
        """One that nobody has used, at any depth."""
        return f"{os.getpid()}-{next(_prefixes)}/{uuid.uuid4().hex[:6]}"

    def tracker(self, prefix: str, **options: Any) -> S3Tracker:
        """A session that has read its files before is quicker; the tracker makes its own client all the same."""
        if not options.keys() & {"session", "profile"}:
            options["session"] = _session()
        return S3Tracker(self.bucket, prefix, endpoint_url=self.url, **options)

    def store_url(self, prefix: str) -> str:
        """For another process, which has the credentials from this one."""
        return f"s3://{self.bucket}/{prefix}?endpoint_url={self.url}"

    def log_tracker(self, prefix: str, **options: Any) -> S3LogTracker:
        """The same for a log."""
        if not options.keys() & {"session", "profile"}:
            options["session"] = _session()
        return S3LogTracker(self.bucket, prefix, **{"endpoint_url": self.url} | options)

    def log_url(self, prefix: str) -> str:
        """The same for a log."""
        return f"s3+log://{self.bucket}/{prefix}?endpoint_url={self.url}"


def raw_client(url: str) -> Any:
    """boto3's own, to look at what is there."""
    use_credentials()
    return boto3.client("s3", endpoint_url=url)


def made_bucket(url: str, bucket: str = BUCKET) -> S3Service:
    """A service with its bucket."""
    use_credentials()
    # These read files, which is not to happen in an event loop.
    SystemClock().boot()
    _session()
    client = raw_client(url)
    client.create_bucket(Bucket=bucket)
    client.close()
    return S3Service(url, bucket)


@contextlib.contextmanager
def shared(name: str, service: AbstractContextManager[str]) -> Iterator[str]:
    """One service for all that use it in this process at one time, however many modules have a fixture of it."""
    if name not in _shared:
        stack = ExitStack()
        _shared[name] = (stack, stack.enter_context(service), 0)
    stack, url, users = _shared[name]
    _shared[name] = (stack, url, users + 1)
    try:
        yield url
    finally:
        stack, url, users = _shared[name]
        _shared[name] = (stack, url, users - 1)
        if users == 1:
            del _shared[name]
            stack.close()


@pytest.fixture(scope="session")
def moto_s3() -> Iterator[S3Service]:
    with shared("moto", moto_server()) as url:
        yield made_bucket(url)


@pytest.fixture(scope="session")
def ceph_s3() -> Iterator[S3Service]:
    require(ceph_is_installed(), "radosgw, ceph-mon, ceph-osd and ceph-common (Debian packages)")
    with shared("ceph", ceph_server()) as url:
        yield made_bucket(url)


@functools.cache
def _session() -> Any:
    return aioboto3.Session()


def prepared(service: S3Service, layout: str = "objects", **settings: Any) -> str:
    """A prefix with a marker that says what is known of the service, so that not every test probes it again."""
    prefix = service.prefix()
    facts = _facts(service.url)
    marker = {"format": FORMAT, "layout": layout, "settings": settings, "stores": {service.url: facts}}
    _client(service.url).put_object(
        Bucket=service.bucket,
        Key=f"{prefix}/{MARKER}",
        Body=msgspec.json.encode(marker),
        ContentType="application/json",
    )
    return prefix


@functools.cache
def _client(url: str) -> Any:
    return raw_client(url)


@functools.cache
def _facts(url: str) -> Facts:
    async def probe() -> Facts:
        async with AsyncExitStack() as stack:
            store = S3Store(BUCKET, "facts", S3Options(endpoint_url=url), SystemClock())
            await store.connect(stack)
            await store.identify("objects")
            return store.facts

    use_credentials()
    with ThreadPoolExecutor(1) as thread:  # there may be an event loop in this one
        return thread.submit(asyncio.run, probe()).result()


@asynccontextmanager
async def client_of(service: S3Service) -> AsyncIterator[Any]:
    """An aiobotocore client of somebody else's making."""
    use_credentials()
    async with aioboto3.Session().client("s3", endpoint_url=service.url) as client:
        yield client
