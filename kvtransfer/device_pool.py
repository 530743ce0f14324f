"""A pool in a device's memory that a process on the same host copies from, straight into its own.

    source process                                   destination process
    checksums of new blocks, by a kernel
    its allocation's handle, in a signed WELCOME ──▶ the allocation, mapped
    blocks of its pool ═══════ one kernel ═════════▶ blocks of our pool, and a checksum of what the kernel stored

The engine owns pool and kernels, and gives them to the transfer layer as a `DevicePool`; mapping another process's
memory is a `DeviceMapper`'s work. Both are Protocols, because neither exists on a machine without a GPU.

**The checksum.** XXH3 is one long chain a block, which is what a GPU is worst at. Blocks on a device have a sum instead
that any number of threads make together, in any order: over every 64-bit word w of the chosen layers, modulo 2^64,

    mix(w XOR (p + 1) * 0x9E3779B97F4A7C15)          p: the word's place, layer * words of a block and layer + its index
    mix(x): x ^= x >> 33; x *= 0xFF51AFD7ED558CCD; x ^= x >> 33; x *= 0xC4CEB9FE1A85EC53; x ^= x >> 33

`mix` (the last steps of MurmurHash3, Appleby 2011) maps words one to one, so a single wrong word is always found; words
that are exchanged, come from another layer, or are wrong in several places are found but for one case in 2^64, unless
somebody constructs them. So it guards against damage, as XXH3 does, and not against an enemy: that is what the proofs
of the control socket are for.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Final, Protocol, Self

from disaggregated.kv_layout import KVLayout
from kvtransfer.checksum import PoolBlocks
from kvtransfer.transport import ReadStop

WORD_BYTES: Final = 8
_MODULUS_MASK: Final = (1 << 64) - 1


class DevicePool(Protocol):
    """The engine's own pool. Called from any thread; blocks it until the device is done, also when it raises."""

    @property
    def layout(self) -> KVLayout: ...

    @property
    def address(self) -> int:
        """In this process."""

    @property
    def device(self) -> str:
        """`cuda:0`"""

    def checksums(self, block_ids: Sequence[int], layers: range) -> tuple[int, ...]:
        """Of blocks of ours, in `layers`, all written by steps that have finished."""

    def copy(self, source: PoolBlocks, into: Sequence[int], layers: range) -> tuple[int, ...]:
        """Copy block `source.ids[i]` to our `into[i]` and return the checksums of what was stored.

        `source` is memory of a device that ours can read. When this has ended, however it did, nothing is written any
        more; every step that is launched later sees the blocks.

        Raises TransferError when the device refuses; what was copied then is not known.
        """


@dataclasses.dataclass(frozen=True, slots=True)
class Exported:
    """Where another process finds a pool: in which allocation, and where in it."""

    handle: bytes
    offset: int
    nbytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class Mapped:
    """Another process's allocation, readable here until it is closed."""

    base: int
    address: int
    """Of the pool in it."""


class DeviceMapper(Protocol):
    """Makes memory of one device readable in another process. Called from any thread.

    Every method raises TransferError, with the device's own words, when the device or its driver refuses.
    """

    def export(self, address: int, nbytes: int) -> Exported:
        """Of memory of this process, for as long as it is allocated."""

    def open(self, exported: Exported) -> Mapped:
        """Of another process of this host. The mapping is good until it is closed, or until that process ends."""

    def close(self, mapped: Mapped) -> None:
        """No copy out of it may be running, which is the caller's to know. Works for a process that has ended, too."""


@dataclasses.dataclass(frozen=True, slots=True)
class SharedPool:
    """A pool that other processes may copy from, or that copies from theirs."""

    pool: DevicePool
    mapper: DeviceMapper
    exported: Exported


class DeviceSums:
    """Running checksums of blocks on a device. Implements `BlockSums`.

    `copy` has every block stored and summed up by one kernel, which ends before `copy` does: between two looks at the
    stop lies a part of a transfer, far less than a millisecond of a GPU's memory.
    """

    def __init__(self, pool: DevicePool, count: int) -> None:
        self._pool = pool
        self._values = [0] * count
        self._first = 0
        self._count = count
        self._touched = [False]

    @property
    def is_untouched(self) -> bool:
        return not self._touched[0]

    def part(self, begin: int, end: int) -> Self:
        assert 0 <= begin <= end <= self._count, f"blocks {begin} to {end} of {self._count}"
        part = copy.copy(self)  # The values are the same ones.
        part._first, part._count = self._first + begin, end - begin
        return part

    def copy(self, source: PoolBlocks, into: PoolBlocks, layers: range, stop: ReadStop) -> None:
        assert into.address == self._pool.address, "a copy on a device ends in its own pool"
        assert source.layout.difference(into.layout) is None, "pools of unlike blocks"
        assert len(source.ids) == len(into.ids) == self._count, f"{len(source.ids)} blocks into {len(into.ids)}"
        stop.check()
        self._add(self._pool.copy(source, into.ids, layers))

    def take(self, blocks: PoolBlocks, layers: range, stop: ReadStop) -> None:
        assert blocks.address == self._pool.address, "only blocks of the device's own pool are summed up where they lie"
        stop.check()
        self._add(self._pool.checksums(blocks.ids, layers))

    def values(self) -> tuple[int, ...]:
        return tuple(self._values[self._first : self._first + self._count])

    def _add(self, sums: Sequence[int]) -> None:
        """Of layers that were not there before; the order does not matter."""
        assert len(sums) == self._count, f"{len(sums)} checksums of {self._count} blocks"
        self._touched[0] = True
        for i, value in enumerate(sums, self._first):
            self._values[i] = (self._values[i] + value) & _MODULUS_MASK


def why_not_shared(layout: KVLayout) -> str | None:
    """Why no pool of this shape can be copied from device to device; None when it can."""
    if layout.block_bytes % WORD_BYTES:
        return f"a block of {layout.block_bytes} bytes is no whole number of 64-bit words"
    return None
