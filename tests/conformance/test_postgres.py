import asyncio
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pytest

from aiotracker.testing import ConformanceSuite
from aiotracker.testing.conformance import MakeTracker
from tests.conftest import require
from tests.services.postgres import has_pgbouncer, has_postgres, pgbouncer, postgres_server

asyncpg = pytest.importorskip("asyncpg")

from aiotracker.backends.postgres import PostgresTracker  # noqa: E402 - it cannot be imported without its driver


@pytest.fixture(scope="module")
def dsn() -> Iterator[str]:
    require(has_postgres(), "no PostgreSQL")
    with postgres_server() as server:
        asyncio.run(PostgresTracker(server.dsn).init())
        yield server.dsn


@pytest.fixture(scope="module")
def pooled_dsn() -> Iterator[str]:
    require(has_postgres() and has_pgbouncer(), "no PostgreSQL or no PgBouncer")
    with postgres_server() as server, pgbouncer(server) as url:
        asyncio.run(PostgresTracker(server.dsn).init())
        yield url


def opened(name: str, **options: Any) -> PostgresTracker[Any, Any]:
    """The store of this name, for another process."""
    dsn, _, namespace = name.partition("#")
    return PostgresTracker(dsn, namespace=namespace.replace("/", "."), **options)


class TestPostgres(ConformanceSuite):
    @pytest.fixture
    def namespace(self) -> str:
        return uuid4().hex

    @pytest.fixture
    def make_tracker(self, dsn: str, namespace: str) -> MakeTracker:
        return lambda **options: PostgresTracker(dsn, namespace=namespace, **options)

    @pytest.fixture
    def store_url(self, dsn: str, namespace: str) -> str:
        return f"{__name__}:opened:{dsn}#{namespace}"
