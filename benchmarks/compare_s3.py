"""aiotracker and its peers on S3, in turns: `python -m benchmarks compare s3`."""

import secrets
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, Final

from tests.services.ceph import ceph_server
from tests.services.moto import use_credentials
from tests.services.s3 import made_bucket

from .compare import Turn, medians, ratio, take_turns
from .lifecycle import summarised
from .numbers import middle, milliseconds, percentile, significant
from .process import run, together
from .report import Figure, figure, say

__all__ = ["PEERS", "PRICES", "dollars", "measure"]

PEERS: Final = ("abstract_tracker", "floor")
COUNTED: Final = 10_000  # tasks of the second count, at the most
CHANGED: Final = 10
LOG_CONCURRENCY: Final = 1000
LOG_TASKS: Final = 20  # times as many as the others run
PROCESSES: Final = 4
SHARE_CONCURRENCY: Final = 64  # in each of them
SHARE_SECONDS: Final = 20.0  # so that the claims with which all begin at once, which are told apart, are under 1 %

# Dollars for a million requests: list prices of S3 Standard in us-east-1, in 2025. Transfer and storage come on top.
PRICES: Final[Mapping[str, float]] = {
    "PutObject": 5.0,
    "ListObjectsV2": 5.0,
    "GetObject": 0.4,
    "HeadObject": 0.4,
    "DeleteObject": 0.0,
}


def dollars(requests: Mapping[str, int], tasks: int) -> float:
    """What a million tasks cost in requests, if they are like these."""
    return sum(PRICES[operation] * count for operation, count in requests.items()) / tasks


def measure(
    folder: Path,
    *,
    tasks: int,
    concurrency: int,
    rounds: int,
    peers: tuple[str, ...] = PEERS,
    server: Callable[[], AbstractContextManager[str]] = ceph_server,
    seconds: float = SHARE_SECONDS,
) -> dict[str, Any]:
    """Runs all contenders in turns, for some rounds, on one Ceph object gateway that keeps all in memory; medians.

    Args:
        folder: Not needed.
        tasks: New ids of each run; of the log's 20 times as many.
        concurrency: Coroutines; of the log 1,000.
        rounds: How often.
        peers: Modules of `benchmarks.contenders`, without the `_s3` at their end.
        server: Starts another service.
        seconds: For which several processes share a log.

    Returns:
        As `compare.measure`, and `ours_log`: the log.
    """
    use_credentials()
    with server() as url:
        where = {"url": url, "bucket": made_bucket(url).bucket}
        sizes = dict.fromkeys(("ours", *peers), (tasks, concurrency))
        sizes["ours_log"] = (LOG_TASKS * tasks, LOG_CONCURRENCY)
        targets = {name: f"{name}_s3" for name in sizes} | {"ours_log": "ours_s3_log"}
        turns: dict[str, Turn] = {
            name: partial(_turn, name, targets[name], where, *size) for name, size in sizes.items()
        }
        runs, missing = take_turns(turns, folder, rounds)
        results = {name: _medians(of_one) for name, of_one in runs.items()}
        contender = "benchmarks.contenders.ours_s3"
        say("ids that were added before, and a second count")
        known = run(f"{contender}:known_ids", **where, prefix=_prefix(), tasks=min(tasks, 200))
        counted = run(
            f"{contender}:count",
            **where,
            prefix=_prefix(),
            tasks=min(10 * tasks, COUNTED),
            changed=min(CHANGED, tasks),
        )
        say(f"{PROCESSES} processes on one log")
        shared = _shared(where, seconds)
    result: dict[str, Any] = {
        "ours": results["ours"],
        "ours_log": results["ours_log"],
        "peers": {name: results[name] for name in peers if name in results},
        "ratios": {
            f"{mine}_{name}": ratio(results[mine], results[name])
            for mine in ("ours", "ours_log")
            for name in peers
            if name in results
        },
        "missing": missing,
        "sections": {
            "known_ids": known,
            "second_count": counted,
            f"log_processes_{PROCESSES}": shared,
            "dollars_a_million": {name: one["dollars_a_million"] for name, one in results.items() if name != "floor"},
            "requests_per_second_of_floor": _of_floor(results),
        },
    }
    result["figures"] = _figures(result, tasks, concurrency)
    return result


def _figures(result: dict[str, Any], tasks: int, concurrency: int) -> list[Figure]:
    ratios, sections = result["ratios"], result["sections"]
    known, counted, shared = (sections[name] for name in ("known_ids", "second_count", f"log_processes_{PROCESSES}"))
    at = f"{tasks:,} new ids, {concurrency:,} coroutines"
    log = result["ours_log"]
    log_at = f"{log['tasks']:,} new ids, {log['concurrency']:,} coroutines"
    several = f"S3LogTracker, {PROCESSES} processes"
    return [
        figure("requests of a lifecycle on a new id", result["ours"]["requests_a_lifecycle"], "at most", 2),
        figure("requests on an id added by the same tracker", known["added_here"], "at most", 2),
        figure("requests on an id added by another", known["added_elsewhere"], "at most", 3),
        figure(f"S3Tracker, times abstract_tracker ({at})", ratios.get("ours_abstract_tracker"), "at least", 2),
        figure(f"of the floor's requests per second ({at})", sections["requests_per_second_of_floor"], "at least", 0.8),
        figure(f"GETs of a second count of {counted['tasks']:,}", counted["gets"], "at most", 20),
        figure(
            f"S3LogTracker, times abstract_tracker ({log_at})", ratios.get("ours_log_abstract_tracker"), "at least", 40
        ),
        figure("S3LogTracker, requests of 1,000 lifecycles", 1000 * log["requests_a_lifecycle"], "at most", 20),
        figure(f"{several}: double claims", shared["double_claims"], "at most", 0),
        figure(f"{several}: of the work, the least of one", min(shared["shares"]), "at least", 0.1),
        figure(f"{several}: p99 of a claim, in PUT times", shared["p99_in_put_times"], "at most", 20),
    ]


def _turn(
    name: str, module: str, where: dict[str, str], tasks: int, concurrency: int, _: Path | None = None
) -> dict[str, Any]:
    target = f"benchmarks.contenders.{module}:run"
    seen = run(target, **where, prefix=_prefix(), tasks=tasks, concurrency=concurrency)
    seconds = seen["end"] - seen["start"]
    requests = sum(seen["requests"].values())
    return summarised(name, tasks, concurrency, 1, [seen]) | {
        "requests": requests,
        "operations": seen["requests"],
        "requests_a_lifecycle": significant(requests / tasks),
        "requests_per_second": significant(requests / seconds),
        "cpu_ms_a_request": significant(1000 * seen["cpu_seconds"] / requests),
        "dollars_a_million": significant(dollars(seen["requests"], tasks)),
    }


def _medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    names = ("requests_a_lifecycle", "requests_per_second", "cpu_ms_a_request", "dollars_a_million")
    return medians(runs) | {name: significant(middle([one[name] for one in runs])) for name in names}


def _of_floor(results: dict[str, dict[str, Any]]) -> float | None:
    floor = results.get("floor")
    return None if floor is None else significant(results["ours"]["requests_per_second"] / floor["requests_per_second"])


def _shared(where: dict[str, str], seconds: float) -> dict[str, Any]:
    """Several processes on one log."""
    prefix = _prefix()
    arguments = {**where, "prefix": prefix, "concurrency": SHARE_CONCURRENCY, "seconds": seconds}
    targets = [("benchmarks.contenders.ours_s3_log:share", arguments | {"index": index}) for index in range(PROCESSES)]
    with together(targets) as children:
        seen = [child.answer() for child in children]
    runs = Counter(task_id for one in seen for task_id, _ in one["ran"])
    wrong = {task_id for task_id, times in runs.items() if times > 1}
    wrong.update(task_id for one in seen for task_id in one["disagreeing"])
    claims = [claim for one in seen for claim in one["claims"]]
    first = [claim for one in seen for claim in one["first_claims"]]
    put = middle([put for one in seen for put in one["puts"]])
    p99 = percentile(claims, 99)
    total = sum(len(one["ran"]) for one in seen)
    took = max(one["end"] for one in seen) - min(one["start"] for one in seen)
    return {
        "processes": PROCESSES,
        "concurrency": SHARE_CONCURRENCY,
        "per_second": significant(total / took),
        "double_claims": len(wrong),
        "refused": sum(one["refused"] for one in seen),
        "shares": [significant(len(one["ran"]) / max(1, total)) for one in seen],
        "claim_p50_ms": milliseconds(percentile(claims, 50)),
        "claim_p99_ms": milliseconds(p99),
        "first_claims_p50_ms": milliseconds(percentile(first, 50)),  # one of each coroutine, all at once
        "first_claims_p99_ms": milliseconds(percentile(first, 99)),
        "put_ms": milliseconds(put),  # of bare aioboto3 in the same processes, at the same time; the median
        "p99_in_put_times": None if p99 is None or put is None else significant(p99 / put),
        "requests_of_1000": significant(1000 * sum(one["requests"] for one in seen) / max(1, total)),
    }


def _prefix() -> str:
    return secrets.token_hex(6)
