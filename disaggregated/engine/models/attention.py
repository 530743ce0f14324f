"""Attention with grouped queries and rope: the attention part of every native family but DeepSeek's.

Families differ in optional tensors (a bias on q, k, v or on the output; a norm of each head's q and k) and in the
numbers of `AttentionSpec` and the rope tables, which a layer may have for itself. Query, key and value weights are one
matrix: fewer, larger products.

Legend as in `ops/api.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from disaggregated.engine.models.decoder import DecoderShape, decoder_shape
from disaggregated.engine.models.rope import RopeTables
from disaggregated.engine.models.weight_reader import NamedWeights
from disaggregated.engine.ops.api import AttentionBatch, AttentionSpec, LayerPool, Ops
from disaggregated.model_files import ModelConfig

Norm = Callable[[NamedWeights, str, int], torch.Tensor]


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

    @classmethod
    def read(
        cls,
        weights: NamedWeights,
        config: ModelConfig,
        rope: RopeTables,
        *,
        window: int | None,
        norm: Norm = NamedWeights.norm,
    ) -> GroupedAttention:
        """`norm` reads a norm's weight: Gemma means another number by what it stores."""
        hidden, head_dim = config.hidden_size, config.head_dim
        q_width, kv_width = config.num_heads * head_dim, config.num_kv_heads * head_dim
        names = {"q_proj": q_width, "k_proj": kv_width, "v_proj": kv_width}
        return cls(
            shape=decoder_shape(config),
            qkv=weights.linear(names, hidden, biased=list(names) if config.attention_bias else []),
            q_norm=norm(weights, "q_norm", head_dim) if config.qk_norm else None,
            k_norm=norm(weights, "k_norm", head_dim) if config.qk_norm else None,
            out=weights.linear({"o_proj": hidden}, q_width, biased=["o_proj"] if config.attention_out_bias else []),
            spec=AttentionSpec(scale=config.attention_scale, window=window, softcap=config.attention_softcap),
            cos_PD=rope.cos_PD,
            sin_PD=rope.sin_PD,
        )

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
