"""Blocks from another process's pool on the GPU into ours: right bytes, right sums, and a source that is killed."""

from __future__ import annotations

import dataclasses
import importlib.util
import random

import pytest
import torch

from disaggregated.errors import TransferError
from disaggregated.kv_layout import KVLayout
from kvtransfer.checksum import PoolBlocks
from kvtransfer.device_pool import Exported
from kvtransfer.transports import cuda_runtime
from kvtransfer.transports.cuda_runtime import CudaMapper
from tests.support.gpu_pool import noise, remote_pool, zeroes
from tests.support.kv_pools import LARGE, SMALL

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(cuda_runtime.missing() is not None, reason="cuda-bindings is not installed"),
]


@pytest.fixture
def mapper() -> CudaMapper:
    return cuda_runtime.load(0)


@pytest.mark.parametrize("layout", [SMALL, LARGE], ids=["48 KiB", "48 MiB"])
def test_blocks_of_another_process_land_with_the_sums_that_it_published(layout: KVLayout, mapper: CudaMapper) -> None:
    ours = zeroes(dataclasses.replace(layout, num_blocks=layout.num_blocks + 3))
    with remote_pool(layout) as remote:
        mapped = mapper.open(remote.exported)
        dice = random.Random(1)
        source = dice.sample(range(layout.num_blocks), layout.num_blocks // 2)
        into = dice.sample(range(ours.layout.num_blocks), len(source))
        every = range(layout.num_layers)
        found = ours.copy(PoolBlocks(mapped.address, layout, source), into, every)
        assert list(found) == [remote.checksums[block] for block in source]
        assert ours.checksums(into, every) == found
        expected = noise(layout)
        here = ours._pool_LBX
        assert torch.equal(here[:, into], expected[:, source])
        others = sorted(set(range(ours.layout.num_blocks)) - set(into))
        assert not here[:, others].any(), "something else was written"
        mapper.close(mapped)


def test_a_small_pool_is_found_within_the_allocators_segment(mapper: CudaMapper) -> None:
    with remote_pool(SMALL) as remote:
        assert remote.exported.offset > 0, "it is alone in its segment, and this test shows nothing"
        mapped = mapper.open(remote.exported)
        assert mapped.address == mapped.base + remote.exported.offset
        mapper.close(mapped)


def test_a_mapping_that_was_opened_twice_is_there_until_it_is_closed_twice(mapper: CudaMapper) -> None:
    ours = zeroes(SMALL)
    with remote_pool(SMALL) as remote:
        first, second = mapper.open(remote.exported), mapper.open(remote.exported)
        assert first == second
        mapper.close(first)
        found = ours.copy(PoolBlocks(second.address, SMALL, [3]), [5], range(SMALL.num_layers))
        assert list(found) == [remote.checksums[3]]
        mapper.close(second)


def test_a_source_that_was_killed_leaves_a_mapping_that_can_be_closed_and_a_device_that_works(
    mapper: CudaMapper,
) -> None:
    """Nothing is read through it any more: that is what CUDA promises nothing about."""
    with remote_pool(SMALL) as remote:
        mapped = mapper.open(remote.exported)
        remote.child.kill()
        remote.child.wait()
        mapper.close(mapped)
    assert int(torch.ones(8, device="cuda").sum()) == 8


def test_a_handle_that_nobody_gave_is_refused_in_words(mapper: CudaMapper) -> None:
    with pytest.raises(TransferError, match="cudaIpcOpenMemHandle: cudaError"):
        mapper.open(Exported(bytes(64), 0, 4096))
    assert int(torch.ones(8, device="cuda").sum()) == 8
