"""For tests: of code that uses trackers, and of backends."""

from ._clock import FakeClock

__all__ = ["FakeClock"]
