"""One decoder for the Llama family: Llama, SmolLM2, TinyLlama, Mistral, and dense Qwen2 and Qwen3.

They differ in three optional tensors (a bias on q, k, v; a bias on the attention's output; a norm on each head's q
and k) and in numbers. Query, key and value weights are one matrix, gate and up another: fewer, larger products.

Legend as in `ops/api.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from disaggregated.engine.ops.api import AttentionBatch, AttentionSpec, LayerPool, Ops


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """`Any` is what the op table's `prepare_linear` made."""

    input_norm: torch.Tensor
    qkv: Any
    """(N + 2 G) * D outputs: all query heads, then key heads, then value heads."""
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    attention_out: Any
    mlp_norm: torch.Tensor
    gate_up: Any
    """2 F outputs: gate, then up."""
    down: Any


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DecoderWeights:
    embedding_VH: torch.Tensor
    layers: Sequence[LayerWeights]
    final_norm: torch.Tensor
    lm_head: Any


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DecoderShape:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float


class Decoder:
    """Stateless but for its weights: the KV pool and the step's layout come with each call."""

    def __init__(
        self, shape: DecoderShape, weights: DecoderWeights, ops: Ops, rope: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        self._shape = shape
        self._weights = weights
        self._ops = ops
        self._cos_PD, self._sin_PD = rope
        self._attention_spec = AttentionSpec(scale=shape.head_dim**-0.5)
        self._program = ops.step_program(shape, weights, rope)
        heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
        self._qkv_widths = [n * shape.head_dim for n in heads]

    def forward(self, token_ids_T: torch.Tensor, batch: AttentionBatch, pools: Sequence[LayerPool]) -> torch.Tensor:
        """(T, H): hidden states before the final norm. Each layer's keys and values are then in `pools[layer]`."""
        if self._program is not None:
            return self._program(token_ids_T, batch, pools)
        ops, eps = self._ops, self._shape.rms_norm_eps
        hidden = ops.embedding(token_ids_T, self._weights.embedding_VH)
        for layer, pool in zip(self._weights.layers, pools, strict=True):
            normed = ops.rms_norm(hidden, layer.input_norm, eps)
            hidden = hidden + self._attention(normed, layer, batch, pool)
            gate_up = ops.linear(ops.rms_norm(hidden, layer.mlp_norm, eps), layer.gate_up)
            hidden = hidden + ops.linear(ops.silu_mul(gate_up), layer.down)
        return hidden

    def logits(self, hidden_RH: torch.Tensor) -> torch.Tensor:
        """(R, V) in the model's dtype."""
        normed = self._ops.rms_norm(hidden_RH, self._weights.final_norm, self._shape.rms_norm_eps)
        return self._ops.linear(normed, self._weights.lm_head)

    def _attention(
        self, normed_TH: torch.Tensor, layer: LayerWeights, batch: AttentionBatch, pool: LayerPool
    ) -> torch.Tensor:
        ops, shape = self._ops, self._shape
        qkv = ops.linear(normed_TH, layer.qkv)
        q, k, v = (
            part.reshape(len(part), -1, shape.head_dim).contiguous() for part in torch.split(qkv, self._qkv_widths, -1)
        )
        if layer.q_norm is not None and layer.k_norm is not None:
            q = ops.rms_norm(q, layer.q_norm, shape.rms_norm_eps)
            k = ops.rms_norm(k, layer.k_norm, shape.rms_norm_eps)
        ops.rope(q, self._cos_PD, self._sin_PD, batch.positions)
        ops.rope(k, self._cos_PD, self._sin_PD, batch.positions)
        ops.store_kv(k, v, pool, batch.slots)
        attended = ops.paged_attention(q, pool, batch, self._attention_spec)
        return ops.linear(attended.view(len(q), -1), layer.attention_out)
