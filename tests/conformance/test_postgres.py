import asyncio
from collections.abc import Iterator
from uuid import uuid4

import pytest

from aiotracker.testing import ConformanceSuite
from aiotracker.testing.conformance import MakeTracker
from tests.conftest import require, require_module
from tests.services.postgres import Server, has_pgbouncer, has_postgres, pgbouncer, postgres_server

require_module("asyncpg")

from aiotracker.backends.postgres import PostgresTracker  # noqa: E402 - it cannot be imported without its driver


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    require(has_postgres(), "no PostgreSQL")
    with postgres_server() as found:
        asyncio.run(PostgresTracker(found.dsn).init())
        yield found


@pytest.fixture(scope="module")
def dsn(server: Server) -> str:
    return server.dsn


@pytest.fixture(scope="module")
def pooled(server: Server) -> Iterator[str]:
    require(has_pgbouncer(), "no PgBouncer")
    with pgbouncer(server, pool_size=4) as found:
        yield found


class TestPostgres(ConformanceSuite):
    @pytest.fixture
    def namespace(self) -> str:
        return uuid4().hex

    @pytest.fixture
    def make_tracker(self, dsn: str, namespace: str) -> MakeTracker:
        return lambda **options: PostgresTracker(dsn, namespace=namespace, **options)

    @pytest.fixture
    def store_url(self, dsn: str, namespace: str) -> str:
        return f"{dsn}?namespace={namespace}"


class TestPostgresThroughPgBouncer(TestPostgres):
    """In transaction mode: each transaction may have another session. Most of it is for `make chaos`."""

    @pytest.fixture
    def dsn(self, pooled: str) -> str:
        return pooled
