"""KV pools and a step's layout as the C kernels read them: structures of raw pointers, checked when they are made.

Each structure is valid as long as the tensors it was made of; whoever makes one keeps them. Legend: see api.py.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_float, c_int64, c_void_p
from typing import Any, Final

import torch

from disaggregated.engine.ops.api import AttentionBatch, AttentionSpec, LayerPool
from disaggregated.engine.ops.native_checks import check_indices, check_shape

MAX_HEAD_DIM: Final = 256

_KINDS: Final = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
"""`KV_…` of csrc/kv.h."""

KV_DTYPES: Final = frozenset(str(dtype).removeprefix("torch.") for dtype in _KINDS)
"""What of `KVLayout.dtype` the kernels can store and read."""


class KVPool(Structure):
    """`kv_pool` of csrc/kv.h."""

    _fields_ = [
        ("kind", c_int64), ("blocks", c_void_p), ("block_stride", c_int64), ("to_scales", c_int64),
        ("num_blocks", c_int64), ("num_kv_heads", c_int64), ("block_size", c_int64), ("head_dim", c_int64),
    ]  # fmt: skip


class BatchPlaces(Structure):
    """`batch_places` of csrc/attention.h."""

    _fields_ = [
        ("query_start", c_void_p), ("first_position", c_void_p), ("block_tables", c_void_p),
        ("num_rows", c_int64), ("table_stride", c_int64), ("num_tokens", c_int64),
    ]  # fmt: skip


class AttentionNumbers(Structure):
    """`attention_numbers` of csrc/attention.h."""

    _fields_ = [("num_heads", c_int64), ("window", c_int64), ("scale", c_float), ("softcap", c_float)]


SIGNATURES: Final[dict[str, tuple[Any, list[Any]]]] = {
    "store_kv": (c_int64, [c_void_p, c_int64, c_void_p, c_int64, POINTER(KVPool), c_void_p, c_int64]),
    "paged_attention": (
        c_int64,
        [c_void_p] * 2 + [c_int64, POINTER(KVPool), POINTER(BatchPlaces), POINTER(AttentionNumbers), c_void_p],
    ),
}
"""Return type and arguments of each function; csrc/ says what they mean."""


def takes_head_dim(head_dim: int) -> bool:
    return 0 < head_dim <= MAX_HEAD_DIM and head_dim % 16 == 0


def kv_pool(pool: LayerPool) -> KVPool:
    values = pool.values
    num_blocks, num_planes, num_kv_heads, block_size, head_dim = values.shape
    assert values.dtype in _KINDS, f"dtype {values.dtype}, must be one of {', '.join(sorted(KV_DTYPES))}"
    assert num_planes == 2, f"{num_planes} planes, must be keys and values"
    assert num_blocks == 0 or values[0].is_contiguous(), f"strides {values.stride()}: a block is not contiguous"
    return KVPool(
        kind=_KINDS[values.dtype],
        blocks=values.data_ptr(),
        block_stride=values.stride(0) * values.itemsize,
        to_scales=_to_scales(pool),
        num_blocks=num_blocks,
        num_kv_heads=num_kv_heads,
        block_size=block_size,
        head_dim=head_dim,
    )


class PoolTable:
    """The pools of all layers as C reads them: described once, since a KV cache gives the same list at every step."""

    def __init__(self, num_layers: int, num_kv_heads: int, head_dim: int) -> None:
        self._num_layers, self._num_kv_heads, self._head_dim = num_layers, num_kv_heads, head_dim
        self._known: tuple[Sequence[LayerPool], ctypes.Array[KVPool]] | None = None

    def of(self, pools: Sequence[LayerPool]) -> ctypes.Array[KVPool]:
        if self._known is None or self._known[0] is not pools:
            assert len(pools) == self._num_layers, f"{len(pools)} pools, {self._num_layers} layers"
            for pool in pools:
                size = (len(pools[0].values), 2, self._num_kv_heads, pools[0].values.shape[3])
                check_shape(pool.values, (*size, self._head_dim))
            self._known = (pools, (KVPool * len(pools))(*map(kv_pool, pools)))
        return self._known[1]


def _to_scales(pool: LayerPool) -> int:
    """Bytes from where a block begins to its scales; 0 of a pool without."""
    values, scales = pool.values, pool.scales
    is_quantised = values.dtype is torch.int8
    assert is_quantised == (scales is not None), f"{values.dtype} {'with' if scales is not None else 'without'} scales"
    if scales is None:
        return 0
    check_shape(scales, tuple(values.shape[:4]))
    assert scales.dtype is torch.float32, f"scales are {scales.dtype}, must be float32"
    assert len(scales) == 0 or scales[0].is_contiguous(), f"strides {scales.stride()}: a block is not contiguous"
    strides = scales.stride(0) * scales.itemsize, values.stride(0) * values.itemsize
    assert strides[0] == strides[1], f"blocks of scales lie {strides[0]} bytes apart, blocks of numbers {strides[1]}"
    return scales.data_ptr() - values.data_ptr()


def batch_places(batch: AttentionBatch, num_tokens: int) -> BatchPlaces:
    num_rows, max_blocks = batch.block_tables.shape
    check_indices(batch.query_start, torch.int32, (num_rows + 1,))
    check_indices(batch.first_position, torch.int32, (num_rows,))
    check_indices(batch.block_tables, torch.int32, (num_rows, max_blocks))
    return BatchPlaces(
        query_start=batch.query_start.data_ptr(),
        first_position=batch.first_position.data_ptr(),
        block_tables=batch.block_tables.data_ptr(),
        num_rows=num_rows,
        table_stride=max_blocks,
        num_tokens=num_tokens,
    )


def attention_numbers(spec: AttentionSpec, num_heads: int, num_kv_heads: int, head_dim: int) -> AttentionNumbers:
    assert num_heads % num_kv_heads == 0, f"{num_heads} query heads, {num_kv_heads} kv heads"
    assert takes_head_dim(head_dim), f"head_dim {head_dim}: must be a multiple of 16 up to {MAX_HEAD_DIM}"
    assert spec.latent_value_dim is None, "these kernels' pools have keys and values, not latents"
    assert spec.window is None or spec.window > 0, f"window {spec.window}: must be positive"
    assert spec.softcap is None or spec.softcap > 0, f"softcap {spec.softcap}: must be positive"
    return AttentionNumbers(num_heads, spec.window or 0, spec.scale, spec.softcap or 0.0)


def unsound_row(batch: AttentionBatch, row: int, num_tokens: int, num_blocks: int) -> str:
    """In words, why `row` cannot be computed."""
    return (
        f"row {row} does not lie within {num_tokens} tokens, {batch.block_tables.shape[1]} blocks a row and "
        f"{num_blocks} in the pool: tokens {batch.query_start[row : row + 2].tolist()}, position "
        f"{batch.first_position[row]}, blocks {batch.block_tables[row].tolist()}"
    )
