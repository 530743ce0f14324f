"""The kernel that copies blocks and sums them up: against the sum as it is defined, and what must not change."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from tests.unit.engine.cuda.kernel_device import AS_INTERPRETED, DEVICE  # isort: skip  # It chooses where kernels run.

from disaggregated.engine.cuda.device_pool import CudaPool
from disaggregated.engine.cuda.kernels.blocks import move_and_sum
from disaggregated.kv_layout import KVLayout
from kvtransfer.checksum import PoolBlocks
from tests.support.fake_gpu import plain_sums

pytestmark = AS_INTERPRETED

OURS = KVLayout(num_layers=3, num_kv_heads=2, head_dim=8, block_size=4, dtype="float32", num_blocks=9)
"""64 words a block and layer."""
THEIRS = dataclasses.replace(OURS, num_blocks=7)
ODD = dataclasses.replace(OURS, head_dim=17, block_size=5, dtype="bfloat16")
"""85 words: the last chunk is not full."""
LONG = dataclasses.replace(OURS, head_dim=64, block_size=33)
"""4224 words: three chunks."""
QUANTISED = dataclasses.replace(OURS, dtype="int8")


def pool_of(layout: KVLayout, seed: int) -> torch.Tensor:
    size = (layout.num_layers, layout.num_blocks, layout.block_bytes)
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def sums_of(pool_LBX: torch.Tensor, blocks: list[int], layers: range) -> tuple[int, ...]:
    return plain_sums(pool_LBX.cpu().numpy().view(np.uint64), blocks, layers)


@pytest.mark.parametrize("layout", [OURS, ODD, LONG, QUANTISED], ids=["64", "85", "4224", "int8"])
@pytest.mark.parametrize("layers", [range(3), range(1, 2), range(1, 3)], ids=str)
def test_blocks_are_copied_and_their_sums_are_those_of_the_definition(layout: KVLayout, layers: range) -> None:
    there, here = dataclasses.replace(layout, num_blocks=7), layout
    theirs, ours = pool_of(there, 1), pool_of(here, 2)
    before = ours.clone()
    source, into = [6, 0, 3], [1, 8, 4]
    pool = CudaPool(ours, here, move_and_sum)
    found = pool.copy(PoolBlocks(theirs.data_ptr(), there, source), into, layers)
    assert found == sums_of(theirs, source, layers)
    chosen = slice(layers.start, layers.stop)
    assert torch.equal(ours[chosen, into], theirs[chosen, source])
    ours[chosen, into] = before[chosen, into]
    assert torch.equal(ours, before), "something else was written"


def test_sums_of_blocks_where_they_lie_change_nothing() -> None:
    ours = pool_of(OURS, 3)
    before = ours.clone()
    pool = CudaPool(ours, OURS, move_and_sum)
    assert pool.checksums([5, 2], range(3)) == sums_of(ours, [5, 2], range(3))
    assert torch.equal(ours, before)


def test_what_a_source_sums_up_a_destination_finds() -> None:
    theirs, ours = pool_of(THEIRS, 1), pool_of(OURS, 2)
    source, destination = CudaPool(theirs, THEIRS, move_and_sum), CudaPool(ours, OURS, move_and_sum)
    published = source.checksums([2, 5], range(3))
    blocks = PoolBlocks(source.address, THEIRS, [2, 5])
    by_layer = [destination.copy(blocks, [7, 1], range(layer, layer + 1)) for layer in range(3)]
    together = tuple(sum(values) % (1 << 64) for values in zip(*by_layer, strict=True))
    assert together == published == destination.checksums([7, 1], range(3))


def test_a_warm_up_leaves_every_block_as_it_was() -> None:
    ours = pool_of(OURS, 3)
    before = ours.clone()
    CudaPool(ours, OURS, move_and_sum).warm_up(8)
    assert torch.equal(ours, before)
