"""Bytes of a connection, cut into frames.

u32 length of the payload │ u8 kind │ u32 number of the call │ payload            little-endian

caller  CALL      number is fresh; payload: u8 length of the method's name, name, message
        CANCEL    nobody wants what this call brings
server  OPENED    a stream is taken: what depends on it may be asked for
        MESSAGE   one of a stream
        END       a stream is over
        ANSWER    the one message of a call that is no stream; it is over
        ERROR     instead of END or ANSWER; payload: a WireError
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator
from typing import Final

FRAME_BYTES_MAX: Final = 64 << 20
"""A prompt of a million token ids takes three."""
_HEAD: Final = struct.Struct("<IBI")
HEAD_BYTES: Final = _HEAD.size


class Kind(enum.IntEnum):
    CALL = 1
    CANCEL = 2
    OPENED = 3
    MESSAGE = 4
    END = 5
    ANSWER = 6
    ERROR = 7


class FrameError(Exception):
    """The other end does not speak this, or is broken: the connection is of no more use."""


def frame(kind: int, call: int, payload: bytes = b"") -> bytes:
    return _HEAD.pack(len(payload), kind, call) + payload


def call_frame(call: int, method: bytes, message: bytes) -> bytes:
    return b"%b%c%b%b" % (_HEAD.pack(1 + len(method) + len(message), Kind.CALL, call), len(method), method, message)


class FrameReader:
    """Takes bytes as they come. A large frame is put together once, when its last byte is there."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._num_bytes = 0
        self._num_wanted = HEAD_BYTES

    def feed(self, received: bytes) -> Iterator[tuple[int, int, bytes]]:
        """The frames that are whole now: kind, call, payload. Take them all before the next `feed`.

        Raises:
            FrameError: a frame is larger than any of ours.
        """
        if self._num_bytes:
            self._parts.append(received)
            self._num_bytes += len(received)
            if self._num_bytes < self._num_wanted:
                return
            received = b"".join(self._parts)
        at, end = 0, len(received)
        self._num_wanted = HEAD_BYTES
        while end - at >= HEAD_BYTES:
            length, kind, call = _HEAD.unpack_from(received, at)
            if length > FRAME_BYTES_MAX:
                raise FrameError(f"a frame of {length} bytes, the limit is {FRAME_BYTES_MAX}")
            if end - at - HEAD_BYTES < length:
                self._num_wanted = HEAD_BYTES + length
                break
            yield kind, call, received[at + HEAD_BYTES : at + HEAD_BYTES + length]
            at += HEAD_BYTES + length
        left = received[at:]
        self._parts, self._num_bytes = ([left], len(left)) if left else ([], 0)
