"""The host tier of a pool on the CPU: ordinary memory beside the pool's shared memory.

The pool is populated at start and registered with every transport, so it is small and of fixed size; this memory is
neither: it costs what is really used, and only the engine's thread touches it.

A slot holds its block of every layer in one piece. Copying a block is then one strided assignment, which numpy does at
the speed of memcpy, without the interpreter's lock.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from disaggregated.engine.host_tier.copies import BlockCopy, Direction
from disaggregated.errors import NotEnoughMemory


class MemoryBlockCopier:
    """Implements `BlockCopier`: every copy is done when copy() returns."""

    def __init__(self, pool_LBX: npt.NDArray[np.uint8], num_slots: int) -> None:
        """
        pool_LBX: the whole pool, (num_layers, num_blocks, block_bytes).

        Raises:
            NotEnoughMemory: the system refuses the address range; pages are taken when they are first written.
        """
        num_layers, _, block_bytes = pool_LBX.shape
        self._pool_LBX = pool_LBX
        self._num_slots = num_slots
        try:
            memory = mmap.mmap(-1, num_slots * num_layers * block_bytes)
        except (OSError, OverflowError, ValueError) as error:
            raise NotEnoughMemory(
                f"no {num_slots * num_layers * block_bytes:,} bytes for kv_cache_config.host_cache_size: {error}"
            ) from error
        self._slots_SLX = np.frombuffer(memory, dtype=np.uint8).reshape(num_slots, num_layers, block_bytes)

    @property
    def num_slots(self) -> int:
        return self._num_slots

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        for direction, block_id, slot in copies:
            if direction is Direction.OFFLOAD:
                self._slots_SLX[slot] = self._pool_LBX[:, block_id]
            else:
                self._pool_LBX[:, block_id] = self._slots_SLX[slot]

    def wait(self) -> None:
        """Nothing is ever under way."""
