"""SHM: two processes of one host and one user. The pool is a sealed memfd; a read is a copy that sums up as it goes.

The descriptor travels over an abstract unix socket (no file to leave behind). The same socket carries each read's
request: so a dead source, an expired lease or a wrong epoch is found before the copy, exactly as over a network.
"""

from __future__ import annotations

import errno
import os
import secrets
import socket
import struct
import threading
from typing import Final

from disaggregated.errors import PeerLost, TransferError
from disaggregated.kv_layout import KVLayout
from kvtransfer.checksum import PoolBlocks, block_sums
from kvtransfer.deadline import Deadline
from kvtransfer.region import MappedRegion, Region
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
from kvtransfer.transports.frame_socket import FrameSocket
from kvtransfer.transports.frames import Hello, ReadRequest
from kvtransfer.transports.link import FramedLink
from kvtransfer.transports.listener import FrameServer, Greeting
from kvtransfer.transports.meeting import EndpointIdentity, Introduction

NAME: Final = "SHM"
_CREDENTIALS: Final = struct.Struct("=iII")


def host_key() -> str:
    """Equal for two processes that can reach each other's abstract sockets; "" when this system cannot tell.

    The boot id tells kernels apart; abstract socket names live in the network namespace.
    """
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as boot_id:
            return f"{boot_id.read().strip()}/{os.readlink('/proc/self/ns/net')}"
    except OSError:
        return ""


class ShmEndpoint:
    """Hands the pool's descriptor to peers of our own user, and answers "may I read this?"."""

    name = NAME

    def __init__(self, region: Region, layout: KVLayout, *, epoch: int) -> None:
        """`region` must stay open until `close`."""
        self._region = region
        self._layout = layout
        self._socket_name = f"disaggregated-kv-{secrets.token_hex(8)}"
        self._identity = EndpointIdentity.fresh(epoch)
        self._server: FrameServer | None = None

    def start(self, gate: ReadGate) -> None:
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            listening.bind(f"\0{self._socket_name}")
            listening.listen()
        except OSError as error:
            listening.close()
            raise TransferError(f"no unix socket for shared memory: {error}") from error
        self._server = FrameServer(listening, self, gate, name=self.name, layout=self._layout, identity=self._identity)
        self._server.start()

    def describe(self) -> Offer:
        return Offer(name=self.name, address=self._identity.address(self._socket_name), host_key=host_key())

    def close(self, *, deadline: Deadline) -> None:
        if self._server is not None:
            self._server.close(deadline=deadline)

    def statistics(self) -> EndpointStatistics:
        return self._server.statistics if self._server else EndpointStatistics()

    def is_welcome(self, accepted: socket.socket) -> bool:
        return peer_uid(accepted) == os.getuid()

    def greeting(self, connection: FrameSocket, hello: Hello) -> Greeting:
        return Greeting(fd=self._region.fd)

    def answer(self, connection: FrameSocket, read: ReadRequest) -> int:
        connection.send(frames.pack_blocks_header(0))
        return sum(run.count for run in read.blocks) * len(read.layers) * self._layout.block_bytes

    def part(self, connection: FrameSocket) -> None:
        """A connection is all there was."""


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
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        connection = FrameSocket(sock, progress_timeout_s=self._us.progress_timeout_s)
        try:
            connection.limit_waits(deadline)
            _connect(sock, f"\0{self._introduction.place}")
            if peer_uid(sock) != os.getuid():
                raise TransferError("the source runs as another user")
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


def peer_uid(sock: socket.socket) -> int:
    """Who made the other end of this unix socket, as the kernel tells it."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(credentials)[1])


def _connect(sock: socket.socket, address: str) -> None:
    try:
        sock.connect(address)
    except OSError as error:
        reason = "its queue of connections is full" if error.errno == errno.EAGAIN else str(error)
        raise PeerLost(f"the source's shared memory is not reachable: {reason}") from error
