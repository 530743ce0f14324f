"""The blocks that every contender moves: whose they are, how they lie scattered, and memcpy of the very same bytes."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from disaggregated.kv_layout import KVLayout
from kvtransfer import Region
from kvtransfer.region import copy_bytes
from kvtransfer.runs import run_pairs

LLAMA_8B: Final = KVLayout(num_layers=32, num_kv_heads=8, head_dim=128, block_size=32, dtype="bfloat16", num_blocks=128)
"""128 KiB a block and layer, 512 MiB."""
SMOLLM2: Final = KVLayout(num_layers=30, num_kv_heads=3, head_dim=64, block_size=32, dtype="float32", num_blocks=364)
"""48 KiB a block and layer, 512 MiB."""
ONE_BLOCK: Final = KVLayout(num_layers=1, num_kv_heads=4, head_dim=64, block_size=32, dtype="float32", num_blocks=64)
"""64 KiB a block."""
SOURCE_SEED: Final = 1
INTO_SEED: Final = 2


def scattered(layout: KVLayout, seed: int, count: int | None = None) -> list[int]:
    """Blocks of a pool in a random order; all of them unless told otherwise."""
    return random.Random(seed).sample(range(layout.num_blocks), layout.num_blocks if count is None else count)


def pieces(layout: KVLayout, block_ids: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Offset and size of each block of each layer, layer by layer: what every contender moves."""
    for layer in range(layout.num_layers):
        for block_id in block_ids:
            yield layout.offset(layer, block_id), layout.block_bytes


def touched(region: Region) -> Region:
    """With all its pages there, which a first write would pay for."""
    region.buffer[:] = b"\1" * region.nbytes
    return region


def seconds(work: Callable[[], object]) -> float:
    begin_s = time.perf_counter()
    work()
    return time.perf_counter() - begin_s


def memcpy(source: Region, into: Region, layout: KVLayout) -> float:
    """Seconds of the yardstick: the same scattered copy between two pools of one process, neighbours in one go."""
    pairs = list(run_pairs(scattered(layout, SOURCE_SEED), scattered(layout, INTO_SEED)))
    begin_s = time.perf_counter()
    for layer in range(layout.num_layers):
        for pair in pairs:
            begin, end = layout.offset(layer, pair.source), layout.offset(layer, pair.into)
            copy_bytes(into.base_address + end, source.base_address + begin, pair.count * layout.block_bytes)
    return time.perf_counter() - begin_s
