"""The metrics that are made of events: which there are, and what an event adds to them. Counted by `otel` and
`prometheus`, under the names and labels that these have for the same thing.

Labels have few values: never a task's id. Names of steps and error types beyond the first hundred are counted as
`other`.
"""

from collections.abc import Callable
from typing import Any, Final, Literal

import msgspec

from .events import (
    Claimed,
    Committed,
    Conflicted,
    Ended,
    Event,
    LeaseLost,
    LoopLagged,
    Refused,
    Renewed,
    StepFailed,
    StepReused,
    StepSucceeded,
    StoreUnreachable,
)

__all__ = ["METRICS", "Measure", "Meter", "Metric"]

Kind = Literal["counter", "histogram", "gauge"]

MAX_VALUES: Final = 100  # of one label whose values come from the user's code
OTHER: Final = "other"

_TIMES: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_LONG_TIMES: Final = (0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0)


class Metric(msgspec.Struct, frozen=True, eq=False):
    """One metric. There is one object of each, so that looking one up is cheap."""

    name: str  # as in OpenTelemetry; Prometheus has underscores and the unit in it
    kind: Kind  # a gauge goes up and down
    unit: str  # by UCUM: s, By, or what is counted in braces
    description: str
    labels: tuple[str, ...] = ()  # after the store, which all have
    buckets: tuple[float, ...] = ()  # upper bounds, of a histogram


Measure = tuple[Metric, float, tuple[str, ...]]  # what is added or observed, under which labels

CLAIMS: Final = Metric("aiotracker.claims", "counter", "{claim}", "Tasks that were claimed.")
CLAIM_TIME: Final = Metric(
    "aiotracker.claim.duration", "histogram", "s", "Time that a claim took, refused ones included.", buckets=_TIMES
)
REFUSALS: Final = Metric("aiotracker.refusals", "counter", "{claim}", "Claims that were refused.", ("reason",))
ACTIVE: Final = Metric("aiotracker.runs.active", "gauge", "{run}", "Bodies that run now.")
OUTCOMES: Final = Metric(
    "aiotracker.outcomes", "counter", "{run}", "Runs that have ended, by how.", ("outcome", "error.type")
)
RUN_TIME: Final = Metric(
    "aiotracker.run.duration", "histogram", "s", "Time that bodies took.", ("outcome",), buckets=_LONG_TIMES
)
STEP_TIME: Final = Metric(
    "aiotracker.step.duration", "histogram", "s", "Time that steps took.", ("step", "outcome"), buckets=_LONG_TIMES
)
REUSED: Final = Metric(
    "aiotracker.steps.reused", "counter", "{step}", "Steps that an earlier attempt had finished.", ("step",)
)
RENEWALS: Final = Metric("aiotracker.renewals", "counter", "{renewal}", "Leases that were renewed.")
LOST: Final = Metric("aiotracker.leases.lost", "counter", "{lease}", "Leases that were lost while a body ran.")
COMMIT_TIME: Final = Metric(
    "aiotracker.commit.duration", "histogram", "s", "Time that the store took to write.", buckets=_TIMES
)
COMMIT_SIZE: Final = Metric(
    "aiotracker.commit.size",
    "histogram",
    "By",
    "Bytes that were written together.",
    buckets=(512.0, 1024.0, 4096.0, 16384.0, 65536.0, 262144.0, 1048576.0, 4194304.0),
)
COMMIT_OPERATIONS: Final = Metric(
    "aiotracker.commit.operations",
    "histogram",
    "{operation}",
    "Operations that shared a commit.",
    buckets=(1.0, 2.0, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0, 2500.0, 5000.0),
)
CONFLICTS: Final = Metric("aiotracker.conflicts", "counter", "{conflict}", "Writes that were made again after a race.")
UNREACHABLE: Final = Metric(
    "aiotracker.store.errors",
    "counter",
    "{error}",
    "Requests that the store did not answer.",
    ("operation", "error.type"),
)
LAG: Final = Metric("aiotracker.loop.lag", "histogram", "s", "How late the event loop was.", buckets=_TIMES)

METRICS: Final = (
    CLAIMS,
    CLAIM_TIME,
    REFUSALS,
    ACTIVE,
    OUTCOMES,
    RUN_TIME,
    STEP_TIME,
    REUSED,
    RENEWALS,
    LOST,
    COMMIT_TIME,
    COMMIT_SIZE,
    COMMIT_OPERATIONS,
    CONFLICTS,
    UNREACHABLE,
    LAG,
)


class Meter:
    """Says what each event adds to which metric."""

    def __init__(self) -> None:
        self._seen: dict[str, set[str]] = {}

    def measures(self, event: Event) -> list[Measure]:
        """What is to be added or observed."""
        for kind in type(event).__mro__:
            if (measure := _MEASURES.get(kind)) is not None:
                return measure(self, event)
        return []

    def few(self, label: str, value: str) -> str:
        """The value, or `other` where the label has had too many."""
        seen = self._seen.setdefault(label, set())
        if value in seen:
            return value
        if len(seen) >= MAX_VALUES:
            return OTHER
        seen.add(value)
        return value

    def error_type(self, error: BaseException | None) -> str:
        return "" if error is None else self.few("error.type", type(error).__name__)


def _claimed(_: Meter, event: Claimed) -> list[Measure]:
    return [(CLAIMS, 1, ()), (CLAIM_TIME, event.seconds, ()), (ACTIVE, 1, ())]


def _refused(_: Meter, event: Refused) -> list[Measure]:
    return [(REFUSALS, 1, (event.reason,)), (CLAIM_TIME, event.seconds, ())]


def _ended(meter: Meter, event: Ended) -> list[Measure]:
    measures: list[Measure] = [
        (ACTIVE, -1, ()),
        (OUTCOMES, 1, (event.outcome, meter.error_type(event.error))),
        (RUN_TIME, event.seconds, (event.outcome,)),
    ]
    if isinstance(event, LeaseLost):
        measures.append((LOST, 1, ()))
    return measures


def _step_succeeded(meter: Meter, event: StepSucceeded) -> list[Measure]:
    return [(STEP_TIME, event.seconds, (meter.few("step", event.step.name), "succeeded"))]


def _step_failed(meter: Meter, event: StepFailed) -> list[Measure]:
    outcome = "cancelled" if event.is_cancelled else "failed"
    return [(STEP_TIME, event.seconds, (meter.few("step", event.step.name), outcome))]


def _step_reused(meter: Meter, event: StepReused) -> list[Measure]:
    return [(REUSED, 1, (meter.few("step", event.step.name),))]


def _committed(_: Meter, event: Committed) -> list[Measure]:
    return [(COMMIT_TIME, event.seconds, ()), (COMMIT_SIZE, event.bytes, ()), (COMMIT_OPERATIONS, event.operations, ())]


def _unreachable(meter: Meter, event: StoreUnreachable) -> list[Measure]:
    return [(UNREACHABLE, 1, (event.operation, meter.error_type(event.error)))]


def _lagged(_: Meter, event: LoopLagged) -> list[Measure]:
    return [(LAG, event.seconds, ())]


_MEASURES: Final[dict[type, Callable[[Meter, Any], list[Measure]]]] = {
    Claimed: _claimed,
    Refused: _refused,
    Ended: _ended,
    StepSucceeded: _step_succeeded,
    StepFailed: _step_failed,
    StepReused: _step_reused,
    Renewed: lambda meter, event: [(RENEWALS, 1, ())],
    Committed: _committed,
    Conflicted: lambda meter, event: [(CONFLICTS, 1, ())],
    StoreUnreachable: _unreachable,
    LoopLagged: _lagged,
}
