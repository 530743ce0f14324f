"""The KV pool as the model sees it: one tensor a layer, over memory that transports can read too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from disaggregated.kv_layout import KVLayout

Allocate = Callable[[KVLayout], Any]
"""Gives a writable buffer of `layout.pool_bytes` that outlives the pool: a shared memory region, a bytearray."""


class KVCache:
    """`layers[i]` is layer i's pool, (num_blocks, 2, num_kv_heads, block_size, head_dim), all views of one region.

    On CPU the region is the buffer that `allocate` gave, so what a transport writes there is what attention reads.
    It is not cleared: places past a sequence's end may hold anything, and attention must not let them through.
    """

    def __init__(self, layout: KVLayout, *, device: torch.device, allocate: Allocate) -> None:
        self.layout = layout
        dtype: torch.dtype = getattr(torch, layout.dtype)
        count = layout.pool_bytes // dtype.itemsize
        if device.type == "cpu":
            region = torch.frombuffer(allocate(layout), dtype=dtype, count=count)
        else:
            region = torch.zeros(count, dtype=dtype, device=device)
        size = (layout.num_layers, layout.num_blocks, 2, layout.num_kv_heads, layout.block_size, layout.head_dim)
        self.layers: Sequence[torch.Tensor] = region.view(size).unbind(0)
