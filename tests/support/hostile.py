"""Hostile bytes, made from a seed: messages of ours with something wrong, for every port of a server.

Each attack says so many messages to one port, and fails when an answer takes longer than `ANSWER_S`: whatever comes,
a port answers, refuses or closes, and never waits for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import random
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor

from disaggregated.v1 import control_pb2, kv_pb2
from kvtransfer.runs import Run
from kvtransfer.transport import Offer
from kvtransfer.transports import frames
from kvtransfer.transports.frames import HEADER, Hello, Kind, ReadRequest
from tests.support import kv_wire

ANSWER_S: Final = 10.0
STREAM_S: Final = 0.05
"""A stream that has nothing to say is left after that."""
CALLS_AT_ONCE: Final = 16
METHODS: Final[tuple[MethodDescriptor, ...]] = tuple(
    method
    for file in (control_pb2.DESCRIPTOR, kv_pb2.DESCRIPTOR)
    for service in file.services_by_name.values()
    for method in service.methods
)
EXTREMES: Final = (0, 1, 2, 127, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)
_INTEGERS: Final = {
    FieldDescriptor.TYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.TYPE_FIXED32: (0, 2**32 - 1),
    FieldDescriptor.TYPE_UINT64: (0, 2**64 - 1),
    FieldDescriptor.TYPE_FIXED64: (0, 2**64 - 1),
    FieldDescriptor.TYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_SINT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_SINT64: (-(2**63), 2**63 - 1),
}

# Bytes.


def mutated(message: bytes, chance: random.Random) -> bytes:
    """`message` with one to four things wrong."""
    wrong = bytearray(message)
    for _ in range(chance.randint(1, 4)):
        chance.choice(_MUTATIONS)(wrong, chance)
    return bytes(wrong)


def _flip(wrong: bytearray, chance: random.Random) -> None:
    if wrong:
        wrong[chance.randrange(len(wrong))] ^= 1 << chance.randrange(8)


def _overwrite(wrong: bytearray, chance: random.Random) -> None:
    """A number at its limit, where a length or an id may stand."""
    size = chance.choice((1, 2, 4, 8))
    at = chance.randrange(len(wrong) + 1)
    wrong[at : at + size] = (chance.choice(EXTREMES) & (1 << 8 * size) - 1).to_bytes(size, "little")


def _cut(wrong: bytearray, chance: random.Random) -> None:
    del wrong[chance.randrange(len(wrong) + 1) :]


def _drop(wrong: bytearray, chance: random.Random) -> None:
    at = chance.randrange(len(wrong) + 1)
    del wrong[at : at + chance.randint(1, 16)]


def _insert(wrong: bytearray, chance: random.Random) -> None:
    at = chance.randrange(len(wrong) + 1)
    wrong[at:at] = chance.randbytes(chance.choice((1, 7, 64, 5000)))


def _repeat(wrong: bytearray, chance: random.Random) -> None:
    wrong += wrong[chance.randrange(len(wrong) + 1) :][:5000]


_MUTATIONS: Final[Sequence[Callable[[bytearray, random.Random], None]]] = (
    _flip,
    _overwrite,
    _cut,
    _drop,
    _insert,
    _repeat,
)

# Messages of the protocol.


def strange_message(descriptor: Descriptor | None, chance: random.Random, likely: Mapping[str, Sequence[Any]]) -> Any:
    """A message of this type; each field is missing, one that is `likely` under its name, or at a limit of its type."""
    assert descriptor is not None
    message = message_factory.GetMessageClass(descriptor)()
    for field in descriptor.fields:
        if chance.random() < 0.2:
            continue
        if field.is_repeated:
            count = chance.choice((1, 2, 3, 50))
            values = [_value(field, chance, likely) for _ in range(count)]
            getattr(message, field.name).extend(values)
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            getattr(message, field.name).CopyFrom(strange_message(field.message_type, chance, likely))
        else:
            setattr(message, field.name, _value(field, chance, likely))
    return message


def _value(field: FieldDescriptor, chance: random.Random, likely: Mapping[str, Sequence[Any]]) -> Any:
    if field.name in likely and chance.random() < 0.7:
        return chance.choice(likely[field.name])
    if field.type == FieldDescriptor.TYPE_MESSAGE:
        return strange_message(field.message_type, chance, likely)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return chance.randbytes(chance.choice((0, 1, 15, 16, 17, 160, 5000)))
    return chance.choice(_extreme_values(field))


def _extreme_values(field: FieldDescriptor) -> Sequence[Any]:
    match field.type:
        case FieldDescriptor.TYPE_STRING:
            return ("", "x", "x" * 300, "\0", "../../etc", "{}%s%n", "\N{GRINNING FACE}" * 80)
        case FieldDescriptor.TYPE_BOOL:
            return (False, True)
        case FieldDescriptor.TYPE_FLOAT | FieldDescriptor.TYPE_DOUBLE:
            return (0.0, -1.0, 0.5, 1e30, float("nan"), float("inf"), float("-inf"), 5e-324)
        case FieldDescriptor.TYPE_ENUM:
            assert field.enum_type is not None
            return [value.number for value in field.enum_type.values]
        case kind:
            low, high = _INTEGERS[kind]
            return [min(max(value, low), high) for value in (*EXTREMES, -1)]


# Attacks.


async def call_strangely(
    channels: Sequence[grpc.aio.Channel], num_messages: int, seed: int, likely: Mapping[str, Sequence[Any]]
) -> None:
    """Messages of every method, valid in form or not even that, over each of `channels`."""
    chance = random.Random(seed)
    limit = asyncio.Semaphore(CALLS_AT_ONCE)

    async def one(channel: grpc.aio.Channel, method: MethodDescriptor, message: bytes) -> None:
        async with limit:
            await _call(channel, method, message)

    for begin in range(0, num_messages, 1000):
        async with asyncio.TaskGroup() as group:
            for _ in range(min(1000, num_messages - begin)):
                method = chance.choice(METHODS)
                message = strange_message(method.input_type, chance, likely).SerializeToString()
                if chance.random() < 0.5:
                    message = mutated(message, chance)
                channel = chance.choice(channels)
                if method.name != "Drain" or channel is channels[0]:  # A member that drains a server means it.
                    group.create_task(one(channel, method, message))


async def _call(channel: Any, method: MethodDescriptor, message: bytes) -> None:
    """One call to its end; any status is an answer, but none in time."""
    name = f"/{method.containing_service.full_name}/{method.name}"
    try:
        async with asyncio.timeout(2 * ANSWER_S):
            if method.server_streaming:
                call = channel.unary_stream(name)(message, timeout=STREAM_S)
                await call.read()
                call.cancel()
            else:
                await channel.unary_unary(name)(message, timeout=ANSWER_S)
    except grpc.aio.AioRpcError as error:
        late = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED and not method.server_streaming
        assert not late, f"{name} did not answer to {message.hex()}"


def say_frames(offer: Offer, lease_key: bytes, epoch: int, num_messages: int, seed: int) -> None:
    """Frames at the control socket of an endpoint: of strangers, and of a member who follows the lease. Blocks."""
    chance = random.Random(seed)
    read = frames.pack_read(
        ReadRequest(lease_key=lease_key, epoch=epoch, layers=range(2), blocks=(Run(0, 1), Run(3, 2)))
    )
    hello = frames.pack_hello(Hello(nonce=b"n" * 16, epoch=epoch, peer_id="hostile", proof=b"p" * 32, tail=b"t" * 20))
    strange = (
        hello,
        read,
        frames.pack_blocks_header(4096),
        HEADER.pack(frames.MAGIC, frames.VERSION, Kind.HELLO, 10_000),
    )
    for _ in range(num_messages):
        is_member = chance.random() < 0.4
        with closed_in_time(), may_hang_up():
            connect = kv_wire.introduced if is_member else _dialled
            with connect(offer, epoch=epoch) as sock:
                sock.settimeout(ANSWER_S)
                base = read if is_member else chance.choice(strange)
                sock.sendall(mutated(base, chance) if chance.random() < 0.9 else chance.randbytes(200))
                sock.shutdown(socket.SHUT_WR)
                kv_wire.read_to_the_end(sock)


def _dialled(offer: Offer, *, epoch: int) -> socket.socket:
    return kv_wire.dial(offer)


_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_SETTINGS: Final = b"\0\0\0\x04\0\0\0\0\0"
_HEADERS: Final = (
    b"\0\0\x20\x01\x05\0\0\0\x01"
    + b"\x82\x86\x84\x41\x8a\x08\x9d\x5c\x0b\x81\x70\xdc\x78\x0f\x03\x40\x82\x49\x7c\xa5\x8a"
)
_REQUEST: Final = (
    b"POST /v1/completions HTTP/1.1\r\nhost: here\r\ncontent-type: application/json\r\ncontent-length: 40\r\n\r\n"
    b'{"model": "fake", "prompt": "a", "n": 1}'
)
BEGINNINGS: Final[Mapping[str, Sequence[bytes]]] = {
    "grpc": (b"", _PREFACE, _PREFACE + _SETTINGS, _PREFACE + _SETTINGS + _HEADERS, _REQUEST, b"\x16\x03\x01\x02\0\x01"),
    "http": (
        b"",
        _REQUEST,
        _REQUEST.replace(b"content-length: 40", b"transfer-encoding: chunked"),
        b"GET /health HTTP/1.1\r\n\r\n",
    ),
}
"""What the other end may take for the beginning of its protocol."""


def say_raw(host: str, port: int, beginnings: Sequence[bytes], num_messages: int, seed: int) -> None:
    """Bytes at a TCP port, each message on a connection of its own. Blocks."""
    chance = random.Random(seed)
    for _ in range(num_messages):
        message = mutated(chance.choice(beginnings), chance) + chance.randbytes(chance.choice((0, 0, 9, 300)))
        with (
            closed_in_time(),
            may_hang_up(),
            socket.create_connection((host, port), timeout=ANSWER_S) as sock,
        ):
            sock.sendall(message)
            sock.shutdown(socket.SHUT_WR)
            kv_wire.read_to_the_end(sock)


@contextlib.contextmanager
def may_hang_up() -> Iterator[None]:
    """The other end closes when it has heard enough, also while we speak."""
    try:
        yield
    except ConnectionError:
        pass
    except OSError as error:
        if error.errno != errno.ENOTCONN:  # What `shutdown` says then; Python has no class for it.
            raise


@contextlib.contextmanager
def closed_in_time() -> Iterator[None]:
    try:
        yield
    except TimeoutError as error:
        raise AssertionError(f"neither answered nor closed within {ANSWER_S} s") from error
