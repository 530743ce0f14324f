"""Reading and writing a layer's pool in plain torch, whatever the dtype of its entries.

A quantised entry is a token's key or value of one head, with a scale of its own (`quantise.py`). So a token can be
written when it comes, never touched again, and means the same wherever its block is copied to.

Legend as in `api.py`.
"""

from __future__ import annotations

import torch

from disaggregated.engine.ops.api import LayerPool
from disaggregated.engine.ops.quantise import dequantise, quantise_rows


def read_planes(pool: LayerPool, planes: torch.Tensor) -> torch.Tensor:
    """(len(planes), S, D) in float32. A plane is one block's keys, or values, of one head: `(block * P + plane) * G +
    head`, int64."""
    if pool.scales is None:
        return _planes(pool.values, planes).float()
    return dequantise(_planes(pool.values, planes), _planes(pool.scales, planes))


def write_plane(pool: LayerPool, plane: int, x_TGD: torch.Tensor, slots_T: torch.Tensor) -> None:
    """Store the keys (plane 0) or values (plane 1) of each token in its slot."""
    block_size = pool.values.shape[3]
    blocks, offsets = slots_T // block_size, slots_T % block_size
    dtype = pool.values.dtype
    if pool.scales is None:
        pool.values[blocks, plane, :, offsets] = x_TGD.to(dtype)
        return
    quantised, scale_TG = quantise_rows(x_TGD, dtype)
    _bytes_of(pool.values)[blocks, plane, :, offsets] = _bytes_of(quantised)
    pool.scales[blocks, plane, :, offsets] = scale_TG


def _planes(tensor: torch.Tensor, planes: torch.Tensor) -> torch.Tensor:
    """Rows `planes` of (B, P, G, …) as if its first three dimensions were one, which they are not in a quantised pool:
    there, scales and values take turns."""
    _, num_planes, num_kv_heads = tensor.shape[:3]
    raw = _bytes_of(tensor)
    if raw.is_contiguous():
        chosen = raw.flatten(0, 2).index_select(0, planes)
    else:
        blocks, inner = planes // (num_planes * num_kv_heads), planes % (num_planes * num_kv_heads)
        chosen = raw[blocks, inner // num_kv_heads, inner % num_kv_heads]
    return chosen.view(tensor.dtype)


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Torch cannot index 8-bit floats; it can index what they are made of."""
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor
