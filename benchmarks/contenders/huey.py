"""huey: a task queue, here on SQLite."""

import time
from pathlib import Path

from huey import SqliteHuey  # type: ignore[import-untyped]  # ships no types

from ..process import Gate
from . import Lifecycles

__all__ = ["BIAS", "run"]

BIAS = (
    "SqliteHuey: enqueue, dequeue, execute a task that returns None, one after another in one thread, as its worker "
    "does. A dequeued task is deleted: no lease, no record of the outcome, lost if the worker dies."
)
SYNCS = {0: "never", 1: "at checkpoints of its write-ahead log", 2: "at each commit", 3: "at each commit"}


def run(gate: Gate, folder: str, tasks: int, concurrency: int) -> Lifecycles:
    huey = SqliteHuey(filename=str(Path(folder, "huey.db")))

    @huey.task()  # type: ignore[untyped-decorator]  # huey is untyped
    def nothing(number: int) -> None:
        pass

    latencies: list[float] = []
    (synchronous,) = huey.storage.conn.execute("pragma synchronous").fetchone()
    (journal,) = huey.storage.conn.execute("pragma journal_mode").fetchone()
    gate.ready()
    start = time.monotonic()
    for number in range(tasks):
        begin = time.perf_counter()
        nothing(number)
        huey.execute(huey.dequeue())
        latencies.append(time.perf_counter() - begin)
    end = time.monotonic()
    if len(huey):
        raise RuntimeError("huey did not run all tasks")
    bias = f"{BIAS} As it opens SQLite here ({journal}), it syncs {SYNCS[synchronous]}."
    return {"start": start, "end": end, "latencies": latencies, "bias": bias}
