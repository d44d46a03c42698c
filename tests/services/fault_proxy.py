"""A proxy in front of an S3 service, which does to requests what networks and services do to them now and then.

    async with FaultProxy(service.url, Plan(seed=1, lost=0.05, slow_down=0.05)) as proxy:
        S3Tracker("bucket", endpoint_url=proxy.url)

Signatures stay valid, since the Host header is passed on as it was sent.
"""

import asyncio
import random
from collections import Counter, deque
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime, parsedate_to_datetime
from types import TracebackType
from typing import Final, NamedTuple, Self

import aiohttp
from aiohttp import web
from yarl import URL

__all__ = ["FATES", "FaultProxy", "Plan", "Request"]

FATES: Final = (
    "lost",  # done, and the connection ends without an answer
    "late",  # the connection ends without an answer, and the request is done some time afterwards
    "twice",  # done, and sent again by something in between, which passes on the second answer
    "reset",  # the connection ends before anything was done
    "delayed",  # done after a while
    "conflict",  # 409: not done, as another write is under way
    "slow_down",  # 503: not done
    "failed",  # 500: not done
    "failed_after",  # 500: done
    "error_in_200",  # not done
    "error_in_200_after",  # done
)
_HOP: Final = frozenset({"connection", "keep-alive", "transfer-encoding", "content-length", "date", "server"})


class Request(NamedTuple):
    """One request as it arrived."""

    method: str
    key: str  # bucket and key, and the query behind it
    headers: dict[str, str]  # in lower case


class Plan:
    """What happens to requests: first what `script` says, then by chance.

    Args:
        seed: The same seed gives the same fates to the same order of requests.
        delay: Up to how many seconds a delayed or late request is late.
        **shares: Of the requests that meet each of `FATES`, from 0 to 1.
    """

    def __init__(self, seed: int = 0, *, delay: float = 0.05, **shares: float) -> None:
        assert shares.keys() <= set(FATES), shares
        self._random = random.Random(seed)
        self._shares = shares
        self._delay = delay
        self._scripts: deque[tuple[Callable[[Request], bool], deque[str]]] = deque()

    def script(self, *fates: str, where: Callable[[Request], bool] = lambda request: True) -> None:
        """What happens to the next requests of a kind: `well`, or one of `FATES`."""
        self._scripts.append((where, deque(fates)))

    def fate(self, request: Request) -> str:
        for where, fates in self._scripts:
            if fates and where(request):
                return fates.popleft()
        chance = self._random.random()
        for name, share in self._shares.items():
            if (chance := chance - share) < 0:
                # Only a write under a condition can meet another one.
                return "well" if name == "conflict" and not _is_conditional(request) else name
        return "well"

    def seconds(self) -> float:
        return self._random.uniform(0, self._delay)


class FaultProxy:
    """The proxy, on the event loop of whoever enters it.

    Args:
        target: The URL of the service.
        plan: What goes wrong.

    Attributes:
        url: Its own.
        requests: What arrived.
        fates: How many met each.
        date_shift: Seconds by which the service's clock is off, for those who look at its answers.
        hides: Methods and headers (in lower case) that are not passed on: a service that takes no notice of them.
        age: Answers seem to come from a cache.
        refuses: Says with which status and code a request is answered instead of being passed on; `None`: it is.
    """

    def __init__(self, target: str, plan: Plan | None = None) -> None:
        self._target = target.rstrip("/")
        self.plan = plan or Plan()
        self.url = ""
        self.requests: list[Request] = []
        self.fates: Counter[str] = Counter()
        self.date_shift = 0.0
        self.hides: set[tuple[str, str]] = set()
        self.age: int | None = None
        self.refuses: Callable[[Request], tuple[int, str] | None] = lambda request: None
        self._late: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), skip_auto_headers=("User-Agent", "Accept", "Content-Type")
        )
        server = web.Server(self._handle, access_log=None)
        self._runner = web.ServerRunner(server, shutdown_timeout=1.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.settle()
        await self._runner.cleanup()
        await self._http.close()

    async def settle(self) -> None:
        """Waits until all late requests are done."""
        while self._late:
            await asyncio.wait(self._late)

    async def _handle(self, incoming: web.BaseRequest) -> web.StreamResponse:
        request = Request(
            incoming.method,
            incoming.raw_path.removeprefix("/"),
            {name.lower(): value for name, value in incoming.headers.items()},
        )
        if "Expect" in incoming.headers:
            await incoming.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await incoming.read()
        self.requests.append(request)
        if (refusal := self.refuses(request)) is not None:
            return self._error(*refusal)
        fate = self.plan.fate(request)
        self.fates[fate] += 1
        if fate == "delayed":
            await asyncio.sleep(self.plan.seconds())
        if fate == "late":
            late = asyncio.create_task(self._pass_on_late(incoming, body, self.plan.seconds()))
            self._late.add(late)
            late.add_done_callback(self._late.discard)
        if fate in ("reset", "late"):
            return _cut(incoming)
        if fate == "conflict":
            return self._error(409, "ConditionalRequestConflict")
        if fate == "slow_down":
            return self._error(503, "SlowDown")
        if fate == "failed":
            return self._error(500, "InternalError")
        if fate == "error_in_200":
            return self._error(200, "InternalError")
        if fate == "twice":
            await self._pass_on(incoming, body)
        status, headers, answer = await self._pass_on(incoming, body)
        if fate == "lost":
            return _cut(incoming)
        if fate == "failed_after":
            return self._error(500, "InternalError")
        if fate == "error_in_200_after":
            return self._error(200, "InternalError")
        return web.Response(status=status, headers=headers, body=answer)

    async def _pass_on_late(self, incoming: web.BaseRequest, body: bytes, seconds: float) -> None:
        await asyncio.sleep(seconds)
        await self._pass_on(incoming, body)

    async def _pass_on(self, incoming: web.BaseRequest, body: bytes) -> tuple[int, dict[str, str], bytes]:
        headers = {
            name: value
            for name, value in incoming.headers.items()
            if name.lower() not in ("connection", "transfer-encoding", "expect")
            and (incoming.method, name.lower()) not in self.hides
        }
        url = URL(self._target + incoming.raw_path, encoded=True)
        async with self._http.request(incoming.method, url, data=body, headers=headers) as answer:
            content = await answer.read()
            kept = {name: value for name, value in answer.headers.items() if name.lower() not in _HOP}
            return answer.status, kept | self._dated(answer.headers.get("Date")), content

    def _dated(self, date: str | None = None) -> dict[str, str]:
        now = parsedate_to_datetime(date) if date else datetime.now(UTC)
        dated = {"Date": format_datetime(now + timedelta(seconds=self.date_shift), usegmt=True)}
        return dated if self.age is None else dated | {"Age": str(self.age)}

    def _error(self, status: int, code: str) -> web.Response:
        text = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>injected</Message></Error>'
        return web.Response(status=status, headers=self._dated(), body=text.encode(), content_type="application/xml")


def _is_conditional(request: Request) -> bool:
    return request.method == "PUT" and bool({"if-match", "if-none-match"} & request.headers.keys())


def _cut(incoming: web.BaseRequest) -> web.StreamResponse:
    if incoming.transport is not None:
        incoming.transport.abort()
    return web.Response(status=500)
