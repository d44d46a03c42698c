"""For tests: of code that uses trackers, and of backends.

* `FakeClock`: time under control.
* `ConformanceSuite`: the contract as a test class. A backend proves itself with a subclass and a fixture.
* `FaultyTracker`, `Faults`: lost replies, errors and delays between a tracker and its store.
* `python -m aiotracker.testing check URL` and `torture URL`: the same from the command line.

Only the suite needs pytest and pytest-asyncio.
"""

import sys
from typing import TYPE_CHECKING, Any

from ._clock import FakeClock
from ._faults import Faults, FaultyTracker, delayed, reply_lost, unreachable
from ._stores import open_store

if TYPE_CHECKING:
    from .conformance import ConformanceSuite

__all__ = [
    "ConformanceSuite",
    "FakeClock",
    "Faults",
    "FaultyTracker",
    "delayed",
    "open_store",
    "reply_lost",
    "unreachable",
]


def __getattr__(name: str) -> Any:
    if name != "ConformanceSuite":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Late, so that users of the clock need no pytest.
    import pytest

    if f"{__name__}.conformance" not in sys.modules:
        pytest.register_assert_rewrite(f"{__name__}.conformance")
    from .conformance import ConformanceSuite

    return ConformanceSuite
