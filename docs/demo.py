"""A tracked job that is killed in the middle: counts the functions in each file of Python's standard library.

    python docs/demo.py

It starts a worker as a process of its own, kills that with SIGKILL when about 40 % is recorded, starts another one,
and then reads from the store what became of each file. The store stays there to look at.
"""

import argparse
import ast
import asyncio
import json
import shutil
import sys
import sysconfig
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn, TypedDict

from aiotracker import FileTracker, Retry, RunningTask, Status

STORE = "demo-store"
BODIES = Path("demo-bodies.jsonl")  # what the bodies themselves say; the tracker knows nothing of it
LEASE = 5.0  # seconds; short, so that what the killed worker held is soon taken over
KILL_AT = 0.4
CONCURRENCY = 64
STDLIB = Path(sysconfig.get_path("stdlib"))


class Counted(TypedDict):
    """What is kept of each file."""

    functions: int
    lines: int


def files(limit: int | None) -> list[str]:
    """The ids of the tasks: paths below the standard library's folder."""
    found = (path.relative_to(STDLIB) for path in STDLIB.rglob("*.py"))
    names = sorted(path.as_posix() for path in found if not {"site-packages", "dist-packages"} & set(path.parts))
    return names[:limit]


# -- the worker


def count(name: str, fence: int) -> Counted:
    """The body's work: plain, busy code, which belongs in a thread."""
    _note(name, fence, "begun")
    source = (STDLIB / name).read_bytes()
    tree = ast.parse(source, name)
    functions = sum(isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) for node in ast.walk(tree))
    _note(name, fence, "ended")
    return Counted(functions=functions, lines=source.count(b"\n"))


def _note(name: str, fence: int, what: str) -> None:
    # One unbuffered append a line: whole lines survive the kill.
    with BODIES.open("ab", buffering=0) as log:
        log.write(json.dumps({"id": name, "fence": fence, "body": what}).encode() + b"\n")


async def body(task: RunningTask[None, Counted]) -> None:
    """One task. Its error, if there is one, is recorded with its traceback, and stops no other task."""
    task.result = await asyncio.to_thread(count, task.id, task.fence)


async def work(limit: int | None) -> None:
    """All that a worker does. It is the same program for the first start and for every other."""
    warnings.simplefilter("ignore")  # of the sources that are read
    async with FileTracker[None, Counted](
        STORE,
        result_type=Counted,
        lease=LEASE,
        retry=Retry(max_attempts=3, never=(SyntaxError, ValueError)),  # a file that is not Python stays so
    ) as tracker:
        print("  worker:", await tracker.work(body, ids=files(limit), concurrency=CONCURRENCY))


# -- what happens to the worker


async def start_worker(limit: int | None) -> asyncio.subprocess.Process:
    """Another process, with the same program."""
    arguments = ["--worker"] if limit is None else ["--worker", "--files", str(limit)]
    return await asyncio.create_subprocess_exec(sys.executable, __file__, *arguments)


async def look() -> Counter[str]:
    """How it stands, from outside, beside whoever works."""
    async with FileTracker(STORE, read_only=True) as tracker:
        return await tracker.count()


async def run_and_kill(limit: int | None, enough: int) -> Counter[str]:
    """The first run: ended by SIGKILL, which gives nobody a chance to tidy up."""
    worker = await start_worker(limit)
    async with FileTracker(STORE, read_only=True) as tracker:
        while True:
            counts = await tracker.count()
            if counts[Status.SUCCEEDED] >= enough and counts[Status.IN_PROGRESS] >= CONCURRENCY // 2:
                break
            if worker.returncode is not None:
                give_up(f"the worker ended before {enough} files were recorded (exit status {worker.returncode})")
            await asyncio.sleep(0.02)
    worker.kill()
    await worker.wait()
    return await look()


async def run_to_the_end(limit: int | None) -> Counter[str]:
    """The second run."""
    worker = await start_worker(limit)
    if await worker.wait() != 0:
        give_up(f"the worker failed (exit status {worker.returncode})")
    return await look()


async def demo(limit: int | None) -> None:
    """Both runs, and what they left."""
    total = len(files(limit))
    async with FileTracker(STORE):
        pass  # it is made here, so that the first run can be watched from its start
    print(f"{total:,} files of {STDLIB}, {CONCURRENCY} at once, one outcome each")

    began = time.monotonic()
    print("\nRun 1")
    first = await run_and_kill(limit, int(total * KILL_AT))
    done, held = final(first), first[Status.IN_PROGRESS]
    print(f"  killed (SIGKILL) after {time.monotonic() - began:.1f} s")
    print(f"  done before: 0, done now: {done:,}, cut off: {held}, not begun: {total - first.total():,}")

    began = time.monotonic()
    print("\nRun 2: the same command again")
    second = await run_to_the_end(limit)
    print(
        f"  done before: {done:,} (skipped), done now: {final(second) - done:,}, cut off: 0, not begun: "
        f"{total - second.total():,}, seconds: {time.monotonic() - began:.1f} (of which up to {LEASE:g} s "
        "until the dead worker's leases ran out)"
    )
    await check(total)


def final(counts: Counter[str]) -> int:
    """How many have an outcome."""
    return sum(number for status, number in counts.items() if Status(status).is_final)


# -- what is to be seen in the end


def notes() -> list[dict[str, Any]]:
    """What the bodies said."""
    return [json.loads(line) for line in BODIES.read_text().splitlines()]


async def check(total: int) -> None:
    """Compares what the store says with what the bodies said."""
    bodies: Counter[str] = Counter()
    latest: dict[str, int] = {}
    for note in await asyncio.to_thread(notes):
        if note["body"] == "begun":
            bodies[note["id"]] += 1
            latest[note["id"]] = max(note["fence"], latest.get(note["id"], 0))
    async with FileTracker(STORE, read_only=True) as tracker:
        tasks = [task async for task in tracker.find(order_by="id")]
    outcomes = [[end for end in task.ends if end.outcome in ("succeeded", "exhausted")] for task in tasks]
    once = sum(len(ends) == 1 for ends in outcomes)
    newest = sum(ends[0].fence == latest[task.id] for ends, task in zip(outcomes, tasks, strict=True) if ends)
    again = [task.id for task in tasks if bodies[task.id] > 1]
    extra = bodies.total() - len(bodies)
    taken = [task for task in tasks if any(end.outcome == "lease_lost" for end in task.ends)]
    failed = [task for task in tasks if task.status is Status.EXHAUSTED]

    print("\nIn the store")
    print(f"  tasks with exactly one outcome: {once:,} of {total:,}")
    print(f"  ... recorded by the latest body that began: {newest:,} of {total:,}")
    print(f"  cut off by the kill, and taken over by run 2: {len(taken)}")
    print(f"  of these, bodies that had begun, and ran again: {len(again)}")
    print(f"  bodies begun, by their own log: {bodies.total():,} = {len(bodies):,} + {extra} again")
    print(f"  not Python, and recorded as such: {len(failed)}")
    for task in failed[:3]:
        print(f"    {task.id}: {task.errors[-1].type}: {task.errors[-1].message[:60]}")
    functions = sum(task.result["functions"] for task in tasks if task.result)
    print(f"  functions counted: {functions:,} in {sum(task.result is not None for task in tasks):,} files")
    if not (once == newest == len(tasks) == len(bodies) == total):
        give_up("this is not what was promised: please report it")
    show_how_to_look(again[0] if again else (taken or tasks)[0].id)


def show_how_to_look(example: str) -> None:
    """The commands for who wants to see for themselves."""
    command = Path(sys.executable).parent / "aiotracker"
    if command.is_relative_to(Path.cwd()):
        command = command.relative_to(Path.cwd())
    print(f"""
The store is in {STORE}/ and stays there. To look at it:
  {command} count --store file:{STORE}
  {command} ls --store file:{STORE} --status exhausted
  {command} errors --store file:{STORE}
  {command} show {example} --store file:{STORE}
or without us, since it is JSON Lines:
  grep -h '"id":"{example}"' {STORE}/log-*.jsonl | jq -c '{{status, attempts, fence, result}}'
What the bodies said is in {BODIES}; the next `make demo` starts from nothing.""")


def give_up(reason: str) -> NoReturn:
    """Ends the demo as failed."""
    sys.exit(f"demo: {reason}")


def main() -> None:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(description="A tracked job that is killed in the middle, and finished.")
    parser.add_argument("--files", type=int, help="only so many files (default: all)")
    parser.add_argument("--worker", action="store_true", help="what the demo itself starts, and kills")
    arguments = parser.parse_args()
    if arguments.worker:
        asyncio.run(work(arguments.files))
    else:
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # a file; the worker prints there too
        shutil.rmtree(STORE, ignore_errors=True)
        BODIES.unlink(missing_ok=True)
        asyncio.run(demo(arguments.files))


if __name__ == "__main__":
    main()
