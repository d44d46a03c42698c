"""`python -m aiotracker.testing`, FakeClock, and what needs no pytest."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from aiotracker import InvalidValueError, MemoryTracker, StoreUnavailableError
from aiotracker.testing import FakeClock, Faults, FaultyTracker, delayed, open_store, reply_lost, unreachable
from aiotracker.testing._proxy import CutProxy, can_be_cut
from aiotracker.testing._stores import another_store


def run(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], cwd=cwd, capture_output=True, text=True, timeout=300)


def test_check_runs_the_suite_against_a_url(tmp_path: Path) -> None:
    done = run("-m", "aiotracker.testing", "check", "file:state", "-k", "100_coroutines or survives", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout
    assert len(list((tmp_path / "state").iterdir())) == 3, "each test has a store of its own"


BROKEN = """
from aiotracker import BaseTracker, Task

stores = {}

class Broken(BaseTracker):
    def __init__(self, name, **options):
        super().__init__(**options)
        self.store = stores.setdefault(name, {})

    async def load(self, task_id):
        raw = self.store.get(task_id)
        return None if raw is None else Task.decode(raw, version="1")

    async def dump(self, task):  # without a guard
        self.store[task.id] = task.encode()
        return task.replace(version="1")
"""


def test_check_takes_a_function_and_finds_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(BROKEN)
    args = ["check", "broken:Broken", "--no-scan", "--no-delete", "--no-processes", "-k", "dump"]
    done = run("-m", "aiotracker.testing", *args, cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "test_dump_replaces_only_the_version_that_it_was_made_for" in done.stdout


@pytest.mark.parametrize("command", ["check", "torture"])
def test_an_unknown_store_is_an_error_that_says_what_there_is(tmp_path: Path, command: str) -> None:
    done = run("-m", "aiotracker.testing", command, "nowhere:nothing", cwd=tmp_path)
    assert done.returncode == 2
    assert "file:PATH" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_clock_needs_no_pytest(tmp_path: Path) -> None:
    code = "import sys; sys.modules['pytest'] = None; from aiotracker.testing import FakeClock, FaultyTracker"
    assert run("-c", code, cwd=tmp_path).returncode == 0


def test_every_public_name_is_there() -> None:
    import aiotracker.testing as module

    for name in module.__all__:
        assert getattr(module, name).__doc__, name
    with pytest.raises(AttributeError):
        module.NoSuchName  # noqa: B018 - raises


def make(name: str, **options: Any) -> MemoryTracker:
    return MemoryTracker(worker=name or "nobody", **options)


async def test_a_reference_is_a_url_or_a_function_with_a_name(tmp_path: Path) -> None:
    reference = f"{__name__}:make"
    assert open_store(reference).worker == "nobody"
    assert open_store(f"{reference}:a:b/c", lease=5).worker == "a:b/c"
    assert type(open_store(f"file:{tmp_path}/x")).__name__ == "FileTracker"
    with pytest.raises(InvalidValueError, match="no_such_module"):
        open_store("no_such_module:make")
    assert another_store(reference, "x") == f"{reference}:x"
    assert another_store(f"{reference}:a", "x") == f"{reference}:a/x"
    assert another_store("file:state?fsync=false", "x") == "file:state/x?fsync=false"
    assert another_store("redis://h/0?lease=3", "x") == "redis://h/0?lease=3&namespace=x"


async def test_a_fake_clock_wakes_sleepers_in_time_and_in_order(clock: FakeClock) -> None:
    woken: list[int] = []

    async def sleep(seconds: int) -> None:
        await clock.sleep(seconds)
        woken.append(seconds)

    sleepers = [asyncio.create_task(sleep(seconds)) for seconds in (3, 1, 2)]
    await asyncio.sleep(0)
    clock.jump(0.5)
    await asyncio.sleep(0.001)
    assert woken == []
    clock.jump(1.5)
    await asyncio.gather(*sleepers[1:])
    assert woken == [1, 2]
    sleepers[0].cancel()
    clock.jump(5)


async def test_faults_come_as_scripted_and_then_by_the_seeds_chance() -> None:
    async def ten(seed: int) -> list[tuple[str, str, str]]:
        faults = Faults(seed, unreachable=0.5)
        async with FaultyTracker(MemoryTracker(), faults) as tracker:
            for _ in range(10):
                try:
                    await tracker.load("x")
                except StoreUnavailableError:
                    pass
        return faults.requests

    assert await ten(1) == await ten(1) != await ten(2)
    faults = Faults()
    async with FaultyTracker(MemoryTracker(), faults) as tracker:
        faults.script("load", None, unreachable, reply_lost, delayed(0.001))
        await tracker.load("x")
        for _ in range(2):
            with pytest.raises(StoreUnavailableError):
                await tracker.load("x")
        await tracker.load("x")
    assert [name for _, _, name in faults.requests] == ["well", "unreachable", "reply_lost", "behave"]


def test_torture_says_what_was_done_and_what_it_came_to(tmp_path: Path) -> None:
    args = ["--workers", "2", "--tasks", "10", "--seconds", "1", "--lease", "0.5", "--seed", "5", "--json"]
    done = run("-m", "aiotracker.testing", "torture", "file:state", *args, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every promise was kept" in done.stdout
    report = json.loads(done.stdout.splitlines()[-1])
    assert (report["tasks"], report["seed"], report["violations"]) == (10, 5, [])
    assert report["statuses"] == {"succeeded": 9, "exhausted": 1}
    assert report["versions"]["python"] == sys.version.split()[0]


async def test_a_cut_network_passes_nothing_on_and_heals() -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(100):
            writer.write(data)
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, CutProxy(f"redis://somebody:secret@127.0.0.1:{port}/3") as proxy:
        moved = urlsplit(proxy.reference)
        assert (moved.username, moved.password, moved.path) == ("somebody", "secret", "/3")

        async def ask() -> bytes:
            reader, writer = await asyncio.open_connection("127.0.0.1", moved.port)
            try:
                writer.write(b"hello")
                return await reader.read(5)
            except OSError:
                return b""
            finally:
                writer.transport.abort()

        assert await ask() == b"hello"
        cut = asyncio.create_task(proxy.reset(0.2))
        await asyncio.sleep(0)
        assert await ask() == b""
        await cut
        assert await ask() == b"hello"
        cut = asyncio.create_task(proxy.swallow(0.2))
        await asyncio.sleep(0)
        asking = asyncio.create_task(ask())
        await cut
        await asking
        assert await ask() == b"hello"


def test_only_what_is_reached_over_plain_tcp_can_be_cut() -> None:
    assert can_be_cut("redis://h/0")
    assert can_be_cut("s3://bucket/x?endpoint_url=http://127.0.0.1:9000")
    for reference in ("file:state", "rediss://h/0", "s3://bucket/x", "s3://b?endpoint_url=https://h", "module:make"):
        assert not can_be_cut(reference)
