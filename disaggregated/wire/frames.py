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
from typing import Final

FRAME_BYTES_MAX: Final = 64 << 20
"""A prompt of a million token ids takes three."""
_HEAD: Final = struct.Struct("<IBI")
HEAD_BYTES: Final = _HEAD.size
_unpack_head: Final = _HEAD.unpack_from


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

    def feed(self, received: bytes) -> list[tuple[int, int, bytes]]:
        """The frames that are whole now: kind, call, payload.

        Raises:
            FrameError: a frame is larger than any of ours. What came with it is of no more use, either.
        """
        if self._num_bytes:
            self._parts.append(received)
            self._num_bytes += len(received)
            if self._num_bytes < self._num_wanted:
                return []
            received = b"".join(self._parts)
            self._num_bytes = 0
        frames = []
        begin, end = HEAD_BYTES, len(received)
        wanted = HEAD_BYTES
        while begin <= end:
            length, kind, call = _unpack_head(received, begin - HEAD_BYTES)
            if length > FRAME_BYTES_MAX:
                raise FrameError(f"a frame of {length} bytes, the limit is {FRAME_BYTES_MAX}")
            if begin + length > end:
                wanted += length
                break
            frames.append((kind, call, received[begin : begin + length]))
            begin += length + HEAD_BYTES
        if left := received[begin - HEAD_BYTES :]:
            self._parts, self._num_bytes, self._num_wanted = [left], len(left), wanted
        return frames
