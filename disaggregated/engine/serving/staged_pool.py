"""A KV pool in a device's memory, and the staging region in host memory that its blocks travel through."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import psutil

from disaggregated import logs
from disaggregated.kv_layout import KVLayout

if TYPE_CHECKING:
    from disaggregated.engine.cuda.device_pool import CudaPool
    from disaggregated.engine.cuda.staging import DeviceBlockCopier
    from disaggregated.engine.load import LoadedEngine

log = logs.get(__name__)

WORD_BYTES: Final = 8
"""That blocks are copied by from device to device."""
STAGING_BYTES: Final = 4 << 30
"""Of a staging region, unless the longest prompt wants more or the pool is smaller."""
HOST_SHARE: Final = 4
"""One part in so many of the host's free memory, at most."""


@dataclasses.dataclass(frozen=True, slots=True)
class StagedPool:
    layout: KVLayout
    """Of the staging region: the pool's, with fewer blocks."""
    copier: DeviceBlockCopier
    device_pool: CudaPool | None
    """The pool itself, for processes that can read it where it lies; None where we have no kernels for that."""


def staging_layout(pool: KVLayout, *, max_seq_len: int, host_bytes: int) -> KVLayout:
    """As many blocks as are worth staging; a longest prompt is among that, if the host's free memory allows it."""
    one_block = pool.num_layers * pool.block_bytes
    wanted = max(STAGING_BYTES // one_block, pool.num_blocks_for(max_seq_len))
    allowed = host_bytes // HOST_SHARE // one_block
    return dataclasses.replace(pool, num_blocks=max(1, min(wanted, pool.num_blocks, allowed)))


def stage(loaded: LoadedEngine, allocate: Callable[[KVLayout], memoryview]) -> StagedPool:
    """Take and pin the staging region. Seconds, for gigabytes; raises what `allocate` raises."""
    from disaggregated.engine.cuda.staging import device_copier

    layout = staging_layout(loaded.layout, max_seq_len=loaded.max_seq_len, host_bytes=psutil.virtual_memory().available)
    log.info("staging_region_sized", blocks=layout.num_blocks, bytes=layout.pool_bytes)
    blocks_LBX = loaded.kv_cache.blocks_LBX
    return StagedPool(layout, device_copier(blocks_LBX, allocate(layout), layout), _device_pool(loaded))


def _device_pool(loaded: LoadedEngine) -> CudaPool | None:
    """Of all blocks that lie there: the engine is told of one less."""
    pool_LBX, layout = loaded.kv_cache.blocks_LBX, loaded.kv_cache.layout
    if pool_LBX.device.type != "cuda" or layout.block_bytes % WORD_BYTES or not importlib.util.find_spec("triton"):
        return None
    from disaggregated.engine.cuda.device_pool import device_pool

    return device_pool(pool_LBX, layout)
