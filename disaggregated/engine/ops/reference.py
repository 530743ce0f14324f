"""The op table in plain torch: the fallback on every device, and the oracle that other implementations are held to.

What makes it row-invariant: matrix products are calls of measured row counts, or sums of integers
(`reference_linear.py`), attention is cut at fixed absolute positions (`reference_attention.py`), and everything else is
element by element. Attention and norms are computed in float32 whatever the model's dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from disaggregated.engine.ops.api import AttentionBatch, AttentionSpec, LayerPool, StepProgram
from disaggregated.engine.ops.elementwise import gelu_mul
from disaggregated.engine.ops.kv_values import write_plane
from disaggregated.engine.ops.reference_attention import ReferenceAttention
from disaggregated.engine.ops.reference_linear import Int8Linear, PlainLinear, PlainLinears
from disaggregated.engine.ops.row_invariant import row_sum

if TYPE_CHECKING:
    from disaggregated.engine.models.decoder import DecoderShape, DecoderWeights
    from disaggregated.engine.precision import Quantization


class ReferenceOps:
    """Implements `Ops`. Its caches are keyed by shape, or hold the one step that is being computed."""

    def __init__(self, quantization: Quantization = "none") -> None:
        assert quantization in ("none", "int8"), f"weights in {quantization}"
        self.name = "torch" if quantization == "none" else f"torch-{quantization}"
        self.linear_bytes: Mapping[str, int] = {}
        self._quantization = quantization
        self._plain_linears = PlainLinears()
        self._attention = ReferenceAttention()
        self._rotation: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def prepare_linear(
        self, weight_MK: torch.Tensor, bias_M: torch.Tensor | None, *, exact: bool = False
    ) -> PlainLinear | Int8Linear:
        if self._quantization == "int8" and not exact:
            return Int8Linear.quantised(weight_MK, bias_M)
        return self._plain_linears.prepare(weight_MK, bias_M)

    def linear(self, x_TK: torch.Tensor, weight: PlainLinear | Int8Linear) -> torch.Tensor:
        return weight.apply(x_TK)

    def embedding(self, token_ids_T: torch.Tensor, table_VH: torch.Tensor) -> torch.Tensor:
        return table_VH.index_select(0, token_ids_T)

    def rms_norm(self, x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
        x = x_TH.float()
        scale = row_sum(x * x).div_(x.shape[-1]).add_(eps).rsqrt_()
        return (x * scale[..., None]).to(x_TH.dtype).mul_(weight_H)

    def silu_mul(self, gate_up_TF2: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up_TF2.float().chunk(2, -1)
        # Not torch's own silu: its vector code and its scalar code for the last elements differ in the last bit.
        return (gate / gate.neg().exp_().add_(1.0)).mul_(up).to(gate_up_TF2.dtype)

    def gelu_mul(self, gate_up_TF2: torch.Tensor) -> torch.Tensor:
        return gelu_mul(gate_up_TF2)

    def rope(self, x_TND: torch.Tensor, cos_PD: torch.Tensor, sin_PD: torch.Tensor, positions_T: torch.Tensor) -> None:
        cos_T1D, sin_T1D = self._rotations(cos_PD, sin_PD, positions_T)
        first, second = x_TND.chunk(2, -1)
        a, b = first.float(), second.float()
        rotated = a * cos_T1D - b * sin_T1D
        second.copy_(b * cos_T1D + a * sin_T1D)
        first.copy_(rotated)

    def store_kv(
        self, key_TGD: torch.Tensor, value_TGD: torch.Tensor | None, pool: LayerPool, slots_T: torch.Tensor
    ) -> None:
        for plane, x_TGD in enumerate((key_TGD, value_TGD)):
            if x_TGD is not None:
                write_plane(pool, plane, x_TGD, slots_T)

    def paged_attention(
        self, q_TND: torch.Tensor, pool: LayerPool, batch: AttentionBatch, spec: AttentionSpec
    ) -> torch.Tensor:
        return self._attention.attend(q_TND, pool, batch, spec)

    def argmax(self, logits_RV: torch.Tensor) -> torch.Tensor:
        return logits_RV.argmax(-1)

    def top_k(self, values_RV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        largest = values_RV.topk(k, sorted=True)
        return largest.values, largest.indices

    def step_program(self, shape: DecoderShape, weights: DecoderWeights) -> StepProgram | None:
        return None

    def _rotations(
        self, cos_PD: torch.Tensor, sin_PD: torch.Tensor, positions_T: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Each token's row of the tables, fetched once a step. The kept references make `is` a safe comparison."""
        kept = self._rotation
        if kept is None or kept[0] is not positions_T or kept[1] is not cos_PD:
            cos, sin = (table.index_select(0, positions_T)[:, None, :] for table in (cos_PD, sin_PD))
            kept = self._rotation = (positions_T, cos_PD, cos, sin)
        return kept[2], kept[3]
