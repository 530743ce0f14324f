"""A whole forward pass of a decoder with grouped attention and gated feed-forward parts, in few kernels.

Per layer: four linears, attention, its rope fused with the write of keys and values, the gate, and each residual sum
fused with the norm behind it. It waits for nothing on the host and reads nothing there that a later batch of the same
size could have otherwise, so a pass over single tokens can be captured into a CUDA graph.

Legend as in `ops/api.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from disaggregated.engine.cuda.kernels import attention
from disaggregated.engine.layer_progress import LayerProgress
from disaggregated.engine.models.attention import GroupedAttention
from disaggregated.engine.models.decoder import DecoderShape, DecoderWeights, LayerWeights
from disaggregated.engine.models.mlp import GatedMlp
from disaggregated.engine.ops.api import AttentionBatch, LayerPool

if TYPE_CHECKING:
    from disaggregated.engine.cuda.ops import CudaOps


def can_fuse(shape: DecoderShape, weights: DecoderWeights) -> bool:
    """Exact classes: a part that extends one of these computes something else."""
    return attention.unsupported(shape.num_heads, shape.num_kv_heads, shape.head_dim) is None and all(
        type(layer.attention) is GroupedAttention and type(layer.mlp) is GatedMlp for layer in weights.layers
    )


class FusedStep:
    """Implements `StepProgram`."""

    def __init__(self, ops: CudaOps, shape: DecoderShape, weights: DecoderWeights) -> None:
        self._ops = ops
        self._shape = shape
        self._weights = weights

    @property
    def decode(self) -> None:
        """The device has it as a captured graph instead."""
        return None

    def __call__(
        self,
        token_ids_T: torch.Tensor,
        batch: AttentionBatch,
        pools: Sequence[LayerPool],
        progress: LayerProgress | None = None,
    ) -> torch.Tensor:
        assert progress is None, "these kernels run when this call has long returned"
        layers, ops, eps = self._weights.layers, self._ops, self._shape.rms_norm_eps
        hidden = ops.embedding(token_ids_T, self._weights.embedding_VH)
        if self._shape.embedding_scale != 1.0:
            hidden = hidden * self._shape.embedding_scale
        normed = ops.rms_norm(hidden, layers[0].input_norm, eps)
        for i, (layer, pool) in enumerate(zip(layers, pools, strict=True)):
            added = self._norm(self._attend(normed, layer, batch, pool), layer.attention_post_norm)
            hidden, normed = ops.add_rms_norm(hidden, added, layer.mlp_norm, eps)
            assert isinstance(layer.mlp, GatedMlp)
            added = self._norm(layer.mlp.forward(normed, ops), layer.mlp_post_norm)
            if i + 1 == len(layers):
                return hidden + added
            hidden, normed = ops.add_rms_norm(hidden, added, layers[i + 1].input_norm, eps)
        raise AssertionError("a model without layers")

    def _attend(
        self, normed_TH: torch.Tensor, layer: LayerWeights, batch: AttentionBatch, pool: LayerPool
    ) -> torch.Tensor:
        part, ops, shape = layer.attention, self._ops, self._shape
        assert isinstance(part, GroupedAttention)
        heads = ops.linear(normed_TH, part.qkv).view(len(normed_TH), -1, shape.head_dim)
        q, k, v = torch.split(heads, [shape.num_heads, shape.num_kv_heads, shape.num_kv_heads], 1)
        if part.q_norm is not None and part.k_norm is not None:
            q = ops.rms_norm(q, part.q_norm, shape.rms_norm_eps)
            k = ops.rms_norm(k, part.k_norm, shape.rms_norm_eps)
        ops.rope_and_store((q, k, v), pool, batch, (part.cos_PD, part.sin_PD))
        attended = ops.paged_attention(q, pool, batch, part.spec)
        return ops.linear(attended.view(len(normed_TH), -1), part.out)

    def _norm(self, x_TH: torch.Tensor, weight_H: torch.Tensor | None) -> torch.Tensor:
        return x_TH if weight_H is None else self._ops.rms_norm(x_TH, weight_H, self._shape.rms_norm_eps)
