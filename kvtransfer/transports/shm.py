"""SHM: two processes of one host and one user. The pool is a sealed memfd; a read is a memcpy.

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
from kvtransfer.deadline import Deadline
from kvtransfer.region import MappedRegion, Region, copy_bytes
from kvtransfer.runs import RunPair, run_pairs
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
from kvtransfer.transports.frames import Hello, ReadRequest, Welcome
from kvtransfer.transports.link import FramedLink
from kvtransfer.transports.listener import EndpointSecret, FrameServer

NAME: Final = "SHM"
COPY_BYTES_MAX: Final = 4 << 20
"""Between two looks at the stop: under a millisecond of memcpy."""
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
        self._expected = EndpointSecret(secret=secrets.token_bytes(frames.SECRET_BYTES), epoch=epoch)
        self._server: FrameServer | None = None

    def start(self, gate: ReadGate) -> None:
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            listening.bind(f"\0{self._socket_name}")
            listening.listen()
        except OSError as error:
            listening.close()
            raise TransferError(f"no unix socket for shared memory: {error}") from error
        self._server = FrameServer(listening, self, gate, name=self.name, layout=self._layout, expected=self._expected)
        self._server.start()

    def describe(self) -> Offer:
        address = f"{self._socket_name}/{self._expected.secret.hex()}"
        return Offer(name=self.name, address=address, host_key=host_key())

    def close(self, *, deadline: Deadline) -> None:
        if self._server is not None:
            self._server.close(deadline=deadline)

    def statistics(self) -> EndpointStatistics:
        return self._server.statistics if self._server else EndpointStatistics()

    def is_welcome(self, accepted: socket.socket) -> bool:
        return peer_uid(accepted) == os.getuid()

    def greet(self, connection: FrameSocket) -> None:
        welcome = Welcome(epoch=self._expected.epoch, region_bytes=self._layout.pool_bytes)
        connection.send_with_descriptor(frames.pack_welcome(welcome), self._region.fd)

    def answer(self, connection: FrameSocket, read: ReadRequest) -> int:
        connection.send(frames.pack_blocks_header(0))
        return sum(run.count for run in read.blocks) * len(read.layers) * self._layout.block_bytes


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
        self._socket_name, secret = offer.split()
        self._hello = Hello(secret=secret, epoch=source.epoch, peer_id=us.peer_id)
        self._source = source
        self._us = us
        self._mapping_lock = threading.Lock()
        self._mapped: MappedRegion | None = None

    def dial(self, *, deadline: Deadline) -> FrameSocket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        connection = FrameSocket(sock, progress_timeout_s=self._us.progress_timeout_s)
        try:
            connection.limit_waits(deadline)
            _connect(sock, f"\0{self._socket_name}")
            if peer_uid(sock) != os.getuid():
                raise TransferError("the source runs as another user")
            connection.send(frames.pack_hello(self._hello))
            body, fd = connection.receive_with_descriptor()
            self._take(frames.unpack_welcome(body), fd)
        except BaseException:
            connection.close()
            raise
        return connection

    def num_bytes_sent(self, read: BlockRead) -> int:
        return 0

    def land(self, connection: FrameSocket, read: BlockRead, *, stop: ReadStop) -> None:
        pairs = list(run_pairs(read.source, read.into))
        for layer in read.layers:
            for pair in pairs:
                self._copy(pair, layer, stop)

    def close(self) -> None:
        if self._mapped is not None:
            self._mapped.close()
            self._mapped = None

    def _copy(self, pair: RunPair, layer: int, stop: ReadStop) -> None:
        assert self._mapped is not None, "a read before the first connection"
        layout, into_region = self._us.layout, self._us.region
        size = pair.count * layout.block_bytes
        begin = self._source.layout.offset(layer, pair.source)
        into = layout.offset(layer, pair.into)
        assert begin + size <= self._mapped.nbytes, f"{begin + size} of {self._mapped.nbytes} bytes"
        assert into + size <= into_region.nbytes, f"{into + size} of {into_region.nbytes} bytes"
        for at in range(0, size, COPY_BYTES_MAX):
            stop.check()
            piece = min(COPY_BYTES_MAX, size - at)
            copy_bytes(into_region.base_address + into + at, self._mapped.base_address + begin + at, piece)

    def _take(self, welcome: Welcome, fd: int) -> None:
        """Map what came with the WELCOME, or close it when we have it already. Two reads may dial at once."""
        expected = self._source.layout.pool_bytes
        with self._mapping_lock:
            if self._mapped is None and welcome.region_bytes == expected:
                self._mapped = MappedRegion(fd, nbytes=expected)
                return
        os.close(fd)
        if welcome.region_bytes != expected:
            raise TransferError(f"the source's region is {welcome.region_bytes} bytes, its layout {expected}")


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
