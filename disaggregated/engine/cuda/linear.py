"""Linears on CUDA: bfloat16 and float32 through cuBLAS, 8-bit floats through torch's row-wise scaled product.

Two modes. *Deterministic*: every call has one of the row counts that were measured to give a row the same bits
(`row_counts.py`), so a sequence's tokens do not depend on its batch. *Fast*: one call of whatever size, whose bits
depend on how many rows there are.

Legend as in `ops/api.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Final

import torch

from disaggregated.engine.cuda import row_counts
from disaggregated.engine.ops.quantise import quantise_rows as quantise_weight

FP8: Final = torch.float8_e4m3fn
PROBE_NUMBERS_MAX: Final = 128 << 20
"""Of the rows of a probe: half a gigabyte in float32 while it is made."""

QuantiseRows = Callable[[torch.Tensor, torch.dtype], tuple[torch.Tensor, torch.Tensor]]
ScaledProduct = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(T, K) fp8, (M, K) fp8, scales (T) and (M) → (T, M) bfloat16."""


@dataclasses.dataclass(frozen=True, slots=True)
class CudaLinear:
    weight_MK: torch.Tensor
    bias_M: torch.Tensor | None
    scale_M: torch.Tensor | None
    """Of 8-bit weights."""
    counts: tuple[int, ...] | None
    """Row counts that it may be called with; None: any, in the fast mode."""


class CudaLinears:
    """Prepares and applies. Keeps what was measured for each shape.

    Invariant: in the deterministic mode, a prepared linear is only ever multiplied with a number of rows of its class.
    """

    def __init__(
        self, *, is_deterministic: bool, quantise_rows: QuantiseRows, scaled_product: ScaledProduct, to_fp8: bool
    ) -> None:
        self._is_deterministic = is_deterministic
        self._quantise_rows = quantise_rows
        self._scaled_product = scaled_product
        self._to_fp8 = to_fp8
        self.measured: dict[tuple[object, ...], tuple[int, ...]] = {}
        """By shape and dtype. Servers with other classes compute other bits: part of the model's fingerprint."""

    def prepare(self, weight_MK: torch.Tensor, bias_M: torch.Tensor | None, *, exact: bool) -> CudaLinear:
        """`exact`, and shapes that an 8-bit product cannot have: in the weight's own dtype."""
        if self._to_fp8 and not exact and _fits_fp8(weight_MK):
            weight, scale_M = _in_fp8(weight_MK)
            return CudaLinear(weight, bias_M, scale_M, self._counts(weight))
        weight_MK = weight_MK.contiguous()
        return CudaLinear(weight_MK, bias_M, None, self._counts(weight_MK))

    def apply(self, x_TK: torch.Tensor, linear: CudaLinear) -> torch.Tensor:
        if linear.scale_M is None:
            weight_KM = linear.weight_MK.t()
            return self._in_calls(x_TK, linear, lambda rows: torch.mm(rows, weight_KM))
        scale_M = linear.scale_M

        def product(rows: torch.Tensor) -> torch.Tensor:
            quantised, scale_T = self._quantise_rows(rows, FP8)
            return self._scaled_product(quantised, linear.weight_MK, scale_T, scale_M)

        return self._in_calls(x_TK, linear, product)

    def padded_rows(self, num_rows: int) -> int:
        """The fewest rows, at least `num_rows`, that every prepared linear takes in one call without padding; a batch
        that is padded to it once is not padded again in each of them. `num_rows` itself when there is none."""
        classes = set(self.measured.values())
        shared = set.intersection(*map(set, classes)) if classes else set()
        return min((n for n in shared if n >= num_rows), default=num_rows)

    def _in_calls(self, x_TK: torch.Tensor, linear: CudaLinear, product: row_counts.Product) -> torch.Tensor:
        num_rows = len(x_TK)
        if linear.counts is None or num_rows in linear.counts:
            out = product(x_TK)
        else:
            sizes = row_counts.split(num_rows, linear.counts)
            padded = torch.nn.functional.pad(x_TK, (0, 0, 0, sum(sizes) - num_rows))
            parts = [product(part) for part in torch.split(padded, list(sizes))]
            out = (parts[0] if len(parts) == 1 else torch.cat(parts))[:num_rows]
        return out if linear.bias_M is None else out + linear.bias_M

    def _counts(self, weight_MK: torch.Tensor) -> tuple[int, ...] | None:
        if not self._is_deterministic:
            return None
        key = (tuple(weight_MK.shape), str(weight_MK.dtype))
        if key not in self.measured:
            self.measured[key] = self._measure(weight_MK)
        return self.measured[key]

    def _measure(self, weight_MK: torch.Tensor) -> tuple[int, ...]:
        dtype = weight_MK.dtype if weight_MK.dtype is not FP8 else torch.bfloat16
        num_rows = min(2 * max(row_counts.COUNTS), max(2, PROBE_NUMBERS_MAX // weight_MK.shape[1]))
        rows, matrix = row_counts.probe(torch.empty_like(weight_MK, dtype=dtype), num_rows)
        if weight_MK.dtype is FP8:
            rows, matrix = rows.to(FP8), matrix.to(FP8)
            ones_T, ones_M = (torch.ones(n, device=rows.device) for n in (len(rows), len(matrix)))
            return row_counts.exact_class(
                lambda part: self._scaled_product(part, matrix, ones_T[: len(part)], ones_M), rows, len(matrix)
            )
        return row_counts.exact_class(lambda part: torch.mm(part, matrix.t()), rows, len(matrix))


def scaled_product(
    x_TK: torch.Tensor, w_MK: torch.Tensor, scale_T: torch.Tensor, scale_M: torch.Tensor
) -> torch.Tensor:
    """CUTLASS's kernel behind torch: a scale for each row of both, sums in float32."""
    return torch._scaled_mm(
        x_TK,
        w_MK.t(),
        scale_a=scale_T[:, None],
        scale_b=scale_M[None, :],
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


def plain_scaled_product(
    x_TK: torch.Tensor, w_MK: torch.Tensor, scale_T: torch.Tensor, scale_M: torch.Tensor
) -> torch.Tensor:
    """The same in float32, on any device: what the fast one is tested against."""
    product = x_TK.float() @ w_MK.float().t()
    return (product * scale_T[:, None] * scale_M[None, :]).bfloat16()


def _in_fp8(weight_MK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A part at a time: a float32 copy of a whole output head is gigabytes."""
    weight = torch.empty(weight_MK.shape, dtype=FP8, device=weight_MK.device)
    scale_M = torch.empty(len(weight_MK), dtype=torch.float32, device=weight_MK.device)
    for start in range(0, len(weight_MK), 4096):
        part, scale = quantise_weight(weight_MK[start : start + 4096], FP8)
        weight.view(torch.uint8)[start : start + 4096] = part.view(torch.uint8)
        scale_M[start : start + 4096] = scale
    return weight, scale_M


def _fits_fp8(weight_MK: torch.Tensor) -> bool:
    return weight_MK.shape[0] % 16 == 0 and weight_MK.shape[1] % 16 == 0
