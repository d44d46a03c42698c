"""What `import aiotracker` costs, and what it pulls in."""

import subprocess
import sys
from statistics import median
from typing import Any

from .numbers import significant

__all__ = ["HEAVY", "measure"]

HEAVY = (
    *("aioboto3", "aiobotocore", "boto3", "botocore", "aiohttp", "httpx", "asyncpg", "psycopg", "redis", "sqlite3"),
    *("duckdb", "pyarrow", "pandas", "numpy", "pydantic", "typer", "click", "rich", "opentelemetry"),
    "prometheus_client",
)
CODE = f"""
import time
begin = time.perf_counter()
import aiotracker
seconds = time.perf_counter() - begin
import sys
print(seconds, *(name for name in {HEAVY!r} if name in sys.modules))
"""
SLOWEST = 8


def measure(rounds: int) -> dict[str, Any]:
    """Imports it in fresh interpreters: median milliseconds, drivers and other heavy modules among what was imported,
    and the modules that took longest by themselves (milliseconds, from `-X importtime`, which slows everything down).
    """
    taken: list[float] = []
    heavy: set[str] = set()
    _run("-c", CODE)  # writes the byte code
    for _ in range(rounds):
        seconds, *names = _run("-c", CODE).stdout.split()
        taken.append(float(seconds))
        heavy.update(names)
    slowest: list[tuple[int, str]] = []
    for line in _run("-X", "importtime", "-c", "import aiotracker").stderr.splitlines():
        own, _, rest = line.removeprefix("import time:").partition("|")
        name = rest.partition("|")[2].strip()
        if own.strip().isdigit():
            slowest.append((int(own), name))
    slowest.sort(reverse=True)
    return {
        "milliseconds": significant(median(taken) * 1000),
        "drivers": sorted(heavy),
        "slowest": {name: significant(microseconds / 1000) for microseconds, name in slowest[:SLOWEST]},
    }


def _run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True)
