import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
import uvicorn

from aiotracker import InvalidValueError, Status, open_tracker
from tests.conftest import require
from tests.services.postgres import has_postgres, postgres_server
from tests.services.redis import is_installed, redis_server


@pytest.fixture(scope="module")
def redis_url() -> Iterator[str]:
    require(is_installed(), "redis-server and redis-cli")
    with redis_server() as server:
        open_tracker(server.url)  # imports its driver, which reads files, before an event loop runs
        yield server.url


@pytest.fixture(scope="module")
def postgres_url() -> Iterator[str]:
    require(has_postgres() and find_spec("asyncpg"), "no PostgreSQL")
    with postgres_server() as server:
        asyncio.run(open_tracker(server.dsn).init())
        yield server.dsn


@pytest.fixture(params=["sqlite", "redis", "postgres"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:{tmp_path / 'jobs.db'}"
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@asynccontextmanager
async def served(app: Any) -> AsyncIterator[httpx.AsyncClient]:
    """The app on a real server, and a client of it."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical"))
    serving = asyncio.create_task(server.serve())
    try:
        while not server.started:
            assert not serving.done()
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        # Its own: a proxy of the machine's settings would not find this server.
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=60) as client:
            yield client
    finally:
        server.should_exit = True
        await serving


@pytest.fixture
def program(load_program: Callable[[str], ModuleType]) -> ModuleType:
    return load_program("idempotent_api")


@pytest.fixture
def charged(program: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The orders that were charged; `do_charge` is wrapped, so that it counts."""
    orders: list[str] = []
    do_charge = program.do_charge

    async def counted(order: str, amount: int) -> Any:
        orders.append(order)
        if order.startswith("bad"):
            raise ConnectionError("the bank does not answer")
        return await do_charge(order, amount)

    counted.__annotations__["return"] = program.Receipt
    monkeypatch.setattr(program, "do_charge", counted)
    return orders


async def test_an_order_is_charged_once_however_often_the_button_is_pressed_on_two_servers(
    program: ModuleType, charged: list[str], store: str
) -> None:
    order = secrets.token_hex(4)
    async with served(program.create_app(store)) as one, served(program.create_app(store)) as two:
        path = f"/orders/{order}/charge?amount=1700"
        answers = await asyncio.gather(*((one, two)[n % 2].post(path) for n in range(20)))
        assert {answer.status_code for answer in answers} <= {200, 409}
        for answer in answers:
            if answer.status_code == 409:
                assert int(answer.headers["Retry-After"]) > 0
        again = await two.post(path)
        assert (again.status_code, again.json()) == (200, {"number": f"R-{order}", "amount": 1700})
        assert charged == [order]
        async with open_tracker(store, namespace="mail", read_only=True) as mail:
            sent = await mail.wait(f"receipt/R-{order}", timeout=60)
        assert (sent.status, sent.result) == (Status.SUCCEEDED, f"mailed {order}")
    async with open_tracker(store, namespace="charges", read_only=True) as charges:
        assert [task.id async for task in charges.find(prefix=order)] == [order], "the mail is not among the charges"


async def test_an_order_that_cannot_be_charged_is_gone_after_the_last_attempt(
    program: ModuleType, charged: list[str], tmp_path: Path
) -> None:
    async with served(program.create_app(f"sqlite:{tmp_path / 'jobs.db'}")) as client:
        answers = [(await client.post("/orders/bad/charge?amount=1")).status_code for _ in range(5)]
    assert answers == [500, 500, 500, 410, 410]
    assert charged == ["bad"] * 3


async def test_closing_the_server_drains_the_mail(program: ModuleType, charged: list[str], tmp_path: Path) -> None:
    store = f"sqlite:{tmp_path / 'jobs.db'}"
    async with served(program.create_app(store)) as client:
        for number in range(10):
            assert (await client.post(f"/orders/{number}/charge?amount=1")).status_code == 200
    async with open_tracker(store, namespace="mail", read_only=True) as mail:
        counts = await mail.count()
    assert counts[Status.IN_PROGRESS] == counts[Status.FAILED] == 0
    assert counts.total() == 10


@pytest.mark.parametrize("url", ["memory:", "file:state", "folder:state", "s3://bucket/jobs"])
def test_a_store_without_namespaces_says_what_to_do_instead(url: str) -> None:
    with pytest.raises(InvalidValueError, match="has no namespaces: give each of them a store of its own"):
        open_tracker(url, namespace="charges")
