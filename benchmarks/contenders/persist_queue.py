"""persist-queue: a queue with acknowledgements on SQLite."""

import time
from typing import Any

from persistqueue import SQLiteAckQueue

from ..process import Gate
from . import Lifecycles

__all__ = ["BIAS", "run"]

BIAS = (
    "SQLiteAckQueue: put, get, ack, one after another in one thread. No lease: what was got and not acknowledged "
    "is given out again when the queue is opened again."
)
SYNCS = {0: "never", 1: "at checkpoints of its write-ahead log", 2: "at each commit", 3: "at each commit"}


def run(gate: Gate, folder: str, tasks: int, concurrency: int) -> Lifecycles:
    queue = SQLiteAckQueue(folder)
    latencies: list[float] = []
    connection: Any = queue._putter
    (synchronous,) = connection.execute("pragma synchronous").fetchone()
    (journal,) = connection.execute("pragma journal_mode").fetchone()
    gate.ready()
    start = time.monotonic()
    for number in range(tasks):
        begin = time.perf_counter()
        queue.put(f"task-{number}")
        queue.ack(queue.get(block=False))
        latencies.append(time.perf_counter() - begin)
    end = time.monotonic()
    if queue.acked_count() != tasks:
        raise RuntimeError("persist-queue did not acknowledge all items")
    queue.close()
    bias = f"{BIAS} As it opens SQLite here ({journal}), it syncs {SYNCS[synchronous]}."
    return {"start": start, "end": end, "latencies": latencies, "bias": bias}
