"""What all tests share."""

import asyncio
import os
import signal
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest
from blockbuster import BlockBuster, blockbuster_ctx
from hypothesis import HealthCheck, settings

from aiotracker.testing import FakeClock

if os.environ.get("AIOTRACKER_TEST_LOOP") == "uvloop":
    import uvloop

    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())


# A shell has its background jobs ignore Ctrl-C, and so would whatever the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes says something about the machine, which may be busy.
settings.register_profile("aiotracker", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("aiotracker")


@pytest.fixture(autouse=True)
def blockbuster() -> Iterator[BlockBuster]:
    """A call of ours that blocks the event loop is an error."""
    with blockbuster_ctx("aiotracker") as guard:
        # `coverage run` counts in all threads, and they wait for each other in the middle of our code.
        guard.functions["threading.Lock.acquire"].can_block_in("coverage/collector.py", "lock_data")
        yield guard


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def require(condition: object, reason: str) -> None:
    """Skips a test whose surroundings are missing; on CI, where they must be there, it fails."""
    if condition:
        return
    if os.environ.get("CI", "").lower() == "true":
        pytest.fail(f"required on CI: {reason}")
    pytest.skip(reason, allow_module_level=True)


def require_module(name: str) -> Any:
    """The module; see `require`. A package that is there but broken is an error."""
    require(find_spec(name) is not None, f"{name} is not installed")
    return import_module(name)
