"""Attention with grouped queries and rope: the attention part of every native family but DeepSeek's.

Families differ in optional tensors (a bias on q, k, v or on the output; a norm of each head's q and k) and in the
numbers of `AttentionSpec` and the rope tables, which a layer may have for itself. Query, key and value weights are one
matrix: fewer, larger products.

Legend as in `ops/api.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from disaggregated.engine.models.decoder import DecoderShape
from disaggregated.engine.ops.api import AttentionBatch, AttentionSpec, LayerPool, Ops


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GroupedAttention:
    """Implements `Attention`."""

    shape: DecoderShape
    qkv: Any
    """(N + 2 G) * D outputs: all query heads, then key heads, then value heads."""
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None
    out: Any
    spec: AttentionSpec
    cos_PD: torch.Tensor
    sin_PD: torch.Tensor
    """Rope tables, (max positions, D / 2) float32, shared by all layers with the same rope."""

    def forward(self, normed_TH: torch.Tensor, batch: AttentionBatch, pool: LayerPool, ops: Ops) -> torch.Tensor:
        shape = self.shape
        widths = [n * shape.head_dim for n in (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)]
        qkv = ops.linear(normed_TH, self.qkv)
        q, k, v = (part.reshape(len(part), -1, shape.head_dim).contiguous() for part in torch.split(qkv, widths, -1))
        if self.q_norm is not None and self.k_norm is not None:
            q = ops.rms_norm(q, self.q_norm, shape.rms_norm_eps)
            k = ops.rms_norm(k, self.k_norm, shape.rms_norm_eps)
        ops.rope(q, self.cos_PD, self.sin_PD, batch.positions)
        ops.rope(k, self.cos_PD, self.sin_PD, batch.positions)
        ops.store_kv(k, v, pool, batch.slots)
        attended = ops.paged_attention(q, pool, batch, self.spec)
        return ops.linear(attended.view(len(q), -1), self.out)
