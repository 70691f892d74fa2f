"""The metrics of a fleet: each replica's under a label of its own, and the front's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector


class FrontMetrics:
    """What the front counts."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.resubmitted = Counter(
            "aim_resubmitted_requests",
            "Requests sent to another replica since theirs had died.",
            registry=self.registry,
        )


def merged(front: FrontMetrics, replicas: Mapping[str, str]) -> bytes:
    """The metrics of a front, and of replicas, whose texts these are by their names."""
    registry = CollectorRegistry()
    registry.register(_Labelled(replicas))
    return generate_latest(front.registry) + generate_latest(registry)


class _Labelled(Collector):
    """What replicas tell, each sample with the replica's name."""

    def __init__(self, replicas: Mapping[str, str]) -> None:
        self._replicas = replicas

    def collect(self) -> Iterator[Metric]:
        found: dict[str, Metric] = {}
        for replica, text in self._replicas.items():
            for family in text_string_to_metric_families(text):
                metric = found.setdefault(
                    family.name, Metric(family.name, family.documentation, family.type)
                )
                for sample in family.samples:
                    labels = {**sample.labels, "replica": replica}
                    metric.add_sample(sample.name, labels, sample.value)
        yield from found.values()
