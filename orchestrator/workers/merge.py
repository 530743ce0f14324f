"""One scrape of many processes: counters and histograms are added, and what all of them see alike is told once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

ADDED: Final = frozenset(
    {"disagg_queue_depth", "disagg_queue_tokens", "disagg_queue_tenants", "disagg_requests_active"}
)
"""Gauges of what a worker has itself. All other gauges are a server's: the same from whoever tells."""
_OF_A_SERVER: Final = "instance"
"""A label. What a server counts of itself is not counted again by each worker that hears it."""

_Key = tuple[str, tuple[tuple[str, str], ...]]


def merged(scrapes: Iterable[bytes]) -> bytes:
    """Prometheus' text of all `scrapes` together."""
    registry = CollectorRegistry()
    registry.register(_Families(scrapes))
    return generate_latest(registry)


class _Families(Collector):
    def __init__(self, scrapes: Iterable[bytes]) -> None:
        self._families: dict[str, Metric] = {}
        self._values: dict[str, dict[_Key, float]] = {}
        for scrape in scrapes:
            for family in text_string_to_metric_families(scrape.decode()):
                self._take(family)

    def _take(self, family: Metric) -> None:
        known = self._families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
        values = self._values.setdefault(family.name, {})
        for sample in family.samples:
            key = sample.name, tuple(sorted(sample.labels.items()))
            if sample.name.endswith("_created"):
                values[key] = min(sample.value, values.get(key, sample.value))
            elif _is_added(known, sample.labels):
                values[key] = values.get(key, 0.0) + sample.value
            else:
                values[key] = max(sample.value, values.get(key, sample.value))

    def collect(self) -> Iterator[Metric]:
        for name, family in self._families.items():
            family.samples.clear()
            for (sample_name, labels), value in self._values[name].items():
                family.add_sample(sample_name, dict(labels), value)
            yield family


def _is_added(family: Metric, labels: Mapping[str, str]) -> bool:
    if family.type == "gauge":
        return family.name in ADDED
    return _OF_A_SERVER not in labels
