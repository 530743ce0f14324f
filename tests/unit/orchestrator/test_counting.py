"""Counters and histograms say to Prometheus what prometheus_client's own would say."""

from __future__ import annotations

import prometheus_client
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest

from orchestrator.counting import Counter, Histogram

BUCKETS = (0.1, 1.0, 2.5)


def told(registry: CollectorRegistry) -> list[str]:
    """What a scrape reads, but for when the metric was made, which is told of prometheus_client's own alone."""
    return [line for line in generate_latest(registry).decode().splitlines() if "_created" not in line]


@given(st.lists(st.floats(0.0, 10.0) | st.sampled_from(BUCKETS), max_size=20))
def test_a_histogram_counts_as_prometheus_does(values: list[float]) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    one = Histogram("wait_seconds", "Waiting.", buckets=BUCKETS, registry=ours)
    other = prometheus_client.Histogram("wait_seconds", "Waiting.", buckets=BUCKETS, registry=theirs)
    for value in values:
        one.observe(value)
        other.observe(value)
    assert told(ours) == told(theirs)


def test_a_counter_counts_as_prometheus_does() -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    for registry, kind in ((ours, Counter), (theirs, prometheus_client.Counter)):
        plain = kind("requests_total", "Requests.", registry=registry)
        by_outcome = kind("outcomes_total", "Requests, by outcome.", ("outcome", "tenant"), registry=registry)
        plain.inc()
        plain.inc(2.5)
        for outcome in ("finished", "failed", "finished"):
            by_outcome.labels(outcome, "a").inc()
    assert told(ours) == told(theirs)
