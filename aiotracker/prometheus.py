"""Prometheus: a hook that counts events in the metrics of prometheus_client.

    from aiotracker.prometheus import PrometheusHook

    tracker = FileTracker("state", hooks=[PrometheusHook()])

The metrics are those of `aiotracker.otel`, with underscores for dots and the unit in the name, such as
`aiotracker_run_duration_seconds`. Labels have few values; no task's id is in them. The page "Observe it" of the
documentation has the list.
"""

from collections.abc import Callable
from typing import Any, Final

from ._metrics import METRICS, Meter, Metric
from .events import Event

try:
    from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
except ModuleNotFoundError as exc:
    raise ModuleNotFoundError(
        f'PrometheusHook needs {exc.name}: pip install "aiotracker[prometheus]"', name=exc.name, path=exc.path
    ) from exc

__all__ = ["PrometheusHook"]

_UNITS: Final = {"s": "seconds", "By": "bytes"}


class PrometheusHook:
    """Metrics of everything that happens in the trackers that it is given to. One hook serves any number of trackers,
    and a registry takes one hook.

    Args:
        registry: Where the metrics are registered; by default the global one.

    Raises:
        ValueError: The registry has such metrics already.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._collectors = {metric: _collector(metric, registry) for metric in METRICS}
        self._meter = Meter()
        # Of each metric by its labels: looking one up at the client costs as much as all the rest.
        self._add: dict[tuple[Metric, str, tuple[str, ...]], Callable[[float], None]] = {}

    def __call__(self, event: Event) -> None:
        for metric, value, labels in self._meter.measures(event):
            key = (metric, event.store, labels)
            add = self._add.get(key)
            if add is None:
                child = self._collectors[metric].labels(event.store, *labels)
                add = self._add[key] = child.observe if metric.kind == "histogram" else child.inc
            add(value)


def _collector(metric: Metric, registry: CollectorRegistry) -> Any:
    name = metric.name.replace(".", "_")
    labels = ["store", *(label.replace(".", "_") for label in metric.labels)]
    if metric.kind == "counter":
        return Counter(name, metric.description, labels, registry=registry)
    if metric.kind == "gauge":
        return Gauge(name, metric.description, labels, registry=registry)
    unit = _UNITS.get(metric.unit, "")
    return Histogram(name, metric.description, labels, unit=unit, registry=registry, buckets=metric.buckets)
