"""Paged attention with grouped queries: causal, with window, softcap and quantised pools.

A query's sum over its keys is cut into *splits* of `SPLIT_KEYS` keys at fixed absolute positions. Each split has its
own maximum, sum of weights and weighted values, made by one loop over tiles of keys; then the splits are folded
together in order. Where a program folds its splits itself (prefill) or leaves them to a second kernel (decode, where
one sequence must keep many multiprocessors busy), the expressions are the same, and so are the bits. The tile that a
query lies in has the same shape in both; where in it, and beside which others, does not matter to a matrix product.

The online softmax is Milakov and Gimelshein's (2018), the tiling that of FlashAttention-2 (Dao 2023), the split over
keys that of Flash-Decoding (Dao, Haziza, Massa and Sizov 2023).

Legend as in `ops/api.py`; M rows of a tile (queries * heads that share a kv head), E keys of a tile.
"""

from __future__ import annotations

import dataclasses
from typing import Final

import torch
import triton
import triton.language as tl

from disaggregated.engine.cuda.kernels import EXACT
from disaggregated.engine.ops.api import AttentionBatch, AttentionSpec, LayerPool

SPLIT_KEYS: Final = 256
TILE_ROWS: Final = 64
"""One shape for prefill and decode. Decode fills few of its rows, and waits for memory all the same."""
PROGRAMS_PER_MULTIPROCESSOR: Final = 4
"""Wanted; while there are fewer, sequences are cut up among programs."""
PARTS_BYTES_MAX: Final = 128 << 20
"""Parts that would take more are not made: each program then folds its splits itself, which gives the same bits."""


@triton.jit
def _fold(m, m_split):
    """The maximum with one more split, and the factors of the old totals and of the split's own.

    A split without a visible key has maximum -inf and total 0, and changes no bit.
    """
    m_new = tl.maximum(m, m_split)
    base = tl.where(m_new == float("-inf"), 0.0, m_new)
    return m_new, tl.exp2(m - base), tl.exp2(m_split - base)


@triton.jit
def _attend_split(
    q_MD, position_M, pool, scales, table, head, start, end, context_len, block_stride, scale_stride, scale, softcap,
    KEYS: tl.constexpr, BLOCK_SIZE: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, IS_QUANTISED: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """(maximum, sum, weighted values) over keys `[start, end)`, all of one split; scores are in units of log 2."""
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    column = tl.arange(0, BLOCK_D)
    is_column = column < HEAD_DIM
    for first in range(start, end, KEYS):
        key_E = first + tl.arange(0, KEYS)
        is_here = key_E < context_len  # Past it may lie anything, NaN included.
        block_E = tl.load(table + key_E // BLOCK_SIZE, mask=is_here, other=0).to(tl.int64)
        place_E = head * BLOCK_SIZE + key_E % BLOCK_SIZE
        at_E = block_E * block_stride + place_E * HEAD_DIM
        k_DE = tl.load(pool + at_E[None, :] + column[:, None], mask=is_here[None, :] & is_column[:, None], other=0.0)
        scores = tl.dot(q_MD, k_DE.to(q_MD.dtype), input_precision="ieee") * scale
        if IS_QUANTISED:
            scale_at = scales + block_E * scale_stride + place_E
            scores = scores * tl.load(scale_at, mask=is_here, other=0.0)[None, :]
        if HAS_SOFTCAP:
            scores = softcap * (1.0 - 2.0 / (tl.exp(2.0 * scores / softcap) + 1.0))
        is_seen = key_E[None, :] <= position_M[:, None]
        if WINDOW > 0:
            is_seen = is_seen & (key_E[None, :] > position_M[:, None] - WINDOW)
        scores = tl.where(is_seen, scores * 1.4426950408889634, float("-inf"))
        m_new = tl.maximum(m, tl.max(scores, 1))
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        kept = tl.exp2(m - base)
        weights = tl.exp2(scores - base[:, None])
        total = total * kept + tl.sum(weights, 1)
        v_ED = tl.load(
            pool + at_E[:, None] + NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM + column[None, :],
            mask=is_here[:, None] & is_column[None, :],
            other=0.0,
        )
        if IS_QUANTISED:
            weights = weights * tl.load(scale_at + NUM_KV_HEADS * BLOCK_SIZE, mask=is_here, other=0.0)[None, :]
        acc = acc * kept[:, None]
        acc = tl.dot(weights.to(q_MD.dtype), v_ED.to(q_MD.dtype), acc, input_precision="ieee")
        m = m_new
    return m, total, acc


@triton.jit
def _row_of(query_start, tile, num_rows, QUERIES: tl.constexpr):
    """The row that `tile` belongs to: the last one whose first tile is not behind it.

    Row r's first tile is `query_start[r] // QUERIES + r`, which leaves it at least as many as it needs; those too many
    find nothing to do. No list of tiles has to come from the host.
    """
    low, high = num_rows - num_rows, num_rows
    while high - low > 1:
        middle = (low + high) // 2
        is_before = tl.load(query_start + middle) // QUERIES + middle <= tile
        low = tl.where(is_before, middle, low)
        high = tl.where(is_before, high, middle)
    return low


@triton.jit(do_not_specialize=["num_rows", "table_stride", "splits_max", "query_start", "first_position", "tables"])
def _attend(
    q, pool, scales, query_start, first_position, tables, out, part_m, part_total, part_acc,
    num_rows, table_stride, splits_max, q_stride, block_stride, scale_stride, scale, softcap,
    ROWS: tl.constexpr, KEYS: tl.constexpr, SPLIT: tl.constexpr, HEADS: tl.constexpr, QUERIES: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, IS_QUANTISED: tl.constexpr,
    IS_DECODE: tl.constexpr, IS_SPLIT: tl.constexpr,
):  # fmt: skip
    """Program (tile, kv head, i). With IS_SPLIT it leaves the parts of splits i, i + programs, …; else it folds all.

    IS_DECODE: every row has one query, so tile t is row t.
    """
    tile, head = tl.program_id(0), tl.program_id(1)
    if IS_DECODE:
        row = tile
        first_query = 0
    else:
        row = _row_of(query_start, tile, num_rows, QUERIES)
        first_query = (tile - tl.load(query_start + row) // QUERIES - row) * QUERIES
    first_token = tl.load(query_start + row)
    num_queries = tl.load(query_start + row + 1) - first_token
    if first_query < num_queries:
        before = tl.load(first_position + row)
        context_len = before + num_queries
        lane = tl.arange(0, ROWS)
        query_M = first_query + lane // HEADS
        is_row = (lane < QUERIES * HEADS) & (query_M < num_queries)
        position_M = before + query_M
        token_M = (first_token + query_M).to(tl.int64)
        head_M = head * HEADS + lane % HEADS
        column = tl.arange(0, BLOCK_D)
        is_place = is_row[:, None] & (column < HEAD_DIM)[None, :]
        q_MD = tl.load(q + token_M[:, None] * q_stride + (head_M * HEAD_DIM)[:, None] + column[None, :], mask=is_place)
        q_MD = tl.where(is_place, q_MD, 0.0).to(q.dtype.element_ty)
        table = tables + row.to(tl.int64) * table_stride
        end = tl.minimum(before + first_query + QUERIES, context_len)
        begin = 0
        if WINDOW > 0:
            begin = tl.maximum(0, before + first_query - WINDOW + 1) // KEYS * KEYS
        m = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
        first_split, step = begin // SPLIT, 1
        if IS_SPLIT:
            first_split, step = first_split + tl.program_id(2), tl.num_programs(2)
        for split in range(first_split, tl.cdiv(end, SPLIT), step):
            m_split, total_split, acc_split = _attend_split(
                q_MD, position_M, pool, scales, table, head, tl.maximum(begin, split * SPLIT),
                tl.minimum(end, split * SPLIT + SPLIT), context_len, block_stride, scale_stride, scale, softcap,
                KEYS, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM, BLOCK_D, WINDOW, HAS_SOFTCAP, IS_QUANTISED, ROWS,
            )  # fmt: skip
            if IS_SPLIT:
                part_M = (token_M * (NUM_KV_HEADS * HEADS) + head_M) * splits_max + split
                tl.store(part_m + part_M, m_split, mask=is_row)
                tl.store(part_total + part_M, total_split, mask=is_row)
                tl.store(part_acc + part_M[:, None] * HEAD_DIM + column[None, :], acc_split, mask=is_place)
            else:
                m, kept, new = _fold(m, m_split)
                total = total * kept + total_split * new
                acc = acc * kept[:, None] + acc_split * new[:, None]
        if not IS_SPLIT:
            out_M = (token_M * (NUM_KV_HEADS * HEADS) + head_M) * HEAD_DIM
            tl.store(
                out + out_M[:, None] + column[None, :], (acc / total[:, None]).to(out.dtype.element_ty), mask=is_place
            )


@triton.jit(do_not_specialize=["splits_max", "positions"])
def _fold_splits(
    part_m, part_total, part_acc, positions, out, splits_max,
    SPLIT: tl.constexpr, NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    WINDOW: tl.constexpr,
):  # fmt: skip
    """Program (token, head): fold the parts of its splits, first to last."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position = tl.load(positions + token).to(tl.int32)
    column = tl.arange(0, BLOCK_D)
    is_column = column < HEAD_DIM
    first = 0
    if WINDOW > 0:
        first = tl.maximum(0, position - WINDOW + 1) // SPLIT
    m = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for split in range(first, position // SPLIT + 1):
        part = (token * NUM_HEADS + head) * splits_max + split
        here = part + tl.arange(0, 1)
        acc_split = tl.load(part_acc + part * HEAD_DIM + column, mask=is_column, other=0.0)
        total_split = tl.load(part_total + here)
        m, kept, new = _fold(m, tl.load(part_m + here))
        total = total * kept + total_split * new
        acc = acc * kept + acc_split * new
    at = (token * NUM_HEADS + head) * HEAD_DIM
    tl.store(out + at + column, (acc / total).to(out.dtype.element_ty), mask=is_column)


@dataclasses.dataclass(frozen=True, slots=True)
class TileShape:
    """Decided by head size and dtype alone, since the order of sums follows from it."""

    keys: int
    num_warps: int
    num_stages: int

    @classmethod
    def of(cls, head_dim: int, dtype: torch.dtype) -> TileShape:
        """What fits into a multiprocessor's shared memory (227 KiB on Hopper): `num_stages` tiles of both."""
        is_wide = head_dim > 128
        if dtype.itemsize > 2:
            return cls(keys=16 if is_wide else 32, num_warps=8 if is_wide else 4, num_stages=1 if is_wide else 2)
        return cls(keys=32 if is_wide else 64, num_warps=8 if is_wide else 4, num_stages=2 if is_wide else 3)


def unsupported(num_heads: int, num_kv_heads: int, head_dim: int) -> str | None:
    """Why these kernels cannot serve a model with such heads, in words."""
    if head_dim > 256 or head_dim % 16:
        return f"head size {head_dim} is not a multiple of 16 up to 256"
    if num_heads // num_kv_heads > TILE_ROWS:
        return f"{num_heads // num_kv_heads} query heads share a key head, at most {TILE_ROWS} may"
    return None


def paged_attention(
    q_TND: torch.Tensor, pool: LayerPool, batch: AttentionBatch, spec: AttentionSpec, *, num_multiprocessors: int
) -> torch.Tensor:
    """(T, N, D) of q's dtype. Tokens of `q_TND` may lie any stride apart; a token's heads are contiguous.

    The device's number of multiprocessors decides who does the work, never what comes out.
    """
    num_tokens, num_heads, head_dim = q_TND.shape
    _, num_planes, num_kv_heads, block_size, _ = pool.values.shape
    assert (num_planes, spec.latent_value_dim) == (2, None), "latents have another kernel"
    assert q_TND.stride()[1:] == (head_dim, 1), f"strides {q_TND.stride()}"
    out = q_TND.new_empty(num_tokens, num_heads, head_dim)
    num_rows = batch.query_start.shape[0] - 1
    heads = num_heads // num_kv_heads
    queries = TILE_ROWS // heads
    is_decode = num_tokens == num_rows
    num_tiles = num_rows if is_decode else num_tokens // queries + num_rows
    splits_max = triton.cdiv(batch.max_context_len, SPLIT_KEYS)
    programs = _programs_per_tile(num_tiles * num_kv_heads, splits_max, q_TND.shape, num_multiprocessors)
    parts = _parts(q_TND, splits_max if programs > 1 else 0)
    shape = TileShape.of(head_dim, q_TND.dtype)
    block_d = triton.next_power_of_2(head_dim)
    window, scales = spec.window or 0, pool.scales
    _attend[(num_tiles, num_kv_heads, programs)](
        q_TND, pool.values, pool.values if scales is None else scales,
        batch.query_start, batch.first_position, batch.block_tables, out, *parts,
        num_rows, batch.block_tables.stride(0), splits_max, q_TND.stride(0),
        pool.values.stride(0), 0 if scales is None else scales.stride(0), spec.scale, spec.softcap or 0.0,
        ROWS=TILE_ROWS, KEYS=shape.keys, SPLIT=SPLIT_KEYS, HEADS=heads, QUERIES=queries,
        NUM_KV_HEADS=num_kv_heads, BLOCK_SIZE=block_size, HEAD_DIM=head_dim, BLOCK_D=block_d,
        WINDOW=window, HAS_SOFTCAP=spec.softcap is not None, IS_QUANTISED=scales is not None,
        IS_DECODE=is_decode, IS_SPLIT=programs > 1,
        **EXACT, num_warps=shape.num_warps, num_stages=shape.num_stages,
    )  # fmt: skip
    if programs > 1:
        _fold_splits[(num_tokens, num_heads)](
            *parts, batch.positions, out, splits_max,
            SPLIT=SPLIT_KEYS, NUM_HEADS=num_heads, HEAD_DIM=head_dim, BLOCK_D=block_d, WINDOW=window,
            **EXACT, num_warps=1,
        )  # fmt: skip
    return out


def _programs_per_tile(num_programs: int, splits_max: int, q_shape: torch.Size, num_multiprocessors: int) -> int:
    num_tokens, num_heads, head_dim = q_shape
    if num_tokens * num_heads * splits_max * head_dim * 4 > PARTS_BYTES_MAX:
        return 1
    return max(1, min(splits_max, PROGRAMS_PER_MULTIPROCESSOR * num_multiprocessors // max(1, num_programs)))


def _parts(q_TND: torch.Tensor, splits_max: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Maxima, totals (T, N, splits) and weighted values (T, N, splits, D) for programs to leave; empty for none."""
    num_tokens, num_heads, head_dim = q_TND.shape
    size = (num_tokens, num_heads, splits_max)
    sums = q_TND.new_empty(2, *size, dtype=torch.float32)
    return sums[0], sums[1], q_TND.new_empty(*size, head_dim, dtype=torch.float32)
