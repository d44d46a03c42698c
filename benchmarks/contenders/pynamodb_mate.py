"""pynamodb_mate: its status tracker, which keeps tasks in a DynamoDB table."""

import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from pynamodb_mate.patterns.status_tracker.impl import (  # type: ignore[import-untyped]  # ships no types
    BaseTask,
    StatusAndUpdateTimeIndex,
    TrackerConfig,
)

from ..process import Gate
from . import Lifecycles

__all__ = ["BIAS", "THREADS", "run"]

THREADS = 32
BIAS = (
    f"make_and_save, then Task.start, in {THREADS} threads, as it blocks: an unconditional PutItem, which would reset "
    "a task that is there, and two UpdateItem, the last of them on the condition of the lock; no fence, no renewal."
)


def run(gate: Gate, url: str, table: str, prefix: str, tasks: int, concurrency: int) -> Lifecycles:
    class Index(StatusAndUpdateTimeIndex):  # type: ignore[misc]  # ships no types
        pass

    class Task(BaseTask):  # type: ignore[misc]  # ships no types
        class Meta:
            table_name = table
            region = "us-east-1"
            host = url
            billing_mode = "PAY_PER_REQUEST"
            max_pool_connections = THREADS

        status_and_update_time_index = Index()
        config = TrackerConfig.make(
            use_case_id=prefix,
            pending_status=100,
            in_progress_status=300,
            failed_status=500,
            succeeded_status=600,
            ignored_status=700,
            n_pending_shard=8,
            n_in_progress_shard=8,
            n_failed_shard=8,
            n_succeeded_shard=8,
            n_ignored_shard=8,
        )

    Task.create_table(wait=True)
    latencies: list[float] = []
    numbers = itertools.count()
    lock = threading.Lock()

    def one_after_another() -> None:
        while True:
            with lock:
                number = next(numbers)
            if number >= tasks:
                return
            begin = time.perf_counter()
            Task.make_and_save(task_id=f"task-{number}")
            with Task.start(task_id=f"task-{number}"):
                pass
            latencies.append(time.perf_counter() - begin)

    gate.ready()
    start = time.monotonic()
    with ThreadPoolExecutor(THREADS) as threads:
        for done in [threads.submit(one_after_another) for _ in range(THREADS)]:
            done.result()
    end = time.monotonic()
    for number in (0, tasks - 1):
        if not Task.get_one_or_none(task_id=f"task-{number}").is_succeeded():
            raise RuntimeError("not all tasks have succeeded")
    return {"start": start, "end": end, "latencies": latencies, "bias": BIAS}
