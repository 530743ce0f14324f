"""The contract of a transport's two ends. Every transport passes this one suite."""

import concurrent.futures
import dataclasses
import gc
import os
import threading
import time
from collections.abc import Iterator

import pytest

from disaggregated.errors import LeaseExpired, PeerLost, StaleEpoch, TransferError, TransferTimeout, WrongSecret
from kvtransfer.deadline import Deadline
from kvtransfer.transport import Offer, ReadStop, ReadStopped
from tests.support.kv_endpoints import PROGRESS_TIMEOUT_S, SLACK_S, Pair, connected_pair, make_endpoint
from tests.support.kv_pools import EPOCH, LARGE, SMALL, blocks_of, fill


@pytest.fixture
def pair(transport_name: str) -> Iterator[Pair]:
    with connected_pair(transport_name) as made:
        yield made


@pytest.fixture
def impatient(transport_name: str) -> Iterator[Pair]:
    with connected_pair(transport_name, progress_timeout_s=PROGRESS_TIMEOUT_S) as made:
        yield made


def test_scattered_blocks_land_in_the_order_they_were_asked_for(pair: Pair) -> None:
    source, into = [5, 6, 7, 1, 30, 29], [3, 2, 1, 20, 21, 22]
    pair.read(pair.order(source, into))
    assert (blocks_of(pair.into, SMALL, into) == blocks_of(pair.source, SMALL, source)).all()
    others = sorted(set(range(SMALL.num_blocks)) - set(into))
    assert not blocks_of(pair.into, SMALL, others).any()


def test_some_layers_of_a_block_can_be_read_alone(pair: Pair) -> None:
    pair.read(pair.order([4], [9], layers=range(1, 2)))
    landed = blocks_of(pair.into, SMALL, [9])
    assert (landed[1] == blocks_of(pair.source, SMALL, [4])[1]).all()
    assert not landed[[0, 2]].any()


def test_a_whole_pool_is_read_in_one_go(transport_name: str) -> None:
    with connected_pair(transport_name, LARGE) as pair:
        every = range(LARGE.num_blocks)
        pair.read(pair.order(every, every))
        assert pair.into.buffer == pair.source.buffer
        counters = pair.link.statistics()
        assert (counters.reads_total, counters.bytes_total) == (1, LARGE.pool_bytes)


def test_every_block_can_be_alone(transport_name: str) -> None:
    with connected_pair(transport_name, LARGE) as pair:
        source = list(range(0, LARGE.num_blocks, 2))
        pair.read(pair.order(source, source[::-1]))
        assert (blocks_of(pair.into, LARGE, source[::-1]) == blocks_of(pair.source, LARGE, source)).all()


def test_many_reads_at_once_through_one_link_do_not_mix(transport_name: str) -> None:
    with connected_pair(transport_name, LARGE) as pair, concurrent.futures.ThreadPoolExecutor(8) as threads:
        strides = [list(range(first, LARGE.num_blocks, 8)) for first in range(8)]
        for _ in threads.map(lambda blocks: pair.read(pair.order(blocks, blocks)), strides):
            pass
        assert pair.into.buffer == pair.source.buffer
        assert pair.endpoint.statistics().connections_open <= 8 * 2, "one a read, two where one is divided"


def test_a_link_keeps_its_connection_from_read_to_read(pair: Pair) -> None:
    for block in range(10):
        pair.read(pair.order([block], [block]))
    assert pair.endpoint.statistics().connections_open == 1
    assert pair.link.statistics().reads_total == 10


def test_two_sources_send_into_one_pool_at_once(transport_name: str) -> None:
    with connected_pair(transport_name, LARGE) as one, connected_pair(transport_name, LARGE) as other:
        fill(other.source, seed=2)
        link = one.transport.connect(other.endpoint.describe(), other.identity, deadline=Deadline.after(20))
        low, high = range(96), range(96, 192)
        theirs = other.order(high, high)
        with concurrent.futures.ThreadPoolExecutor(2) as threads:
            second = threads.submit(link.read, theirs, stop=ReadStop(), deadline=Deadline.after(20))
            one.read(one.order(low, low))
            second.result(20)
        link.close(deadline=Deadline.after(20))
        assert (blocks_of(one.into, LARGE, low) == blocks_of(one.source, LARGE, low)).all()
        assert (blocks_of(one.into, LARGE, high) == blocks_of(other.source, LARGE, high)).all()


def test_what_is_written_after_the_link_was_made_is_what_is_read(pair: Pair) -> None:
    fill(pair.source, seed=9)
    pair.read(pair.order([1], [1]))
    assert (blocks_of(pair.into, SMALL, [1]) == blocks_of(pair.source, SMALL, [1])).all()


# Refusals: no byte lands, and the next good read goes through.


def test_a_wrong_lease_key_reads_nothing(pair: Pair) -> None:
    with pytest.raises(LeaseExpired):
        pair.read(dataclasses.replace(pair.order([1], [1]), lease_key=b"x" * 16))
    assert not any(pair.into.buffer)
    assert pair.endpoint.statistics().reads_refused == 1
    pair.read(pair.order([1], [1]))


def test_a_wrong_epoch_reads_nothing(pair: Pair) -> None:
    with pytest.raises(StaleEpoch, match=f"epoch {EPOCH}"):
        pair.read(dataclasses.replace(pair.order([1], [1]), epoch=EPOCH - 1))
    assert not any(pair.into.buffer)


def test_a_block_that_was_not_published_reads_nothing(transport_name: str) -> None:
    with connected_pair(transport_name, readable=[3, 4, 6]) as pair:
        with pytest.raises(TransferError, match="not published"):
            pair.read(pair.order([3, 4, 5, 6], [0, 1, 2, 3]))
        assert not any(pair.into.buffer)
        pair.read(pair.order([3, 4, 6], [0, 1, 2]))


def test_an_endpoint_answers_only_who_was_offered_it(pair: Pair) -> None:
    offer = pair.endpoint.describe()
    place, _ = offer.split()
    forged = Offer(name=offer.name, address=f"{place}/{'0' * 32}", host_key=offer.host_key)
    with pytest.raises(WrongSecret, match="secret"):
        pair.connect(offer=forged)
    assert pair.endpoint.statistics().connections_refused == 1


def test_an_endpoint_of_another_epoch_is_not_connected_to(pair: Pair) -> None:
    with pytest.raises(StaleEpoch):
        pair.connect(identity=dataclasses.replace(pair.identity, epoch=EPOCH + 1))


def test_a_pool_of_another_size_than_its_layout_is_not_connected_to(pair: Pair) -> None:
    larger = dataclasses.replace(SMALL, num_blocks=SMALL.num_blocks + 1)
    with pytest.raises(TransferError, match="bytes, its layout"):
        pair.connect(identity=dataclasses.replace(pair.identity, layout=larger))


@pytest.mark.parametrize("address", ["", "nonsense", "127.0.0.1:99999999/zz", "127.0.0.1:x/00"])
def test_an_offer_that_is_no_address_is_an_error_in_words(pair: Pair, address: str) -> None:
    with pytest.raises(TransferError):
        pair.connect(offer=Offer(name=pair.name, address=address))


# Stopping: a read is terminal when it has returned or raised.


def running_read(pair: Pair, threads: concurrent.futures.Executor, stop: ReadStop) -> concurrent.futures.Future[None]:
    """A read that the source has been asked for and does not answer yet."""
    pair.gate.answers.clear()
    reading = threads.submit(pair.read, pair.order([1], [1]), stop=stop)
    assert pair.gate.asked.wait(20)
    return reading


def test_a_stopped_read_ends_at_once_and_writes_nothing_when_the_answer_comes(pair: Pair) -> None:
    stop = ReadStop()
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        reading = running_read(pair, threads, stop)
        stop.request()
        with pytest.raises(ReadStopped):
            reading.result(SLACK_S)
        pair.gate.answers.set()
        pair.read(pair.order([2], [2]))
    assert not blocks_of(pair.into, SMALL, [1]).any()
    assert blocks_of(pair.into, SMALL, [2]).any()


def test_a_read_that_was_stopped_before_it_began_asks_for_nothing(pair: Pair) -> None:
    stop = ReadStop()
    stop.request()
    with pytest.raises(ReadStopped):
        pair.read(pair.order([1], [1]), stop=stop)
    assert not pair.gate.asked.is_set()


def test_a_drain_ends_running_reads_and_leaves_the_link_good(pair: Pair) -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        reading = running_read(pair, threads, ReadStop())
        pair.link.drain(deadline=Deadline.after(20))
        with pytest.raises(ReadStopped):
            reading.result(SLACK_S)
        pair.gate.answers.set()
        pair.read(pair.order([2], [2]))


def test_a_closed_link_reads_no_more(pair: Pair) -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        reading = running_read(pair, threads, ReadStop())
        pair.link.close(deadline=Deadline.after(20))
        with pytest.raises(TransferError):
            reading.result(SLACK_S)
    with pytest.raises(PeerLost, match="closed"):
        pair.read(pair.order([2], [2]))
    pair.link.close(deadline=Deadline.after(20))


# Peers that fall silent, go, or come back.


def test_a_source_that_answers_nothing_is_lost_after_the_progress_timeout(impatient: Pair) -> None:
    pair = impatient
    pair.gate.answers.clear()
    begin_s = time.monotonic()
    with pytest.raises(PeerLost, match="no byte"):
        pair.read(pair.order([1], [1]))
    assert PROGRESS_TIMEOUT_S * 0.9 <= time.monotonic() - begin_s < PROGRESS_TIMEOUT_S + SLACK_S


def test_a_deadline_before_the_progress_timeout_is_kept(pair: Pair) -> None:
    pair.gate.answers.clear()
    begin_s = time.monotonic()
    with pytest.raises((PeerLost, TransferTimeout)):
        pair.read(pair.order([1], [1]), timeout_s=0.05)
    assert time.monotonic() - begin_s < SLACK_S
    with pytest.raises(TransferTimeout):
        pair.read(pair.order([1], [1]), timeout_s=0.0)


def test_a_source_that_closes_is_lost_at_once(pair: Pair) -> None:
    pair.endpoint.close(deadline=Deadline.after(20))
    begin_s = time.monotonic()
    with pytest.raises(PeerLost):
        pair.read(pair.order([1], [1]))
    with pytest.raises(PeerLost):
        pair.connect()
    assert time.monotonic() - begin_s < SLACK_S


def test_a_source_that_closes_while_it_is_asked_ends_the_read(pair: Pair) -> None:
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        reading = running_read(pair, threads, ReadStop())
        closing = threads.submit(pair.endpoint.close, deadline=Deadline.after(20))
        with pytest.raises(PeerLost):
            reading.result(SLACK_S)
        pair.gate.answers.set()
        closing.result(20)


def test_a_new_incarnation_does_not_serve_the_old_ones_reader(pair: Pair) -> None:
    pair.endpoint.close(deadline=Deadline.after(20))
    again = make_endpoint(pair.name, pair.source, SMALL, epoch=EPOCH + 1)
    again.start(pair.gate)
    with pytest.raises(StaleEpoch):
        pair.connect(offer=again.describe())
    link = pair.connect(offer=again.describe(), identity=dataclasses.replace(pair.identity, epoch=EPOCH + 1))
    link.close(deadline=Deadline.after(20))
    again.close(deadline=Deadline.after(20))


def test_an_endpoint_leaves_no_thread_and_no_descriptor(transport_name: str) -> None:
    def open_descriptors() -> int:
        gc.collect()  # Our own pool is mapped until its last view has gone.
        return len(os.listdir("/proc/self/fd"))

    def connect_and_read() -> None:
        with connected_pair(transport_name) as pair:
            pair.read(pair.order([1, 3], [1, 3]))
            pair.connect().close(deadline=Deadline.after(20))

    connect_and_read()
    before = open_descriptors(), threading.active_count()
    for _ in range(5):
        connect_and_read()
    end_s = time.monotonic() + SLACK_S
    while threading.active_count() > before[1] and time.monotonic() < end_s:
        time.sleep(0.01)  # A thread that has ended is counted a moment longer.
    assert open_descriptors() <= before[0]
    assert threading.active_count() <= before[1]
