"""A GPU whose memory is ours: pools on it, and handles by which "another process" maps one. The sum is numpy's."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from disaggregated.errors import TransferError
from disaggregated.kv_layout import KVLayout
from kvtransfer.checksum import PoolBlocks
from kvtransfer.device_pool import Exported, Mapped
from kvtransfer.region import memory_at

Words = npt.NDArray[np.uint64]

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(words: Words) -> Words:
    for factor in (np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)):
        words = (words ^ (words >> np.uint64(33))) * factor
    return words ^ (words >> np.uint64(33))


def plain_sums(words_LBW: Words, blocks: Sequence[int], layers: range) -> tuple[int, ...]:
    """The checksums that `kvtransfer/device_pool.py` defines, written down as they stand there."""
    num_words = words_LBW.shape[2]
    totals = np.zeros(len(blocks), dtype=np.uint64)
    for layer in layers:
        places = np.arange(layer * num_words + 1, (layer + 1) * num_words + 1, dtype=np.uint64)
        totals += mix(words_LBW[layer, list(blocks)] ^ (places * GOLDEN)).sum(1, dtype=np.uint64)
    return tuple(int(total) for total in totals)


class FakeDevicePool:
    """Implements `DevicePool`."""

    def __init__(self, layout: KVLayout, *, seed: int | None, device: str = "cuda:0") -> None:
        """Of noise, or of zeroes."""
        self.layout = layout
        self.device = device
        self.memory = np.zeros(layout.pool_bytes, dtype=np.uint8)
        if seed is not None:
            self.memory[:] = np.random.default_rng(seed).integers(0, 256, layout.pool_bytes, dtype=np.uint8)
        self.num_copies = 0
        self.before_copy: Callable[[], None] = lambda: None
        """Called on the reading thread, once a kernel would be launched."""

    @property
    def address(self) -> int:
        return int(self.memory.ctypes.data)

    @property
    def blocks_LBX(self) -> npt.NDArray[np.uint8]:
        return self.memory.reshape(self.layout.num_layers, self.layout.num_blocks, -1)

    def checksums(self, block_ids: Sequence[int], layers: range) -> tuple[int, ...]:
        return plain_sums(self._words(self.memory, self.layout), block_ids, layers)

    def copy(self, source: PoolBlocks, into: Sequence[int], layers: range) -> tuple[int, ...]:
        self.before_copy()
        self.num_copies += 1
        theirs = np.frombuffer(memory_at(source.address, source.layout.pool_bytes), dtype=np.uint8)
        words = self._words(theirs, source.layout)
        chosen = slice(layers.start, layers.stop)
        self._words(self.memory, self.layout)[chosen, list(into)] = words[chosen, list(source.ids)]
        return plain_sums(words, source.ids, layers)

    @staticmethod
    def _words(memory: npt.NDArray[np.uint8], layout: KVLayout) -> Words:
        return memory.view(np.uint64).reshape(layout.num_layers, layout.num_blocks, -1)


class FakeMapper:
    """Implements `DeviceMapper`. All instances are one machine's; each counts what it has mapped.

    Invariant: a mapping is closed as often as it was opened.
    """

    _exported: dict[bytes, tuple[int, int]] = {}  # noqa: RUF012  # The machine's: handle to address and size.
    _lock = threading.Lock()

    def __init__(self) -> None:
        self.refuses = ""
        """Why memory of another process cannot be mapped; "" while it can."""
        self.num_mapped = 0

    def export(self, address: int, nbytes: int) -> Exported:
        """The allocation begins 4 KiB before the pool."""
        if self.refuses:
            raise TransferError(self.refuses)
        handle = secrets.token_bytes(64)
        with self._lock:
            self._exported[handle] = (address - 4096, nbytes)
        return Exported(handle, 4096, nbytes)

    def open(self, exported: Exported) -> Mapped:
        if self.refuses:
            raise TransferError(self.refuses)
        with self._lock:
            if exported.handle not in self._exported:
                raise TransferError("cudaIpcOpenMemHandle: cudaErrorMapBufferObjectFailed")
            base, _ = self._exported[exported.handle]
            self.num_mapped += 1
        return Mapped(base, base + exported.offset)

    def close(self, mapped: Mapped) -> None:
        with self._lock:
            assert self.num_mapped > 0, "closed more often than opened"
            self.num_mapped -= 1
