"""What a server counts and times, as Prometheus reads it, in a registry of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from aim_runtime import BatcherStatus, Generator
from aim_runtime.version import __version__

# From a GPU's 100 ms for an image to a queue of minutes on a CPU.
_SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)


class Metrics:
    """The metrics of one service."""

    def __init__(self, generator: Generator, status: Callable[[], BatcherStatus]) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        ProcessCollector(registry=registry)
        registry.register(_Batch(status))
        Gauge(
            "aim_info",
            "What is served, as labels.",
            ["version", "bundle", "backend", "precision"],
            registry=registry,
        ).labels(__version__, generator.manifest.name, generator.backend, generator.precision).set(
            1
        )
        self.requests = Counter(
            "aim_http_requests", "Requests answered.", ["endpoint", "status"], registry=registry
        )
        self.in_progress = Gauge(
            "aim_http_requests_in_progress", "Requests being answered.", registry=registry
        )
        self.errors = Counter(
            "aim_errors",
            "Requests that ended in an error, by its code.",
            ["kind"],
            registry=registry,
        )
        self.images = Counter("aim_images", "Images drawn and handed over.", registry=registry)
        self.disconnects = Counter(
            "aim_disconnects", "Requests whose client went before the end.", registry=registry
        )
        self.image_seconds = Histogram(
            "aim_image_latency_seconds",
            "From a request to the pixels of its last image, the queue included.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.first_preview_seconds = Histogram(
            "aim_first_preview_seconds",
            "From a request to its first preview, the queue included.",
            buckets=_SECONDS,
            registry=registry,
        )

    def text(self) -> bytes:
        """All of them in Prometheus's text format."""
        return generate_latest(self.registry)


class _Batch(Collector):
    """What the batcher is doing at the moment of the scrape."""

    def __init__(self, status: Callable[[], BatcherStatus]) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        status = self._status()
        yield GaugeMetricFamily("aim_queue_images", "Images waiting for a slot.", status.waiting)
        yield GaugeMetricFamily("aim_slots_in_use", "Images being drawn.", status.active)
        yield GaugeMetricFamily(
            "aim_decoding_images", "Images drawn whose pixels are awaited.", status.decoding
        )
        # Their rate is steps a second.
        yield CounterMetricFamily("aim_steps", "Steps taken by all slots together.", status.steps)
        yield GaugeMetricFamily(
            "aim_step_seconds",
            "What a step takes, a moving average; 0 before the first.",
            status.step_seconds or 0.0,
        )
        yield GaugeMetricFamily(
            "aim_accepting", "1 while requests are taken, 0 once not.", status.refusal is None
        )
