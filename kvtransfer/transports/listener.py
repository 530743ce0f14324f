"""The source's side of a connection, the same for every transport that has one: listen, greet, answer reads.

One thread accepts, one serves each connection; they block in the kernel and cost nothing while idle. Their number is
bounded: a connection beyond the bound is closed at once, and the peer that made it reports PeerLost.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hmac
import socket
import threading
from typing import Final, Protocol

from disaggregated import logs
from disaggregated.errors import PeerLost, StaleEpoch, TransferError
from disaggregated.kv_layout import KVLayout
from kvtransfer.deadline import Deadline
from kvtransfer.transport import EndpointStatistics, ReadGate
from kvtransfer.transports import frames
from kvtransfer.transports.frame_socket import FrameSocket
from kvtransfer.transports.frames import Hello, Kind, ReadRequest

log = logs.get(__name__)

CONNECTIONS_MAX: Final = 128
GREETING_TIMEOUT_S: Final = 5.0
"""For a HELLO, and for the rest of a request whose first bytes have come."""
ACCEPT_PAUSE_S: Final = 0.1
"""After a connection could not be accepted, for want of descriptors for example: the next one may be."""
ANSWER_TIMEOUT_S: Final = 60.0
"""For a peer to take the blocks it asked for; the progress timeout cuts in much earlier when it takes none."""


class Conversation(Protocol):
    """What differs between transports; called on the connections' threads."""

    def is_welcome(self, accepted: socket.socket) -> bool:
        """False closes the connection before a byte is read."""

    def greet(self, connection: FrameSocket) -> None:
        """Send the WELCOME."""

    def answer(self, connection: FrameSocket, read: ReadRequest) -> int:
        """Send BLOCKS for a read that the gate has let through; returns the bytes that it moved."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EndpointSecret:
    """What a peer's HELLO must show."""

    secret: bytes
    epoch: int

    def check(self, hello: Hello) -> None:
        if not hmac.compare_digest(hello.secret, self.secret):
            raise TransferError("the secret is not the one of this endpoint's offer")
        if hello.epoch != self.epoch:
            raise StaleEpoch(f"this source is epoch {self.epoch}, the peer asked for {hello.epoch}")


class FrameServer:
    """Answers one transport's connections. Owns the listening socket and every thread, from `start` to `close`."""

    def __init__(
        self,
        listening: socket.socket,
        conversation: Conversation,
        gate: ReadGate,
        *,
        name: str,
        layout: KVLayout,
        expected: EndpointSecret,
    ) -> None:
        self._listening = listening
        self._conversation = conversation
        self._gate = gate
        self._name = name
        self._layout = layout
        self._expected = expected
        self._lock = threading.Lock()
        self._connections: set[FrameSocket] = set()
        self._threads: list[threading.Thread] = []  # Those that ended are dropped when the next one comes.
        self._closing = False
        self._closed = threading.Event()
        self._acceptor = threading.Thread(target=self._accept, name=f"kv-{name}-accept", daemon=True)
        self.statistics = EndpointStatistics()

    def start(self) -> None:
        self._acceptor.start()

    def close(self, *, deadline: Deadline) -> None:
        """Every thread has ended when this returns. Raises TransferTimeout when one has not by the deadline."""
        with self._lock:
            self._closing = True
            self._closed.set()
            threads = list(self._threads)
            for connection in self._connections:
                connection.shut()
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)  # What wakes a thread in accept(); closing does not.
        for thread in (self._acceptor, *threads):
            if thread.is_alive():
                thread.join(deadline.left_s())
                if thread.is_alive():
                    deadline.check(f"thread {thread.name}")
        self._listening.close()

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                accepted, _ = self._listening.accept()
            except OSError as error:
                if self._closed.is_set():
                    return
                log.error("kv_connection_not_accepted", transport=self._name, error=str(error))
                self._closed.wait(ACCEPT_PAUSE_S)
                continue
            self._take(accepted)

    def _take(self, accepted: socket.socket) -> None:
        """Give `accepted` a thread, or close it."""
        with self._lock:
            if (
                self._closing
                or len(self._connections) >= CONNECTIONS_MAX
                or not self._conversation.is_welcome(accepted)
            ):
                self.statistics.connections_refused += 1
                accepted.close()
                return
            connection = FrameSocket(accepted)
            thread = threading.Thread(target=self._serve, args=[connection], name=f"kv-{self._name}", daemon=True)
            self._connections.add(connection)
            self._threads = [*filter(threading.Thread.is_alive, self._threads), thread]
            self.statistics.connections_open = len(self._connections)
            thread.start()

    def _serve(self, connection: FrameSocket) -> None:
        try:
            if self._meet(connection):
                self._answer_reads(connection)
        except PeerLost as error:
            log.debug("kv_connection_ended", transport=self._name, reason=str(error))
        except TransferError as error:
            log.warning("kv_connection_cut", transport=self._name, reason=str(error))
        finally:
            with self._lock:
                self._connections.remove(connection)
                self.statistics.connections_open = len(self._connections)
                connection.close()

    def _meet(self, connection: FrameSocket) -> bool:
        """True once the peer has shown that it knows the secret and means this epoch."""
        try:
            connection.limit_waits(Deadline.after(GREETING_TIMEOUT_S))
            _, body = connection.receive_frame(Kind.HELLO)
            self._expected.check(frames.unpack_hello(body))
            self._conversation.greet(connection)
        except PeerLost:
            raise
        except TransferError as error:
            self.statistics.connections_refused += 1
            connection.send(frames.pack_refused(error))
            log.warning("kv_connection_refused", transport=self._name, reason=str(error))
            return False
        return True

    def _answer_reads(self, connection: FrameSocket) -> None:
        while True:
            connection.wait_for_ever()
            kind, length = connection.receive_header()
            connection.limit_waits(Deadline.after(GREETING_TIMEOUT_S))
            _, body = connection.finish_frame(kind, length, allowed=[Kind.READ])
            layout = self._layout
            read = frames.unpack_read(body, num_layers=layout.num_layers, num_blocks=layout.num_blocks)
            connection.limit_waits(Deadline.after(ANSWER_TIMEOUT_S))
            try:
                self._gate.check_read(lease_key=read.lease_key, epoch=read.epoch, blocks=read.blocks)
            except TransferError as refusal:  # No byte was sent: the connection stays good.
                self.statistics.reads_refused += 1
                connection.send(frames.pack_refused(refusal))
                continue
            self.statistics.bytes_total += self._conversation.answer(connection, read)
            self.statistics.reads_total += 1
