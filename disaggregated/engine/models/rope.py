"""Rotary position tables: cos and sin for every position, as Hugging Face's `rope_scaling` asks for.

Legend: P positions, D half of the rotated dimensions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch

from disaggregated.errors import ModelUnavailable


@dataclasses.dataclass(frozen=True, slots=True)
class RopeTables:
    """float32, on the model's device; shared by all layers with the same rope."""

    cos_PD: torch.Tensor
    sin_PD: torch.Tensor


def rope_tables(
    *, theta: float, scaling: Mapping[str, Any] | None, head_dim: int, num_positions: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos_PD, sin_PD) in float32. Scaling types: none, "linear", "llama3", "yarn".

    Raises:
        ModelUnavailable: the scaling type is another one.
    """
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    length = 1.0
    match (scaling or {}).get("rope_type", (scaling or {}).get("type", "default")):
        case "default":
            pass
        case "linear":
            assert scaling is not None
            frequencies = frequencies / scaling["factor"]
        case "llama3":
            assert scaling is not None
            frequencies = _llama3(frequencies, scaling)
        case "yarn":
            assert scaling is not None
            frequencies, length = _yarn(frequencies, scaling, theta), _yarn_length(scaling)
        case other:
            raise ModelUnavailable(
                f"config.json: rope_scaling: type {other!r} is not supported, only linear, llama3 and yarn"
            )
    angles = torch.arange(num_positions).float()[:, None] * frequencies
    return angles.cos() * length, angles.sin() * length


def _llama3(frequencies: torch.Tensor, scaling: Mapping[str, Any]) -> torch.Tensor:
    """Slow rotations are slowed by `factor`, fast ones kept, those between blended."""
    low, high, original, factor = (
        float(scaling[key])
        for key in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "factor")
    )
    turns = original * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - kept) * frequencies / factor + kept * frequencies


def _yarn(frequencies: torch.Tensor, scaling: Mapping[str, Any], theta: float) -> torch.Tensor:
    """As llama3, but blended evenly over the dimensions between two numbers of turns: Peng et al., YaRN, 2023."""
    half = len(frequencies)

    def dimension(turns: float) -> float:
        """Where a rotation makes so many turns within the original length."""
        original = float(scaling["original_max_position_embeddings"])
        return half * math.log(original / (turns * 2 * math.pi)) / math.log(theta)

    first = max(math.floor(dimension(scaling.get("beta_fast") or 32.0)), 0)
    last = min(math.ceil(dimension(scaling.get("beta_slow") or 1.0)), 2 * half - 1)
    slowed = ((torch.arange(half).float() - first) / max(last - first, 0.001)).clamp(0.0, 1.0)
    return frequencies / float(scaling["factor"]) * slowed + frequencies * (1 - slowed)


def _yarn_length(scaling: Mapping[str, Any]) -> float:
    """What yarn makes of vectors of length 1: attention over a longer text has to be sharper."""

    def length(mscale: float) -> float:
        return 1.0 if scaling["factor"] <= 1 else 0.1 * mscale * math.log(scaling["factor"]) + 1.0

    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return length(scaling["mscale"]) / length(scaling["mscale_all_dim"])
    return length(1.0)
