"""The control socket of a transport whose blocks go through a library of their own.

    framed control, TCP    who are you, may I read this, here it comes; and above all: is the peer still there?
    the library            nothing but the blocks

Libraries tell of a dead peer late or never, and of a stranger never at all. A socket tells at once, and its frames are
proven (`meeting.py`), so what a library must know of its peer (an address, a key to memory) travels here.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import socket
from collections.abc import Callable

from disaggregated.errors import PeerLost, TransferError
from disaggregated.kv_layout import KVLayout
from kvtransfer.deadline import Deadline
from kvtransfer.transport import EndpointStatistics, Offer, OurEnd, ReadGate
from kvtransfer.transports.frame_socket import FrameSocket
from kvtransfer.transports.frames import Welcome
from kvtransfer.transports.listener import Conversation, FrameServer
from kvtransfer.transports.meeting import EndpointIdentity, Introduction
from kvtransfer.transports.tcp import EVERY_ADDRESS


class ControlPort:
    """Listens on a TCP port and answers by `conversation`, from `start` to `close`."""

    def __init__(self, name: str, conversation: Conversation, layout: KVLayout, *, epoch: int, host: str) -> None:
        """`host` is the address we bind and the one that peers are told; bound to every address we tell none."""
        self._name = name
        self._conversation = conversation
        self._layout = layout
        self._host = host
        self._identity = EndpointIdentity.fresh(epoch)
        self._address = ""
        self._server: FrameServer | None = None

    def start(self, gate: ReadGate) -> None:
        """Raises TransferError when the address cannot be bound."""
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        try:
            listening = socket.create_server((self._host, 0), family=family, backlog=128)
        except OSError as error:
            raise TransferError(f"no control socket for {self._name} on {self._host}: {error}") from error
        told = "" if self._host in EVERY_ADDRESS else self._host
        self._address = self._identity.address(f"{told}:{listening.getsockname()[1]}")
        self._server = FrameServer(
            listening, self._conversation, gate, name=self._name, layout=self._layout, identity=self._identity
        )
        self._server.start()

    def describe(self) -> Offer:
        return Offer(name=self._name, address=self._address)

    def close(self, *, deadline: Deadline) -> None:
        if self._server is not None:
            self._server.close(deadline=deadline)

    def statistics(self) -> EndpointStatistics:
        return self._server.statistics if self._server else EndpointStatistics()


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where a control port listens, as its offer told."""

    host: str
    port: int

    @classmethod
    def of(cls, introduction: Introduction) -> Place:
        """Raises TransferError when the offer names none."""
        host, _, port = introduction.place.rpartition(":")
        if not port.isdecimal():
            raise TransferError(f"an offer's address is not host:port: {introduction.place!r}")
        return cls(host, int(port))

    @property
    def is_loopback(self) -> bool:
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """True for an address of this machine alone; a library needs no other network device then."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def dial(
    place: Place,
    introduction: Introduction,
    us: OurEnd,
    *,
    deadline: Deadline,
    tail: bytes = b"",
    make: Callable[[socket.socket], FrameSocket] | None = None,
) -> tuple[FrameSocket, Welcome]:
    """A connection on which both ends have proven themselves, and what the source said.

    `make` owns the socket from its call on. Raises PeerLost when nobody answers, and what `Introduction.meet` raises.
    """
    deadline.check("a control connection to the source")
    try:
        sock = socket.create_connection((place.host, place.port), timeout=min(deadline.left_s(), us.progress_timeout_s))
    except (OSError, ValueError) as error:  # The latter for what can be no host name.
        raise PeerLost(f"no control connection to {place.host}:{place.port}: {error}") from error
    connection = FrameSocket(sock, progress_timeout_s=us.progress_timeout_s) if make is None else make(sock)
    try:
        connection.limit_waits(deadline)
        return connection, introduction.meet(connection, tail=tail)
    except BaseException:
        connection.close()
        raise
