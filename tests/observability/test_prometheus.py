"""Prometheus, by its own client and a scrape over HTTP."""

import asyncio
import urllib.request
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.parser import text_string_to_metric_families

from aiotracker import FileTracker, MemoryTracker, Retry, TaskSucceededError
from aiotracker._metrics import METRICS
from aiotracker.prometheus import PrometheusHook


async def one() -> int:
    return 1


async def broken() -> int:
    raise ValueError("broken")


async def test_a_scrape_shows_what_happened_and_no_tasks_id(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    hook = PrometheusHook(registry)
    async with FileTracker(tmp_path, hooks=[hook], retry=Retry(delay=0)) as tracker:
        await tracker.call("order-17", one)
        with pytest.raises(TaskSucceededError):
            async with tracker.run("order-17"):
                pass
        with pytest.raises(ValueError, match="broken"):
            async with tracker.run("order-18") as task:
                await task.step("load", broken)
        async with tracker.run("order-18") as task:
            await task.step("load", one)
            await task.renew()
            text = await asyncio.to_thread(_scrape, registry)
    samples = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    store = ("store", "file")
    assert samples["aiotracker_claims_total", store] == 3
    assert samples["aiotracker_refusals_total", ("reason", "succeeded"), store] == 1
    assert samples["aiotracker_runs_active", store] == 1
    assert samples["aiotracker_outcomes_total", ("error_type", ""), ("outcome", "succeeded"), store] == 1
    assert samples["aiotracker_outcomes_total", ("error_type", "ValueError"), ("outcome", "failed"), store] == 1
    assert samples["aiotracker_run_duration_seconds_count", ("outcome", "failed"), store] == 1
    assert samples["aiotracker_step_duration_seconds_count", ("outcome", "succeeded"), ("step", "load"), store] == 1
    assert samples["aiotracker_renewals_total", store] == 1
    assert samples["aiotracker_commit_size_bytes_count", store] >= 7
    assert samples["aiotracker_commit_duration_seconds_bucket", ("le", "+Inf"), store] >= 7
    assert "order-1" not in text
    assert str(tmp_path) not in text


def _scrape(registry: CollectorRegistry) -> str:
    server, thread = start_http_server(0, addr="127.0.0.1", registry=registry)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/metrics", timeout=60) as answer:
            text: bytes = answer.read()
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    return text.decode()


async def test_one_hook_serves_several_trackers() -> None:
    registry = CollectorRegistry()
    hook = PrometheusHook(registry)
    async with MemoryTracker(hooks=[hook]) as first, MemoryTracker(hooks=[hook]) as second:
        await first.call("job", one)
        await second.call("job", one)
    assert registry.get_sample_value("aiotracker_claims_total", {"store": "memory"}) == 2
    assert registry.get_sample_value("aiotracker_runs_active", {"store": "memory"}) == 0
    with pytest.raises(ValueError, match="Duplicated"):
        PrometheusHook(registry)


def test_every_metric_is_there_before_anything_happens() -> None:
    registry = CollectorRegistry()
    PrometheusHook(registry)
    families = {family.name: family for family in registry.collect()}
    assert len(families) == len(METRICS)
    for metric in METRICS:
        name = metric.name.replace(".", "_")
        family = families[{"s": f"{name}_seconds", "By": f"{name}_bytes"}.get(metric.unit, name)]
        assert family.documentation == metric.description
        assert family.type == metric.kind
