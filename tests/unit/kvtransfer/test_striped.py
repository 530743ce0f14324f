"""A read that is divided among connections keeps every law of a read: what one stripe does, all of them end by."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from disaggregated.errors import LeaseExpired, PeerLost, TransferError
from kvtransfer.deadline import Deadline
from kvtransfer.transport import BlockRead, LinkCounters, ReadStop, ReadStopped
from kvtransfer.transports import tcp
from kvtransfer.transports.striped import STRIPE_BYTES_MIN, StripedLink, stripes

BLOCK_BYTES = STRIPE_BYTES_MIN // 4


def order(num_blocks: int) -> BlockRead:
    blocks = tuple(range(num_blocks))
    return BlockRead(lease_key=b"k" * 16, epoch=7, source=blocks, into=blocks[::-1], layers=range(1))


@dataclasses.dataclass
class Recorder:
    """A PeerLink that does with each read what it is told, on the thread that reads."""

    behave: Callable[[BlockRead, ReadStop], None] = lambda read, stop: None
    reads: list[BlockRead] = dataclasses.field(default_factory=list)
    running: int = 0
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    drained: int = 0
    closed: int = 0
    transport: str = "FAKE"
    can_stop: bool = True

    def read(self, read: BlockRead, *, stop: ReadStop, deadline: Deadline) -> None:
        with self.lock:
            self.reads.append(read)
            self.running += 1
        try:
            stop.check()
            self.behave(read, stop)
        finally:
            with self.lock:
                self.running -= 1

    def drain(self, *, deadline: Deadline) -> None:
        self.drained += 1

    def close(self, *, deadline: Deadline) -> None:
        self.closed += 1

    def statistics(self) -> LinkCounters:
        return LinkCounters()


def until_stopped(stop: ReadStop) -> None:
    """As a read that waits for its peer: ends within moments of a stop, and fails the test without one."""
    end_s = time.monotonic() + 5
    while not stop.is_requested:
        assert time.monotonic() < end_s, "nobody stopped this stripe"
        threading.Event().wait(0.001)
    stop.check()


@pytest.fixture
def link() -> Iterator[StripedLink]:
    made = StripedLink(Recorder(), num_streams=4, block_bytes=BLOCK_BYTES)
    yield made
    made.close(deadline=Deadline.after(20))


def recorder_of(link: StripedLink) -> Recorder:
    recorder = link._link
    assert isinstance(recorder, Recorder)
    return recorder


def read(link: StripedLink, num_blocks: int, stop: ReadStop | None = None) -> None:
    link.read(order(num_blocks), stop=stop or ReadStop(), deadline=Deadline.after(20))


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("num_blocks", [8, 9, 13, 100])
def test_stripes_are_the_read_in_order_and_of_almost_one_size(num_blocks: int, count: int) -> None:
    whole = order(num_blocks)
    parts = stripes(whole, count)
    assert [block for part in parts for block in part.source] == list(whole.source)
    assert [block for part in parts for block in part.into] == list(whole.into)
    assert {(part.lease_key, part.epoch, part.layers) for part in parts} == {(whole.lease_key, 7, range(1))}
    sizes = [len(part.source) for part in parts]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(("num_blocks", "num_stripes"), [(1, 1), (7, 1), (8, 2), (15, 3), (16, 4), (100, 4)])
def test_a_read_is_divided_when_each_stripe_is_worth_a_thread(
    link: StripedLink, num_blocks: int, num_stripes: int
) -> None:
    read(link, num_blocks)
    assert len(recorder_of(link).reads) == num_stripes
    counters = link.statistics()
    assert (counters.reads_total, counters.bytes_total) == (1, num_blocks * BLOCK_BYTES)
    assert (counters.failures_total, link.transport, link.can_stop) == (0, "FAKE", True)


def test_reads_beside_each_other_are_not_divided(link: StripedLink) -> None:
    recorder, begun, go_on = recorder_of(link), threading.Event(), threading.Event()

    def wait(read: BlockRead, stop: ReadStop) -> None:
        begun.set()
        assert go_on.wait(20)

    recorder.behave = wait
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        first = threads.submit(read, link, 1)
        assert begun.wait(20)
        recorder.behave = lambda read, stop: None
        read(link, 100)
        go_on.set()
        first.result(20)
    assert len(recorder.reads) == 2


def test_the_first_stripe_to_fail_stops_the_others_and_is_what_is_raised(link: StripedLink) -> None:
    def fail(read: BlockRead, stop: ReadStop) -> None:
        if 50 in read.source:
            raise LeaseExpired("over")
        until_stopped(stop)

    recorder_of(link).behave = fail
    stop = ReadStop()
    with pytest.raises(LeaseExpired, match="over"):
        read(link, 100, stop)
    assert not stop.is_requested, "it was no stop of the caller's"
    assert recorder_of(link).running == 0
    assert link.statistics().failures_total == 1


def test_a_read_ends_only_when_its_last_stripe_has(link: StripedLink) -> None:
    lingering, go_on = threading.Event(), threading.Event()

    def behave(read: BlockRead, stop: ReadStop) -> None:
        if 0 in read.source:
            raise PeerLost("gone")
        lingering.set()
        assert go_on.wait(20)

    recorder_of(link).behave = behave
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        reading = threads.submit(read, link, 100)
        assert lingering.wait(20)
        assert concurrent.futures.wait([reading], timeout=0.05).not_done, "a stripe can still write"
        go_on.set()
        with pytest.raises(PeerLost):
            reading.result(20)


def test_a_stop_reaches_every_stripe(link: StripedLink) -> None:
    recorder, stop = recorder_of(link), ReadStop()
    recorder.behave = lambda read, stop: until_stopped(stop)
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        reading = threads.submit(read, link, 100, stop)
        stop.request()
        with pytest.raises(ReadStopped):
            reading.result(20)
    assert recorder.running == 0


def test_a_read_that_was_stopped_before_it_began_asks_for_nothing(link: StripedLink) -> None:
    stop = ReadStop()
    stop.request()
    with pytest.raises(ReadStopped):
        read(link, 100, stop)
    assert recorder_of(link).reads == []


def test_draining_and_closing_are_the_links(link: StripedLink) -> None:
    link.drain(deadline=Deadline.after(20))
    link.close(deadline=Deadline.after(20))
    recorder = recorder_of(link)
    assert (recorder.drained, recorder.closed) == (1, 1)


@pytest.mark.parametrize("told", ["", "0", "17", "two", "-1"])
def test_a_number_of_streams_that_cannot_be_is_refused_in_words(told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tcp.STREAMS_VARIABLE, told)
    with pytest.raises(TransferError, match="DISAGG_TCP_STREAMS must be 1 to 16"):
        tcp.streams_configured()
