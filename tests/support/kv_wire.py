"""Both ends of a control socket by hand, byte by byte: for tests that say what no end of ours would say."""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import socket
from collections.abc import Iterable

from kvtransfer.transport import Offer
from kvtransfer.transports import frames, meeting
from kvtransfer.transports.frames import HEADER, Hello, Kind
from kvtransfer.transports.meeting import EndpointIdentity

WAIT_S = 5.0
"""What any answer may take."""


def dial(offer: Offer) -> socket.socket:
    """A connection to an endpoint of SHM or TCP, on which its CHALLENGE has not been read."""
    place, _ = offer.split()
    if offer.name == "SHM":
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(WAIT_S)
        sock.connect(f"\0{place}")
        return sock
    host, _, port = place.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=WAIT_S)


def receive(sock: socket.socket, num_bytes: int) -> bytes:
    """Exactly so many; fewer when the other end closes before."""
    received = b""
    while len(received) < num_bytes and (piece := sock.recv(num_bytes - len(received))):
        received += piece
    return received


def receive_frame(sock: socket.socket) -> tuple[Kind, bytes]:
    kind, length = frames.unpack_header(receive(sock, HEADER.size))
    return kind, receive(sock, length)


def read_to_the_end(sock: socket.socket) -> bytes:
    """What the endpoint still says before it closes; a reset is an end, too."""
    said = b""
    with contextlib.suppress(ConnectionError):
        while piece := sock.recv(65536):
            said += piece
    return said


def proven_hello(sock: socket.socket, offer: Offer, *, epoch: int, peer_id: str = "hostile") -> bytes:
    """Takes the CHALLENGE from `sock`; gives the HELLO of a member of the cluster, as it would be sent."""
    kind, body = receive_frame(sock)
    assert kind is Kind.CHALLENGE
    nonce = secrets.token_bytes(frames.NONCE_BYTES)
    key = meeting._connection_key(meeting._endpoint_key(None, offer.split()[1]), frames.unpack_challenge(body), nonce)
    hello = Hello(nonce=nonce, epoch=epoch, peer_id=peer_id, proof=b"")
    return frames.pack_hello(dataclasses.replace(hello, proof=meeting._destination_proof(key, hello)))


def introduced(offer: Offer, *, epoch: int, peer_id: str = "hostile") -> socket.socket:
    """A connection that the endpoint takes for a member's."""
    sock = dial(offer)
    sock.sendall(proven_hello(sock, offer, epoch=epoch, peer_id=peer_id))
    kind, _ = receive_frame(sock)
    assert kind is Kind.WELCOME
    return sock


def greet(sock: socket.socket, identity: EndpointIdentity, *, region_bytes: int, fds: Iterable[int] = ()) -> None:
    """Play a source that knows the secret: CHALLENGE, HELLO, WELCOME."""
    challenge = secrets.token_bytes(frames.NONCE_BYTES)
    sock.sendall(frames.pack_challenge(challenge))
    _, body = receive_frame(sock)
    hello = frames.unpack_hello(body)
    identity.check(hello, challenge=challenge)
    welcome = frames.pack_welcome(identity.welcome(hello, challenge=challenge, region_bytes=region_bytes, tail=b""))
    if fds:
        socket.send_fds(sock, [welcome], list(fds))
    else:
        sock.sendall(welcome)
