"""New ids, each claimed and succeeded once: `python -m benchmarks lifecycle`."""

import secrets
from collections import Counter
from typing import Any

from .numbers import milliseconds, percentile, significant
from .process import together

__all__ = ["measure", "summarised"]


def measure(store: str, tasks: int, concurrency: int, processes: int, *, step: bool = False) -> dict[str, Any]:
    """Runs that many new ids through `async with tracker.run(id)`.

    Args:
        store: URL; ids are new also where it has been used before.
        tasks: Ids in all. The processes share them, but each tries every 50th, so that they meet.
        concurrency: Coroutines in each process.
        processes: On one store.
        step: Each body has one step.

    Returns:
        `per_second` counts lifecycles that succeeded, from the first start to the last end. `double_claims` counts
        ids whose body ran twice, or whose record says something else than the process that ran it.

    Raises:
        ValueError: `memory:` cannot be shared by processes.
    """
    if store.startswith("memory:") and processes > 1:
        raise ValueError("memory: is one process's own; use --processes 1")
    arguments = {
        "store": store,
        "prefix": secrets.token_hex(4),
        "tasks": tasks,
        "concurrency": concurrency,
        "processes": processes,
        "step": step,
    }
    targets = [("benchmarks.contenders.ours:run", arguments | {"index": index}) for index in range(processes)]
    with together(targets) as children:
        seen = [child.answer() for child in children]
    runs = Counter(task_id for one in seen for task_id, _ in one["ran"])
    wrong = {task_id for task_id, times in runs.items() if times > 1}
    wrong.update(task_id for one in seen for task_id in one["disagreeing"])
    result = summarised(f"aiotracker {store.partition(':')[0]}", tasks, concurrency, processes, seen)
    result["double_claims"] = len(wrong)
    result["refused"] = sum(one["refused"] for one in seen)
    if all("requests" in one for one in seen):
        result["requests"] = sum(one["requests"] for one in seen)
    return result


def summarised(
    contender: str, tasks: int, concurrency: int, processes: int, seen: list[dict[str, Any]]
) -> dict[str, Any]:
    """What the processes of one run came to together."""
    latencies = [latency for one in seen for latency in one["latencies"]]
    seconds = max(one["end"] for one in seen) - min(one["start"] for one in seen)
    return {
        "contender": contender,
        "tasks": tasks,
        "concurrency": concurrency,
        "processes": processes,
        "seconds": significant(seconds),
        "per_second": significant(len(latencies) / seconds),
        "p50_ms": milliseconds(percentile(latencies, 50)),
        "p99_ms": milliseconds(percentile(latencies, 99)),
        "bias": seen[0]["bias"],
    }
