"""Scattered blocks as few large messages: what a library without scatter and gather is given to send.

    pool of the source      ▓▓   ▓▓▓    ▓         spans, layer by layer, in the order of the read
                              ╲   │   ╱
    staging buffer           ▓▓▓▓▓▓               one chunk, one message
                              ╱  │  ╲
    pool of the destination ▓  ▓▓▓   ▓▓           other places for the same bytes (block_stream.ArrivingBlocks)

Both ends count the same bytes, so a chunk needs no header: its number says which bytes it holds.
"""

from __future__ import annotations

import dataclasses
import mmap
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from disaggregated.errors import TransferTimeout
from disaggregated.kv_layout import KVLayout
from kvtransfer.deadline import Deadline
from kvtransfer.region import address_of, copy_bytes
from kvtransfer.runs import Run

CHUNK_BYTES: Final = 4 << 20
"""Large enough that a message's own cost does not show, small enough that two of them overlap within one read."""


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """Contiguous bytes of a pool: `size` from `offset` on."""

    offset: int
    size: int


def spans(layout: KVLayout, block_runs: Sequence[Run], layers: range) -> Iterator[Span]:
    """The bytes of `block_runs` in each of `layers`, layer by layer."""
    for layer in layers:
        for run in block_runs:
            yield Span(layout.offset(layer, run.first), run.count * layout.block_bytes)


def chunks(whole: Iterable[Span], chunk_bytes: int = CHUNK_BYTES) -> Iterator[list[Span]]:
    """`whole`, in order, in parts of exactly `chunk_bytes` (the last may be less), spans cut where a part ends."""
    part: list[Span] = []
    room = chunk_bytes
    for span in whole:
        offset, left = span.offset, span.size
        while left:
            size = min(left, room)
            part.append(Span(offset, size))
            offset, left, room = offset + size, left - size, room - size
            if room == 0:
                yield part
                part, room = [], chunk_bytes
    if part:
        yield part


class StagingBuffer:
    """`size` bytes of page-aligned memory that blocks are packed into, or arrive in."""

    def __init__(self, size: int = CHUNK_BYTES) -> None:
        self.view = memoryview(mmap.mmap(-1, size))
        self.address = address_of(self.view)

    def gather(self, chunk: Sequence[Span], pool_address: int) -> memoryview:
        """Copy `chunk` out of the pool; returns the part of the buffer that holds it."""
        at = 0
        for span in chunk:
            copy_bytes(self.address + at, pool_address + span.offset, span.size)
            at += span.size
        assert at <= len(self.view), f"a chunk of {at} bytes in a buffer of {len(self.view)}"
        return self.view[:at]


class StagingBuffers:
    """A bounded number of them, made when first needed. Thread-safe.

    Invariant: a buffer is free, taken, or lost: lost ones may still be written by a library that did not let go of
    them; they are never handed out again, and others are made in their place.
    """

    def __init__(self, count: int, buffer_bytes: int = CHUNK_BYTES) -> None:
        self._changed = threading.Condition()
        self._free: list[StagingBuffer] = []
        self._buffer_bytes = buffer_bytes
        self._num_to_make = count
        self.count = count
        self.num_lost = 0

    def take(self, count: int, *, deadline: Deadline) -> list[StagingBuffer]:
        """`count` at once, so that two readers never wait for each other. Raises TransferTimeout."""
        assert count <= self.count, f"{count} of {self.count} staging buffers"
        with self._changed:
            if not self._changed.wait_for(lambda: self._num_free() >= count, deadline.left_s()):
                raise TransferTimeout(f"no {count} of {self.count} staging buffers came free in time")
            taken = [self._free.pop() for _ in range(min(count, len(self._free)))]
            self._num_to_make -= count - len(taken)
        return taken + [StagingBuffer(self._buffer_bytes) for _ in range(count - len(taken))]

    def give_back(self, buffers: Sequence[StagingBuffer]) -> None:
        with self._changed:
            self._free.extend(buffers)
            self._changed.notify_all()

    def lose(self, buffers: Sequence[StagingBuffer]) -> None:
        """Somebody may still write into these."""
        with self._changed:
            self.num_lost += len(buffers)
            self._num_to_make += len(buffers)
            self._changed.notify_all()

    def _num_free(self) -> int:
        return len(self._free) + self._num_to_make
