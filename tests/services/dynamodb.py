"""DynamoDB for tests: two services that differ, a table in each, and a fresh namespace for each test."""

import asyncio
import functools
import itertools
import os
import uuid
from collections.abc import Iterator
from typing import Any, NamedTuple

import aioboto3  # type: ignore[import-untyped]  # ships no types
import boto3  # type: ignore[import-untyped]  # ships no types
import pytest

from aiotracker.backends.dynamodb import DynamoDBTracker
from tests.conftest import require

from .dynalite import dynalite_path, dynalite_server
from .moto import moto_server, use_credentials
from .s3 import shared

__all__ = [
    "TABLE",
    "DynamoDBService",
    "dynalite_dynamodb",
    "made_table",
    "moto_dynamodb",
    "raw_client",
    "shared_session",
]

TABLE = "tasks"

_namespaces = itertools.count(1)


class DynamoDBService(NamedTuple):
    """A service that runs, with a table."""

    url: str
    table: str = TABLE

    def namespace(self) -> str:
        """One that nobody has used."""
        return f"{os.getpid()}-{next(_namespaces)}-{uuid.uuid4().hex[:6]}"

    def tracker(self, namespace: str, **options: Any) -> DynamoDBTracker:
        return DynamoDBTracker(
            self.table, namespace=namespace, endpoint_url=self.url, session=shared_session(), **options
        )

    def store_url(self, namespace: str) -> str:
        """For another process."""
        return f"dynamodb://{self.table}?endpoint_url={self.url}&namespace={namespace}"


@functools.cache
def shared_session() -> Any:
    """Of all trackers of a test run: one that is made anew reads the descriptions of all services again."""
    use_credentials()
    return aioboto3.Session()


def raw_client(url: str) -> Any:
    """boto3's own, to look at what is there."""
    use_credentials()
    return boto3.client("dynamodb", endpoint_url=url)


def made_table(url: str, table: str = TABLE) -> DynamoDBService:
    """A service with its table."""
    shared_session()  # not on an event loop, as it reads files
    asyncio.run(DynamoDBTracker(table, endpoint_url=url).create_table())
    return DynamoDBService(url, table)


@pytest.fixture(scope="session")
def moto_dynamodb() -> Iterator[DynamoDBService]:
    with shared("moto", moto_server()) as url:
        yield made_table(url)


@pytest.fixture(scope="session")
def dynalite_dynamodb() -> Iterator[DynamoDBService]:
    require(dynalite_path(), "dynalite (npm): tests/services/install_dynalite.sh")
    with dynalite_server() as url:
        yield made_table(url)
