"""The decoder that all families share: a stream of hidden states to which each layer adds twice.

A layer is an attention part and a feed-forward part, each behind its norm; Gemma norms what they add once more. What
the parts are, and with which numbers, is the family's business: `attention.py`, `mlp.py` and their neighbours hold the
parts, `families.py` says which family is made of which.

Legend as in `ops/api.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from disaggregated.engine.layer_progress import LayerProgress, layer_ranges
from disaggregated.engine.ops.api import AttentionBatch, DecodeProgram, LayerPool, Ops
from disaggregated.model_files import ModelConfig


class Model(Protocol):
    """What a runner needs of a model. Stateless but for its weights: the KV pool and the step's layout come with each
    call."""

    @property
    def ops(self) -> Ops:
        """The table it computes with."""

    @property
    def decode(self) -> DecodeProgram | None:
        """A shorter way for steps of nothing but decoding; None: there is none."""

    def forward(
        self,
        token_ids_T: torch.Tensor,
        batch: AttentionBatch,
        pools: Sequence[LayerPool],
        progress: LayerProgress | None = None,
    ) -> torch.Tensor:
        """(T, H): what `logits` takes. Each layer's keys and values are then in `pools[layer]`.

        `progress` is told on the way, on a device that has done what it was given when a call returns.
        """

    def logits(self, hidden_RH: torch.Tensor) -> torch.Tensor:
        """(R, V) in the model's dtype."""


class Attention(Protocol):
    def forward(self, normed_TH: torch.Tensor, batch: AttentionBatch, pool: LayerPool, ops: Ops) -> torch.Tensor:
        """(T, H) to add. Each token's keys and values are then in `pool`."""


class FeedForward(Protocol):
    def forward(self, normed_TH: torch.Tensor, ops: Ops) -> torch.Tensor:
        """(T, H) to add, each row of its own token alone."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    input_norm: torch.Tensor
    attention: Attention
    attention_post_norm: torch.Tensor | None = None
    """Of what attention adds, before it is added."""
    mlp_norm: torch.Tensor
    mlp: FeedForward
    mlp_post_norm: torch.Tensor | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DecoderWeights:
    embedding_VH: torch.Tensor
    layers: Sequence[LayerWeights]
    final_norm: torch.Tensor
    lm_head: Any
    """`Any` is, here and in the parts, what the op table's `prepare_linear` made."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DecoderShape:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    embedding_scale: float = 1.0
    """Embeddings are multiplied by it (Gemma)."""
    final_softcap: float | None = None
    """Logits become softcap · tanh(logit / softcap) (Gemma 2)."""


def decoder_shape(config: ModelConfig, *, embedding_scale: float = 1.0) -> DecoderShape:
    return DecoderShape(
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.rms_norm_eps,
        embedding_scale=embedding_scale,
        final_softcap=config.final_softcap,
    )


class Decoder:
    """Implements `Model`."""

    def __init__(self, shape: DecoderShape, weights: DecoderWeights, ops: Ops) -> None:
        self._shape = shape
        self._weights = weights
        self._ops = ops
        self._program = ops.step_program(shape, weights)

    @property
    def ops(self) -> Ops:
        """The table it computes with."""
        return self._ops

    @property
    def decode(self) -> DecodeProgram | None:
        return None if self._program is None else self._program.decode

    def forward(
        self,
        token_ids_T: torch.Tensor,
        batch: AttentionBatch,
        pools: Sequence[LayerPool],
        progress: LayerProgress | None = None,
    ) -> torch.Tensor:
        """(T, H): hidden states before the final norm. Each layer's keys and values are then in `pools[layer]`."""
        if self._program is not None:
            return self._program(token_ids_T, batch, pools, progress)
        ops = self._ops
        hidden = ops.embedding(token_ids_T, self._weights.embedding_VH)
        if self._shape.embedding_scale != 1.0:
            hidden = hidden * self._shape.embedding_scale
        assert len(pools) == len(self._weights.layers), f"{len(pools)} pools, {len(self._weights.layers)} layers"
        for first, end in layer_ranges(len(pools), progress):
            for layer, pool in zip(self._weights.layers[first:end], pools[first:end], strict=True):
                hidden = self._layer(hidden, layer, batch, pool)
            if progress is not None:
                progress.written(end)
        return hidden

    def _layer(self, hidden: torch.Tensor, layer: LayerWeights, batch: AttentionBatch, pool: LayerPool) -> torch.Tensor:
        added = layer.attention.forward(self._norm(hidden, layer.input_norm), batch, pool, self._ops)
        hidden = hidden + self._norm(added, layer.attention_post_norm)
        added = layer.mlp.forward(self._norm(hidden, layer.mlp_norm), self._ops)
        return hidden + self._norm(added, layer.mlp_post_norm)

    def logits(self, hidden_RH: torch.Tensor) -> torch.Tensor:
        """(R, V) in the model's dtype."""
        logits = self._ops.linear(self._norm(hidden_RH, self._weights.final_norm), self._weights.lm_head)
        if (softcap := self._shape.final_softcap) is not None:
            logits = logits.div_(softcap).tanh_().mul_(softcap)
        return logits

    def _norm(self, x_TH: torch.Tensor, weight_H: torch.Tensor | None) -> torch.Tensor:
        return x_TH if weight_H is None else self._ops.rms_norm(x_TH, weight_H, self._shape.rms_norm_eps)
