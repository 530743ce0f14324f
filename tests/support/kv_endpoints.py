"""One transport between two pools, without gRPC: what the transport contract suite runs on."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator, Sequence

from disaggregated.kv_layout import KVLayout
from kvtransfer import registry
from kvtransfer.deadline import Deadline
from kvtransfer.region import Region
from kvtransfer.runs import Run
from kvtransfer.source.lease import Chunk, LeaseBook, Progress
from kvtransfer.transport import (
    BlockRead,
    DestinationTransport,
    EndpointStatistics,
    Offer,
    OurEnd,
    PeerLink,
    ReadGate,
    ReadStop,
    SourceEndpoint,
    SourceIdentity,
)
from tests.support.kv_pools import EPOCH, SMALL, regions

PROGRESS_TIMEOUT_S = 0.8
"""Tests wait for it; but a peer that gets no core for a while on a busy machine is not to be taken for lost."""
SLACK_S = 8.0
"""What a busy machine may add to what a test waits for."""
PATIENT_S = 20.0
"""The progress timeout where nobody is to wait for it: what ends within SLACK_S has not."""


class LeaseGate:
    """A real lease book with one transfer, in virtual time. While `answers` is clear, whoever asks waits."""

    def __init__(self, readable: Sequence[int], *, num_layers: int) -> None:
        self.book = LeaseBook(epoch=EPOCH, lease_s=10.0, num_layers=num_layers)
        self.book.open("t", now_s=0.0)
        ids = tuple(readable)
        self.book.publish("t", Chunk(first_block=0, block_ids=ids, checksums=ids, num_tokens=1), None, now_s=0.0)
        self.asked = threading.Event()
        self.answers = threading.Event()
        self.answers.set()

    @property
    def key(self) -> bytes:
        progress = self.book.progress("t", after=0)
        assert isinstance(progress, Progress)
        return progress.key

    def check_read(self, *, lease_key: bytes, epoch: int, blocks: Sequence[Run], layers: range, peer_id: str) -> None:
        self.asked.set()
        assert self.answers.wait(60), "nobody let the gate answer"
        self.book.check_read(lease_key=lease_key, epoch=epoch, blocks=blocks, layers=layers, peer_id=peer_id, now_s=0.0)


class GatedEndpoint:
    """A real endpoint, each read of which can be held up before its first byte."""

    def __init__(self, endpoint: SourceEndpoint) -> None:
        self._endpoint = endpoint
        self.name = endpoint.name
        self.asked = threading.Event()
        self.answers = threading.Event()
        self.answers.set()
        self._gate: ReadGate | None = None

    def start(self, gate: ReadGate) -> None:
        self._gate = gate
        self._endpoint.start(self)

    def check_read(self, *, lease_key: bytes, epoch: int, blocks: Sequence[Run], layers: range, peer_id: str) -> None:
        assert self._gate is not None
        self.asked.set()
        assert self.answers.wait(60), "nobody let the gate answer"
        self._gate.check_read(lease_key=lease_key, epoch=epoch, blocks=blocks, layers=layers, peer_id=peer_id)

    def describe(self) -> Offer:
        return self._endpoint.describe()

    def close(self, *, deadline: Deadline) -> None:
        self.answers.set()
        self._endpoint.close(deadline=deadline)

    def statistics(self) -> EndpointStatistics:
        return self._endpoint.statistics()


def make_endpoint(name: str, region: Region, layout: KVLayout, *, epoch: int = EPOCH) -> SourceEndpoint:
    return registry.load(name).make_endpoint(region, layout, epoch=epoch, host="127.0.0.1")


def make_transport(
    name: str, region: Region, layout: KVLayout, *, progress_timeout_s: float = PROGRESS_TIMEOUT_S
) -> DestinationTransport:
    us = OurEnd(region=region, layout=layout, peer_id="generation-0", progress_timeout_s=progress_timeout_s)
    return registry.load(name).make_transport(us)


@dataclasses.dataclass(slots=True)
class Pair:
    """Two pools of one layout and a link from the first into the second."""

    name: str
    layout: KVLayout
    source: Region
    into: Region
    gate: LeaseGate
    endpoint: SourceEndpoint
    transport: DestinationTransport
    identity: SourceIdentity
    link: PeerLink

    def order(self, source: Sequence[int], into: Sequence[int], *, layers: range | None = None) -> BlockRead:
        return BlockRead(
            lease_key=self.gate.key,
            epoch=EPOCH,
            source=tuple(source),
            into=tuple(into),
            layers=layers or range(self.layout.num_layers),
        )

    def read(self, read: BlockRead, *, stop: ReadStop | None = None, timeout_s: float = 20.0) -> None:
        self.link.read(read, stop=stop or ReadStop(), deadline=Deadline.after(timeout_s))

    def connect(self, *, offer: Offer | None = None, identity: SourceIdentity | None = None) -> PeerLink:
        return self.transport.connect(
            offer or self.endpoint.describe(), identity or self.identity, deadline=Deadline.after(20)
        )


@contextlib.contextmanager
def connected_pair(
    name: str,
    layout: KVLayout = SMALL,
    *,
    readable: Sequence[int] | None = None,
    epoch: int = EPOCH,
    progress_timeout_s: float = PATIENT_S,
) -> Iterator[Pair]:
    """All blocks are readable unless told otherwise."""
    with regions(layout) as (source, into):
        gate = LeaseGate(range(layout.num_blocks) if readable is None else readable, num_layers=layout.num_layers)
        endpoint = make_endpoint(name, source, layout, epoch=epoch)
        transport = make_transport(name, into, layout, progress_timeout_s=progress_timeout_s)
        identity = SourceIdentity(instance_id="context-0", epoch=epoch, layout=layout)
        endpoint.start(gate)
        try:
            link = transport.connect(endpoint.describe(), identity, deadline=Deadline.after(20))
            try:
                yield Pair(name, layout, source, into, gate, endpoint, transport, identity, link)
            finally:
                gate.answers.set()
                link.close(deadline=Deadline.after(20))
        finally:
            endpoint.close(deadline=Deadline.after(20))
