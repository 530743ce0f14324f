"""The bytes between two ends of a transport: small framed messages, every length bounded before it is believed.

    destination                      source
                                ◀──  CHALLENGE nonce
    HELLO  nonce, who, proof    ──▶
                                ◀──  WELCOME epoch, region, proof           (over a unix socket: its descriptor, too)
    READ   lease, layers, runs  ──▶
                                ◀──  BLOCKS  num_bytes, then the bytes      (shared memory: 0 bytes, "go ahead")
                                ◀──  REFUSED error class, sentence          (instead of WELCOME or BLOCKS)
    MORE                        ──▶                                         (staged transports: room for one chunk more)

HELLO and WELCOME may end in a tail, which only the transport itself understands: the address of a library's worker, for
example. What the proofs prove stands in `meeting.py`.

A frame is a 16-byte header (magic, version, kind, length of the body) and its body; integers are little-endian.
Block bytes follow a BLOCKS header layer by layer, within a layer in the order of the runs that were asked for.
"""

from __future__ import annotations

import dataclasses
import enum
import struct
from typing import Any, Final

from disaggregated import errors
from disaggregated.errors import TransferError
from kvtransfer.runs import Run
from kvtransfer.transport import LEASE_KEY_BYTES

MAGIC: Final = b"KVTR"
VERSION: Final = 2
NONCE_BYTES: Final = 16
PROOF_BYTES: Final = 32
HELLO_TAIL_BYTES_MAX: Final = 16 << 10
"""Small, because it is read from whoever connects, before anything is proven."""
WELCOME_TAIL_BYTES_MAX: Final = 64 << 10
RUNS_MAX: Final = 8192
"""Block runs in one READ; a reader with more asks again."""

HEADER: Final = struct.Struct("<4sHHQ")
_CHALLENGE: Final = struct.Struct(f"<{NONCE_BYTES}s")
_HELLO: Final = struct.Struct(f"<{NONCE_BYTES}sQ128s{PROOF_BYTES}s")
_WELCOME: Final = struct.Struct(f"<QQ{PROOF_BYTES}s")
_READ: Final = struct.Struct(f"<{LEASE_KEY_BYTES}sQIII")
_RUN: Final = struct.Struct("<II")


class Kind(enum.IntEnum):
    HELLO = 1
    WELCOME = 2
    READ = 3
    BLOCKS = 4
    REFUSED = 5
    CHALLENGE = 6
    MORE = 7


BODY_BYTES_MAX: Final = {
    Kind.CHALLENGE: _CHALLENGE.size,
    Kind.HELLO: _HELLO.size + HELLO_TAIL_BYTES_MAX,
    Kind.WELCOME: _WELCOME.size + WELCOME_TAIL_BYTES_MAX,
    Kind.READ: _READ.size + RUNS_MAX * _RUN.size,
    Kind.REFUSED: 1024,
    Kind.MORE: 0,
}
"""BLOCKS is missing: its length must be exactly what was asked for."""


class MalformedFrame(TransferError):
    """These bytes are not our protocol; whoever sent them is disconnected."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    nonce: bytes
    epoch: int
    """Of the source, as Connect told; another one answers when the source was restarted at this address."""
    peer_id: str
    proof: bytes
    tail: bytes = b""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Welcome:
    epoch: int
    region_bytes: int
    proof: bytes
    tail: bytes = b""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ReadRequest:
    lease_key: bytes
    epoch: int
    layers: range
    blocks: tuple[Run, ...]


def pack(kind: Kind, body: bytes) -> bytes:
    return HEADER.pack(MAGIC, VERSION, kind, len(body)) + body


def pack_blocks_header(num_bytes: int) -> bytes:
    return HEADER.pack(MAGIC, VERSION, Kind.BLOCKS, num_bytes)


def unpack_header(header: bytes) -> tuple[Kind, int]:
    """The kind and the body's length, which is within the kind's bound."""
    magic, version, number, length = HEADER.unpack(header)
    if magic != MAGIC:
        raise MalformedFrame(f"a frame begins with {magic!r}, not {MAGIC!r}")
    if version != VERSION:
        raise MalformedFrame(f"the peer speaks version {version} of the block protocol, we speak {VERSION}")
    try:
        kind = Kind(number)
    except ValueError as error:
        raise MalformedFrame(f"a frame of unknown kind {number}") from error
    if kind in BODY_BYTES_MAX and length > BODY_BYTES_MAX[kind]:
        raise MalformedFrame(f"a {kind.name} of {length} bytes; at most {BODY_BYTES_MAX[kind]} are allowed")
    return kind, length


def pack_challenge(nonce: bytes) -> bytes:
    return pack(Kind.CHALLENGE, _CHALLENGE.pack(nonce))


def unpack_challenge(body: bytes) -> bytes:
    """The nonce."""
    return bytes(_unpack(_CHALLENGE, body)[0])


def peer_id_bytes(peer_id: str) -> bytes:
    """As it travels, and as it is proven: at most 128 bytes, and no character of which only a part fits."""
    return peer_id.encode()[:128].decode(errors="ignore").encode()


def pack_hello(hello: Hello) -> bytes:
    assert len(hello.tail) <= HELLO_TAIL_BYTES_MAX, f"a tail of {len(hello.tail)} bytes"
    head = _HELLO.pack(hello.nonce, hello.epoch, peer_id_bytes(hello.peer_id), hello.proof)
    return pack(Kind.HELLO, head + hello.tail)


def unpack_hello(body: bytes) -> Hello:
    nonce, epoch, peer_id, proof = _unpack(_HELLO, body[: _HELLO.size])
    return Hello(
        nonce=nonce,
        epoch=epoch,
        peer_id=peer_id.rstrip(b"\0").decode(errors="replace"),
        proof=proof,
        tail=body[_HELLO.size :],
    )


def pack_welcome(welcome: Welcome) -> bytes:
    assert len(welcome.tail) <= WELCOME_TAIL_BYTES_MAX, f"a tail of {len(welcome.tail)} bytes"
    return pack(Kind.WELCOME, _WELCOME.pack(welcome.epoch, welcome.region_bytes, welcome.proof) + welcome.tail)


def unpack_welcome(body: bytes) -> Welcome:
    epoch, region_bytes, proof = _unpack(_WELCOME, body[: _WELCOME.size])
    return Welcome(epoch=epoch, region_bytes=region_bytes, proof=proof, tail=body[_WELCOME.size :])


def pack_read(read: ReadRequest) -> bytes:
    assert len(read.blocks) <= RUNS_MAX, f"{len(read.blocks)} runs in one read; at most {RUNS_MAX} fit"
    head = _READ.pack(read.lease_key, read.epoch, read.layers.start, len(read.layers), len(read.blocks))
    return pack(Kind.READ, head + b"".join(_RUN.pack(run.first, run.count) for run in read.blocks))


def unpack_read(body: bytes, *, num_layers: int, num_blocks: int) -> ReadRequest:
    """Every layer and block of the result exists in a pool of that size."""
    lease_key, epoch, first_layer, layer_count, num_runs = _unpack(_READ, body[: _READ.size])
    tail = body[_READ.size :]
    if len(tail) != num_runs * _RUN.size or num_runs == 0:
        raise MalformedFrame(f"a READ of {num_runs} runs with {len(tail)} bytes of them")
    if layer_count == 0 or first_layer + layer_count > num_layers:
        raise MalformedFrame(f"layers {first_layer} to {first_layer + layer_count} of {num_layers}")
    blocks = tuple(Run(first, count) for first, count in _RUN.iter_unpack(tail))
    for run in blocks:
        if run.count == 0 or run.end > num_blocks:
            raise MalformedFrame(f"blocks {run.first} to {run.end} of {num_blocks}")
    if sum(run.count for run in blocks) > num_blocks:
        raise MalformedFrame("a READ of more blocks than the pool has")
    return ReadRequest(
        lease_key=lease_key, epoch=epoch, layers=range(first_layer, first_layer + layer_count), blocks=blocks
    )


def pack_refused(error: TransferError) -> bytes:
    return pack(Kind.REFUSED, f"{type(error).__name__}: {error}".encode()[:1024])


def unpack_refused(body: bytes) -> TransferError:
    """The error as the source raised it; an unknown class becomes a plain TransferError."""
    name, _, sentence = body.decode(errors="replace").partition(": ")
    named = getattr(errors, name, None)
    if isinstance(named, type) and issubclass(named, TransferError):
        return named(sentence)
    return TransferError(f"refused by the source: {name}: {sentence}")


def _unpack(layout: struct.Struct, body: bytes) -> tuple[Any, ...]:
    if len(body) != layout.size:
        raise MalformedFrame(f"a body of {len(body)} bytes where {layout.size} belong")
    return layout.unpack(body)
