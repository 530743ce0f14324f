"""TCP divides a large read among connections: the same bytes, the same checksums, the same ends."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import time

import pytest

from disaggregated.errors import PeerLost
from kvtransfer.checksum import block_checksums, block_sums
from kvtransfer.deadline import Deadline
from kvtransfer.transport import ReadStop, ReadStopped
from kvtransfer.transports import tcp
from tests.support.kv_endpoints import PROGRESS_TIMEOUT_S, SLACK_S, Pair, connected_pair
from tests.support.kv_pools import LARGE, blocks_of

EVERY = tuple(range(LARGE.num_blocks))


@pytest.mark.parametrize("streams", [1, 2, 4])
def test_checksums_of_stripes_are_the_checksums_of_the_read(streams: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tcp.STREAMS_VARIABLE, str(streams))
    with connected_pair("TCP", LARGE) as pair:
        source, into = list(range(0, LARGE.num_blocks, 2)), list(range(LARGE.num_blocks - 2, -1, -2))
        sums = block_sums(len(source), LARGE)
        pair.read(dataclasses.replace(pair.order(source, into), sums=sums))
        assert sums.values() == block_checksums(pair.source.buffer, LARGE, source)
        assert (blocks_of(pair.into, LARGE, into) == blocks_of(pair.source, LARGE, source)).all()
        assert pair.endpoint.statistics().connections_open == streams


def divided_read(pair: Pair, threads: concurrent.futures.Executor, stop: ReadStop) -> concurrent.futures.Future[None]:
    """Both stripes have been asked for, and neither is answered yet."""
    pair.gate.answers.clear()
    reading = threads.submit(pair.read, pair.order(EVERY, EVERY), stop=stop)
    assert pair.gate.asked.wait(20)
    return reading


def test_a_stop_ends_every_stripe_and_no_byte_comes_after() -> None:
    stop = ReadStop()
    with (
        connected_pair("TCP", LARGE) as pair,
        concurrent.futures.ThreadPoolExecutor(1) as threads,
    ):
        reading = divided_read(pair, threads, stop)
        stop.request()
        with pytest.raises(ReadStopped):
            reading.result(SLACK_S)
        pair.gate.answers.set()
        pair.read(pair.order([1], [2]))
        assert not blocks_of(pair.into, LARGE, [1, 3, LARGE.num_blocks - 1]).any()


def test_a_drain_ends_every_stripe() -> None:
    with connected_pair("TCP", LARGE) as pair, concurrent.futures.ThreadPoolExecutor(1) as threads:
        reading = divided_read(pair, threads, ReadStop())
        pair.link.drain(deadline=Deadline.after(20))
        with pytest.raises(ReadStopped):
            reading.result(SLACK_S)
        pair.gate.answers.set()
        pair.read(pair.order(EVERY, EVERY))
        assert pair.into.buffer == pair.source.buffer


def test_a_source_that_answers_no_stripe_is_lost_after_the_progress_timeout() -> None:
    with (
        connected_pair("TCP", LARGE, progress_timeout_s=PROGRESS_TIMEOUT_S) as pair,
        concurrent.futures.ThreadPoolExecutor(1) as threads,
    ):
        begin_s = time.monotonic()
        with pytest.raises(PeerLost, match="no byte"):
            divided_read(pair, threads, ReadStop()).result(SLACK_S)
        assert time.monotonic() - begin_s >= PROGRESS_TIMEOUT_S * 0.9


def test_a_source_that_closes_ends_every_stripe() -> None:
    with connected_pair("TCP", LARGE) as pair, concurrent.futures.ThreadPoolExecutor(2) as threads:
        reading = divided_read(pair, threads, ReadStop())
        closing = threads.submit(pair.endpoint.close, deadline=Deadline.after(20))
        with pytest.raises(PeerLost):
            reading.result(20)
        pair.gate.answers.set()
        closing.result(20)
