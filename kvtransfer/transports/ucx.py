"""UCX: whatever network UCX finds (InfiniBand, RoCE, TCP), through `ucxx`. Blocks travel packed into large messages.

Python's UCX has tags, not memory access, and each message costs microseconds: so a source packs the blocks of a read
into staging buffers, two of them in turns, and a destination unpacks. A message can only land in a staging buffer,
never in the pool; what is late finds a closed lane.

    destination                                    source
    READ                       ─── control ──▶     asks its gate, packs chunk 0
                               ◀── control ───     BLOCKS n
    posts two receives, MORE MORE   ───────▶       sends 0, packs 1, sends 1, packs 2
                               ◀═══ chunk 0 ════
    unpacks 0, posts one, MORE ─── control ──▶     sends 2, packs 3 ...
"""

from __future__ import annotations

import contextlib
import importlib.util
import socket
import sys
from collections.abc import Iterator
from typing import Any, Final

from disaggregated.kv_layout import KVLayout
from kvtransfer.deadline import Deadline
from kvtransfer.region import Region
from kvtransfer.runs import runs
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
from kvtransfer.transports.control_port import ControlPort, Place, dial, is_loopback
from kvtransfer.transports.frame_socket import FrameSocket
from kvtransfer.transports.frames import Hello, Kind, ReadRequest
from kvtransfer.transports.link import FramedLink
from kvtransfer.transports.listener import Greeting
from kvtransfer.transports.meeting import Introduction
from kvtransfer.transports.packing import CHUNK_BYTES, StagingBuffer, StagingBuffers, chunks, spans
from kvtransfer.transports.ucx_lane import UcxLane

NAME: Final = "UCX"
IN_FLIGHT: Final = 2
"""Chunks of one read: one is on the way while the other is packed, or unpacked."""
STAGING_BUFFERS_MAX: Final = 16
"""Of an endpoint, and of a link: 64 MiB, made when needed. A read beyond them waits, within its deadline."""
_MORE: Final = frames.pack(Kind.MORE, b"")


def missing() -> str | None:
    if sys.platform != "linux":
        return "needs Linux"
    if "nixl_cu12" in sys.modules:
        return "cannot be in one process with NIXL, which brings a UCX of its own"
    if importlib.util.find_spec("ucxx") is None:
        return "needs the ucxx package: pip install 'disaggregated[ucx]'"
    return None


def make_endpoint(region: Region, layout: KVLayout, *, epoch: int, host: str) -> SourceEndpoint:
    return UcxEndpoint(region, layout, epoch=epoch, host=host)


def make_transport(us: OurEnd) -> DestinationTransport:
    return UcxTransport(us)


class UcxEndpoint:
    """Packs blocks out of the pool and sends them. Each connection has a lane, which its thread drives."""

    name = NAME

    def __init__(self, region: Region, layout: KVLayout, *, epoch: int, host: str = "127.0.0.1") -> None:
        """`region` must stay open until `close`."""
        self._region = region
        self._layout = layout
        self._loopback_only = is_loopback(host)
        self._staging = StagingBuffers(STAGING_BUFFERS_MAX)
        self._lanes: dict[FrameSocket, UcxLane] = {}
        self._port = ControlPort(NAME, self, layout, epoch=epoch, host=host)

    def start(self, gate: ReadGate) -> None:
        UcxLane(loopback_only=self._loopback_only).close()  # Better to miss a device now than in a request.
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
        lane = UcxLane(loopback_only=self._loopback_only)
        self._lanes[connection] = lane
        if hello.tail:  # Without it the peer may introduce itself, and not read.
            lane.connect(hello.tail)
        return Greeting(tail=lane.address)

    def part(self, connection: FrameSocket) -> None:
        lane = self._lanes.pop(connection, None)
        if lane is not None:
            lane.close()

    def answer(self, connection: FrameSocket, read: ReadRequest) -> int:
        num_bytes = sum(run.count for run in read.blocks) * len(read.layers) * self._layout.block_bytes
        lane = self._lanes[connection]
        buffers = self._staging.take(_buffers_for(num_bytes), deadline=Deadline.after(connection.progress_timeout_s))
        try:
            connection.send(frames.pack_blocks_header(num_bytes))
            self._send(lane, connection, read, buffers)
        except BaseException:
            del self._lanes[connection]
            _settle(self._staging, buffers, has_ended=lane.close())
            raise
        self._staging.give_back(buffers)
        return num_bytes

    def _send(self, lane: UcxLane, connection: FrameSocket, read: ReadRequest, buffers: list[StagingBuffer]) -> None:
        """Each chunk once the destination has said that it awaits it: no message ever comes unexpected there."""
        sending: list[Any] = []
        for number, chunk in enumerate(chunks(spans(self._layout, read.blocks, read.layers))):
            if number >= len(buffers):
                lane.wait(sending.pop(0), connection, while_it_may_speak=True)
            message = buffers[number % len(buffers)].gather(chunk, self._region.base_address)
            lane.wait_for_word(connection)
            connection.receive_frame(Kind.MORE)
            sending.append(lane.send(message, tag=number))
        for request in sending:
            lane.wait(request, connection, while_it_may_speak=True)  # It may ask for the next blocks already.


class UcxTransport:
    """Receives a source's blocks in staging buffers, and unpacks them into our pool."""

    name = NAME

    def __init__(self, us: OurEnd) -> None:
        self._us = us

    def connect(self, offer: Offer, source: SourceIdentity, *, deadline: Deadline) -> PeerLink:
        dialler = _UcxDialler(offer, source, self._us)
        link = FramedLink(dialler, transport=NAME, block_bytes=self._us.layout.block_bytes)
        link.open(deadline=deadline)
        return link


class _UcxConnection(FrameSocket):
    """A control socket and the lane beside it. Closing the one closes the other."""

    def __init__(self, sock: socket.socket, lane: UcxLane, *, progress_timeout_s: float) -> None:
        super().__init__(sock, progress_timeout_s=progress_timeout_s)
        self.lane = lane
        self._lane_has_ended: bool | None = None

    def close(self) -> None:
        super().close()
        self.end_lane()

    def end_lane(self) -> bool:
        """True when nothing that was received through it can be written any more. Idempotent."""
        if self._lane_has_ended is None:
            self._lane_has_ended = self.lane.close()
        return self._lane_has_ended


class _UcxDialler:
    def __init__(self, offer: Offer, source: SourceIdentity, us: OurEnd) -> None:
        self._introduction = Introduction(offer, source, us)
        self._place = Place.of(self._introduction)
        self._us = us
        self._staging = StagingBuffers(STAGING_BUFFERS_MAX)

    def dial(self, *, deadline: Deadline) -> FrameSocket:
        lane = UcxLane(loopback_only=self._place.is_loopback)

        def make(sock: socket.socket) -> FrameSocket:
            return _UcxConnection(sock, lane, progress_timeout_s=self._us.progress_timeout_s)

        try:
            connection, welcome = dial(
                self._place, self._introduction, self._us, deadline=deadline, tail=lane.address, make=make
            )
        except BaseException:
            lane.close()
            raise
        try:
            lane.connect(welcome.tail)
        except BaseException:
            connection.close()
            raise
        return connection

    def num_bytes_sent(self, read: BlockRead) -> int:
        return len(read.source) * len(read.layers) * self._us.layout.block_bytes

    def land(self, connection: FrameSocket, read: BlockRead, *, stop: ReadStop) -> None:
        assert isinstance(connection, _UcxConnection), "a connection of another transport"
        with self._buffers(connection, self.num_bytes_sent(read)) as buffers:
            self._receive(connection, read, buffers)

    def close(self) -> None:
        """Nothing but connections, which the link closes."""

    def _receive(self, connection: _UcxConnection, read: BlockRead, buffers: list[StagingBuffer]) -> None:
        lane = connection.lane
        parts = list(chunks(spans(self._us.layout, runs(read.into), read.layers)))

        def post(number: int) -> Any:
            size = sum(span.size for span in parts[number])
            return lane.receive(buffers[number % len(buffers)].view[:size], tag=number)

        receiving: list[Any] = []
        for number, part in enumerate(parts):
            while len(receiving) < min(number + len(buffers), len(parts)):
                receiving.append(post(len(receiving)))
                connection.send(_MORE)
            lane.wait(receiving[number], connection)
            buffers[number % len(buffers)].scatter(part, self._us.region.base_address)

    @contextlib.contextmanager
    def _buffers(self, connection: _UcxConnection, num_bytes: int) -> Iterator[list[StagingBuffer]]:
        buffers = self._staging.take(_buffers_for(num_bytes), deadline=connection.deadline)
        try:
            yield buffers
        except BaseException:
            _settle(self._staging, buffers, has_ended=connection.end_lane())
            raise
        self._staging.give_back(buffers)


def _buffers_for(num_bytes: int) -> int:
    return IN_FLIGHT if num_bytes > CHUNK_BYTES else 1


def _settle(staging: StagingBuffers, buffers: list[StagingBuffer], *, has_ended: bool) -> None:
    """After a failure: buffers go back once UCX has let go of them, and are lost when it has not."""
    if has_ended:
        staging.give_back(buffers)
    else:
        staging.lose(buffers)
