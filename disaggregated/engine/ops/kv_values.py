"""Reading a layer's pool in plain torch.

Legend as in `api.py`.
"""

from __future__ import annotations

import torch

from disaggregated.engine.ops.api import LayerPool


def read_planes(pool: LayerPool, planes: torch.Tensor) -> torch.Tensor:
    """(len(planes), S, D) in float32. A plane is one block's keys, or values, of one head: `(block * P + plane) * G +
    head`, int64."""
    num_blocks, num_planes, num_kv_heads, block_size, head_dim = pool.values.shape
    per_block = num_planes * num_kv_heads
    if pool.values.is_contiguous():
        return pool.values.view(num_blocks * per_block, block_size, head_dim).index_select(0, planes).float()
    blocks, inner = planes // per_block, planes % per_block
    return pool.values[blocks, inner // num_kv_heads, inner % num_kv_heads].float()
