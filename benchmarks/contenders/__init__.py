"""One module a contender. Each has

* `BIAS`: what it does for one lifecycle, in which way, and whether it syncs: what to know before comparing;
* `run(gate, folder, tasks, concurrency)`: that many lifecycles in an empty folder, as `Lifecycles`.

Setting up and importing is not counted; the clock starts after `gate.ready()`. The versions that the figures are for
are pinned in the dependency group `bench`.
"""

from typing import Final, TypedDict

__all__ = ["PEERS", "Lifecycles"]

PEERS: Final = ("abstract_tracker", "crawlee", "huey", "persist_queue", "floor")


class Lifecycles(TypedDict):
    """What a contender saw."""

    start: float  # by the machine's monotonic clock, which all its processes share
    end: float
    latencies: list[float]  # seconds of each lifecycle
    bias: str  # `BIAS`, and what is found out only by running it
