"""The control socket of a transport between two processes of one host and one user: an abstract unix socket.

It leaves no file behind, tells who is at its other end, and carries descriptors. Each read is asked for on it: so a
dead source, an expired lease or a wrong epoch is found before a byte is copied, exactly as over a network.
"""

from __future__ import annotations

import errno
import os
import secrets
import socket
import struct
from typing import Final

from disaggregated.errors import PeerLost, TransferError
from disaggregated.kv_layout import KVLayout
from kvtransfer.deadline import Deadline
from kvtransfer.transport import EndpointStatistics, Offer, ReadGate
from kvtransfer.transports.frame_socket import FrameSocket
from kvtransfer.transports.listener import Conversation, FrameServer
from kvtransfer.transports.meeting import EndpointIdentity

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


class UnixPort:
    """Listens, and answers by `conversation`, from `start` to `close`."""

    def __init__(self, name: str, conversation: Conversation, layout: KVLayout, *, epoch: int) -> None:
        self._name = name
        self._conversation = conversation
        self._layout = layout
        self._socket_name = f"disaggregated-kv-{secrets.token_hex(8)}"
        self._identity = EndpointIdentity.fresh(epoch)
        self._server: FrameServer | None = None

    def start(self, gate: ReadGate) -> None:
        """Raises TransferError when there is no such socket to be had."""
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            listening.bind(f"\0{self._socket_name}")
            listening.listen()
        except OSError as error:
            listening.close()
            raise TransferError(f"no unix socket for shared memory: {error}") from error
        self._server = FrameServer(
            listening, self._conversation, gate, name=self._name, layout=self._layout, identity=self._identity
        )
        self._server.start()

    def describe(self) -> Offer:
        return Offer(name=self._name, address=self._identity.address(self._socket_name), host_key=host_key())

    def close(self, *, deadline: Deadline) -> None:
        if self._server is not None:
            self._server.close(deadline=deadline)

    def statistics(self) -> EndpointStatistics:
        return self._server.statistics if self._server else EndpointStatistics()


def dial(place: str, *, progress_timeout_s: float, deadline: Deadline) -> FrameSocket:
    """A connection to a process of our own user, on which nothing has been said yet; its waits are limited.

    Raises PeerLost when nobody listens there, TransferError when it is somebody else's.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    connection = FrameSocket(sock, progress_timeout_s=progress_timeout_s)
    try:
        connection.limit_waits(deadline)
        _connect(sock, f"\0{place}")
        if not is_ours(sock):
            raise TransferError("the source runs as another user")
    except BaseException:
        connection.close()
        raise
    return connection


def is_ours(sock: socket.socket) -> bool:
    """Whether a process of our own user made the other end of this unix socket."""
    return peer_uid(sock) == os.getuid()


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
