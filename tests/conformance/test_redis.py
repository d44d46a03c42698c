import secrets
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from aiotracker.backends.redis import RedisTracker
from aiotracker.testing import ConformanceSuite
from aiotracker.testing.conformance import MakeTracker
from tests.conftest import require
from tests.services.redis import is_installed, redis_server


@pytest.fixture(scope="module")
def server_url() -> Iterator[str]:
    require(is_installed(), "redis-server and redis-cli")
    with redis_server() as server:
        yield server.url


def open_redis(name: str, **options: Any) -> Any:
    """For other processes."""
    url, _, namespace = name.rpartition("/")
    return RedisTracker(url, namespace=namespace, **options)


class TestRedis(ConformanceSuite):
    @pytest.fixture
    def store(self, server_url: str) -> str:
        return f"{server_url}/{secrets.token_hex(6)}"

    @pytest.fixture
    def make_tracker(self, store: str) -> MakeTracker:
        return partial(open_redis, store)

    @pytest.fixture
    def store_url(self, store: str) -> str:
        return f"tests.conformance.test_redis:open_redis:{store}"
