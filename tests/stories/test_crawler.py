import asyncio
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from aiohttp import web

from aiotracker import FileTracker, Status


class Site:
    """Pages that link to each other, and a server that is moody."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self.url = ""
        self.answers: Counter[tuple[str, int]] = Counter()
        self.served = asyncio.Event()  # five pages were
        self.gate = asyncio.Event()  # open: later pages are served at once
        self.gate.set()

    async def page(self, request: web.Request) -> web.Response:
        number = int(request.match_info["number"])
        response = self._answer(number)
        self.answers[request.path, response.status] += 1
        if sum(self.answers.values()) >= 5:
            self.served.set()
            await self.gate.wait()
        return response

    def _answer(self, number: int) -> web.Response:
        path = f"/{number}"
        if number == self.pages:
            return web.Response(status=404)
        if number == 7 and self.answers[path, 429] < 2:
            return web.Response(status=429, headers={"Retry-After": "0.05"})
        if number == 8 and not self.answers[path, 500]:
            return web.Response(status=500)
        links = [link for link in (2 * number + 1, 2 * number + 2) if link < self.pages]
        text = "".join(f'<a href="/{link}">x</a>' for link in links) + f'<a href="/{number}#top">up</a>'
        return web.Response(text=text, content_type="text/html")


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    site = Site(pages=30)
    app = web.Application()
    app.router.add_get("/{number:\\d+}", site.page)
    runner = web.AppRunner(app)
    await runner.setup()
    server = web.TCPSite(runner, "127.0.0.1", 0)
    await server.start()
    site.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield site
    site.gate.set()
    await runner.cleanup()


@pytest.fixture
def crawl(
    program: Callable[[str], Path], tmp_path: Path
) -> Callable[..., "asyncio.Future[asyncio.subprocess.Process]"]:
    def start(*seeds: str) -> "asyncio.Future[asyncio.subprocess.Process]":
        return asyncio.ensure_future(
            asyncio.create_subprocess_exec(
                sys.executable,
                str(program("crawler")),
                str(tmp_path / "store"),
                *seeds,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
        )

    return start


async def test_every_page_is_fetched_once_and_the_servers_wishes_are_obeyed(
    site: Site, crawl: Callable[..., "asyncio.Future[asyncio.subprocess.Process]"], tmp_path: Path
) -> None:
    process = await crawl(f"{site.url}/0", f"{site.url}/30")
    out, err = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 1, "one page is not there"
    assert b"30 succeeded, 1 exhausted" in out
    assert f"{site.url}/30 not found".encode() in err
    expected = Counter({(f"/{number}", 200): 1 for number in range(30)})
    expected += Counter({("/30", 404): 1, ("/7", 429): 2, ("/8", 500): 1})
    assert site.answers == expected
    async with FileTracker(tmp_path / "store", read_only=True) as tracker:
        polite = await tracker.load(f"{site.url}/7")
        assert polite is not None
        assert (polite.status, polite.attempts, polite.errors) == (Status.SUCCEEDED, 1, ())
        moody = await tracker.load(f"{site.url}/8")
        assert moody is not None
        assert (moody.status, moody.attempts) == (Status.SUCCEEDED, 2)


async def test_after_ctrl_c_it_goes_on_where_it_was(
    site: Site, crawl: Callable[..., "asyncio.Future[asyncio.subprocess.Process]"]
) -> None:
    site.gate.clear()
    process = await crawl(f"{site.url}/0")
    await asyncio.wait_for(site.served.wait(), 30)
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    assert b"SIGINT: finishing what is under way" in await asyncio.wait_for(process.stderr.readline(), 30)
    site.gate.set()
    out, _ = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 1
    assert b", stopped" in out
    first = site.answers.copy()
    assert 5 <= first.total() < 30

    process = await crawl(f"{site.url}/0")
    out, err = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, err
    assert {path for path, status in site.answers if status == 200} == {f"/{number}" for number in range(30)}
    assert max(count for (_, status), count in site.answers.items() if status == 200) == 1
