"""One checksum a block: xxh3_64 over that block of every layer, in layer order.

    source        block_checksums() of its own memory, when it publishes
    destination   `BlockSums`, fed by the transport with the bytes as they pass: a copy out of shared memory sums up the
                  very registers that it stores, TCP sums up our memory right behind the kernel
                  block_checksums() of our memory, after a transport that fed nothing

What a running checksum covers: the source's memory at the moment of the copy, the way, and the order of the blocks. It
does not cover our memory after the store, as a second pass over it would until that pass is over. Measured: the first
costs nothing, the second a third of the time (docs/decisions/0016).
"""

from __future__ import annotations

import array
import copy
import ctypes
from collections.abc import Sequence
from typing import Final, NamedTuple, Protocol, Self

import xxhash

from disaggregated.kv_layout import KVLayout
from kvtransfer.native.library import CHECKSUM_WORDS, TAKEN_WORD, VALUE_WORD, Outcome, library
from kvtransfer.region import address_of, copy_bytes, memory_at
from kvtransfer.runs import run_pairs
from kvtransfer.transport import ReadStop

PAST_CACHE_BYTES: Final = 4 << 20
"""A copy of at least that much goes past the caches, which it would only sweep: a third more of DRAM is free then."""
_COPY_BYTES_MAX: Final = 4 << 20
"""Between two looks at the stop, without native code: under a millisecond of memcpy."""
_SHORT_BYTES_MAX: Final = 240
"""XXH3 has another algorithm for inputs up to this; no model's blocks are so small."""


class PoolBlocks(NamedTuple):
    """Blocks of a pool at `address` in this process, which whoever made this keeps mapped."""

    address: int
    layout: KVLayout
    ids: Sequence[int]


class BlockSums(Protocol):
    """Running checksums of some blocks. Used by one thread at a time.

    Invariant: the layers of a block come in order, each once; they may come in several calls.
    """

    @property
    def is_untouched(self) -> bool:
        """Nothing was taken yet: a transport that leaves it so has the destination verify its memory instead."""

    def part(self, begin: int, end: int) -> Self:
        """The same running checksums, of blocks `begin` to `end` only: several threads may feed parts."""

    def copy(self, source: PoolBlocks, into: PoolBlocks, layers: range, stop: ReadStop) -> None:
        """Copy block `source.ids[i]` to `into.ids[i]`, summing it up. Raises ReadStopped; some is copied then."""

    def take(self, blocks: PoolBlocks, layers: range, stop: ReadStop) -> None:
        """Sum up blocks where they lie. Raises ReadStopped."""

    def values(self) -> tuple[int, ...]:
        """One a block, all bytes of which were taken."""


def block_sums(count: int, layout: KVLayout, num_layers: int | None = None) -> BlockSums:
    """For `count` blocks through `num_layers` layers, by default all."""
    length = (layout.num_layers if num_layers is None else num_layers) * layout.block_bytes
    native = library()
    if native is None or length <= _SHORT_BYTES_MAX:
        return PlainSums([xxhash.xxh3_64() for _ in range(count)])
    return NativeSums(native, count, length)


def block_checksums(
    pool: memoryview,
    layout: KVLayout,
    block_ids: Sequence[int],
    layers: range | None = None,
    stop: ReadStop | None = None,
) -> tuple[int, ...]:
    """Each 64 bits over `len(layers) * block_bytes` bytes; all layers by default. Raises ReadStopped."""
    assert pool.nbytes == layout.pool_bytes, f"a pool of {pool.nbytes} bytes, its layout says {layout.pool_bytes}"
    chosen = range(layout.num_layers) if layers is None else layers
    sums = block_sums(len(block_ids), layout, len(chosen))
    sums.take(PoolBlocks(address_of(pool), layout, block_ids), chosen, stop or ReadStop())
    return sums.values()


def block_checksum(pool: memoryview, layout: KVLayout, block_id: int, layers: range | None = None) -> int:
    return block_checksums(pool, layout, [block_id], layers)[0]


class NativeSums:
    """Copies and sums up in one pass, or sums up at the speed of memory, with the interpreter lock released."""

    def __init__(self, native: ctypes.CDLL, count: int, length: int) -> None:
        self._native = native
        self._words = array.array("Q", bytes(8 * CHECKSUM_WORDS * count))
        self._first = 0
        self._count = count
        self._length = length
        self._touched = [False]

    @property
    def is_untouched(self) -> bool:
        return not self._touched[0]

    def part(self, begin: int, end: int) -> Self:
        assert 0 <= begin <= end <= self._count, f"blocks {begin} to {end} of {self._count}"
        part = copy.copy(self)  # The words are the same ones.
        part._first, part._count = self._first + begin, end - begin
        return part

    def copy(self, source: PoolBlocks, into: PoolBlocks, layers: range, stop: ReadStop) -> None:
        assert source.layout.block_bytes == into.layout.block_bytes, "pools of unlike blocks"
        assert source.layout.num_layers == into.layout.num_layers, "pools of unlike layers"
        assert len(source.ids) == len(into.ids), f"{len(source.ids)} blocks into {len(into.ids)}"
        self._run(self.order(source, into, layers), stop)

    def order(self, source: PoolBlocks, into: PoolBlocks | None, layers: range) -> array.array[int]:
        """For native code that feeds these checksums; the pools are its caller's to keep mapped."""
        assert len(source.ids) == self._count, f"{len(source.ids)} blocks, {self._count} checksums"
        self._touched[0] = True
        return native_order(source, into, layers, length=self._length)

    def address(self) -> int:
        """Of the first running checksum, while this object lives."""
        return self._words.buffer_info()[0] + 8 * CHECKSUM_WORDS * self._first

    def take(self, blocks: PoolBlocks, layers: range, stop: ReadStop) -> None:
        self._run(self.order(blocks, None, layers), stop)

    def values(self) -> tuple[int, ...]:
        begin = self._first * CHECKSUM_WORDS
        words = self._words[begin : begin + self._count * CHECKSUM_WORDS]
        taken = words[TAKEN_WORD::CHECKSUM_WORDS]
        assert all(num_bytes == self._length for num_bytes in taken), f"{list(taken)} of {self._length} bytes have come"
        return tuple(words[VALUE_WORD::CHECKSUM_WORDS])

    def _run(self, order: array.array[int], stop: ReadStop) -> None:
        stop.check()
        outcome = self._native.take_blocks(order.buffer_info()[0], self.address(), stop.flag_address)
        assert outcome != Outcome.UNSOUND, "a block or layer that is not in its pool"
        if outcome == Outcome.STOPPED:
            stop.check()


def native_order(source: PoolBlocks, into: PoolBlocks | None, layers: range, *, length: int = 0) -> array.array[int]:
    """`order` of csrc/blocks.h; `length` is of the whole input of each checksum that it feeds."""
    address, layout, ids = source
    block_bytes, count, num_layers = layout.block_bytes, len(ids), len(layers)
    past_cache = count * num_layers * block_bytes >= PAST_CACHE_BYTES
    to_address, to_num_blocks, to_ids = (0, 0, ()) if into is None else (into.address, into.layout.num_blocks, into.ids)
    return array.array(
        "q",
        (
            *(address, layout.num_blocks, to_address, to_num_blocks),
            *(count, block_bytes, layout.num_layers, layers.start, num_layers, past_cache, length),
            *ids,
            *to_ids,
        ),
    )


class PlainSums:
    """The same without native code: a copy, then a second pass over what was copied."""

    def __init__(self, hashers: Sequence[xxhash.xxh3_64]) -> None:
        self._hashers = hashers
        self._touched = [False]

    @property
    def is_untouched(self) -> bool:
        return not self._touched[0]

    def part(self, begin: int, end: int) -> Self:
        part = type(self)(self._hashers[begin:end])
        part._touched = self._touched
        return part

    def copy(self, source: PoolBlocks, into: PoolBlocks, layers: range, stop: ReadStop) -> None:
        pairs = list(run_pairs(source.ids, into.ids))
        for layer in layers:
            for pair in pairs:
                begin = source.address + _offset(source.layout, layer, pair.source, pair.count)
                to = into.address + _offset(into.layout, layer, pair.into, pair.count)
                size = pair.count * into.layout.block_bytes
                for at in range(0, size, _COPY_BYTES_MAX):
                    stop.check()
                    copy_bytes(to + at, begin + at, min(_COPY_BYTES_MAX, size - at))
        self.take(into, layers, stop)

    def take(self, blocks: PoolBlocks, layers: range, stop: ReadStop) -> None:
        self._touched[0] = True
        size = blocks.layout.block_bytes
        for hasher, block_id in zip(self._hashers, blocks.ids, strict=True):
            stop.check()
            for layer in layers:
                address = blocks.address + _offset(blocks.layout, layer, block_id, 1)
                hasher.update(memory_at(address, size))

    def values(self) -> tuple[int, ...]:
        return tuple(hasher.intdigest() for hasher in self._hashers)


def _offset(layout: KVLayout, layer: int, block_id: int, count: int) -> int:
    """Of blocks that are all there."""
    assert block_id + count <= layout.num_blocks, f"blocks {block_id} to {block_id + count} of {layout.num_blocks}"
    return layout.offset(layer, block_id)
