"""The op table in plain torch: the fallback on every device, and the oracle that other implementations are held to.

What makes it row-invariant: matrix products are calls of measured row counts (`row_invariant.py`), attention is cut at
fixed absolute positions (`reference_attention.py`), and everything else is element by element. Attention and norms are
computed in float32 whatever the model's dtype.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Final

import torch

from disaggregated.engine.ops.api import AttentionBatch, AttentionSpec, LayerPool, StepProgram
from disaggregated.engine.ops.elementwise import gelu_mul
from disaggregated.engine.ops.reference_attention import ReferenceAttention
from disaggregated.engine.ops.row_invariant import PROBE_ROWS, exact_row_counts, matmul_rows, probe_pair, row_sum

if TYPE_CHECKING:
    from disaggregated.engine.models.decoder import DecoderShape, DecoderWeights

TRANSPOSE_NUMEL_MAX: Final = 16 << 20
"""Weights of up to that many numbers are stored (K, M): a call with few rows is up to twice as fast on CPU. A larger
one (an output head, often shared with the embedding) is left where it is."""


@dataclasses.dataclass(frozen=True, slots=True)
class ReferenceLinear:
    weight_KM: torch.Tensor
    bias_M: torch.Tensor | None
    exact: tuple[int, ...]
    """Row counts that `linear` may call with."""


class ReferenceOps:
    """Implements `Ops`. Its caches are keyed by shape, or hold the one step that is being computed."""

    name = "torch"

    def __init__(self) -> None:
        self._exact_linear: dict[tuple[object, ...], tuple[int, ...]] = {}
        self._attention = ReferenceAttention()
        self._rotation: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def prepare_linear(
        self, weight_MK: torch.Tensor, bias_M: torch.Tensor | None, *, exact: bool = False
    ) -> ReferenceLinear:
        weight_KM = weight_MK.t()
        if weight_MK.numel() <= TRANSPOSE_NUMEL_MAX:
            weight_KM = weight_KM.contiguous()
        elif weight_MK.data_ptr() % 64:
            weight_KM = weight_MK.clone().t()  # A mapped file puts it anywhere; kernels may care for alignment.
        key = (weight_KM.shape, weight_KM.stride(), weight_KM.dtype, str(weight_KM.device), torch.get_num_threads())
        if key not in self._exact_linear:
            rows, matrix = probe_pair(PROBE_ROWS, weight_KM)
            self._exact_linear[key] = exact_row_counts(lambda part: part @ matrix, rows, 2.0 * matrix.numel())
        return ReferenceLinear(weight_KM, bias_M, self._exact_linear[key])

    def linear(self, x_TK: torch.Tensor, weight: ReferenceLinear) -> torch.Tensor:
        return matmul_rows(x_TK, weight.weight_KM, weight.bias_M, weight.exact)

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
        block_size = pool.values.shape[3]
        blocks, offsets = slots_T // block_size, slots_T % block_size
        for plane, x_TGD in enumerate((key_TGD, value_TGD)):
            if x_TGD is not None:
                pool.values[blocks, plane, :, offsets] = x_TGD.to(pool.values.dtype)

    def paged_attention(
        self, q_TND: torch.Tensor, pool: LayerPool, batch: AttentionBatch, spec: AttentionSpec
    ) -> torch.Tensor:
        return self._attention.attend(q_TND, pool, batch, spec)

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
