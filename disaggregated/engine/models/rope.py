"""Rotary position tables: cos and sin for every position, as Hugging Face's `rope_scaling` asks for.

Legend: P positions, D half of the head size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from disaggregated.errors import ModelUnavailable


def rope_tables(
    *, theta: float, scaling: Mapping[str, Any] | None, head_dim: int, num_positions: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos_PD, sin_PD) in float32. Scaling types: none, "linear", "llama3".

    Raises:
        ModelUnavailable: the scaling type is another one.
    """
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    match (scaling or {}).get("rope_type", (scaling or {}).get("type", "default")):
        case "default":
            pass
        case "linear":
            assert scaling is not None
            frequencies = frequencies / scaling["factor"]
        case "llama3":
            assert scaling is not None
            frequencies = _llama3(frequencies, scaling)
        case other:
            raise ModelUnavailable(
                f"config.json: rope_scaling: type {other!r} is not supported, only linear and llama3"
            )
    angles = torch.arange(num_positions).float()[:, None] * frequencies
    return angles.cos(), angles.sin()


def _llama3(frequencies: torch.Tensor, scaling: Mapping[str, Any]) -> torch.Tensor:
    """Slow rotations are slowed by `factor`, fast ones kept, those between blended."""
    low, high, original, factor = (
        float(scaling[key])
        for key in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "factor")
    )
    turns = original * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - kept) * frequencies / factor + kept * frequencies
