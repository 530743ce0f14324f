"""The dense feed-forward part: down(activation(gate) * up), gate and up as one matrix."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch

from disaggregated.engine.models.weight_reader import NamedWeights
from disaggregated.engine.ops.api import Ops

Activation = Literal["silu", "gelu"]
"""`gelu` is the approximation with tanh, which is what models with a gelu gate (Gemma) mean by it."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GatedMlp:
    """Implements `FeedForward`."""

    gate_up: Any
    """2 F outputs: gate, then up."""
    down: Any
    activation: Activation = "silu"

    @classmethod
    def read(
        cls,
        weights: NamedWeights,
        hidden_size: int,
        width: int,
        *,
        names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
        activation: Activation = "silu",
    ) -> GatedMlp:
        gate, up, down = names
        return cls(
            gate_up=weights.linear({gate: width, up: width}, hidden_size),
            down=weights.linear({down: hidden_size}, width),
            activation=activation,
        )

    def forward(self, normed_TH: torch.Tensor, ops: Ops) -> torch.Tensor:
        gate_up = ops.linear(normed_TH, self.gate_up)
        return ops.linear(ops.silu_mul(gate_up) if self.activation == "silu" else ops.gelu_mul(gate_up), self.down)
