from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from orchestrator.workers.merge import merged


def scrape(requests: int, *, took_s: float, queue: int, preempted: int = 7) -> bytes:
    registry = CollectorRegistry()
    Counter("disagg_requests_total", "That ended.", ["outcome"], registry=registry).labels("finished").inc(requests)
    Histogram("disagg_ttft_seconds", "Seconds.", buckets=(0.1, 1.0), registry=registry).observe(took_s)
    Gauge("disagg_queue_depth", "That wait.", registry=registry).set(queue)
    labels = {"role": "generation", "instance": "g-0"}
    Gauge("disagg_blocks_free", "Free.", list(labels), registry=registry).labels(**labels).set(100)
    Counter("disagg_sequences_preempted", "Times.", list(labels), registry=registry).labels(**labels).inc(preempted)
    return generate_latest(registry)


def values(text: bytes) -> dict[tuple[str, ...], float]:
    return {
        (sample.name, *(sample.labels[name] for name in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def test_what_each_worker_counts_is_added_and_what_servers_tell_all_of_them_is_not() -> None:
    found = values(merged([scrape(3, took_s=0.05, queue=2), scrape(5, took_s=0.5, queue=1, preempted=8)]))
    assert found["disagg_requests_total", "finished"] == 8
    assert found["disagg_queue_depth",] == 3
    assert found["disagg_ttft_seconds_count",] == 2
    assert found["disagg_ttft_seconds_sum",] == pytest.approx(0.55)
    assert found["disagg_ttft_seconds_bucket", "0.1"] == 1
    assert found["disagg_ttft_seconds_bucket", "+Inf"] == 2
    assert found["disagg_blocks_free", "g-0", "generation"] == 100
    assert found["disagg_sequences_preempted_total", "g-0", "generation"] == 8, "the newer of two heartbeats"


def test_one_scrape_alone_stays_what_it_was() -> None:
    alone = scrape(3, took_s=0.05, queue=2)
    assert values(merged([alone])) == values(alone)


def test_what_only_one_worker_has_is_kept() -> None:
    registry = CollectorRegistry()
    Counter("disagg_errors_answered_total", "Errors.", ["status"], registry=registry).labels("503").inc()
    found = values(merged([scrape(1, took_s=0.1, queue=0), generate_latest(registry)]))
    assert found["disagg_errors_answered_total", "503"] == 1
    assert found["disagg_requests_total", "finished"] == 1
