"""What tests of trackers on S3 share: fixtures, on moto unless they say otherwise."""

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from aiotracker import (
    Task,
)
from aiotracker.backends.s3 import S3Tracker
from tests.services.fault_proxy import FaultProxy
from tests.services.s3 import S3Service, ceph_s3, moto_s3, prepared, raw_client

__all__ = ["ceph_s3", "copied_facts", "loaded", "make", "moto_s3", "prefix", "proxy", "through"]


@pytest.fixture
def prefix(moto_s3: S3Service) -> str:
    return prepared(moto_s3)


@pytest.fixture
def make(moto_s3: S3Service, prefix: str) -> Callable[..., S3Tracker]:
    return lambda **options: moto_s3.tracker(prefix, **options)


@pytest.fixture
async def proxy(moto_s3: S3Service) -> AsyncIterator[FaultProxy]:
    async with FaultProxy(moto_s3.url) as proxy:
        yield proxy


@pytest.fixture
def through(proxy: FaultProxy, moto_s3: S3Service) -> Callable[..., S3Tracker]:
    """A tracker behind the proxy."""

    def make(prefix: str = "", **options: Any) -> S3Tracker:
        return S3Tracker(moto_s3.bucket, prefix or moto_s3.prefix(), endpoint_url=proxy.url, **options)

    return make


async def loaded(tracker: S3Tracker, task_id: str) -> Task:
    task = await tracker.load(task_id)
    assert task is not None
    return task


def copied_facts(service: S3Service, prefix: str, url: str) -> None:
    client = raw_client(service.url)
    where = {"Bucket": service.bucket, "Key": f"{prefix}/aiotracker.json"}
    marker = json.loads(client.get_object(**where)["Body"].read())
    marker["stores"][url] = marker["stores"][service.url]
    client.put_object(**where, Body=json.dumps(marker).encode())
    client.close()
