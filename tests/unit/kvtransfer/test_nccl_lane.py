"""Two gloo lanes in one process: they find each other by what they are told, and each ends when it is closed."""

import concurrent.futures
import contextlib
import threading
import time
from collections.abc import Iterator

import pytest
from torch import distributed

from disaggregated.errors import PeerLost, TransferError, TransferTimeout
from kvtransfer.deadline import Deadline
from kvtransfer.transports import nccl_lane
from kvtransfer.transports.nccl_lane import ADDRESS_BYTES_MAX, GlooLane, _Addresses

SOON_S = 20.0


def soon() -> Deadline:
    return Deadline.after(SOON_S)


@contextlib.contextmanager
def lanes() -> Iterator[tuple[GlooLane, GlooLane]]:
    """A source's and a destination's, introduced to each other."""
    source, into = GlooLane("127.0.0.1", rank=0), GlooLane("127.0.0.1", rank=1)
    try:
        source.connect(into.address(deadline=soon()), deadline=soon())
        into.connect(source.address(deadline=soon()), deadline=soon())
        yield source, into
    finally:
        with concurrent.futures.ThreadPoolExecutor(2) as threads:
            assert all(threads.map(GlooLane.close, (source, into)))
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("kv-NCCL")]


def test_messages_arrive_whole_and_in_order() -> None:
    arrived = [bytearray(100_000) for _ in range(4)]
    with lanes() as (source, into):
        receives = [into.receive(memoryview(buffer)) for buffer in arrived]
        sends = [source.send(memoryview(bytearray([number]) * 100_000)) for number in range(4)]
        for transit in (*receives, *sends):
            transit.wait_alone(soon())
    assert [bytes(buffer) for buffer in arrived] == [bytes([number]) * 100_000 for number in range(4)]


def test_torchs_own_group_is_not_touched() -> None:
    with lanes() as (source, into):
        receive = into.receive(memoryview(bytearray(8)))
        source.send(memoryview(bytearray(8))).wait_alone(soon())
        receive.wait_alone(soon())
        assert not distributed.is_initialized()


def test_a_lane_that_closes_ends_its_own_receive_and_writes_nothing_more() -> None:
    buffer = bytearray(1 << 20)
    with lanes() as (source, into):
        first = into.receive(memoryview(bytearray(8)))
        source.send(memoryview(bytearray(8))).wait_alone(soon())
        first.wait_alone(soon())
        waiting = into.receive(memoryview(buffer))
        begin_s = time.monotonic()
        assert into.close()
        assert time.monotonic() - begin_s < SOON_S
        with pytest.raises(PeerLost, match="gloo"):
            waiting.wait_alone(soon())
        with pytest.raises(PeerLost):
            source.send(memoryview(bytearray(b"x") * (1 << 20))).wait_alone(soon())
    assert not any(buffer)


def test_a_source_that_closes_ends_the_receive_of_its_peer() -> None:
    with lanes() as (source, into):
        first = into.receive(memoryview(bytearray(8)))
        source.send(memoryview(bytearray(8))).wait_alone(soon())
        first.wait_alone(soon())
        waiting = into.receive(memoryview(bytearray(8)))
        source.close()
        with pytest.raises(PeerLost):
            waiting.wait_alone(soon())


def test_a_lane_whose_peer_never_came_closes_at_once() -> None:
    begin_s = time.monotonic()
    lane = GlooLane("127.0.0.1", rank=0)
    assert lane.address(deadline=soon())
    assert lane.close()
    assert lane.close()
    assert time.monotonic() - begin_s < SOON_S


def test_an_address_that_is_none_is_refused() -> None:
    lane = GlooLane("127.0.0.1", rank=1)
    for address in (b"", b"x" * (ADDRESS_BYTES_MAX + 1)):
        with pytest.raises(TransferError, match="gloo address"):
            lane.connect(address, deadline=soon())
    lane.close()


def test_a_host_that_is_not_ours_is_an_error_in_words() -> None:
    lane = GlooLane("203.0.113.1", rank=0)
    begin_s = time.monotonic()
    with pytest.raises(TransferError, match=r"gloo does not listen on 203\.0\.113\.1: \w+"):
        assert lane.address(deadline=soon())
    assert time.monotonic() - begin_s < SOON_S
    lane.close()


def test_a_peer_that_tells_nonsense_is_lost() -> None:
    lane = GlooLane("127.0.0.1", rank=1)
    lane.connect(b"nonsense", deadline=soon())
    with pytest.raises(PeerLost, match="NCCL"):
        lane.receive(memoryview(bytearray(8))).wait_alone(soon())
    lane.close()


def test_the_store_answers_with_what_each_end_has_told() -> None:
    store = _Addresses()
    store.set("0/0", b"ours")
    store.tell(b"theirs")
    assert (store.get("0/0"), store.get("0/1")) == (b"ours", b"theirs")
    assert store.ours(Deadline.after(0)) == b"ours"


def test_whoever_waits_at_a_store_that_closes_is_told() -> None:
    store = _Addresses()
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(store.get, "0/1")
        store.close()
        with pytest.raises(RuntimeError, match="closed"):
            waiting.result(20)


def test_a_deadline_that_passes_before_gloo_listens_is_told_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    may_listen = threading.Event()
    monkeypatch.setattr(nccl_lane, "_make_group", lambda *_: may_listen.wait(10))
    lane = GlooLane("127.0.0.1", rank=0)
    with pytest.raises(TransferTimeout, match="gloo to listen"):
        lane.address(deadline=Deadline.after(0.0))
    may_listen.set()
    lane.close()
