"""Counters and histograms that cost a tenth of a microsecond, and are put into Prometheus' form when it asks.

prometheus_client's own take a lock, and look at every bucket, each time: thirty of them at the end of a request would
cost as much as placing it. These belong to one event loop.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence
from typing import Final

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry


class One:
    """One number that grows."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def inc(self, amount: float = 1.0) -> None:
        self.value += amount


class Counter(Collector):
    """A number that grows; with `labels`, one for each of their values."""

    def __init__(self, name: str, text: str, labels: Sequence[str] = (), *, registry: CollectorRegistry) -> None:
        self._name, self._text, self._label_names = name.removesuffix("_total"), text, tuple(labels)
        self._ones: dict[tuple[str, ...], One] = {} if labels else {(): One()}
        registry.register(self)

    def inc(self, amount: float = 1.0) -> None:
        self._ones[()].value += amount

    def labels(self, *values: str) -> One:
        """The number for these values. There are few of them: each is kept for ever."""
        try:
            return self._ones[values]
        except KeyError:
            assert len(values) == len(self._label_names), f"{self._name} has the labels {self._label_names}"
            return self._ones.setdefault(values, One())

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily(self._name, self._text, labels=self._label_names)
        for values, one in self._ones.items():
            family.add_metric(values, one.value)
        yield family


class Histogram(Collector):
    """How often a value was at most so large."""

    def __init__(self, name: str, text: str, *, buckets: Sequence[float], registry: CollectorRegistry) -> None:
        self._name, self._text = name, text
        self._bounds: Final = tuple(buckets)
        self._counts = [0] * (len(buckets) + 1)
        self._sum = 0.0
        registry.register(self)

    def observe(self, value: float) -> None:
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self._sum += value

    def collect(self) -> Iterator[Metric]:
        names = [*map(str, map(float, self._bounds)), "+Inf"]
        family = HistogramMetricFamily(self._name, self._text)
        family.add_metric([], list(zip(names, itertools.accumulate(self._counts), strict=True)), self._sum)
        yield family
