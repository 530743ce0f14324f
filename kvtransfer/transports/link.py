"""The destination's side of a connection, the same for every transport that has one: dial, say hello, read, drain."""

from __future__ import annotations

import threading
import time
from typing import Protocol

from disaggregated.errors import PeerLost
from kvtransfer.deadline import Deadline
from kvtransfer.runs import runs
from kvtransfer.transport import BlockRead, LinkCounters, ReadStop
from kvtransfer.transports import frames
from kvtransfer.transports.frame_socket import FrameSocket
from kvtransfer.transports.frames import Kind, MalformedFrame, ReadRequest


class Dialler(Protocol):
    """What differs between transports."""

    def dial(self, *, deadline: Deadline) -> FrameSocket:
        """A connection on which HELLO and WELCOME have been exchanged."""

    def num_bytes_sent(self, read: BlockRead) -> int:
        """How many bytes follow the BLOCKS header of this read."""

    def land(self, connection: FrameSocket, read: BlockRead, *, stop: ReadStop) -> None:
        """Put the blocks into our pool, once the source has said that they may be read."""

    def close(self) -> None:
        """Give back whatever `dial` made besides connections. No `land` runs any more."""


class FramedLink:
    """A PeerLink over framed connections. Idle ones are kept for the next read; one that failed is closed.

    Invariant: `_running` holds the stop of each read that may still write into our pool.
    """

    def __init__(self, dialler: Dialler, *, transport: str, block_bytes: int) -> None:
        self._dialler = dialler
        self._transport = transport
        self._block_bytes = block_bytes
        self._changed = threading.Condition()
        self._idle: list[FrameSocket] = []
        self._running: set[ReadStop] = set()
        self._closing = False
        self._counters = LinkCounters()

    @property
    def transport(self) -> str:
        return self._transport

    @property
    def can_stop(self) -> bool:
        return True

    def open(self, *, deadline: Deadline) -> None:
        """Dial once, so that what is wrong with this way shows before it is chosen."""
        self._idle.append(self._dialler.dial(deadline=deadline))

    def read(self, read: BlockRead, *, stop: ReadStop, deadline: Deadline) -> None:
        begin_s = time.monotonic()
        self._begin(stop)
        num_bytes, num_failures = 0, 1
        try:
            self._read(read, stop, deadline)
            num_bytes, num_failures = len(read.source) * len(read.layers) * self._block_bytes, 0
        except PeerLost:
            stop.check()  # It was us who shut the socket.
            raise
        finally:
            with self._changed:
                self._running.remove(stop)
                self._changed.notify_all()
                self._counters.count(num_bytes, time.monotonic() - begin_s, num_failures)

    def drain(self, *, deadline: Deadline) -> None:
        with self._changed:
            for stop in self._running:
                stop.request()
            while self._running:
                deadline.check("running reads to end")
                self._changed.wait(deadline.left_s())

    def close(self, *, deadline: Deadline) -> None:
        with self._changed:
            self._closing = True
        self.drain(deadline=deadline)
        with self._changed:
            for connection in self._idle:
                connection.close()
            self._idle.clear()
        self._dialler.close()

    def statistics(self) -> LinkCounters:
        return self._counters

    def _ask(self, connection: FrameSocket, read: BlockRead) -> None:
        """Returns when the source has let this read through."""
        request = ReadRequest(lease_key=read.lease_key, epoch=read.epoch, layers=read.layers, blocks=runs(read.source))
        connection.send(frames.pack_read(request))
        kind, length = connection.receive_header()
        if kind is not Kind.BLOCKS:
            connection.finish_frame(kind, length, allowed=[])
        if length != (expected := self._dialler.num_bytes_sent(read)):
            raise MalformedFrame(f"{length} bytes of blocks where {expected} were asked for")

    def _take_idle(self) -> FrameSocket | None:
        """One whose peer is there and owes nothing. What has hung up meanwhile, or has an answer in it that nobody
        waits for, is closed: its next answer would be the answer to another question."""
        while True:
            with self._changed:
                if not self._idle:
                    return None
                connection = self._idle.pop()
            if connection.is_quiet:
                return connection
            connection.close()

    def _begin(self, stop: ReadStop) -> None:
        with self._changed:
            if self._closing:
                raise PeerLost("the link to this source has been closed")
            self._running.add(stop)

    def _read(self, read: BlockRead, stop: ReadStop, deadline: Deadline) -> None:
        """Over an idle connection or a new one; it is kept only after a read that went well."""
        connection = self._take_idle() or self._dialler.dial(deadline=deadline)
        try:
            connection.limit_waits(deadline)
            with connection.stopped_by(stop):
                self._ask(connection, read)
                self._dialler.land(connection, read, stop=stop)
        except BaseException:
            connection.close()
            raise
        with self._changed:
            self._idle.append(connection)
