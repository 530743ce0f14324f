"""A real transport that counts the bytes of the reads that are under way, as nobody inside would."""

from __future__ import annotations

import threading

from kvtransfer.deadline import Deadline
from kvtransfer.transport import (
    BlockRead,
    DestinationTransport,
    LinkCounters,
    Offer,
    PeerLink,
    ReadStop,
    SourceIdentity,
)


class UnderWay:
    """Shared by everything that reads into one process."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self.high_water_bytes = 0
        self.num_reads = 0
        self._lock = threading.Lock()

    def add(self, num_bytes: int) -> None:
        with self._lock:
            self.num_reads += num_bytes > 0
            self.num_bytes += num_bytes
            self.high_water_bytes = max(self.high_water_bytes, self.num_bytes)


class CountingTransport:
    """Implements `DestinationTransport` by another one."""

    def __init__(self, transport: DestinationTransport, under_way: UnderWay) -> None:
        self._transport = transport
        self._under_way = under_way
        self.name = transport.name

    def connect(self, offer: Offer, source: SourceIdentity, *, deadline: Deadline) -> PeerLink:
        link = self._transport.connect(offer, source, deadline=deadline)
        return _CountingLink(link, self._under_way, source.layout.block_bytes)


class _CountingLink:
    def __init__(self, link: PeerLink, under_way: UnderWay, block_bytes: int) -> None:
        self._link = link
        self._under_way = under_way
        self._block_bytes = block_bytes

    @property
    def transport(self) -> str:
        return self._link.transport

    @property
    def can_stop(self) -> bool:
        return self._link.can_stop

    def read(self, read: BlockRead, *, stop: ReadStop, deadline: Deadline) -> None:
        num_bytes = len(read.source) * len(read.layers) * self._block_bytes
        self._under_way.add(num_bytes)
        try:
            self._link.read(read, stop=stop, deadline=deadline)
        finally:
            self._under_way.add(-num_bytes)

    def drain(self, *, deadline: Deadline) -> None:
        self._link.drain(deadline=deadline)

    def close(self, *, deadline: Deadline) -> None:
        self._link.close(deadline=deadline)

    def statistics(self) -> LinkCounters:
        return self._link.statistics()
