"""A transport that packs blocks into messages and gives those to a library, whichever it is: all but the library.

    destination                                    source
    READ                       ─── control ──▶     asks its gate
                               ◀── control ───     BLOCKS n
    posts its receives, MORE for each   ─────▶     packs chunk 0, sends it, packs 1, sends it ...
                               ◀═══ library ══
    unpacks 0, posts one, MORE ─── control ──▶     sends one more

A chunk is sent only once its receive is posted. So nothing comes unexpected at a destination; and what a source has
begun to send can end even when the read that wanted it is over. Messages land in staging buffers: what is late finds no
pool.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import socket
from collections.abc import Callable, Iterator
from typing import Final, Protocol

from disaggregated.errors import PeerLost
from disaggregated.kv_layout import KVLayout
from kvtransfer.checksum import PoolBlocks
from kvtransfer.deadline import Deadline
from kvtransfer.region import Region
from kvtransfer.transport import (
    BlockRead,
    EndpointStatistics,
    Offer,
    OurEnd,
    PeerLink,
    ReadGate,
    ReadStop,
    SourceIdentity,
)
from kvtransfer.transports import control_port, frames
from kvtransfer.transports.block_stream import ArrivingBlocks
from kvtransfer.transports.control_port import ControlPort, Place
from kvtransfer.transports.frame_socket import FrameSocket
from kvtransfer.transports.frames import Hello, Kind, MalformedFrame, ReadRequest
from kvtransfer.transports.link import FramedLink
from kvtransfer.transports.listener import Greeting
from kvtransfer.transports.meeting import Introduction
from kvtransfer.transports.packing import Span, StagingBuffer, StagingBuffers, chunks, spans
from kvtransfer.transports.tcp import EVERY_ADDRESS

_MORE: Final = frames.pack(Kind.MORE, b"")


class Passage(Protocol):
    """One message on its way; its buffer is the library's until it is over. `transit.Transit` is one."""

    def wait(self, connection: FrameSocket, *, listening: bool) -> None:
        """Until it is over. `listening`: what the peer says meanwhile ends the wait, too.

        Raises PeerLost, TransferTimeout, or what a REFUSED of the peer carries.
        """


class Lane(Protocol):
    """What a library has between the two ends of one connection. Used by that connection's thread."""

    def address(self, *, deadline: Deadline) -> bytes:
        """What the other end must know of this one; it travels in a proven frame. Raises TransferError."""

    def connect(self, peer: bytes, *, deadline: Deadline) -> None:
        """`peer` is the other end's address. Raises TransferError."""

    def send(self, message: memoryview) -> Passage: ...

    def receive(self, message: memoryview) -> Passage:
        """Messages arrive in the order in which they were sent, each as long as what was posted for it."""

    def hear(self, connection: FrameSocket) -> None:
        """Until the peer has something to say, where what is under way needs this thread to go on; else at once.

        Raises as `Passage.wait` does.
        """

    def close(self) -> bool:
        """True when the library has let go of every buffer. Idempotent."""


MakeLane = Callable[[str], Lane]
"""Given the address of ours by which the two ends reach each other. Waits for nobody.

Raises TransferError: the library is not well.
"""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """How a library likes its messages: measured for each. The two ends must agree."""

    chunk_bytes: int
    in_flight: int
    """Chunks of one read: while one is on the way, others are packed and unpacked."""
    buffers_max: int
    """Of an endpoint, and of a link; made when needed. A read beyond them waits, within its deadline."""

    def buffers_for(self, num_bytes: int) -> int:
        return min(self.in_flight, -(-num_bytes // self.chunk_bytes))

    def buffers(self) -> StagingBuffers:
        return StagingBuffers(self.buffers_max, self.chunk_bytes)


class PackedEndpoint:
    """Packs blocks out of the pool and sends them, each connection through a lane of its own."""

    def __init__(
        self,
        name: str,
        region: Region,
        layout: KVLayout,
        *,
        epoch: int,
        host: str,
        make_lane: MakeLane,
        packing: Packing,
    ) -> None:
        """`region` must stay open until `close`."""
        self.name = name
        self._region = region
        self._layout = layout
        self._make_lane = make_lane
        self._packing = packing
        self._staging = packing.buffers()
        self._lanes: dict[FrameSocket, Lane] = {}
        self._host = host
        self._port = ControlPort(name, self, layout, epoch=epoch, host=host)

    def start(self, gate: ReadGate) -> None:
        our_host = "127.0.0.1" if self._host in EVERY_ADDRESS else self._host
        self._make_lane(our_host).close()  # Better to miss a library now than in the middle of a request.
        self._port.start(gate)

    def describe(self) -> Offer:
        return self._port.describe()

    def close(self, *, deadline: Deadline) -> None:
        self._port.close(deadline=deadline)

    def statistics(self) -> EndpointStatistics:
        return self._port.statistics()

    def is_welcome(self, accepted: socket.socket) -> bool:
        return True

    def greeting(self, connection: FrameSocket, hello: Hello) -> Greeting:
        lane = self._lanes[connection] = self._make_lane(connection.our_host)
        deadline = Deadline.after(connection.progress_timeout_s)
        if hello.tail:  # Without it a peer may introduce itself, and not read.
            lane.connect(hello.tail, deadline=deadline)
        return Greeting(tail=lane.address(deadline=deadline))

    def part(self, connection: FrameSocket) -> None:
        lane = self._lanes.pop(connection, None)
        if lane is not None:
            lane.close()

    def answer(self, connection: FrameSocket, read: ReadRequest) -> int:
        num_bytes = sum(run.count for run in read.blocks) * len(read.layers) * self._layout.block_bytes
        lane = self._lanes[connection]
        wanted = self._packing.buffers_for(num_bytes)
        waiting_until = Deadline.after(connection.progress_timeout_s)
        with _taken(self._staging, wanted, lane, deadline=waiting_until) as buffers:
            connection.send(frames.pack_blocks_header(num_bytes))
            parts = chunks(spans(self._layout, read.blocks, read.layers), self._packing.chunk_bytes)
            self._send(lane, connection, parts, buffers)
        return num_bytes

    def _send(
        self, lane: Lane, connection: FrameSocket, parts: Iterator[list[Span]], buffers: list[StagingBuffer]
    ) -> None:
        under_way: collections.deque[Passage] = collections.deque()
        for number, part in enumerate(parts):
            if number >= len(buffers):
                under_way.popleft().wait(connection, listening=False)
            message = buffers[number % len(buffers)].gather(part, self._region.base_address)
            if connection.is_quiet:
                lane.hear(connection)
            connection.receive_frame(Kind.MORE)
            under_way.append(lane.send(message))
        for passage in under_way:  # The peer may have them all, and ask for the next blocks already.
            passage.wait(connection, listening=False)


class PackedTransport:
    """Receives a source's blocks in staging buffers, and unpacks them into our pool."""

    def __init__(self, name: str, us: OurEnd, *, make_lane: MakeLane, packing: Packing) -> None:
        self.name = name
        self._us = us
        self._make_lane = make_lane
        self._packing = packing

    def connect(self, offer: Offer, source: SourceIdentity, *, deadline: Deadline) -> PeerLink:
        dialler = _PackedDialler(offer, source, self._us, self._make_lane, self._packing)
        link = FramedLink(dialler, transport=self.name, block_bytes=self._us.layout.block_bytes)
        link.open(deadline=deadline)
        return link


class _PackedConnection(FrameSocket):
    """A control socket and the lane beside it. Closing the one closes the other."""

    def __init__(self, sock: socket.socket, lane: Lane, *, progress_timeout_s: float) -> None:
        super().__init__(sock, progress_timeout_s=progress_timeout_s)
        self.lane = lane

    def close(self) -> None:
        super().close()
        self.lane.close()


class _PackedDialler:
    def __init__(
        self,
        offer: Offer,
        source: SourceIdentity,
        us: OurEnd,
        make_lane: MakeLane,
        packing: Packing,
    ) -> None:
        self._introduction = Introduction(offer, source, us)
        self._place = Place.of(self._introduction)
        self._us = us
        self._make_lane = make_lane
        self._packing = packing
        self._staging = packing.buffers()

    def dial(self, *, deadline: Deadline) -> FrameSocket:
        lane = self._make_lane(_our_host_towards(self._place))

        def make(sock: socket.socket) -> FrameSocket:
            return _PackedConnection(sock, lane, progress_timeout_s=self._us.progress_timeout_s)

        with contextlib.ExitStack() as failed:
            failed.callback(lane.close)
            tail = lane.address(deadline=deadline)
            connection, welcome = control_port.dial(
                self._place, self._introduction, self._us, deadline=deadline, tail=tail, make=make
            )
            failed.callback(connection.close)
            lane.connect(welcome.tail, deadline=deadline.no_later_than(self._us.progress_timeout_s))
            failed.pop_all()
        return connection

    def num_bytes_sent(self, read: BlockRead) -> int:
        return len(read.source) * len(read.layers) * self._us.layout.block_bytes

    def land(self, connection: FrameSocket, read: BlockRead, *, stop: ReadStop) -> None:
        assert isinstance(connection, _PackedConnection), "a connection of another transport"
        wanted = self._packing.buffers_for(self.num_bytes_sent(read))
        with _taken(self._staging, wanted, connection.lane, deadline=connection.deadline) as buffers:
            self._receive(connection, read, buffers, stop)

    def close(self) -> None:
        """Nothing but connections, which the link closes."""

    def _receive(
        self, connection: _PackedConnection, read: BlockRead, buffers: list[StagingBuffer], stop: ReadStop
    ) -> None:
        whole, chunk_bytes = self.num_bytes_sent(read), self._packing.chunk_bytes
        sizes = [min(chunk_bytes, whole - begin) for begin in range(0, whole, chunk_bytes)]
        into = PoolBlocks(self._us.region.base_address, self._us.layout, read.into)
        arriving = ArrivingBlocks(into, read.layers, read.sums)
        under_way: collections.deque[Passage] = collections.deque()

        def buffer_of(number: int) -> memoryview:
            return buffers[number % len(buffers)].view[: sizes[number]]

        for number in range(len(buffers)):
            under_way.append(connection.lane.receive(buffer_of(number)))
        connection.send(_MORE * len(buffers))
        for number in range(len(sizes)):
            under_way.popleft().wait(connection, listening=True)
            stop.check()
            arriving.put(buffer_of(number))
            if (following := number + len(buffers)) < len(sizes):
                under_way.append(connection.lane.receive(buffer_of(following)))
                connection.send(_MORE)


def _our_host_towards(place: Place) -> str:
    """The address of ours that packets to `place` leave from; a UDP socket knows it without sending one."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(place.host, place.port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as unsent:
            unsent.connect(address)
            return str(unsent.getsockname()[0])
    except (OSError, UnicodeError) as error:
        raise PeerLost(f"no way to {place.host}:{place.port}: {error}") from error


@contextlib.contextmanager
def _taken(staging: StagingBuffers, count: int, lane: Lane, *, deadline: Deadline) -> Iterator[list[StagingBuffer]]:
    """Buffers for one read. After a failure they go back once the library has let go of them, or are lost."""
    buffers = staging.take(count, deadline=deadline)
    try:
        yield buffers
    except BaseException:
        if lane.close():
            staging.give_back(buffers)
        else:
            staging.lose(buffers)
        raise
    staging.give_back(buffers)


def heed(connection: FrameSocket, fd: int | None, *, listening: bool) -> None:
    """Wait for `fd` and for the peer at once; returns when `fd` can be read.

    Raises PeerLost when the peer closes, says what it must not say now, or is silent for the progress timeout;
    TransferTimeout; or what a REFUSED carries.
    """
    if not connection.watch(fd, listening=listening):
        return
    kind, _ = connection.receive_frame(*Kind)
    raise MalformedFrame(f"a {kind.name} in the middle of blocks")
