"""The KV pool as the model sees it: one tensor a layer, over memory that transports can read too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from disaggregated.engine.ops.api import LayerPool
from disaggregated.kv_layout import KVLayout

Allocate = Callable[[KVLayout], Any]
"""Gives a writable buffer of `layout.pool_bytes` that outlives the pool: a shared memory region, a bytearray."""


class KVCache:
    """`layers[i]` is layer i's pool, all views of one region.

    On CPU the region is the buffer that `allocate` gave, so what a transport writes there is what attention reads.
    It is not cleared: places past a sequence's end may hold anything, and attention must not let them through.
    """

    def __init__(self, layout: KVLayout, *, device: torch.device, allocate: Allocate) -> None:
        self.layout = layout
        if device.type == "cpu":
            region = torch.frombuffer(allocate(layout), dtype=torch.uint8, count=layout.pool_bytes)
        else:
            region = torch.zeros(layout.pool_bytes, dtype=torch.uint8, device=device)
        self.blocks_LBX = region.view(layout.num_layers, layout.num_blocks, layout.block_bytes)
        """Bytes, for whoever moves whole blocks."""
        self.layers: Sequence[LayerPool] = [_layer_pool(layer, layout) for layer in self.blocks_LBX.unbind(0)]


def _layer_pool(bytes_BX: torch.Tensor, layout: KVLayout) -> LayerPool:
    size = (layout.num_blocks, layout.num_planes, layout.num_kv_heads, layout.block_size)
    dtype: torch.dtype = getattr(torch, layout.dtype)
    values = bytes_BX[:, : layout.value_bytes].view(dtype).view(*size, layout.head_dim)
    scales = bytes_BX[:, layout.value_bytes :].view(torch.float32).view(size) if layout.is_quantised else None
    return LayerPool(values, scales)
