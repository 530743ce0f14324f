from __future__ import annotations

import asyncio
import logging

import pytest

from orchestrator.metrics import Metrics
from orchestrator.totals_log import totals_logged


async def test_totals_are_logged_while_the_block_runs_and_not_after(caplog: pytest.LogCaptureFixture) -> None:
    read_twice = asyncio.Event()
    num_reads = 0

    def read() -> dict[str, float]:
        nonlocal num_reads
        num_reads += 1
        if num_reads == 2:
            read_twice.set()
        return {"requests": num_reads}

    with caplog.at_level(logging.INFO):
        async with totals_logged(read, 0.001):
            await read_twice.wait()
    at_the_end = num_reads
    await asyncio.sleep(0)
    assert num_reads == at_the_end >= 2
    assert any("totals" in record.getMessage() for record in caplog.records)


async def test_an_interval_of_0_reads_nothing() -> None:
    def read() -> dict[str, float]:
        raise AssertionError("it was read")

    async with totals_logged(read, 0):
        await asyncio.sleep(0)


def test_the_totals_are_the_counters_without_labels() -> None:
    metrics = Metrics([])
    metrics.request_began(stream=True)
    totals = metrics.totals()
    assert totals["total_requests_total"] == totals["stream_requests_total"] == 1
    assert totals["disagg_generation_tokens_total"] == 0
    assert not any(name.endswith("_created") for name in totals)
