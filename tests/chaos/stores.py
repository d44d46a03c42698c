"""Every kind of store, each with its server where it has one, and how that is restarted."""

import asyncio
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from tests.conftest import require
from tests.services.ceph import ceph_is_installed, ceph_server
from tests.services.dynalite import DynaliteServer, dynalite_path
from tests.services.moto import moto_server
from tests.services.postgres import Server as PostgresServer
from tests.services.postgres import has_postgres, postgres_server
from tests.services.redis import RedisServer, is_installed, redis_server

__all__ = ["KINDS", "LOCAL", "SERVED", "Store", "a_store"]

LOCAL = ("file", "folder", "sqlite")
S3 = ("s3 on moto", "s3 on Ceph", "s3 log on moto", "s3 log on Ceph")
SERVED = ("postgres", "redis", *S3, "dynamodb on moto", "dynamodb on dynalite")
KINDS = (*LOCAL, *SERVED)


class Store(NamedTuple):
    """An empty one."""

    reference: str
    restart: Callable[[], None] | None = None


@contextmanager
def a_store(kind: str, folder: Path) -> Iterator[Store]:
    """A new store of this kind; its server ends with it."""
    if kind in LOCAL:
        yield Store(f"{kind}:{folder / 'store'}")
    elif kind == "postgres":
        require(has_postgres(), "no PostgreSQL")
        from aiotracker.backends.postgres import PostgresTracker

        with postgres_server() as postgres:
            asyncio.run(PostgresTracker(postgres.dsn).init())
            yield Store(f"{postgres.dsn}?namespace={_name()}", lambda: _again(postgres))
    elif kind == "redis":
        require(is_installed(), "no redis-server")
        with redis_server() as redis:
            yield Store(f"{redis.url}?namespace={_name()}", lambda: _again(redis))
    elif kind in S3:
        is_moto = kind.endswith("moto")
        require(is_moto or ceph_is_installed(), "no Ceph")
        from tests.services.s3 import made_bucket

        with moto_server() if is_moto else ceph_server() as url:
            bucket = made_bucket(url)
            yield Store((bucket.log_url if kind.startswith("s3 log") else bucket.store_url)(_name()))
    else:
        require(find_spec("aioboto3") and (kind == "dynamodb on moto" or dynalite_path()), f"no {kind}")
        from tests.services.dynamodb import made_table

        if kind == "dynamodb on moto":
            with moto_server() as url:
                yield Store(made_table(url).store_url(_name()))
        else:
            with DynaliteServer(folder / "dynalite") as dynalite:
                yield Store(made_table(dynalite.url).store_url(_name()), lambda: _again(dynalite))


def _again(server: PostgresServer | RedisServer | DynaliteServer) -> None:
    server.kill()
    server.start()


def _name() -> str:
    return f"chaos-{uuid.uuid4().hex[:8]}"
