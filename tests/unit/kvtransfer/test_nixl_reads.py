"""What NIXL is asked for, and how reads that share an agent end together. A fake agent stands for the library."""

from __future__ import annotations

import concurrent.futures
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disaggregated.errors import PeerLost
from disaggregated.kv_layout import KVLayout
from kvtransfer.deadline import Deadline
from kvtransfer.region import Region
from kvtransfer.transport import BlockRead, OurEnd, ReadStop, ReadStopped
from kvtransfer.transports.frame_socket import FrameSocket
from kvtransfer.transports.nixl_agent import PLUGIN_VARIABLE, Descriptors, chosen_plugin
from kvtransfer.transports.nixl_reads import (
    BATCH_BYTES,
    BATCH_DESCRIPTORS_MAX,
    IN_FLIGHT_BYTES_MAX,
    PeerMemory,
    SharedAgent,
    batches,
)
from tests.support.kv_pools import LARGE, SMALL

PEER_ADDRESS = 1 << 40


def order(source: list[int], into: list[int], layout: KVLayout) -> BlockRead:
    return BlockRead(lease_key=bytes(16), epoch=1, source=source, into=into, layers=range(layout.num_layers))


class FakeAgent:
    """Transfers end when `lands` is set; fails all of them when `is_lost`."""

    def __init__(self) -> None:
        self.lands = threading.Event()
        self.begun = threading.Semaphore(0)
        self.is_lost = False
        self.is_closed = False
        self.bytes_in_flight = 0
        self.bytes_in_flight_max = 0
        self._lock = threading.Lock()

    def read(self, peer: str, source: Descriptors, into: Descriptors) -> int:
        assert not self.is_closed
        num_bytes = int(into[:, 1].sum())
        with self._lock:
            self.bytes_in_flight += num_bytes
            self.bytes_in_flight_max = max(self.bytes_in_flight_max, self.bytes_in_flight)
        self.begun.release()
        return num_bytes

    def has_ended(self, transfer: int) -> bool:
        assert not self.is_closed, "a read looked at an agent that has ended"
        if self.is_lost:
            raise PeerLost("it is gone")
        if not self.lands.is_set():
            return False
        with self._lock:
            self.bytes_in_flight -= transfer
        return True

    def forget(self, transfer: int) -> None:
        assert not self.is_closed, "a handle was given back to an agent that has ended"

    def close(self) -> None:
        assert not self.is_closed, "it was closed twice"
        self.is_closed = True


@pytest.fixture
def region() -> Iterator[Region]:
    with Region.allocate(LARGE.pool_bytes) as made:
        yield made


@pytest.fixture
def controls() -> Iterator[list[tuple[FrameSocket, socket.socket]]]:
    """Control sockets of two reads, and their far ends."""
    pairs = [socket.socketpair() for _ in range(2)]
    made = [(FrameSocket(near, progress_timeout_s=0.2), far) for near, far in pairs]
    for connection, _ in made:
        connection.limit_waits(Deadline.after(20))
    yield made
    for connection, far in made:
        connection.close()
        far.close()


def shared(agent: Any, region: Region) -> SharedAgent:
    peer = PeerMemory(name="peer", base_address=PEER_ADDRESS, layout=LARGE)
    return SharedAgent(agent, peer, OurEnd(region=region, layout=LARGE, peer_id="us"))


WHOLE = order(list(range(LARGE.num_blocks)), list(range(LARGE.num_blocks)), LARGE)


@given(st.permutations(range(SMALL.num_blocks)), st.permutations(range(SMALL.num_blocks)), st.integers(1, 32))
def test_batches_name_each_byte_once_on_both_sides(source: list[int], into: list[int], count: int) -> None:
    read = order(source[:count], into[:count], SMALL)
    peer = PeerMemory(name="peer", base_address=PEER_ADDRESS, layout=SMALL)
    with Region.allocate(SMALL.pool_bytes) as region:
        asked = {}
        for theirs, ours in batches(read, region, SMALL, peer):
            for (from_address, size, _), (to_address, ours_size, _) in zip(theirs.tolist(), ours.tolist(), strict=True):
                assert size == ours_size
                for at in range(0, size, SMALL.block_bytes):
                    asked[to_address + at] = from_address + at
        wanted = {
            region.base_address + SMALL.offset(layer, there): PEER_ADDRESS + SMALL.offset(layer, here)
            for layer in read.layers
            for here, there in zip(read.source, read.into, strict=True)
        }
        assert asked == wanted


def test_no_batch_is_more_than_its_bound(region: Region) -> None:
    peer = PeerMemory(name="peer", base_address=PEER_ADDRESS, layout=LARGE)
    for read in (WHOLE, order(list(range(0, LARGE.num_blocks, 2)), list(range(0, LARGE.num_blocks, 2)), LARGE)):
        sizes = [(int(into[:, 1].sum()), len(into)) for _, into in batches(read, region, LARGE, peer)]
        assert max(size for size, _ in sizes) <= BATCH_BYTES
        assert max(count for _, count in sizes) <= BATCH_DESCRIPTORS_MAX
        assert sum(size for size, _ in sizes) == len(read.source) * LARGE.num_layers * LARGE.block_bytes


def test_a_block_of_more_than_a_batch_goes_alone() -> None:
    layout = KVLayout(num_layers=2, num_kv_heads=16, head_dim=256, block_size=128, dtype="float32", num_blocks=3)
    assert layout.block_bytes > BATCH_BYTES
    peer = PeerMemory(name="peer", base_address=PEER_ADDRESS, layout=layout)
    with Region.allocate(layout.pool_bytes) as region:
        found = list(batches(order([0, 1], [1, 2], layout), region, layout, peer))
    assert [len(into) for _, into in found] == [1, 1, 1, 1]


def test_reads_at_once_share_what_may_be_in_flight(
    region: Region, controls: list[tuple[FrameSocket, socket.socket]]
) -> None:
    agent = FakeAgent()
    both = shared(agent, region)
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        reads = [threads.submit(both.read, WHOLE, control, stop=ReadStop()) for control, _ in controls]
        for _ in range(IN_FLIGHT_BYTES_MAX // BATCH_BYTES):
            assert agent.begun.acquire(timeout=20)
        agent.lands.set()
        for read in reads:
            read.result(10)
    assert BATCH_BYTES < agent.bytes_in_flight_max <= IN_FLIGHT_BYTES_MAX
    assert not agent.is_closed
    both.end()
    assert agent.is_closed


def test_a_peer_that_moves_nothing_ends_the_agent_before_any_read_of_it_raises(
    region: Region, controls: list[tuple[FrameSocket, socket.socket]]
) -> None:
    agent = FakeAgent()
    both = shared(agent, region)

    def reads(control: FrameSocket) -> bool:
        with pytest.raises(PeerLost):
            both.read(WHOLE, control, stop=ReadStop())
        return agent.is_closed

    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        assert list(threads.map(reads, [control for control, _ in controls])) == [True, True]
    assert both.is_doomed
    with pytest.raises(PeerLost, match="another read"):
        both.read(WHOLE, controls[0][0], stop=ReadStop())
    both.end()


def test_a_lost_transfer_ends_the_agent_at_once(
    region: Region, controls: list[tuple[FrameSocket, socket.socket]]
) -> None:
    agent = FakeAgent()
    agent.is_lost = True
    with pytest.raises(PeerLost, match="gone"):
        shared(agent, region).read(WHOLE, controls[0][0], stop=ReadStop())
    assert agent.is_closed


def test_a_source_that_hangs_up_ends_the_read(
    region: Region, controls: list[tuple[FrameSocket, socket.socket]]
) -> None:
    agent = FakeAgent()
    control, far = controls[0]
    far.close()
    with pytest.raises(PeerLost):
        shared(agent, region).read(WHOLE, control, stop=ReadStop())
    assert agent.is_closed


def test_a_read_that_is_stopped_lets_what_is_in_flight_arrive_and_the_agent_live(
    region: Region, controls: list[tuple[FrameSocket, socket.socket]]
) -> None:
    agent = FakeAgent()
    both = shared(agent, region)
    control, _ = controls[0]
    stop = ReadStop()
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        reading = threads.submit(both.read, WHOLE, control, stop=stop)
        assert agent.begun.acquire(timeout=20)
        stop.request()
        agent.lands.set()
        with pytest.raises(ReadStopped):
            reading.result(10)
    assert not agent.is_closed
    assert agent.bytes_in_flight == 0
    both.end()


@pytest.mark.parametrize(
    ("value", "plugin"), [("", "UCX"), ("UCX", "UCX"), ("LIBFABRIC", "LIBFABRIC"), ("MOONCAKE", "UCX")]
)
def test_the_plugin_is_what_the_environment_asks_for_or_ucx(
    monkeypatch: pytest.MonkeyPatch, value: str, plugin: str
) -> None:
    monkeypatch.setenv(PLUGIN_VARIABLE, value)
    assert chosen_plugin() == plugin
