"""A fresh store of each kind, on a server of its own where it needs one."""

import asyncio
import secrets
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from aiotracker import DynamoDBTracker, PostgresTracker
from tests.services.ceph import ceph_server
from tests.services.dynalite import dynalite_server
from tests.services.moto import use_credentials
from tests.services.postgres import postgres_server
from tests.services.redis import RedisServer
from tests.services.s3 import made_bucket

from .machine import fresh

__all__ = ["STORES", "store"]


@contextmanager
def store(kind: str, folder: Path) -> Iterator[str]:
    """The URL of an empty store, which is gone afterwards.

    Args:
        kind: One of `STORES`.
        folder: On a real disk; what the store or its server keeps is in it.
    """
    with fresh(folder.absolute()) as made, STORES[kind](made) as url:
        yield url


@contextmanager
def _file(made: Path) -> Iterator[str]:
    yield f"file:{made}/store"


@contextmanager
def _sqlite(made: Path) -> Iterator[str]:
    yield f"sqlite:{made}/jobs.db"


@contextmanager
def _postgres(made: Path) -> Iterator[str]:
    with postgres_server(folder=str(made)) as server:
        asyncio.run(PostgresTracker(server.dsn).init())
        yield server.dsn


@contextmanager
def _redis(made: Path) -> Iterator[str]:
    server = RedisServer(made)
    try:
        server.start()
        yield server.url
    finally:
        server.kill()


@contextmanager
def _dynamodb(made: Path) -> Iterator[str]:
    use_credentials()
    with dynalite_server() as url:
        asyncio.run(DynamoDBTracker("tasks", endpoint_url=url).create_table())
        yield f"dynamodb://tasks?endpoint_url={url}"


def _on_ceph(scheme: str) -> Callable[[Path], AbstractContextManager[str]]:
    @contextmanager
    def serve(made: Path) -> Iterator[str]:
        use_credentials()
        with ceph_server() as url:
            yield f"{scheme}://{made_bucket(url).bucket}/{secrets.token_hex(6)}?endpoint_url={url}"

    return serve


STORES: dict[str, Callable[[Path], AbstractContextManager[str]]] = {
    "file": _file,
    "sqlite": _sqlite,
    "postgres": _postgres,
    "redis": _redis,
    "dynamodb": _dynamodb,
    "s3": _on_ceph("s3"),
    "s3_log": _on_ceph("s3+log"),
}
