"""The source's side of a connection, the same for every transport that has one: listen, greet, answer reads.

One thread accepts, one serves each connection; they block in the kernel and cost nothing while idle. Their number is
bounded: a connection beyond the bound is closed at once, and the peer that made it reports PeerLost. Strangers, who
have not proven yet that they belong to the cluster, share a few places of their own: when those are taken, the one that
has been there longest is sent away, so that whoever only holds connections open keeps nobody else out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import socket
import threading
from typing import Final, Protocol

from disaggregated import logs
from disaggregated.errors import PeerLost, TransferError
from disaggregated.kv_layout import KVLayout
from kvtransfer.deadline import Deadline
from kvtransfer.transport import EndpointStatistics, ReadGate
from kvtransfer.transports import frames
from kvtransfer.transports.frame_socket import FrameSocket
from kvtransfer.transports.frames import Hello, Kind, ReadRequest
from kvtransfer.transports.meeting import EndpointIdentity

log = logs.get(__name__)

CONNECTIONS_MAX: Final = 128
"""Of peers that have proven who they are."""
STRANGERS_MAX: Final = 32
"""Connections that have not. Each makes us hold a HELLO (16 KiB at most) and a thread, GREETING_TIMEOUT_S at most."""
GREETING_TIMEOUT_S: Final = 5.0
"""For a HELLO, and for the rest of a request whose first bytes have come."""
ACCEPT_PAUSE_S: Final = 0.1
"""After a connection could not be accepted, for want of descriptors for example: the next one may be."""
ANSWER_TIMEOUT_S: Final = 60.0
"""For a peer to take the blocks it asked for; the progress timeout cuts in much earlier when it takes none."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Greeting:
    """What a transport adds to a WELCOME."""

    tail: bytes = b""
    """For the destination's half of this transport alone: the address of a library's worker, for example."""
    fd: int | None = None
    """Goes with it, over a unix socket; stays ours."""


class Conversation(Protocol):
    """What differs between transports; called on the connections' threads."""

    def is_welcome(self, accepted: socket.socket) -> bool:
        """False closes the connection before a byte is read."""

    def greeting(self, connection: FrameSocket, hello: Hello) -> Greeting:
        """For a peer that has proven itself; `hello.tail` is what its half of this transport sent."""

    def answer(self, connection: FrameSocket, read: ReadRequest) -> int:
        """Send BLOCKS for a read that the gate has let through; returns the bytes that it moved."""

    def part(self, connection: FrameSocket) -> None:
        """It has ended: give back what `greeting` made for it. Called for connections that were never greeted, too."""


class FrameServer:
    """Answers one transport's connections. Owns the listening socket and every thread, from `start` to `close`.

    Invariant: every open connection has a thread; it is a stranger's until its peer has proven itself.
    """

    def __init__(
        self,
        listening: socket.socket,
        conversation: Conversation,
        gate: ReadGate,
        *,
        name: str,
        layout: KVLayout,
        identity: EndpointIdentity,
    ) -> None:
        self._listening = listening
        self._conversation = conversation
        self._gate = gate
        self._name = name
        self._layout = layout
        self._identity = identity
        self._lock = threading.Lock()
        self._connections: set[FrameSocket] = set()
        self._strangers: dict[FrameSocket, None] = {}  # In the order in which they came.
        self._members: set[FrameSocket] = set()
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
            if self._closing or not self._has_room() or not self._conversation.is_welcome(accepted):
                self.statistics.connections_refused += 1
                accepted.close()
                return
            connection = FrameSocket(accepted)
            thread = threading.Thread(target=self._serve, args=[connection], name=f"kv-{self._name}", daemon=True)
            self._connections.add(connection)
            self._strangers[connection] = None
            self._threads = [*filter(threading.Thread.is_alive, self._threads), thread]
            self.statistics.connections_open = len(self._connections)
            thread.start()

    def _has_room(self) -> bool:
        """True when one more may be greeted; makes the stranger who came first leave for it."""
        if len(self._members) >= CONNECTIONS_MAX:
            return False
        if len(self._strangers) < STRANGERS_MAX:
            return True
        if len(self._connections) >= CONNECTIONS_MAX + 2 * STRANGERS_MAX:
            return False  # Those who were sent away have not gone yet.
        first = next(iter(self._strangers))
        del self._strangers[first]
        first.shut()
        return True

    def _serve(self, connection: FrameSocket) -> None:
        try:
            peer_id = self._meet(connection)
            if peer_id is not None:
                self._answer_reads(connection, peer_id)
        except PeerLost as error:
            log.debug("kv_connection_ended", transport=self._name, reason=str(error))
        except TransferError as error:
            log.warning("kv_connection_cut", transport=self._name, reason=str(error))
        finally:
            self._conversation.part(connection)
            with self._lock:
                self._connections.remove(connection)
                self._strangers.pop(connection, None)
                self._members.discard(connection)
                self.statistics.connections_open = len(self._connections)
                connection.close()

    def _meet(self, connection: FrameSocket) -> str | None:
        """Who it is, once it has proven that it knows the secret and means this epoch; None when it was refused."""
        try:
            connection.limit_waits(Deadline.after(GREETING_TIMEOUT_S))
            challenge = secrets.token_bytes(frames.NONCE_BYTES)
            connection.send(frames.pack_challenge(challenge))
            _, body = connection.receive_frame(Kind.HELLO)
            hello = frames.unpack_hello(body)
            self._identity.check(hello, challenge=challenge)
            with self._lock:
                self._strangers.pop(connection, None)
                self._members.add(connection)
            self._greet(connection, hello, challenge)
        except PeerLost:
            raise
        except TransferError as error:
            self.statistics.connections_refused += 1
            connection.send(frames.pack_refused(error))
            log.warning("kv_connection_refused", transport=self._name, reason=str(error))
            return None
        return hello.peer_id

    def _greet(self, connection: FrameSocket, hello: Hello, challenge: bytes) -> None:
        greeting = self._conversation.greeting(connection, hello)
        welcome = self._identity.welcome(
            hello, challenge=challenge, region_bytes=self._layout.pool_bytes, tail=greeting.tail
        )
        if greeting.fd is None:
            connection.send(frames.pack_welcome(welcome))
        else:
            connection.send_with_descriptor(frames.pack_welcome(welcome), greeting.fd)

    def _answer_reads(self, connection: FrameSocket, peer_id: str) -> None:
        while True:
            connection.wait_for_ever()
            kind, length = connection.receive_header()
            connection.limit_waits(Deadline.after(GREETING_TIMEOUT_S))
            _, body = connection.finish_frame(kind, length, allowed=[Kind.READ])
            layout = self._layout
            read = frames.unpack_read(body, num_layers=layout.num_layers, num_blocks=layout.num_blocks)
            connection.limit_waits(Deadline.after(ANSWER_TIMEOUT_S))
            try:
                self._gate.check_read(
                    lease_key=read.lease_key,
                    epoch=read.epoch,
                    blocks=read.blocks,
                    layers=read.layers,
                    peer_id=peer_id,
                )
            except TransferError as refusal:  # No byte was sent: the connection stays good.
                self.statistics.reads_refused += 1
                connection.send(frames.pack_refused(refusal))
                continue
            self.statistics.bytes_total += self._conversation.answer(connection, read)
            self.statistics.reads_total += 1
