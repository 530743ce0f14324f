"""The op table in plain torch: the fallback on every device, and the oracle that other implementations are held to.

What makes it row-invariant: matrix products are calls of measured row counts (`row_invariant.py`), attention is cut at
fixed absolute positions (`attention_plan.py`), and everything else is element by element. Attention and norms are
computed in float32 whatever the model's dtype.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

import torch

from disaggregated.engine.ops.api import AttentionBatch, AttentionSpec, LayerPool, StepProgram
from disaggregated.engine.ops.attention_plan import AttentionShape, WorkGroup, key_tile, plan_attention
from disaggregated.engine.ops.elementwise import gelu_mul
from disaggregated.engine.ops.row_invariant import CANDIDATE_ROWS, exact_row_counts, matmul_rows, probe_pair, row_sum

if TYPE_CHECKING:
    from disaggregated.engine.models.decoder import DecoderShape, DecoderWeights

PROBE_ROWS: Final = 2 * max(CANDIDATE_ROWS)
TRANSPOSE_NUMEL_MAX: Final = 16 << 20
"""Weights of up to that many numbers are stored (K, M): a call with few rows is up to twice as fast on CPU. A larger
one (an output head, often shared with the embedding) is left where it is."""


@dataclasses.dataclass(frozen=True, slots=True)
class ReferenceLinear:
    weight_KM: torch.Tensor
    bias_M: torch.Tensor | None
    exact: tuple[int, ...]
    """Row counts that `linear` may call with."""


class ReferenceOps:
    """Implements `Ops`. Its caches are keyed by shape, or hold the one step that is being computed."""

    name = "torch"

    def __init__(self) -> None:
        self._exact_linear: dict[tuple[object, ...], tuple[int, ...]] = {}
        self._exact_attention: dict[tuple[object, ...], tuple[int, ...]] = {}
        self._plan: tuple[AttentionBatch, AttentionShape, list[WorkGroup]] | None = None
        self._rotation: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def prepare_linear(
        self, weight_MK: torch.Tensor, bias_M: torch.Tensor | None, *, exact: bool = False
    ) -> ReferenceLinear:
        weight_KM = weight_MK.t()
        if weight_MK.numel() <= TRANSPOSE_NUMEL_MAX:
            weight_KM = weight_KM.contiguous()
        elif weight_MK.data_ptr() % 64:
            weight_KM = weight_MK.clone().t()  # A mapped file puts it anywhere; kernels may care for alignment.
        key = (weight_KM.shape, weight_KM.stride(), weight_KM.dtype, str(weight_KM.device), torch.get_num_threads())
        if key not in self._exact_linear:
            rows, matrix = probe_pair(PROBE_ROWS, weight_KM)
            self._exact_linear[key] = exact_row_counts(lambda part: part @ matrix, rows, 2.0 * matrix.numel())
        return ReferenceLinear(weight_KM, bias_M, self._exact_linear[key])

    def linear(self, x_TK: torch.Tensor, weight: ReferenceLinear) -> torch.Tensor:
        return matmul_rows(x_TK, weight.weight_KM, weight.bias_M, weight.exact)

    def embedding(self, token_ids_T: torch.Tensor, table_VH: torch.Tensor) -> torch.Tensor:
        return table_VH.index_select(0, token_ids_T)

    def rms_norm(self, x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
        x = x_TH.float()
        scale = row_sum(x * x).div_(x.shape[-1]).add_(eps).rsqrt_()
        return (x * scale[..., None]).to(x_TH.dtype).mul_(weight_H)

    def silu_mul(self, gate_up_TF2: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up_TF2.float().chunk(2, -1)
        # Not torch's own silu: its vector code and its scalar code for the last elements differ in the last bit.
        return (gate / gate.neg().exp_().add_(1.0)).mul_(up).to(gate_up_TF2.dtype)

    def gelu_mul(self, gate_up_TF2: torch.Tensor) -> torch.Tensor:
        return gelu_mul(gate_up_TF2)

    def rope(self, x_TND: torch.Tensor, cos_PD: torch.Tensor, sin_PD: torch.Tensor, positions_T: torch.Tensor) -> None:
        cos_T1D, sin_T1D = self._rotations(cos_PD, sin_PD, positions_T)
        first, second = x_TND.chunk(2, -1)
        a, b = first.float(), second.float()
        rotated = a * cos_T1D - b * sin_T1D
        second.copy_(b * cos_T1D + a * sin_T1D)
        first.copy_(rotated)

    def store_kv(
        self, key_TGD: torch.Tensor, value_TGD: torch.Tensor | None, pool: LayerPool, slots_T: torch.Tensor
    ) -> None:
        pool_B2GSD = pool.values
        assert value_TGD is not None
        block_size = pool_B2GSD.shape[3]
        blocks, offsets = slots_T // block_size, slots_T % block_size
        pool_B2GSD[blocks, 0, :, offsets] = key_TGD.to(pool_B2GSD.dtype)
        pool_B2GSD[blocks, 1, :, offsets] = value_TGD.to(pool_B2GSD.dtype)

    def paged_attention(
        self, q_TND: torch.Tensor, pool: LayerPool, batch: AttentionBatch, spec: AttentionSpec
    ) -> torch.Tensor:
        pool_B2GSD = pool.values
        num_blocks, _, num_kv_heads, block_size, head_dim = pool_B2GSD.shape
        exact = self._attention_rows(q_TND, num_kv_heads, block_size)
        shape = AttentionShape(q_TND.shape[1], num_kv_heads, head_dim, block_size, exact)
        planes = pool_B2GSD.view(num_blocks * 2 * num_kv_heads, block_size, head_dim)
        q_scaled = q_TND.float() * spec.scale
        out_TND = torch.empty_like(q_TND)
        for group in self._groups(batch, shape):
            out_TND.index_copy_(0, group.tokens, _attend(q_scaled, planes, group, shape).to(q_TND.dtype))
        return out_TND

    def step_program(self, shape: DecoderShape, weights: DecoderWeights) -> StepProgram | None:
        return None

    def _groups(self, batch: AttentionBatch, shape: AttentionShape) -> list[WorkGroup]:
        if self._plan is None or self._plan[0] is not batch or self._plan[1] != shape:
            self._plan = (batch, shape, plan_attention(batch, shape))
        return self._plan[2]

    def _rotations(
        self, cos_PD: torch.Tensor, sin_PD: torch.Tensor, positions_T: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Each token's row of the tables, fetched once a step. The kept references make `is` a safe comparison."""
        kept = self._rotation
        if kept is None or kept[0] is not positions_T or kept[1] is not cos_PD:
            cos, sin = (table.index_select(0, positions_T)[:, None, :] for table in (cos_PD, sin_PD))
            kept = self._rotation = (positions_T, cos_PD, cos, sin)
        return kept[2], kept[3]

    def _attention_rows(self, q_TND: torch.Tensor, num_kv_heads: int, block_size: int) -> tuple[int, ...]:
        """Row counts at which both products of attention give a row the same bits, batched or not."""
        device, head_dim = q_TND.device, q_TND.shape[2]
        key = (str(device), num_kv_heads, block_size, head_dim, torch.get_num_threads())
        if key not in self._exact_attention:
            keys_ED = q_TND.new_empty(key_tile(block_size), head_dim, dtype=torch.float32)
            batch_sizes = (1, num_kv_heads, 5 * num_kv_heads)
            exact = set.intersection(*(set(_exact_batched(side, batch_sizes)) for side in (keys_ED.t(), keys_ED)))
            self._exact_attention[key] = tuple(sorted(exact)) or (1,)
        return self._exact_attention[key]


def _attend(q_TND: torch.Tensor, planes: torch.Tensor, group: WorkGroup, shape: AttentionShape) -> torch.Tensor:
    """(Y * Q, N, D) float32, of scaled queries."""
    num_kv_heads, head_dim = shape.num_kv_heads, shape.head_dim
    num_units, tile_len = len(group.unit_rows), key_tile(shape.block_size)
    keys = planes.index_select(0, group.key_heads).float().view(-1, tile_len, head_dim)
    values = planes.index_select(0, group.key_heads + num_kv_heads).float().view(-1, tile_len, head_dim)
    # A weight of zero does not silence a NaN that some earlier owner of the block left behind.
    values.view(-1, head_dim).index_fill_(0, group.stale, 0.0)

    q_units = _group_queries(q_TND, group, shape).index_select(0, group.unit_rows)
    scores = _multiply(q_units.view(-1, group.padded_rows, head_dim), keys.transpose(1, 2), shape)
    scores_UGME = scores.view(num_units, num_kv_heads, group.padded_rows, tile_len)
    scores_UGME.masked_fill_(group.hidden_UME[:, None], -torch.inf)
    maxima = _fold(scores_UGME.amax(-1), group.counts, torch.maximum)
    weights = scores_UGME.sub_(maxima.index_select(0, group.unit_rows)[..., None]).exp_()
    totals = _fold(row_sum(weights), group.counts, torch.add)
    sums = _multiply(weights.view(-1, group.padded_rows, tile_len), values, shape)
    out = _fold(sums.view(num_units, num_kv_heads, group.padded_rows, head_dim), group.counts, torch.add)
    out.div_(totals[..., None])

    rows, queries, heads = group.num_rows, group.num_queries, shape.heads_per_kv
    out = out[:, :, : queries * heads].view(rows, num_kv_heads, queries, heads, head_dim)
    return out.transpose(1, 2).reshape(rows * queries, num_kv_heads * heads, head_dim)


def _group_queries(q_TND: torch.Tensor, group: WorkGroup, shape: AttentionShape) -> torch.Tensor:
    """(Y, G, M, D): the queries that share a kv head lie together, padded with zero rows."""
    rows, queries, heads = group.num_rows, group.num_queries, shape.heads_per_kv
    q = q_TND.index_select(0, group.tokens).view(rows, queries, shape.num_kv_heads, heads, shape.head_dim)
    q = q.transpose(1, 2).reshape(rows, shape.num_kv_heads, queries * heads, shape.head_dim)
    return torch.nn.functional.pad(q, (0, 0, 0, group.padded_rows - queries * heads))


def _multiply(left: torch.Tensor, right: torch.Tensor, shape: AttentionShape) -> torch.Tensor:
    if not shape.is_isolated:
        return torch.bmm(left, right)
    unit = shape.num_kv_heads
    return torch.cat([torch.bmm(a, b) for a, b in zip(torch.split(left, unit), torch.split(right, unit), strict=True)])


def _fold(units: torch.Tensor, counts: tuple[int, ...], combine: Callable[..., torch.Tensor]) -> torch.Tensor:
    """Combine each row's units in the order of their tiles."""
    start = counts[0]
    folded = units[:start].clone()
    for count in counts[1:]:
        combine(folded[:count], units[start : start + count], out=folded[:count])
        start += count
    return folded


def _exact_batched(like: torch.Tensor, batch_sizes: Sequence[int]) -> tuple[int, ...]:
    """Row counts at which products with matrices that lie in memory as `like` does agree, for every batch size."""
    rows, matrix = probe_pair(PROBE_ROWS, like)
    batches = [matrix.t().expand(n, -1, -1).contiguous().transpose(1, 2) for n in batch_sizes]
    if like.is_contiguous():
        batches = [batch.contiguous() for batch in batches]

    def product(part: torch.Tensor) -> torch.Tensor:
        return _agreed([torch.bmm(part.expand(len(batch), -1, -1).contiguous(), batch) for batch in batches])

    return exact_row_counts(product, rows, 2.0 * like.numel() * sum(batch_sizes))


def _agreed(batches: Sequence[torch.Tensor]) -> torch.Tensor:
    """The product that all batched calls agree on; NaN, which equals nothing, where they do not."""
    first = batches[0][0]
    agree = all(torch.equal(product, first) for products in batches for product in products)
    return first if agree else torch.full_like(first, torch.nan)
