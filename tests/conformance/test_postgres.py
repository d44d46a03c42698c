import asyncio
from collections.abc import Iterator
from uuid import uuid4

import pytest

from aiotracker.testing import ConformanceSuite
from aiotracker.testing.conformance import MakeTracker
from tests.conftest import require
from tests.services.postgres import has_postgres, postgres_server

asyncpg = pytest.importorskip("asyncpg")

from aiotracker.backends.postgres import PostgresTracker  # noqa: E402 - it cannot be imported without its driver


@pytest.fixture(scope="module")
def dsn() -> Iterator[str]:
    require(has_postgres(), "no PostgreSQL")
    with postgres_server() as server:
        asyncio.run(PostgresTracker(server.dsn).init())
        yield server.dsn


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
