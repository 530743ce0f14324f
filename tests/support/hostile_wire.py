"""Hostile bytes at a server's port for calls in frames: of strangers, and of members who mean no good."""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import Mapping, Sequence
from typing import Any, Final

from disaggregated.security import membership
from disaggregated.security.secret import ClusterSecret
from disaggregated.v1 import control_pb2
from disaggregated.wire.frames import FRAME_BYTES_MAX, Kind, call_frame, frame
from disaggregated.wire.handshake import CHALLENGE_BYTES, HELLO_BYTES, WELCOME_BYTES, CallerHandshake
from tests.support import kv_wire
from tests.support.hostile import ANSWER_S, BEGINNINGS, EXTREMES, closed_in_time, may_hang_up, mutated, strange_message

METHODS: Final = tuple(
    (f"{service.name}.{method.name}".encode(), method.input_type)
    for service in control_pb2.DESCRIPTOR.services_by_name.values()
    for method in service.methods
    if method.name != "Drain"  # A member that drains a server means it.
)
CALLS_UNREAD: Final = 1_000_000
"""So many are never taken of one who reads no answer: sockets hold a few megabytes, and the server no more."""
DEAF_S: Final = 0.5
"""A send that is not taken for so long will not be."""


def say_calls(host: str, port: int, num_messages: int, seed: int, likely: Mapping[str, Sequence[Any]]) -> None:
    """Each message on a connection of its own: before the handshake, with a wrong secret, or as a member. Blocks."""
    chance = random.Random(seed)
    for _ in range(num_messages):
        with closed_in_time(), may_hang_up(), socket.create_connection((host, port), timeout=ANSWER_S) as sock:
            match chance.randrange(4):
                case 0:
                    beginnings = (*BEGINNINGS["grpc"], chance.randbytes(HELLO_BYTES))
                    sock.sendall(mutated(chance.choice(beginnings), chance))
                case 1:
                    hello = _hello(sock, ClusterSecret.random())
                    sock.sendall(hello + _strange_frames(chance, likely))
                case _:
                    become_member(sock)
                    sock.sendall(_strange_frames(chance, likely))
            sock.shutdown(socket.SHUT_WR)
            kv_wire.read_to_the_end(sock)


def become_member(sock: socket.socket) -> None:
    """Shakes hands with the secret of this process."""
    sock.sendall(_hello(sock, membership.of_this_process().secret))
    assert len(kv_wire.receive(sock, WELCOME_BYTES)) == WELCOME_BYTES


def _hello(sock: socket.socket, secret: ClusterSecret) -> bytes:
    return CallerHandshake(secret, address="hostile").hello(kv_wire.receive(sock, CHALLENGE_BYTES))


def _strange_frames(chance: random.Random, likely: Mapping[str, Sequence[Any]]) -> bytes:
    """One to five frames, of which any may be wrong in itself, or follow from nothing that was said before."""
    frames = [_strange_frame(chance, likely) for _ in range(chance.randint(1, 5))]
    return b"".join(mutated(each, chance) if chance.random() < 0.3 else each for each in frames)


def _strange_frame(chance: random.Random, likely: Mapping[str, Sequence[Any]]) -> bytes:
    number = chance.choice((0, 1, 1, 2, 2**32 - 1))  # Few, so that one is used again while its call runs.
    match chance.randrange(6):
        case 0:
            return frame(Kind.CANCEL, number)
        case 1:
            return frame(chance.randrange(256), number, chance.randbytes(chance.choice((0, 1, 300))))
        case 2:
            return call_frame(number, chance.choice((b"", b"x" * 255, b"Generation.Nothing", b"\xff\0")), b"?")
        case 3:
            length = chance.choice((FRAME_BYTES_MAX, FRAME_BYTES_MAX + 1, *EXTREMES)) & 0xFFFFFFFF
            return struct.pack("<IBI", length, Kind.CALL, number) + chance.randbytes(20)
        case _:
            name, message_type = chance.choice(METHODS)
            return call_frame(number, name, strange_message(message_type, chance, likely).SerializeToString())


def open_calls_and_read_nothing(host: str, port: int) -> socket.socket:
    """A member whose calls are answered, or refused, and who takes none of it. Blocks until the server no longer
    listens to it; the caller closes the socket."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.settimeout(ANSWER_S)
    sock.connect((host, port))
    become_member(sock)
    sock.settimeout(DEAF_S)
    calls = b"".join(call_frame(number, b"no such call", b"") for number in range(1000))
    for _ in range(CALLS_UNREAD // 1000):
        try:
            sock.sendall(calls)
        except TimeoutError:
            return sock
    sock.close()
    raise AssertionError(f"{CALLS_UNREAD} calls were taken of one who reads nothing")
