"""NIXL: one-sided reads out of the source's pool straight into ours, over whatever its plugin finds (RDMA, CMA, TCP).

    destination                                    source
    HELLO, WELCOME   ◀──────── control ────────▶   its agent's metadata, in the WELCOME: proven, or not looked at
    READ             ───────── control ────────▶   asks its gate
                     ◀──────── control ─────────   BLOCKS 0: go ahead
    posts small batches of reads   ◀══ bytes ═══   takes no part (RDMA, CMA), or its library's thread does (TCP)

Memory that a peer may read stays readable to it until the agent ends; what it does read is checked like all blocks are.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import socket
import struct
import sys
import threading
from typing import Final

from disaggregated.errors import TransferError
from disaggregated.kv_layout import KVLayout
from kvtransfer.deadline import Deadline
from kvtransfer.negotiate import fabric_devices
from kvtransfer.region import Region
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
from kvtransfer.transports.frames import Hello, ReadRequest
from kvtransfer.transports.link import FramedLink
from kvtransfer.transports.listener import Greeting
from kvtransfer.transports.meeting import Introduction
from kvtransfer.transports.nixl_agent import NixlAgent, chosen_plugin
from kvtransfer.transports.nixl_reads import PeerMemory, SharedAgent

NAME: Final = "NIXL"
_TAIL: Final = struct.Struct("<Q?16s")
"""Of a WELCOME, before the metadata: where the pool begins in the source's memory, and how its agent was made."""


def missing() -> str | None:
    if sys.platform != "linux":
        return "needs Linux"
    if "ucxx" in sys.modules:
        return "cannot be in one process with UCX (ucxx), since it brings a UCX of its own"
    if importlib.util.find_spec("nixl_cu12") is None:
        return "needs the nixl-cu12 package: pip install 'disaggregated[nixl]'"
    return None


def make_endpoint(region: Region, layout: KVLayout, *, epoch: int, host: str) -> SourceEndpoint:
    return NixlEndpoint(region, layout, epoch=epoch, host=host)


def make_transport(us: OurEnd) -> DestinationTransport:
    return NixlTransport(us)


class NixlEndpoint:
    """Registers the pool with an agent, tells members of the cluster how to read it, and answers "may I?"."""

    name = NAME

    def __init__(self, region: Region, layout: KVLayout, *, epoch: int, host: str = "127.0.0.1") -> None:
        """`region` must stay open until `close`."""
        self._region = region
        self._layout = layout
        self._epoch = epoch
        self._loopback_only = is_loopback(host)
        self._port = ControlPort(NAME, self, layout, epoch=epoch, host=host)
        self._agent: NixlAgent | None = None
        self._tail = b""

    def start(self, gate: ReadGate) -> None:
        plugin, peer_errors = chosen_plugin(), bool(fabric_devices())
        self._agent = NixlAgent(
            agent_name("source", self._epoch),
            self._region,
            plugin=plugin,
            peer_errors=peer_errors,
            loopback_only=self._loopback_only,
        )
        head = _TAIL.pack(self._region.base_address, peer_errors, plugin.encode())
        self._tail = head + self._agent.metadata
        try:
            self._port.start(gate)
        except BaseException:
            self._end_agent()
            raise

    def describe(self) -> Offer:
        return self._port.describe()

    def close(self, *, deadline: Deadline) -> None:
        self._port.close(deadline=deadline)
        self._end_agent()

    def statistics(self) -> EndpointStatistics:
        return self._port.statistics()

    def is_welcome(self, accepted: socket.socket) -> bool:
        return True

    def greeting(self, connection: FrameSocket, hello: Hello) -> Greeting:
        return Greeting(tail=self._tail)

    def answer(self, connection: FrameSocket, read: ReadRequest) -> int:
        connection.send(frames.pack_blocks_header(0))
        return sum(run.count for run in read.blocks) * len(read.layers) * self._layout.block_bytes

    def part(self, connection: FrameSocket) -> None:
        """The agent serves all of them."""

    def _end_agent(self) -> None:
        if self._agent is not None:
            self._agent.close()
            self._agent = None


class NixlTransport:
    """Makes an agent for each source, so that what one of them does, or does not, ends nobody else's reads."""

    name = NAME

    def __init__(self, us: OurEnd) -> None:
        self._us = us

    def connect(self, offer: Offer, source: SourceIdentity, *, deadline: Deadline) -> PeerLink:
        dialler = _NixlDialler(offer, source, self._us)
        link = FramedLink(dialler, transport=NAME, block_bytes=self._us.layout.block_bytes)
        try:
            link.open(deadline=deadline)
        except BaseException:
            dialler.close()
            raise
        return link


class _NixlDialler:
    """The first connection brings the metadata, from which the agent is made that all reads share."""

    def __init__(self, offer: Offer, source: SourceIdentity, us: OurEnd) -> None:
        self._introduction = Introduction(offer, source, us)
        self._place = Place.of(self._introduction)
        self._source = source
        self._us = us
        self._lock = threading.Lock()
        self._told = b""
        self._shared: SharedAgent | None = None

    def dial(self, *, deadline: Deadline) -> FrameSocket:
        connection, welcome = dial(self._place, self._introduction, self._us, deadline=deadline)
        try:
            self._take(welcome.tail)
        except BaseException:
            connection.close()
            raise
        return connection

    def num_bytes_sent(self, read: BlockRead) -> int:
        return 0

    def land(self, connection: FrameSocket, read: BlockRead, *, stop: ReadStop) -> None:
        shared = self._shared
        assert shared is not None, "a read before the first connection"
        shared.read(read, connection, stop=stop)

    def close(self) -> None:
        with self._lock:
            if self._shared is not None:
                self._shared.end()
                self._shared = None

    def _take(self, tail: bytes) -> None:
        """Make the agent; a new one when the last has ended or the source's is another. Two reads may dial at once."""
        with self._lock:
            if self._shared is not None and self._told == tail and not self._shared.is_doomed:
                return
            if self._shared is not None:
                self._shared.end()
            self._shared, self._told = None, tail
            self._shared = self._make_agent(tail)

    def _make_agent(self, tail: bytes) -> SharedAgent:
        if len(tail) <= _TAIL.size:
            raise TransferError("the source told nothing of its NIXL agent")
        base_address, peer_errors, plugin = _TAIL.unpack_from(tail)
        agent = NixlAgent(
            agent_name("destination", self._source.epoch),
            self._us.region,
            plugin=plugin.rstrip(b"\0").decode(errors="replace"),
            peer_errors=peer_errors,
            loopback_only=self._place.is_loopback,
        )
        try:
            peer = PeerMemory(
                name=agent.add_peer(tail[_TAIL.size :]), base_address=base_address, layout=self._source.layout
            )
        except BaseException:
            agent.close()
            raise
        return SharedAgent(agent, peer, self._us)


def agent_name(role: str, epoch: int) -> str:
    """New for each incarnation: a peer that knew the last one does not take it for this one."""
    return f"kv-{role}-{epoch}-{os.getpid()}-{secrets.token_hex(8)}"
