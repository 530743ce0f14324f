"""A source whose peers, processes of our own user on this host, map its pool and copy out of it by themselves."""

from __future__ import annotations

import abc
import socket

from disaggregated.kv_layout import KVLayout
from kvtransfer.deadline import Deadline
from kvtransfer.transport import EndpointStatistics, Offer, ReadGate
from kvtransfer.transports import frames, unix_port
from kvtransfer.transports.frame_socket import FrameSocket
from kvtransfer.transports.frames import Hello, ReadRequest
from kvtransfer.transports.listener import Greeting
from kvtransfer.transports.unix_port import UnixPort


class HandedPool(abc.ABC):
    """Hands the pool to peers of our own user, and answers "may I read this?". What is handed, a subclass knows."""

    def __init__(self, name: str, layout: KVLayout, *, epoch: int) -> None:
        self.name = name
        self._layout = layout
        self._port = UnixPort(name, self, layout, epoch=epoch)

    @abc.abstractmethod
    def greeting(self, connection: FrameSocket, hello: Hello) -> Greeting:
        """With what a peer maps the pool by."""

    def start(self, gate: ReadGate) -> None:
        self._port.start(gate)

    def describe(self) -> Offer:
        return self._port.describe()

    def close(self, *, deadline: Deadline) -> None:
        self._port.close(deadline=deadline)

    def statistics(self) -> EndpointStatistics:
        return self._port.statistics()

    def is_welcome(self, accepted: socket.socket) -> bool:
        return unix_port.is_ours(accepted)

    def answer(self, connection: FrameSocket, read: ReadRequest) -> int:
        connection.send(frames.pack_blocks_header(0))
        return sum(run.count for run in read.blocks) * len(read.layers) * self._layout.block_bytes

    def part(self, connection: FrameSocket) -> None:  # noqa: B027  # Nothing is to be done by any of them.
        """A connection is all there was."""
