"""abstract-tracker: one JSON file a task, rewritten at each change."""

import time
from pathlib import Path

from abstract_tracker.api import FileTracker  # type: ignore[import-untyped]  # ships no types

from ..process import Gate
from . import Lifecycles

__all__ = ["BIAS", "run"]

BIAS = (
    "FileTracker.new(id), then `with tracker.start()`: three writes of one file, one task after another in one thread, "
    "as it has no async interface. Never syncs, and does not write atomically: a crash may leave a torn file. "
    "Its lock is no lock among processes. Its log is silent, as it is by default."
)


def run(gate: Gate, folder: str, tasks: int, concurrency: int) -> Lifecycles:
    class Tracker(FileTracker):  # type: ignore[misc]  # its base is untyped
        @classmethod
        def get_path(cls, id: str) -> Path:
            return Path(folder, f"{id}.json")

    latencies: list[float] = []
    gate.ready()
    start = time.monotonic()
    for number in range(tasks):
        begin = time.perf_counter()
        with Tracker.new(f"task-{number}").start():
            pass
        latencies.append(time.perf_counter() - begin)
    return {"start": start, "end": time.monotonic(), "latencies": latencies, "bias": BIAS}
