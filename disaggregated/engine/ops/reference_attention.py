"""Paged attention in torch: what `attention_plan.py` cut into units, multiplied and added up.

Row-invariant like the rest of the reference: products have row counts that were measured to give the same bits, and a
row's units are added in the order of their tiles. Computed in float32, whatever the dtypes of queries and pool.

Legend as in `attention_plan.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from disaggregated.engine.ops.api import AttentionBatch, AttentionSpec, LayerPool
from disaggregated.engine.ops.attention_plan import AttentionShape, WorkGroup, key_tile, plan_attention
from disaggregated.engine.ops.kv_values import read_planes
from disaggregated.engine.ops.row_invariant import PROBE_ROWS, exact_row_counts, probe_pair, row_sum


class ReferenceAttention:
    """Implements `Ops.paged_attention`. Keeps the plans of the step that is being computed, one for each kind of layer
    (Gemma alternates between two), and the measured row counts of each shape."""

    def __init__(self) -> None:
        self._exact: dict[tuple[object, ...], tuple[int, ...]] = {}
        self._batch: AttentionBatch | None = None
        self._plans: dict[AttentionShape, list[WorkGroup]] = {}

    def attend(self, q_TND: torch.Tensor, pool: LayerPool, batch: AttentionBatch, spec: AttentionSpec) -> torch.Tensor:
        shape = self._shape(q_TND, pool, spec)
        q_scaled = q_TND.float() * spec.scale
        out_TND = q_TND.new_empty(*q_TND.shape[:2], shape.value_dim)
        for group in self._groups(batch, shape):
            out_TND.index_copy_(0, group.tokens, _attend(q_scaled, pool, group, shape, spec.softcap).to(q_TND.dtype))
        return out_TND

    def _shape(self, q_TND: torch.Tensor, pool: LayerPool, spec: AttentionSpec) -> AttentionShape:
        _, num_planes, num_kv_heads, block_size, head_dim = pool.values.shape
        assert num_planes == (1 if spec.latent_value_dim else 2), f"{num_planes} planes for {spec}"
        value_dim = spec.latent_value_dim or head_dim
        return AttentionShape(
            num_heads=q_TND.shape[1],
            num_kv_heads=num_kv_heads,
            num_planes=num_planes,
            head_dim=head_dim,
            value_dim=value_dim,
            block_size=block_size,
            window=spec.window,
            exact=self._exact_rows(q_TND.device, num_kv_heads, block_size, (head_dim, value_dim)),
        )

    def _groups(self, batch: AttentionBatch, shape: AttentionShape) -> list[WorkGroup]:
        if self._batch is not batch:  # The kept reference makes `is` a safe comparison.
            self._batch, self._plans = batch, {}
        if shape not in self._plans:
            self._plans[shape] = plan_attention(batch, shape)
        return self._plans[shape]

    def _exact_rows(
        self, device: torch.device, num_kv_heads: int, block_size: int, widths: tuple[int, int]
    ) -> tuple[int, ...]:
        """Row counts at which both products of attention give a row the same bits, batched or not."""
        key = (str(device), num_kv_heads, block_size, widths, torch.get_num_threads())
        if key not in self._exact:
            keys, values = (torch.empty(key_tile(block_size), width, device=device) for width in widths)
            batch_sizes = (1, num_kv_heads, 5 * num_kv_heads)
            exact = set.intersection(*(set(_exact_batched(side, batch_sizes)) for side in (keys.t(), values)))
            self._exact[key] = tuple(sorted(exact)) or (1,)
        return self._exact[key]


def _attend(
    q_TND: torch.Tensor, pool: LayerPool, group: WorkGroup, shape: AttentionShape, softcap: float | None
) -> torch.Tensor:
    """(Y * Q, N, value size) float32, of scaled queries."""
    num_kv_heads, value_dim = shape.num_kv_heads, shape.value_dim
    num_units, tile_len = len(group.unit_rows), key_tile(shape.block_size)
    keys, values = _keys_and_values(pool, group, shape)

    q_units = _group_queries(q_TND, group, shape).index_select(0, group.unit_rows)
    scores = _multiply(q_units.view(-1, group.padded_rows, shape.head_dim), keys.transpose(1, 2), shape)
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    scores_UGME = scores.view(num_units, num_kv_heads, group.padded_rows, tile_len)
    scores_UGME.masked_fill_(group.hidden_UME[:, None], -torch.inf)
    maxima = _fold(scores_UGME.amax(-1), group.counts, torch.maximum)
    weights = scores_UGME.sub_(maxima.index_select(0, group.unit_rows)[..., None]).exp_()
    totals = _fold(row_sum(weights), group.counts, torch.add)
    sums = _multiply(weights.view(-1, group.padded_rows, tile_len), values, shape)
    out = _fold(sums.view(num_units, num_kv_heads, group.padded_rows, value_dim), group.counts, torch.add)
    out.div_(totals[..., None])

    rows, queries, heads = group.num_rows, group.num_queries, shape.heads_per_kv
    out = out[:, :, : queries * heads].view(rows, num_kv_heads, queries, heads, value_dim)
    return out.transpose(1, 2).reshape(rows * queries, num_kv_heads * heads, value_dim)


def _keys_and_values(pool: LayerPool, group: WorkGroup, shape: AttentionShape) -> tuple[torch.Tensor, torch.Tensor]:
    """(U * G, E, D) and (U * G, E, value size), with zeros where the pool holds another owner's leftovers."""
    tile_len = key_tile(shape.block_size)
    keys = read_planes(pool, group.key_planes).view(-1, tile_len, shape.head_dim)
    if shape.num_planes == 2:
        values = read_planes(pool, group.key_planes + shape.num_kv_heads).view(-1, tile_len, shape.head_dim)
    else:
        values = keys[..., : shape.value_dim].contiguous()
    # A weight of zero does not silence a NaN that some earlier owner of the block left behind.
    values.view(-1, shape.value_dim).index_fill_(0, group.stale, 0.0)
    return keys, values


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
