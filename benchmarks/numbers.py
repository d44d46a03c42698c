"""The few statistics that the benchmarks tell."""

from collections.abc import Sequence
from statistics import median

__all__ = ["middle", "milliseconds", "percentile", "significant"]


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The smallest value that this percentage of the values does not exceed; `None` of no values."""
    if not values:
        return None
    ordered = sorted(values)
    rank = -(-len(ordered) * percent // 100)  # rounded up
    return ordered[max(0, int(rank) - 1)]


def middle(values: Sequence[float | None]) -> float | None:
    """The median of the values that there are."""
    there = [value for value in values if value is not None]
    return median(there) if there else None


def significant(value: float | None) -> float | None:
    """A figure without the digits that a second run would change anyway."""
    return None if value is None else float(f"{value:.4g}")


def milliseconds(seconds: float | None) -> float | None:
    """Seconds as milliseconds, rounded."""
    return None if seconds is None else significant(seconds * 1000)
