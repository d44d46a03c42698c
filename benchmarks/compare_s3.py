"""aiotracker and its peers on S3, in turns: `python -m benchmarks compare s3`."""

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from tests.services.ceph import ceph_server
from tests.services.moto import use_credentials
from tests.services.s3 import made_bucket

from .compare import in_turns, medians, ratio
from .lifecycle import summarised
from .numbers import significant
from .process import MissingPackageError, run
from .report import figure, say

__all__ = ["PEERS", "measure"]

PEERS: Final = ("abstract_tracker", "floor")
COUNTED: Final = 10_000  # tasks of the second count, at the most
CHANGED: Final = 10


def measure(
    folder: Path, *, tasks: int, concurrency: int, rounds: int, peers: tuple[str, ...] = PEERS
) -> dict[str, Any]:
    """Runs all contenders in turns, for some rounds, on one Ceph object gateway that keeps all in memory; medians.

    Args:
        folder: Not needed.
        tasks: New ids of each run.
        concurrency: Coroutines.
        rounds: How often.
        peers: Modules of `benchmarks.contenders`, without the `_s3` at their end.

    Returns:
        As `compare.measure`.
    """
    use_credentials()
    with ceph_server() as url:
        bucket = made_bucket(url).bucket
        turns: dict[str, Callable[[Path], dict[str, Any]]] = {
            name: lambda _, name=name: _turn(name, url, bucket, tasks, concurrency)  # type: ignore[misc]  # mypy infers no type for the default
            for name in ("ours", *peers)
        }
        runs: dict[str, list[dict[str, Any]]] = {}
        missing: list[str] = []
        for number, (name, turn) in in_turns(turns, rounds):
            if name in missing:
                continue
            try:
                result = turn(folder)
            except MissingPackageError as exc:
                say(f"{name}: {exc}")
                missing.append(name)
                continue
            runs.setdefault(name, []).append(result)
            say(f"round {number} of {rounds}: {name}: {result['per_second']:,.0f}/s")
        results = {name: medians(of_one) for name, of_one in runs.items()}
        where = {"url": url, "bucket": bucket}
        known = run("benchmarks.contenders.ours_s3:known_ids", **where, prefix=_prefix(), tasks=min(tasks, 200))
        counted = run(
            "benchmarks.contenders.ours_s3:count",
            **where,
            prefix=_prefix(),
            tasks=min(10 * tasks, COUNTED),
            changed=min(CHANGED, tasks),
        )
    ours = results["ours"]
    ratios = {name: ratio(ours, results[name]) for name in peers if name in results}
    floor = results.get("floor")
    of_floor = None if floor is None else significant(ours["requests_per_second"] / floor["requests_per_second"])
    at = f"{tasks:,} new ids, {concurrency:,} coroutines"
    return {
        "ours": ours,
        "peers": {name: results[name] for name in peers if name in results},
        "ratios": ratios,
        "missing": missing,
        "sections": {"known_ids": known, "second_count": counted, "requests_per_second_of_floor": of_floor},
        "figures": [
            figure("requests of a lifecycle on a new id", ours["requests_a_lifecycle"], "at most", 2),
            figure("requests on an id added by the same tracker", known["added_here"], "at most", 2),
            figure("requests on an id added by another", known["added_elsewhere"], "at most", 3),
            figure(f"times abstract_tracker ({at})", ratios.get("abstract_tracker"), "at least", 2),
            figure(f"of the floor's requests per second ({at})", of_floor, "at least", 0.8),
            figure(f"GETs of a second count of {counted['tasks']:,}", counted["gets"], "at most", 20),
        ],
    }


def _turn(name: str, url: str, bucket: str, tasks: int, concurrency: int) -> dict[str, Any]:
    target = f"benchmarks.contenders.{name}_s3:run"
    seen = run(target, url=url, bucket=bucket, prefix=_prefix(), tasks=tasks, concurrency=concurrency)
    seconds = seen["end"] - seen["start"]
    return summarised(name, tasks, concurrency, 1, [seen]) | {
        "requests": seen["requests"],
        "requests_a_lifecycle": significant(seen["requests"] / tasks),
        "requests_per_second": significant(seen["requests"] / seconds),
        "cpu_ms_a_request": significant(1000 * seen["cpu_seconds"] / seen["requests"]),
    }


def _prefix() -> str:
    return secrets.token_hex(6)
