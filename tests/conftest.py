"""What all tests share."""

import os
from collections.abc import Iterator

import pytest
from blockbuster import BlockBuster, blockbuster_ctx

from aiotracker.testing import FakeClock


@pytest.fixture(autouse=True)
def blockbuster() -> Iterator[BlockBuster]:
    """A call of ours that blocks the event loop is an error."""
    with blockbuster_ctx("aiotracker") as guard:
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
    pytest.skip(reason)
