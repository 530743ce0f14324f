"""The host tier's memory on the CPU: whole blocks of all layers, there and back."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from disaggregated.engine.host_tier.copies import BlockCopier, BlockCopy, Direction
from disaggregated.engine.host_tier.device_memory import StreamBlockCopier
from disaggregated.engine.host_tier.memory import MemoryBlockCopier
from disaggregated.engine.kv_cache import KVCache
from disaggregated.engine.ops.api import LayerPool
from disaggregated.errors import NotEnoughMemory
from disaggregated.kv_layout import KVLayout

NUM_BLOCKS, NUM_SLOTS = 5, 3
Pool = npt.NDArray[np.uint8]
Make = Callable[[Pool, int], BlockCopier]


def written_first(copies: list[BlockCopy]) -> list[BlockCopy]:
    """Without those that read a slot before anything was written into it: the books never ask for one."""
    written: set[int] = set()
    kept = []
    for copy in copies:
        if copy.direction is Direction.OFFLOAD:
            written.add(copy.slot)
        if copy.slot in written:
            kept.append(copy)
    return kept


COPIES = st.lists(
    st.builds(BlockCopy, st.sampled_from(Direction), st.integers(0, NUM_BLOCKS - 1), st.integers(0, NUM_SLOTS - 1)),
    max_size=30,
).map(written_first)


def on_cpu(pool: Pool, num_slots: int) -> BlockCopier:
    return MemoryBlockCopier(pool, num_slots)


def on_a_stream(pool: Pool, num_slots: int) -> BlockCopier:
    """The one for devices, whose tensors may lie anywhere; here they lie where the test can see them."""
    return StreamBlockCopier(torch.from_numpy(pool), num_slots)


@pytest.mark.parametrize("make", [on_cpu, on_a_stream])
@given(copies=COPIES, seed=st.integers(0, 2**32 - 1))
def test_copies_are_carried_out_in_order_and_touch_nothing_else(make: Make, copies: list[BlockCopy], seed: int) -> None:
    pool = np.random.default_rng(seed).integers(0, 256, (4, NUM_BLOCKS, 24), dtype=np.uint8)
    blocks = [pool[:, block_id].copy() for block_id in range(NUM_BLOCKS)]
    slots: dict[int, Pool] = {}
    copier = make(pool, NUM_SLOTS)
    assert copier.num_slots == NUM_SLOTS
    copier.copy(copies)
    copier.wait()
    for direction, block_id, slot in copies:
        if direction is Direction.OFFLOAD:
            slots[slot] = blocks[block_id]
        else:
            blocks[block_id] = slots[slot]
    for block_id, expected in enumerate(blocks):
        assert (pool[:, block_id] == expected).all()


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_block_of_every_layer_comes_back_as_it_was_scales_and_all(dtype: str) -> None:
    layout = KVLayout(num_layers=3, num_kv_heads=2, head_dim=8, block_size=4, dtype=dtype, num_blocks=NUM_BLOCKS)
    cache = KVCache(layout, device=torch.device("cpu"), allocate=lambda layout: bytearray(layout.pool_bytes))
    cache.blocks_LBX.copy_(torch.randint(0, 256, cache.blocks_LBX.shape, dtype=torch.uint8))
    before = [_bits_of(pool, 2) for pool in cache.layers]
    copier = MemoryBlockCopier(cache.blocks_LBX.numpy(), NUM_SLOTS)
    copier.copy([BlockCopy(Direction.OFFLOAD, 2, 1)])
    cache.blocks_LBX.zero_()
    copier.copy([BlockCopy(Direction.ONBOARD, 4, 1)])
    assert [_bits_of(pool, 4) for pool in cache.layers] == before


def _bits_of(pool: LayerPool, block_id: int) -> tuple[bytes, bytes]:
    scales = b"" if pool.scales is None else pool.scales[block_id].numpy().tobytes()
    return pool.values[block_id].numpy().tobytes(), scales


@pytest.mark.parametrize("make", [on_cpu, on_a_stream])
def test_memory_that_the_system_does_not_have_is_refused_by_the_key_that_asked_for_it(make: Make) -> None:
    with pytest.raises(NotEnoughMemory, match="host_cache_size"):
        make(np.zeros((30, 2, 1 << 20), np.uint8), 1 << 35)
