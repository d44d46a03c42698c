"""What operators ask of a million tasks: `python -m benchmarks query`."""

import asyncio
import gc
import hashlib
import itertools
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import msgspec

from aiotracker import BaseTracker, End, Failure, Status, Step, Task, analytics, open_tracker
from tests.services.postgres import has_postgres, postgres_server

from .machine import fresh
from .memory import peak, peak_from_now, resident
from .numbers import milliseconds, percentile, significant
from .process import Gate, run
from .report import Figure, figure, say

__all__ = ["STORES", "ask", "export", "fill", "measure"]

STORES: Final = ("file", "sqlite", "postgres")
PAGE: Final = 100
CALLS: Final = 5
KINDS: Final = 20  # types of errors
WINDOW: Final = 2_000  # writes under way at once
FIRST_ID: Final = "page/{:08}"
LIMITS: Final = {  # milliseconds
    "file": {"find": 50, "count": 50, "count_by_error_type": 1000},
    "sqlite": {"find": 50, "count": 500, "count_by_error_type": 1000},
    "postgres": {"find": 50, "count": 500, "count_by_error_type": 1000},
}
QUERIES: Final = {
    "find": "find(status='failed', limit=100)",
    "count": "count()",
    "count_by_error_type": "count(by='error_type')",
}


def measure(folder: Path, *, tasks: int, stores: Iterable[str]) -> dict[str, Any]:
    """Fills stores, then asks each in a process of its own, and exports it in another.

    Args:
        folder: On a real disk; the stores are made in it, and removed at the end.
        tasks: How many.
        stores: Which kinds.

    Returns:
        All in one object, with `figures`.
    """
    results: dict[str, Any] = {}
    figures: list[Figure] = []
    for kind in stores:
        with fresh(folder) as made, ExitStack() as stack:
            url = _url(kind, made, stack)
            say(f"{kind}: adding {tasks:,} tasks")
            filled = run("benchmarks.query:fill", url=url, tasks=tasks)
            say(f"{kind}: asking")
            asked = run("benchmarks.query:ask", url=url)
            say(f"{kind}: exporting")
            exported = run("benchmarks.query:export", url=url, path=str(made / "tasks.parquet"))
        results[kind] = {"fill": filled, "ask": asked, "export": exported}
        figures += _figures(kind, asked, exported, tasks)
    return {"contender": "aiotracker", "tasks": tasks, "stores": results, "figures": figures}


def _figures(kind: str, asked: dict[str, Any], exported: dict[str, Any], tasks: int) -> list[Figure]:
    found = [
        figure(f"{kind}: {QUERIES[name]}", asked[f"{name}_ms"], "at most", limit, "ms")
        for name, limit in LIMITS[kind].items()
    ]
    return [
        *found,
        figure(f"{kind}: export of {tasks:,} to parquet", exported["seconds"], "at most", 60, "s"),
        figure(f"{kind}: memory for it, above the open store", exported["megabytes_more"], "at most", 300, "MB"),
    ]


def _url(kind: str, folder: Path, stack: ExitStack) -> str:
    if kind != "postgres":
        return f"{kind}:{folder / 'store'}"
    if not has_postgres():
        raise ValueError("no PostgreSQL on this machine; tests/services/install_postgres.sh installs it")
    # Beside ours, which is closed to others: a server that root starts runs as somebody else.
    server = stack.enter_context(postgres_server(folder=str(folder.parent)))
    asyncio.run(open_tracker(server.dsn).init())
    return server.dsn


def records(tasks: int) -> Iterator[Task]:
    """A realistic mix: of ten tasks one has failed, one is exhausted, six have succeeded, two are pending."""
    begin = datetime.now(UTC) - timedelta(days=1)
    for number in range(tasks):
        kind = number % 10
        made = begin + timedelta(milliseconds=number % 80_000_000)
        task_id = FIRST_ID.format(number)
        task = Task(
            id=task_id,
            status=Status.PENDING,
            data={"url": f"https://example.org/{number}", "country": ("DE", "FR", "IT")[number % 3], "depth": kind},
            create_time=made,
            update_time=made,
            create_id=f"c{number:x}",
        )
        yield task if kind >= 8 else _ran(task, number, kind)


def _ran(task: Task, number: int, kind: int) -> Task:
    started = task.create_time + timedelta(seconds=60)
    ended = started + timedelta(milliseconds=100 + number * 7919 % 3000)
    steps = (
        Step("fetch", Status.SUCCEEDED, 1, started, ended, result=f"/data/{number}.html"),
        Step("parse", Status.FAILED if kind < 2 else Status.SUCCEEDED, 1, started, ended),
    )
    fence = 1_700_000_000_000_000 + number
    outcome = ("failed", "exhausted", "succeeded")[min(kind, 2)]
    ran = task.replace(
        status=Status(outcome),
        attempts=1 + kind % 2,
        fence=fence,
        steps=steps,
        start_time=started,
        finish_time=ended,
        update_time=ended,
        ends=(End(fence, f"t{number:x}", outcome),),
    )
    if kind >= 2:
        return ran.replace(result={"bytes": number % 100_000, "links": number % 40})
    name = f"Problem{number // 10 % KINDS}Error"
    failure = Failure(
        attempt=1,
        time=ended,
        worker=f"host-{number % 8}:4711:ab",
        type=name,
        message=f"row {number} of {task.id!r} has no number",
        traceback=_TRACEBACK.format(name=name, number=number, task_id=task.id),
        fingerprint=hashlib.sha256(name.encode()).hexdigest()[:12],  # of each type one cause
    )
    return ran.replace(errors=(failure,), last_outcome="error", not_before=ended + timedelta(seconds=2), backoff=True)


_TRACEBACK: Final = """Traceback (most recent call last):
  File "/srv/jobs/pipeline.py", line 41, in nightly
    rows = await task.step("parse", asyncio.to_thread, parse, path)
           ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
  File "/srv/jobs/pipeline.py", line 17, in parse
    return [{{"value": int(row["value"])}} for row in json.loads(Path(path).read_text())]
                       ^^^^^^^^^^^^^^^^^
jobs.{name}: row {number} of '{task_id}' has no number
"""


async def fill(gate: Gate, url: str, tasks: int) -> dict[str, Any]:
    """Writes all records, as `copy` does: as they would be after days of work, without that work."""
    async with open_tracker(url) as tracker:
        gate.ready()
        begin = time.monotonic()
        left = records(tasks)
        while window := list(itertools.islice(left, WINDOW)):
            await asyncio.gather(*(tracker.update(task.id, _Put(task), known=None) for task in window))
        seconds = time.monotonic() - begin
        if url.startswith("postgres"):
            await _analyze(url)
        counts = await tracker.count()
    return {"per_second": significant(tasks / seconds), "seconds": significant(seconds), "by_status": counts}


class _Put:
    """The transition that makes a record."""

    def __init__(self, task: Task) -> None:
        self._task = task

    def __call__(self, current: Task | None, now: datetime) -> Task | None:
        return msgspec.structs.replace(self._task)


async def _analyze(url: str) -> None:
    """What the server does by itself a minute later."""
    import asyncpg  # type: ignore[import-untyped]  # ships no types

    connection = await asyncpg.connect(url)
    await connection.execute("VACUUM ANALYZE")
    await connection.close()


async def ask(gate: Gate, url: str) -> dict[str, Any]:
    """Opens a store in a fresh process, and asks it: the first answers are what a person's command would wait for."""
    gate.ready()
    begin = time.monotonic()
    async with open_tracker(url, read_only=True) as tracker:
        opened = time.monotonic() - begin
        answers: dict[str, Any] = {"open_seconds": significant(opened)}
        for name, query in {"find": _find, "count": _count, "count_by_error_type": _by_type}.items():
            times: list[float] = []
            for _ in range(CALLS):
                gc.collect()
                start = time.perf_counter()
                found = await query(tracker)
                times.append(time.perf_counter() - start)
            answers |= {
                f"{name}_ms": milliseconds(times[0]),
                f"{name}_again_ms": milliseconds(percentile(times[1:], 50)),
                f"{name}_found": found,
            }
        begin, used = time.monotonic(), time.process_time()
        await analytics.summary(tracker)
        answers["summary_seconds"] = significant(time.monotonic() - begin)
        answers["summary_cpu_seconds"] = significant(time.process_time() - used)
    return answers


async def _find(tracker: BaseTracker[Any, Any]) -> int:
    return len([task async for task in tracker.find(status="failed", limit=PAGE)])


async def _count(tracker: BaseTracker[Any, Any]) -> int:
    return (await tracker.count()).total()


async def _by_type(tracker: BaseTracker[Any, Any]) -> int:
    """How many types of errors there are."""
    return len((await tracker.count(by="error_type")).keys() - {""})


async def export(gate: Gate, url: str, path: str) -> dict[str, Any]:
    """Writes all tasks to a file, in a process that has done nothing else."""
    await asyncio.to_thread(_import)  # a library of a few dozen megabytes is no memory that grows with the store
    async with open_tracker(url, read_only=True) as tracker:
        gate.ready()
        gc.collect()
        before = resident()
        peak_from_now()
        begin, used = time.monotonic(), time.process_time()
        tasks = await analytics.export(tracker, path)
        seconds, used = time.monotonic() - begin, time.process_time() - used
        more = max(0, peak() - before)
    return {
        "tasks": tasks,
        "seconds": significant(seconds),
        "cpu_seconds": significant(used),
        "megabytes_more": significant(more / 1e6),
        "file_megabytes": significant(await asyncio.to_thread(os.path.getsize, path) / 1e6),
    }


def _import() -> None:
    import pyarrow.parquet  # noqa: F401 - only imported
