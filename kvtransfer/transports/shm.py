"""SHM: two processes of one host and one user. The pool is a sealed memfd; a read is a copy that sums up as it goes.

The descriptor travels over the control socket (`unix_port.py`). Pools in a device's memory are copied likewise, device
to device: `cuda_ipc.py`.
"""

from __future__ import annotations

import os
import threading
from typing import Final

from disaggregated.kv_layout import KVLayout
from kvtransfer.checksum import PoolBlocks, block_sums
from kvtransfer.deadline import Deadline
from kvtransfer.region import MappedRegion, Region
from kvtransfer.transport import (
    BlockRead,
    DestinationTransport,
    Offer,
    OurEnd,
    PeerLink,
    ReadStop,
    SourceEndpoint,
    SourceIdentity,
)
from kvtransfer.transports import unix_port
from kvtransfer.transports.frame_socket import FrameSocket
from kvtransfer.transports.frames import Hello
from kvtransfer.transports.handed_pool import HandedPool
from kvtransfer.transports.link import FramedLink
from kvtransfer.transports.listener import Greeting
from kvtransfer.transports.meeting import Introduction
from kvtransfer.transports.unix_port import host_key

NAME: Final = "SHM"


class ShmEndpoint(HandedPool):
    """Hands the pool's descriptor to peers."""

    def __init__(self, region: Region, layout: KVLayout, *, epoch: int) -> None:
        """`region` must stay open until `close`."""
        self._region = region
        super().__init__(NAME, layout, epoch=epoch)

    def greeting(self, connection: FrameSocket, hello: Hello) -> Greeting:
        return Greeting(fd=self._region.fd)


class ShmTransport:
    """Maps a source's pool and copies out of it into ours."""

    name = NAME

    def __init__(self, us: OurEnd) -> None:
        self._us = us

    def connect(self, offer: Offer, source: SourceIdentity, *, deadline: Deadline) -> PeerLink:
        dialler = _ShmDialler(offer, source, self._us)
        link = FramedLink(dialler, transport=self.name, block_bytes=self._us.layout.block_bytes)
        link.open(deadline=deadline)
        return link


class _ShmDialler:
    """The first connection brings the mapping, which all reads share."""

    def __init__(self, offer: Offer, source: SourceIdentity, us: OurEnd) -> None:
        self._introduction = Introduction(offer, source, us)
        self._source = source
        self._us = us
        self._mapping_lock = threading.Lock()
        self._mapped: MappedRegion | None = None

    def dial(self, *, deadline: Deadline) -> FrameSocket:
        place, limit_s = self._introduction.place, self._us.progress_timeout_s
        connection = unix_port.dial(place, progress_timeout_s=limit_s, deadline=deadline)
        try:
            _, fd = self._introduction.meet_for_descriptor(connection)
            self._take(fd)
        except BaseException:
            connection.close()
            raise
        return connection

    def num_bytes_sent(self, read: BlockRead) -> int:
        return 0

    def land(self, connection: FrameSocket, read: BlockRead, *, stop: ReadStop) -> None:
        assert self._mapped is not None, "a read before the first connection"
        layout = self._us.layout
        sums = block_sums(len(read.source), layout, len(read.layers)) if read.sums is None else read.sums
        sums.copy(
            PoolBlocks(self._mapped.base_address, self._source.layout, read.source),
            PoolBlocks(self._us.region.base_address, layout, read.into),
            read.layers,
            stop,
        )

    def close(self) -> None:
        if self._mapped is not None:
            self._mapped.close()
            self._mapped = None

    def _take(self, fd: int) -> None:
        """Map what came with the WELCOME, or close it when we have it already. Two reads may dial at once."""
        with self._mapping_lock:
            if self._mapped is None:
                self._mapped = MappedRegion(fd, nbytes=self._source.layout.pool_bytes)
                return
        os.close(fd)


def missing() -> str | None:
    """Memory of another process needs a system that seals it."""
    return None if hasattr(os, "memfd_create") and host_key() else "needs Linux's sealed memory (memfd)"


def make_endpoint(region: Region, layout: KVLayout, *, epoch: int, host: str) -> SourceEndpoint:
    return ShmEndpoint(region, layout, epoch=epoch)


def make_transport(us: OurEnd) -> DestinationTransport:
    return ShmTransport(us)
