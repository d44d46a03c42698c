"""OpenTelemetry: a hook that makes spans of runs and steps, and metrics of all events.

    from aiotracker.otel import OpenTelemetryHook

    tracker = FileTracker("state", hooks=[OpenTelemetryHook()])

A run is a span `task.run`, and current while its body runs: spans that the body makes, itself or by instrumented
libraries, are its children; so are those of its steps, `task.step NAME`. Its own parent is whatever span was current
around `tracker.run(...)`. An attempt that follows another is linked to that one's span, in whatever process it was:
for that the record's `trace` keeps the `traceparent`, written with the run's next write. An attempt that was killed
before its first renewal has written none.

The page "Observe it" of the documentation has the list of the metrics.
"""

import asyncio
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from ._core.task import Failure
from ._metrics import METRICS, Meter, Metric
from .events import (
    Claimed,
    Ended,
    Event,
    Exhausted,
    Failed,
    Postponed,
    Released,
    RunEvent,
    StepFailed,
    StepReused,
    StepStarted,
    StepSucceeded,
    Succeeded,
)

try:
    from opentelemetry import context, metrics, trace
    from opentelemetry.trace import Link, Span, SpanContext, SpanKind, Status, StatusCode, TraceFlags
except ModuleNotFoundError as exc:
    raise ModuleNotFoundError(
        f'OpenTelemetryHook needs {exc.name}: pip install "aiotracker[otel]"', name=exc.name, path=exc.path
    ) from exc

if TYPE_CHECKING:
    from contextvars import Token

    from opentelemetry.context import Context
    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import TracerProvider

__all__ = ["OpenTelemetryHook"]

_SCOPE: Final = "aiotracker"
_LABELS: Final = {"error.type": "error.type"}  # the others begin with the library's name


class _Open(NamedTuple):
    """A span that is current in one asyncio task."""

    span: Span
    token: "Token[Context]"
    task: "asyncio.Task[Any] | None"


class OpenTelemetryHook:
    """Spans and metrics of everything that happens in the trackers that it is given to.

    Args:
        tracer_provider: Where spans go; by default the global one.
        meter_provider: Where metrics go; by default the global one.
    """

    def __init__(
        self, tracer_provider: "TracerProvider | None" = None, meter_provider: "MeterProvider | None" = None
    ) -> None:
        self._tracer = trace.get_tracer(_SCOPE, tracer_provider=tracer_provider)
        meter = metrics.get_meter(_SCOPE, meter_provider=meter_provider)
        self._add = {metric: _instrument(meter, metric) for metric in METRICS}
        self._attributes: dict[tuple[Metric, str, tuple[str, ...]], dict[str, str]] = {}
        self._meter = Meter()
        self._runs: dict[str, _Open] = {}  # by token
        self._steps: dict[tuple[str, str], _Open] = {}  # by token and name

    def __call__(self, event: Event) -> None:
        if isinstance(event, Claimed):
            self._claimed(event)
        elif isinstance(event, StepStarted):
            self._step_started(event)
        self._measure(event)  # while the span is current, for exemplars
        if isinstance(event, StepSucceeded | StepFailed):
            self._step_ended(event)
        elif isinstance(event, StepReused):
            if (run := self._runs.get(event.token)) is not None:
                run.span.add_event("step.reused", {f"{_SCOPE}.step": event.step.name})
        elif isinstance(event, Ended):
            self._ended(event)

    def _measure(self, event: Event) -> None:
        for metric, value, labels in self._meter.measures(event):
            key = (metric, event.store, labels)
            attributes = self._attributes.get(key)
            if attributes is None:
                named = zip(metric.labels, labels, strict=True)
                attributes = self._attributes[key] = {f"{_SCOPE}.store": event.store} | {
                    _LABELS.get(name, f"{_SCOPE}.{name}"): label for name, label in named if label
                }
            self._add[metric](value, attributes)

    # -- spans

    def _claimed(self, event: Claimed) -> None:
        before = _parsed(event.task.trace)
        span = self._tracer.start_span(
            "task.run",
            kind=SpanKind.CONSUMER,
            attributes=_attributes(event),
            links=[] if before is None else [Link(before, {f"{_SCOPE}.link": "previous_attempt"})],
        )
        self._runs[event.token] = _opened(span)
        made = span.get_span_context()
        if made.is_valid:
            event.set_trace(f"00-{made.trace_id:032x}-{made.span_id:016x}-{made.trace_flags:02x}")

    def _step_started(self, event: StepStarted) -> None:
        attributes = _attributes(event) | {
            f"{_SCOPE}.step": event.step.name,
            f"{_SCOPE}.step.attempt": event.step.attempts,
        }
        span = self._tracer.start_span(f"task.step {event.step.name}", attributes=attributes)
        self._steps[event.token, event.step.name] = _opened(span)

    def _step_ended(self, event: StepSucceeded | StepFailed) -> None:
        step = self._steps.pop((event.token, event.step.name), None)
        if step is None:
            return
        if isinstance(event, StepSucceeded):
            step.span.set_attribute(f"{_SCOPE}.outcome", "succeeded")
        elif event.is_cancelled:
            step.span.set_attribute(f"{_SCOPE}.outcome", "cancelled")
        else:
            step.span.set_attribute(f"{_SCOPE}.outcome", "failed")
            _set_error(step.span, event.error, event.step.error)
        _close(step)

    def _ended(self, event: Ended) -> None:
        run = self._runs.pop(event.token, None)
        if run is None:
            return
        run.span.set_attribute(f"{_SCOPE}.outcome", event.outcome)
        if not isinstance(event, Succeeded | Released | Postponed):
            failure = event.failure if isinstance(event, Failed | Exhausted) else None
            _set_error(run.span, event.error, failure)
        _close(run)


def _instrument(meter: metrics.Meter, metric: Metric) -> Any:
    """What takes a value and its attributes."""
    if metric.kind == "counter":
        return meter.create_counter(metric.name, metric.unit, metric.description).add
    if metric.kind == "gauge":
        return meter.create_up_down_counter(metric.name, metric.unit, metric.description).add
    return meter.create_histogram(
        metric.name, metric.unit, metric.description, explicit_bucket_boundaries_advisory=metric.buckets
    ).record


def _attributes(event: RunEvent) -> dict[str, str | int]:
    return {
        f"{_SCOPE}.task.id": event.task_id,
        f"{_SCOPE}.task.attempt": event.attempt,
        f"{_SCOPE}.task.fence": event.fence,
        f"{_SCOPE}.store": event.store,
        f"{_SCOPE}.worker": event.worker,
    }


def _opened(span: Span) -> _Open:
    token = context.attach(trace.set_span_in_context(span))
    return _Open(span, token, _current_task())


def _close(opened: _Open) -> None:
    # A body that is dropped ends wherever the garbage collector is; the span is not current there.
    if _current_task() is opened.task:
        context.detach(opened.token)
    opened.span.end()


def _current_task() -> "asyncio.Task[Any] | None":
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None


def _set_error(span: Span, error: BaseException | None, failure: Failure | None) -> None:
    # `record_exception` would format the traceback, which reads files: what the record has was made on a thread.
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    message = "" if error is None else failure.message if failure is not None else str(error)
    if error is not None:
        attributes = {"exception.type": name, "exception.message": message}
        if failure is not None and failure.traceback:
            attributes["exception.stacktrace"] = failure.traceback
        span.add_event("exception", attributes)
        span.set_attribute("error.type", name)
    span.set_status(Status(StatusCode.ERROR, message))


def _parsed(traceparent: str | None) -> SpanContext | None:
    parts = (traceparent or "").split("-")
    try:
        _, trace_id, span_id, flags = parts
        found = SpanContext(int(trace_id, 16), int(span_id, 16), is_remote=True, trace_flags=TraceFlags(int(flags, 16)))
    except ValueError:
        return None  # not ours
    return found if found.is_valid else None
