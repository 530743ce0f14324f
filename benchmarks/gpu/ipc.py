"""Blocks between two processes on one GPU: by CUDA IPC from pool to pool, and by pinned host memory, the same blocks.

By the host is what a transfer costs on the way to the staging region and on from it; the copy between the regions of
the two processes, which comes on top, is a CPU's.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from typing import Final

import torch

from benchmarks.gpu import llama
from benchmarks.gpu.figures import keep, measured_bandwidth
from disaggregated.engine.cuda.staging import device_copier
from disaggregated.kv_layout import KVLayout
from kvtransfer import Region
from kvtransfer.checksum import PoolBlocks
from kvtransfer.transports import cuda_runtime
from tests.support.gpu_pool import remote_pool, zeroes

BLOCK_SIZE: Final = 32
LAYOUT: Final = KVLayout(
    num_layers=llama.NUM_LAYERS,
    num_kv_heads=llama.NUM_KV_HEADS,
    head_dim=llama.HEAD_DIM,
    block_size=BLOCK_SIZE,
    dtype="bfloat16",
    num_blocks=512,
)
"""2 GiB: 128 KiB a block and layer."""
PROMPTS: Final = (512, 2048, 8192)
NUM_RUNS: Final = 9


def seconds(call: Callable[[], object]) -> float:
    """Of a call that ends when the device has: the median of some, by the host's clock."""
    call()
    seen = []
    for _ in range(NUM_RUNS):
        started_s = time.perf_counter()
        call()
        seen.append(time.perf_counter() - started_s)
    return statistics.median(seen)


def main() -> None:
    bandwidth = measured_bandwidth()
    torch.cuda.empty_cache()
    ours, mapper = zeroes(LAYOUT), cuda_runtime.load(0)
    every, dice = range(LAYOUT.num_layers), random.Random(0)
    with remote_pool(LAYOUT) as remote, Region.allocate(LAYOUT.pool_bytes, populate=True) as region:
        copier = device_copier(ours._pool_LBX, region.buffer, LAYOUT)
        mapped = mapper.open(remote.exported)
        for num_tokens in PROMPTS:
            count = num_tokens // BLOCK_SIZE
            source, into = dice.sample(range(LAYOUT.num_blocks), count), dice.sample(range(LAYOUT.num_blocks), count)
            blocks, num_bytes = PoolBlocks(mapped.address, LAYOUT, source), count * every.stop * LAYOUT.block_bytes
            assert list(ours.copy(blocks, into, every)) == [remote.checksums[block] for block in source]
            direct = seconds(lambda blocks=blocks, into=into: ours.copy(blocks, into, every))  # type: ignore[misc]
            summed = seconds(lambda into=into: ours.checksums(into, every))  # type: ignore[misc]
            to_host = seconds(lambda into=into, source=source: copier.to_host(into, source))  # type: ignore[misc]
            to_device = seconds(lambda into=into, source=source: copier.to_device(source, into))  # type: ignore[misc]
            keep(
                f"CUDA IPC: prompt of {num_tokens}, {num_bytes / 1e6:.0f} MB, copied and verified",
                f"{direct * 1e3:.2f} ms, {num_bytes / direct / 1e9:.0f} GB/s; {(to_host + to_device) / direct:.1f} x "
                f"as fast as by pinned host memory: {to_host * 1e3:.2f} ms there, {to_device * 1e3:.2f} ms on",
                share=2 * num_bytes / direct / bandwidth,
                of="measured copy bandwidth",
            )
            keep(
                f"CUDA IPC: checksums of {num_bytes / 1e6:.0f} MB at the source",
                f"{summed * 1e3:.2f} ms, {num_bytes / summed / 1e9:.0f} GB/s",
                share=num_bytes / summed / bandwidth,
                of="measured copy bandwidth",
            )
        mapper.close(mapped)


if __name__ == "__main__":
    main()
