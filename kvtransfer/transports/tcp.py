"""TCP: any two hosts. Blocks go from the source's pool into its kernel, and from our kernel into our pool.

What is in flight is what one read asked for, in the kernel's socket buffers, and 256 KiB of it in the cache of the core
that receives (docs/decisions/0016).
"""

from __future__ import annotations

import os
import socket
from typing import Final

from disaggregated.errors import PeerLost, TransferError
from disaggregated.kv_layout import KVLayout
from kvtransfer.checksum import PoolBlocks
from kvtransfer.deadline import Deadline
from kvtransfer.region import Region
from kvtransfer.runs import block_ids_of
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
from kvtransfer.transports import frames
from kvtransfer.transports.block_stream import receive_blocks, send_blocks
from kvtransfer.transports.frame_socket import FrameSocket
from kvtransfer.transports.frames import Hello, ReadRequest
from kvtransfer.transports.link import FramedLink
from kvtransfer.transports.listener import FrameServer, Greeting
from kvtransfer.transports.meeting import EndpointIdentity, Introduction
from kvtransfer.transports.striped import STREAMS_DEFAULT, STREAMS_MAX, StripedLink

NAME: Final = "TCP"
STREAMS_VARIABLE: Final = "DISAGG_TCP_STREAMS"
EVERY_ADDRESS: Final = ("", "0.0.0.0", "::")


class TcpEndpoint:
    """Serves the pool on a port of its own."""

    name = NAME

    def __init__(self, region: Region, layout: KVLayout, *, epoch: int, host: str = "127.0.0.1", port: int = 0) -> None:
        """`host` is the address we bind and the one that peers are told; port 0 takes any free one.

        Bound to every address (`0.0.0.0`, `::`) we tell none: peers use the host that they reached our gRPC server by.
        """
        self._region = region
        self._layout = layout
        self._bind_to = (host, port)
        self._identity = EndpointIdentity.fresh(epoch)
        self._address = ""
        self._server: FrameServer | None = None

    def start(self, gate: ReadGate) -> None:
        host, port = self._bind_to
        try:
            listening = socket.create_server(
                (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=128
            )
        except OSError as error:
            raise TransferError(f"no TCP socket for blocks on {host}:{port}: {error}") from error
        told = "" if host in EVERY_ADDRESS else host
        self._address = self._identity.address(f"{told}:{listening.getsockname()[1]}")
        self._server = FrameServer(listening, self, gate, name=self.name, layout=self._layout, identity=self._identity)
        self._server.start()

    def describe(self) -> Offer:
        return Offer(name=self.name, address=self._address)

    def close(self, *, deadline: Deadline) -> None:
        if self._server is not None:
            self._server.close(deadline=deadline)

    def statistics(self) -> EndpointStatistics:
        return self._server.statistics if self._server else EndpointStatistics()

    def is_welcome(self, accepted: socket.socket) -> bool:
        return True

    def greeting(self, connection: FrameSocket, hello: Hello) -> Greeting:
        return Greeting()

    def answer(self, connection: FrameSocket, read: ReadRequest) -> int:
        block_ids = block_ids_of(read.blocks)
        num_bytes = len(block_ids) * len(read.layers) * self._layout.block_bytes
        connection.send(frames.pack_blocks_header(num_bytes))
        send_blocks(connection, PoolBlocks(self._region.base_address, self._layout, block_ids), read.layers)
        return num_bytes

    def part(self, connection: FrameSocket) -> None:
        """A connection is all there was."""


class TcpTransport:
    """Receives a source's blocks straight into our pool."""

    name = NAME

    def __init__(self, us: OurEnd, *, num_streams: int | None = None) -> None:
        """`num_streams` connections may carry one read; by default what $DISAGG_TCP_STREAMS says."""
        self._us = us
        self._num_streams = streams_configured() if num_streams is None else num_streams

    def connect(self, offer: Offer, source: SourceIdentity, *, deadline: Deadline) -> PeerLink:
        dialler = _TcpDialler(offer, source, self._us)
        block_bytes = self._us.layout.block_bytes
        link = FramedLink(dialler, transport=self.name, block_bytes=block_bytes)
        link.open(deadline=deadline)
        return StripedLink(link, num_streams=self._num_streams, block_bytes=block_bytes)


class _TcpDialler:
    def __init__(self, offer: Offer, source: SourceIdentity, us: OurEnd) -> None:
        self._introduction = Introduction(offer, source, us)
        place = self._introduction.place
        host, _, port = place.rpartition(":")
        if not port.isdecimal():
            raise TransferError(f"the TCP offer's address is not host:port: {place!r}")
        self._address = (host, int(port))
        self._us = us

    def dial(self, *, deadline: Deadline) -> FrameSocket:
        deadline.check("a TCP connection to the source")
        try:
            sock = socket.create_connection(self._address, timeout=min(deadline.left_s(), self._us.progress_timeout_s))
        except (OSError, ValueError) as error:  # The latter for what can be no host name.
            raise PeerLost(f"no TCP connection to {self._address[0]}:{self._address[1]}: {error}") from error
        connection = FrameSocket(sock, progress_timeout_s=self._us.progress_timeout_s)
        try:
            connection.limit_waits(deadline)
            self._introduction.meet(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def num_bytes_sent(self, read: BlockRead) -> int:
        return len(read.source) * len(read.layers) * self._us.layout.block_bytes

    def land(self, connection: FrameSocket, read: BlockRead, *, stop: ReadStop) -> None:
        into = PoolBlocks(self._us.region.base_address, self._us.layout, read.into)
        receive_blocks(connection, into, read.layers, read.sums, stop=stop)

    def close(self) -> None:
        """Nothing but connections, which the link closes."""


def streams_configured() -> int:
    """Raises TransferError when $DISAGG_TCP_STREAMS is not a number that can be used."""
    told = os.environ.get(STREAMS_VARIABLE, str(STREAMS_DEFAULT))
    if not told.isdecimal() or not 1 <= int(told) <= STREAMS_MAX:
        raise TransferError(f"{STREAMS_VARIABLE} must be 1 to {STREAMS_MAX}, is {told!r}")
    return int(told)


def missing() -> str | None:
    return None


def make_endpoint(region: Region, layout: KVLayout, *, epoch: int, host: str) -> SourceEndpoint:
    return TcpEndpoint(region, layout, epoch=epoch, host=host)


def make_transport(us: OurEnd) -> DestinationTransport:
    return TcpTransport(us)
