"""OpenTelemetry, by its own SDK and in-memory exporters."""

import asyncio
import itertools
import logging
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import SpanKind, StatusCode

from aiotracker import FileTracker, LeaseLostError, MemoryTracker, Retry, RunningTask, TaskSucceededError
from aiotracker._metrics import METRICS
from aiotracker.otel import OpenTelemetryHook
from aiotracker.testing import FakeClock

from .conftest import until


class Telemetry:
    """A hook, and what it exports."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.reader = InMemoryMetricReader()
        self.provider = TracerProvider(shutdown_on_exit=False)
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.hook = OpenTelemetryHook(self.provider, MeterProvider([self.reader], shutdown_on_exit=False))
        self.tracer = self.provider.get_tracer("the body's own")

    @property
    def spans(self) -> list[ReadableSpan]:
        """Those that have ended, in that order."""
        return list(self.exporter.get_finished_spans())

    def span(self, name: str) -> ReadableSpan:
        (found,) = [span for span in self.spans if span.name == name]
        return found

    def points(self, name: str) -> dict[tuple[tuple[str, Any], ...], Any]:
        """What a metric is at, by its attributes without the store."""
        data = self.reader.get_metrics_data()
        if data is None:
            return {}
        return {
            tuple(sorted((k, v) for k, v in (point.attributes or {}).items() if k != "aiotracker.store")): getattr(
                point, "value", getattr(point, "count", None)
            )
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == name
            for point in metric.data.data_points
        }


@pytest.fixture
def telemetry() -> Telemetry:
    return Telemetry()


@pytest.fixture
async def tracker(telemetry: Telemetry, clock: FakeClock) -> AsyncIterator[MemoryTracker]:
    async with MemoryTracker(hooks=[telemetry.hook], clock=clock, worker="me") as tracker:
        yield tracker


async def one() -> int:
    return 1


async def broken() -> int:
    raise ValueError("broken")


# -- spans


async def test_a_run_is_a_span_and_those_of_the_body_are_its_children(
    tracker: MemoryTracker, telemetry: Telemetry
) -> None:
    async def load() -> int:
        await asyncio.sleep(0)
        with telemetry.tracer.start_as_current_span("query"):
            return 1

    with telemetry.tracer.start_as_current_span("request"):
        async with tracker.run("job") as task:
            with telemetry.tracer.start_as_current_span("fetch"):
                await asyncio.sleep(0)
            await task.step("load", load)
        with telemetry.tracer.start_as_current_span("after"):
            pass
    spans = {span.name: span for span in telemetry.spans}
    parents = {
        name: next((other.name for other in spans.values() if span.parent and other.context == span.parent), None)
        for name, span in spans.items()
    }
    assert parents == {
        "request": None,
        "task.run": "request",
        "fetch": "task.run",
        "task.step load": "task.run",
        "query": "task.step load",
        "after": "request",
    }
    run = spans["task.run"]
    assert run.kind is SpanKind.CONSUMER
    assert dict(run.attributes or {}) == {
        "aiotracker.task.id": "job",
        "aiotracker.task.attempt": 1,
        "aiotracker.task.fence": task.fence,
        "aiotracker.store": "memory",
        "aiotracker.worker": "me",
        "aiotracker.outcome": "succeeded",
    }
    assert run.status.status_code is StatusCode.UNSET
    step = dict(spans["task.step load"].attributes or {})
    assert (step["aiotracker.step"], step["aiotracker.step.attempt"], step["aiotracker.outcome"]) == (
        "load",
        1,
        "succeeded",
    )


async def test_concurrent_runs_and_steps_do_not_take_each_others_spans(
    tmp_path: Path, telemetry: Telemetry, caplog: pytest.LogCaptureFixture
) -> None:
    async def step(name: str) -> str:
        await asyncio.sleep(0.001)
        with telemetry.tracer.start_as_current_span(f"inner {name}"):
            return name

    async def body(task: RunningTask) -> None:
        await asyncio.gather(*(task.step(name, step, f"{task.id} {name}") for name in ("x", "y")))

    async with FileTracker(tmp_path, hooks=[telemetry.hook]) as tracker:
        await tracker.work(body, ids=[f"job-{n}" for n in range(20)], concurrency=10)
    by_id = {span.context.span_id: span for span in telemetry.spans if span.context is not None}
    inner = [span for span in by_id.values() if span.name.startswith("inner")]
    assert len(inner) == 40
    for span in inner:
        assert span.parent is not None
        of_step = by_id[span.parent.span_id]
        assert of_step.parent is not None
        assert of_step.attributes is not None
        run = by_id[of_step.parent.span_id]
        assert run.attributes is not None
        assert run.name == "task.run"
        assert span.name.split() == [
            "inner",
            run.attributes["aiotracker.task.id"],
            of_step.attributes["aiotracker.step"],
        ]
        assert run.parent is None
    assert trace.get_current_span() is trace.INVALID_SPAN
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


async def test_a_failure_sets_status_and_records_the_exception_of_run_and_step(
    tracker: MemoryTracker, telemetry: Telemetry
) -> None:
    with pytest.raises(ValueError, match="broken"):
        async with tracker.run("job") as task:
            await task.step("one", broken)
    for name in ("task.run", "task.step one"):
        span = telemetry.span(name)
        assert span.status.status_code is StatusCode.ERROR
        assert span.status.description == "broken"
        (event,) = span.events
        assert event.name == "exception"
        attributes = dict(event.attributes or {})
        assert attributes["exception.type"] == "ValueError"
        assert attributes["exception.message"] == "broken"
        assert "Traceback" in str(attributes["exception.stacktrace"])
        assert "in broken" in str(attributes["exception.stacktrace"])
        assert (span.attributes or {})["error.type"] == "ValueError"
    assert (telemetry.span("task.run").attributes or {})["aiotracker.outcome"] == "failed"


async def test_a_cancelled_body_is_no_error(tracker: MemoryTracker, telemetry: Telemetry) -> None:
    async def run() -> None:
        async with tracker.run("job") as task:
            await task.step("one", asyncio.Event().wait)

    running = asyncio.create_task(run())
    await until(lambda: telemetry.hook._steps)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    for name, outcome in (("task.run", "released"), ("task.step one", "cancelled")):
        span = telemetry.span(name)
        assert span.status.status_code is StatusCode.UNSET
        assert (span.attributes or {})["aiotracker.outcome"] == outcome
        assert span.events == ()


async def test_a_lost_lease_is_an_error(tracker: MemoryTracker, telemetry: Telemetry) -> None:
    with pytest.raises(LeaseLostError):
        async with tracker.run("job") as task:
            await tracker.reset("job", force=True)
            await task.save()
    span = telemetry.span("task.run")
    assert span.status.status_code is StatusCode.ERROR
    assert (span.attributes or {})["error.type"] == "aiotracker.errors.LeaseLostError"


async def test_a_later_attempt_is_linked_to_the_one_before_it_in_whatever_process(tmp_path: Path) -> None:
    attempts = [Telemetry(), Telemetry(), Telemetry()]
    for telemetry in attempts:
        async with FileTracker(tmp_path, hooks=[telemetry.hook], retry=Retry(delay=0)) as tracker:
            with pytest.raises(ValueError, match="broken"):
                async with tracker.run("job") as task:
                    await task.step("one", broken)
    spans = [telemetry.span("task.run") for telemetry in attempts]
    assert list(spans[0].links) == []
    for before, after in itertools.pairwise(spans):
        (link,) = after.links
        assert before.context is not None
        assert (link.context.trace_id, link.context.span_id) == (before.context.trace_id, before.context.span_id)
        assert link.context.is_remote
        assert link.context.trace_flags.sampled


async def test_an_attempt_that_was_killed_after_a_write_is_linked_too(telemetry: Telemetry, clock: FakeClock) -> None:
    async with MemoryTracker(hooks=[telemetry.hook], clock=clock) as killed, killed.peer() as other:
        run = killed.run("job")
        task = await run.__aenter__()
        await task.save()
        clock.jump(61)  # it is not seen again
        async with other.run("job"):
            pass
        with pytest.raises(LeaseLostError):
            await run.__aexit__(None, None, None)
    after, before = telemetry.spans
    (link,) = after.links
    assert link.context.span_id == before.context.span_id


@pytest.mark.parametrize("text", ["none of ours", "00-0-0-00", "00-zz-11-01", ""])
async def test_a_trace_that_something_else_left_is_passed_over(
    tracker: MemoryTracker, telemetry: Telemetry, text: str
) -> None:
    with pytest.raises(ValueError, match="broken"):
        async with tracker.run("job"):
            await broken()
    record = await tracker.load("job")
    assert record is not None
    await tracker.dump(record.replace(trace=text))
    async with tracker.run("job"):
        pass
    assert list(telemetry.spans[-1].links) == []


async def test_a_reused_step_is_an_event_of_the_run(tracker: MemoryTracker, telemetry: Telemetry) -> None:
    with pytest.raises(ValueError, match="broken"):
        async with tracker.run("job") as task:
            await task.step("one", one)
            await broken()
    async with tracker.run("job") as task:
        await task.step("one", one)
    events = telemetry.spans[-1].events
    assert [(event.name, dict(event.attributes or {})) for event in events] == [
        ("step.reused", {"aiotracker.step": "one"})
    ]


async def test_a_body_that_is_dropped_elsewhere_ends_its_span_quietly(
    tracker: MemoryTracker, telemetry: Telemetry, caplog: pytest.LogCaptureFixture
) -> None:
    async def bodies() -> AsyncIterator[None]:
        async with tracker.run("job"):
            yield

    async def begin() -> AsyncIterator[None]:
        body = bodies().__aiter__()
        await body.__anext__()
        return body

    body: Any = await asyncio.create_task(begin())
    with pytest.raises(RuntimeError):
        await body.athrow(ValueError("from another task"))
    assert (telemetry.span("task.run").attributes or {})["aiotracker.outcome"] == "unknown"
    assert trace.get_current_span() is trace.INVALID_SPAN
    assert [record for record in caplog.records if record.name.startswith("opentelemetry")] == []
    assert telemetry.hook._runs == {}


async def test_the_keepers_work_is_no_part_of_the_first_runs_trace(clock: FakeClock, telemetry: Telemetry) -> None:
    around: list[trace.Span] = []

    class Instrumented(MemoryTracker):
        def update(self, task_id: str, transition: Any, **options: Any) -> Any:
            if type(transition).__name__ == "Renew":
                around.append(trace.get_current_span())
            return super().update(task_id, transition, **options)

    with telemetry.tracer.start_as_current_span("request"):
        async with Instrumented(clock=clock) as tracker, tracker.run("job"):
            for _ in range(30):
                clock.jump(1)
                for _ in range(5):
                    await asyncio.sleep(0)
            await until(lambda: around)
    assert around == [trace.INVALID_SPAN]


async def test_without_a_provider_nothing_is_kept_and_nothing_breaks(clock: FakeClock) -> None:
    async with MemoryTracker(hooks=[OpenTelemetryHook()], clock=clock) as tracker:
        async with tracker.run("job") as task:
            await task.step("one", one)
        record = await tracker.load("job")
    assert record is not None
    assert record.trace is None


async def test_what_is_not_sampled_is_not_exported(clock: FakeClock) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(sampler=ALWAYS_OFF, shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracker = MemoryTracker(hooks=[OpenTelemetryHook(provider)], clock=clock)
    async with tracker, tracker.run("job") as task:
        await task.step("one", one)
    assert exporter.get_finished_spans() == ()


# -- metrics


async def test_metrics_count_what_happened(tmp_path: Path, telemetry: Telemetry) -> None:
    async with FileTracker(tmp_path, hooks=[telemetry.hook], retry=Retry(delay=0)) as tracker:
        async with tracker.run("one") as task:
            assert telemetry.points("aiotracker.runs.active") == {(): 1}
            await task.step("load", one)
            await task.renew()
        with pytest.raises(TaskSucceededError):
            async with tracker.run("one"):
                pass
        with pytest.raises(ValueError, match="broken"):
            async with tracker.run("two") as task:
                await task.step("load", broken)
        with pytest.raises(LeaseLostError):
            async with tracker.run("three") as task:
                await tracker.reset("three", force=True)
                await task.save()
    assert telemetry.points("aiotracker.claims") == {(): 3}
    assert telemetry.points("aiotracker.claim.duration") == {(): 4}
    assert telemetry.points("aiotracker.refusals") == {(("aiotracker.reason", "succeeded"),): 1}
    assert telemetry.points("aiotracker.runs.active") == {(): 0}
    assert telemetry.points("aiotracker.outcomes") == {
        (("aiotracker.outcome", "succeeded"),): 1,
        (("aiotracker.outcome", "failed"), ("error.type", "ValueError")): 1,
        (("aiotracker.outcome", "lease_lost"), ("error.type", "LeaseLostError")): 1,
    }
    assert sum(telemetry.points("aiotracker.run.duration").values()) == 3
    assert telemetry.points("aiotracker.step.duration") == {
        (("aiotracker.outcome", "succeeded"), ("aiotracker.step", "load")): 1,
        (("aiotracker.outcome", "failed"), ("aiotracker.step", "load")): 1,
    }
    assert telemetry.points("aiotracker.renewals") == {(): 1}
    assert telemetry.points("aiotracker.leases.lost") == {(): 1}
    assert telemetry.points("aiotracker.commit.duration")[()] >= 8
    assert telemetry.points("aiotracker.commit.size") == telemetry.points("aiotracker.commit.duration")


async def test_all_metrics_have_units_and_the_stores_name(tmp_path: Path, telemetry: Telemetry) -> None:
    async with FileTracker(tmp_path, hooks=[telemetry.hook]) as tracker:
        await tracker.call("job", one)
    data = telemetry.reader.get_metrics_data()
    assert data is not None
    (scope,) = data.resource_metrics[0].scope_metrics
    assert scope.scope.name == "aiotracker"
    for metric in scope.metrics:
        assert metric.unit in ("s", "By") or str(metric.unit).startswith("{")
        assert metric.description
        for point in metric.data.data_points:
            assert (point.attributes or {})["aiotracker.store"] == "file"
    assert {metric.name for metric in scope.metrics} < {metric.name for metric in METRICS}


async def test_labels_have_few_values(tracker: MemoryTracker, telemetry: Telemetry) -> None:
    async with tracker.run("job") as task:
        for n in range(150):
            await task.step(f"step-{n}", one)
    points = telemetry.points("aiotracker.step.duration")
    assert len(points) == 101
    assert points[("aiotracker.outcome", "succeeded"), ("aiotracker.step", "other")] == 50


def test_a_missing_driver_says_how_to_install_it() -> None:
    for module, extra in (("opentelemetry", "otel"), ("prometheus_client", "prometheus")):
        code = f"import sys; sys.modules[{module!r}] = None\nimport aiotracker.{extra}"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert f'pip install "aiotracker[{extra}]"' in done.stderr
