"""One checksum a block: xxh3_64 over that block of every layer, in layer order.

The source computes it where the block was written, the destination over its own memory after the copy. What
matched is therefore what will be attended to, whatever happened on the way.
"""

from __future__ import annotations

from collections.abc import Sequence

import xxhash

from disaggregated.kv_layout import KVLayout


def block_checksum(pool: memoryview, layout: KVLayout, block_id: int) -> int:
    """64 bits over `num_layers * block_bytes` bytes."""
    hasher = xxhash.xxh3_64()
    size = layout.block_bytes
    for layer in range(layout.num_layers):
        begin = layout.offset(layer, block_id)
        hasher.update(pool[begin : begin + size])
    return hasher.intdigest()


def block_checksums(pool: memoryview, layout: KVLayout, block_ids: Sequence[int]) -> tuple[int, ...]:
    return tuple(block_checksum(pool, layout, block_id) for block_id in block_ids)
