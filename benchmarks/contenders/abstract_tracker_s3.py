"""abstract-tracker on S3: one JSON object a task, written without a condition."""

import os
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import boto3  # type: ignore[import-untyped]  # ships no types
from abstract_tracker.api import S3Tracker  # type: ignore[import-untyped]  # ships no types
from botocore.config import Config  # type: ignore[import-untyped]  # ships no types

from ..process import Gate
from .ours_s3 import SeenOnS3

__all__ = ["BIAS", "run"]

THREADS = 32
BIAS = (
    f"S3Tracker.new(id), then `with tracker.start()`, in {THREADS} threads with one client, which its users must make: "
    "it is synchronous. Three PUTs without a condition, so its lock is no lock: two workers may both hold a task."
)


def run(gate: Gate, url: str, bucket: str, prefix: str, tasks: int, concurrency: int) -> SeenOnS3:
    client: Any = boto3.client("s3", endpoint_url=url, config=Config(max_pool_connections=THREADS))
    requests: Counter[str] = Counter()
    counting = threading.Lock()

    def count(event_name: str, **_: object) -> None:
        with counting:
            requests[event_name.rpartition(".")[2]] += 1

    client.meta.events.register("before-send.s3", count)

    class Tracker(S3Tracker):  # type: ignore[misc]  # its base is untyped
        @classmethod
        def get_bucket_key(cls, id: str) -> tuple[str, str]:
            return bucket, f"{prefix}/{id}.json"

        @classmethod
        def get_s3_client(cls) -> Any:
            return client

    def one(number: int) -> float:
        begin = time.perf_counter()
        with Tracker.new(f"task-{number}").start():
            pass
        return time.perf_counter() - begin

    with ThreadPoolExecutor(THREADS) as threads:
        list(threads.map(one, range(tasks, tasks + THREADS)))  # connects
        requests.clear()
        gate.ready()
        before = os.times()
        start = time.monotonic()
        latencies = list(threads.map(one, range(tasks)))
        end = time.monotonic()
        after = os.times()
    return {
        "start": start,
        "end": end,
        "latencies": latencies,
        "bias": BIAS,
        "requests": dict(requests),
        "cpu_seconds": after.user + after.system - before.user - before.system,
    }
