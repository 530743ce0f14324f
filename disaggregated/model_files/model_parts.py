"""Parts of a model's config that only some families have."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsConfig:
    """Feed-forward layers of which a router picks a few for each token."""

    is_sparse: tuple[bool, ...]
    """For each layer, whether it has experts or one dense feed-forward part."""
    num_experts: int
    num_chosen: int
    """Experts of each token."""
    width: int
    """Of one expert."""
    scoring: Literal["softmax", "sigmoid"]
    is_normalised: bool
    """The weights of the chosen experts are made to sum up to 1."""
    scale: float = 1.0
    """What they are multiplied with then."""
    num_groups: int = 1
    num_chosen_groups: int = 1
    """Experts are chosen from so many groups only, those that score best."""
    shared_width: int = 0
    """Of the dense part that every token goes through beside its experts; 0: there is none."""
    has_correction_bias: bool = False
    """A number for each expert is added to its score for the choice, not for the weight (DeepSeek V3)."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LatentConfig:
    """Multi-head latent attention: a token's keys and values all follow from one short vector, which is cached."""

    q_rank: int | None
    """Width that queries are squeezed through; None: they are not."""
    kv_rank: int
    plain_dim: int
    """Of a head's query and key, the numbers that are not rotated."""
    rope_dim: int
    """And those that are; the rotated part of the key is the same for all heads."""
    value_dim: int
    rope_is_interleaved: bool
    """Weights rotate neighbours, not halves; undone when they are loaded."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class KVShape:
    """What the model decides of a `KVLayout`, under its names."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    num_planes: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TransformersConfig:
    """Of a model that the transformers library computes: only the library knows what in its config means what."""

    file: Mapping[str, Any]
    """The whole config.json: servers exchange KV when it is the same."""
    num_parameters: int
