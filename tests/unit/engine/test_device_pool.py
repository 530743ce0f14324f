"""What stands between the transfer layer and the kernel: no address leaves a pool, and no failure goes by."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from disaggregated.engine.cuda.device_pool import CudaPool
from disaggregated.errors import TransferError
from kvtransfer.checksum import PoolBlocks
from kvtransfer.device_pool import DevicePool
from kvtransfer.transports import cuda_runtime
from tests.support.kv_pools import SMALL

THEIRS = dataclasses.replace(SMALL, num_blocks=40)


class Launches:
    """A kernel that notes what it was asked for."""

    def __init__(self, *, fails: str = "") -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.fails = fails

    def __call__(self, addresses: tuple[int, int], ids_2N: torch.Tensor, *rest: Any, is_copy: bool) -> torch.Tensor:
        if self.fails:
            raise RuntimeError(self.fails)
        self.asked.append((addresses, ids_2N.tolist(), *rest, is_copy))
        return torch.arange(-1, ids_2N.shape[1] - 1)


def pool_with(launches: Launches) -> CudaPool:
    size = (SMALL.num_layers, SMALL.num_blocks, SMALL.block_bytes)
    return CudaPool(torch.zeros(size, dtype=torch.uint8), SMALL, launches)


def test_it_is_what_the_transfer_layer_asks_for() -> None:
    """Which the type checker sees, too."""
    pool: cuda_runtime.CudaPool = pool_with(Launches())
    asked: DevicePool = pool
    assert (asked.layout, asked.device, pool.device_index) == (SMALL, "cpu:0", 0)
    assert asked.address > 0


def test_a_copy_is_one_launch_for_all_blocks_and_layers() -> None:
    launches = Launches()
    pool = pool_with(launches)
    found = pool.copy(PoolBlocks(4096, THEIRS, (39, 0)), (3, 4), range(1, 3))
    words = SMALL.block_bytes // 8
    expected = ((4096, pool.address), [[39, 0], [3, 4]], range(1, 3), (40 * words, 32 * words), words, True)
    assert launches.asked == [expected]
    assert found == ((1 << 64) - 1, 0), "sums are unsigned"


def test_nothing_is_launched_for_no_blocks() -> None:
    launches = Launches()
    assert pool_with(launches).copy(PoolBlocks(4096, THEIRS, ()), (), range(3)) == ()
    assert launches.asked == []


@pytest.mark.parametrize(
    ("source", "into", "layers"),
    [((40,), (0,), range(3)), ((0,), (32,), range(3)), ((-1,), (0,), range(3)), ((0,), (0,), range(1, 4))],
)
def test_what_is_not_in_a_pool_never_reaches_a_kernel(
    source: tuple[int, ...], into: tuple[int, ...], layers: range
) -> None:
    launches = Launches()
    with pytest.raises(AssertionError, match=" of "):
        pool_with(launches).copy(PoolBlocks(4096, THEIRS, source), into, layers)
    assert launches.asked == []


def test_blocks_of_another_shape_are_not_copied() -> None:
    unlike = dataclasses.replace(THEIRS, block_size=8)
    with pytest.raises(AssertionError, match="block_size is 8 here and 4 there"):
        pool_with(Launches()).copy(PoolBlocks(4096, unlike, (0,)), (0,), range(3))


def test_a_device_that_fails_fails_the_transfer_in_words() -> None:
    pool = pool_with(Launches(fails="CUDA error: an illegal memory access was encountered"))
    with pytest.raises(TransferError, match="cpu:0 failed while it copied blocks: CUDA error: an illegal"):
        pool.checksums([0], range(3))
