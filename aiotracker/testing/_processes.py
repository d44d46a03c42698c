"""Worker processes for the suite. Run as a program, this is one of them."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from typing import Any

from .._core.retry import Retry
from ..errors import TaskUnavailableError
from ..tracker import BaseTracker
from ._spawn import command
from ._stores import open_store

__all__ = ["Child", "race"]

READY_TIME = 60.0  # seconds


class Child:
    """A worker process that does what its role says once it is told to go."""

    def __init__(self, role: str, store_url: str, *args: str) -> None:
        self.process = subprocess.Popen(
            command(__name__, role, store_url, *args),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def read(self) -> dict[str, Any]:
        """The next line that it says."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise AssertionError(f"a worker process has ended: {self.process.communicate()[1]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def go(self) -> None:
        """Lets it begin."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.communicate()

    def end(self) -> None:
        """Waits for its end."""
        _, errors = self.process.communicate(timeout=READY_TIME)
        assert self.process.returncode == 0, errors


async def race(store_url: str, *, processes: int, keys: int) -> list[dict[str, Any]]:
    """Several processes run all keys at once, each in another order; what each of them got."""

    def run() -> list[dict[str, Any]]:
        children = [Child("race", store_url, str(keys), str(number)) for number in range(processes)]
        try:
            for child in children:
                child.read()
            for child in children:
                child.go()
            answers = [child.read() for child in children]
            for child in children:
                child.end()
            return answers
        finally:
            for child in children:
                if child.process.poll() is None:
                    child.kill()

    return await asyncio.to_thread(run)


def _say(**fields: Any) -> None:
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


async def _go() -> None:
    await asyncio.to_thread(sys.stdin.readline)


async def _race(tracker: BaseTracker[Any, Any], keys: str, number: str) -> None:
    outcomes: dict[str, str] = {}

    async def one(index: int) -> None:
        try:
            async with tracker.run(f"key-{index}") as task:
                task.result = os.getpid()
                await asyncio.sleep(0)
            outcomes[f"key-{index}"] = "succeeded"
        except TaskUnavailableError as exc:
            outcomes[f"key-{index}"] = type(exc).__name__

    _say(ready=True)
    await _go()
    count = int(keys)
    await asyncio.gather(*(one((index * 37 + 50 * int(number)) % count) for index in range(count)))
    _say(pid=os.getpid(), outcomes=outcomes)


async def _hold(tracker: BaseTracker[Any, Any], lease: str) -> None:
    """Adds, records, claims; says so, and waits to be killed."""
    await tracker.add("added", {"by": "it"})
    async with tracker.run("done") as task:
        task.result = "acknowledged"
    async with tracker.run("held", lease=float(lease)) as task:
        task.data = {"page": 7}
        await task.save()
        _say(fence=task.fence)
        await _go()


async def _leave(store_url: str, count: str, seconds: str) -> BaseTracker[Any, Any]:
    """Holds tasks, or is about to, when the event loop ends without the tracker having been closed."""
    tracker = await open_store(store_url).open()

    async def hold(task_id: str) -> None:
        async with tracker.run(task_id):
            await asyncio.Event().wait()

    holding = [asyncio.create_task(hold(f"job-{index}")) for index in range(int(count))]
    await asyncio.sleep(float(seconds))
    assert not any(task.done() for task in holding)
    return tracker


async def _main(role: str, store_url: str, *args: str) -> None:
    async with open_store(store_url, retry=Retry(2)) as tracker:
        roles: dict[str, Callable[..., Awaitable[None]]] = {"race": _race, "hold": _hold}
        await roles[role](tracker, *args)


if __name__ == "__main__":
    if sys.argv[1] == "leave":
        left = asyncio.run(_leave(*sys.argv[2:]))
        _say(left=left.worker)
        sys.stdin.readline()  # its threads go on meanwhile
    else:
        asyncio.run(_main(*sys.argv[1:]))
