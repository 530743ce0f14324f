"""Linears of the torch reference: in the model's dtype, in calls of measured row counts; or in int8, in exact integers.

W8A8: both sides are rotated, a weight has a scale for each of its rows and an activation one for each token, and in
between stand sums of integers, which are the same in whatever order they are added. So a quantised linear is
row-invariant by construction, and any implementation that follows `quantise.py` gives the same bits.

Legend as in `api.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Final

import torch

from disaggregated.engine.ops.quantise import quantise_rows, rotate, rotation_block
from disaggregated.engine.ops.row_invariant import PROBE_ROWS, exact_row_counts, matmul_rows, probe_pair

TRANSPOSE_NUMEL_MAX: Final = 16 << 20
"""Weights of up to that many numbers are stored (K, M): a call with few rows is up to twice as fast on CPU. A larger
one (an output head, often shared with the embedding) is left where it is."""

EXACT_DEPTH: Final = 1040
"""So many products of two int8 numbers up to ±127 add up to less than 2²⁴, below which float32 has every integer."""


@dataclasses.dataclass(frozen=True, slots=True)
class PlainLinear:
    weight_KM: torch.Tensor
    bias_M: torch.Tensor | None
    exact: tuple[int, ...]
    """Row counts that a product may have."""

    def apply(self, x_TK: torch.Tensor) -> torch.Tensor:
        return matmul_rows(x_TK, self.weight_KM, self.bias_M, self.exact)


@dataclasses.dataclass(frozen=True, slots=True)
class Int8Linear:
    weight_MK: torch.Tensor
    scale_M: torch.Tensor
    bias_M: torch.Tensor | None

    @classmethod
    def quantised(cls, weight_MK: torch.Tensor, bias_M: torch.Tensor | None) -> Int8Linear:
        # 1 / n, a power of two, undoes what two rotations multiply with; it changes no digit.
        weight, scale = quantise_rows(rotate(weight_MK) / rotation_block(weight_MK.shape[1]))
        return cls(weight, scale, None if bias_M is None else bias_M.float())

    def apply(self, x_TK: torch.Tensor) -> torch.Tensor:
        x, scale_T = quantise_rows(rotate(x_TK))
        out = integer_products(x, self.weight_MK) * (scale_T[:, None] * self.scale_M)
        return (out if self.bias_M is None else out + self.bias_M).to(x_TK.dtype)


class PlainLinears:
    """Makes `PlainLinear`s: row counts are measured once for each shape of weight."""

    def __init__(self) -> None:
        self._exact: dict[tuple[object, ...], tuple[int, ...]] = {}

    def prepare(self, weight_MK: torch.Tensor, bias_M: torch.Tensor | None) -> PlainLinear:
        weight_KM = weight_MK.t()
        if weight_MK.numel() <= TRANSPOSE_NUMEL_MAX:
            weight_KM = weight_KM.contiguous()
        elif weight_MK.data_ptr() % 64:
            weight_KM = weight_MK.clone().t()  # A mapped file puts it anywhere; kernels may care for alignment.
        key = (weight_KM.shape, weight_KM.stride(), weight_KM.dtype, str(weight_KM.device), torch.get_num_threads())
        if key not in self._exact:
            rows, matrix = probe_pair(PROBE_ROWS, weight_KM)
            self._exact[key] = exact_row_counts(lambda part: part @ matrix, rows, 2.0 * matrix.numel())
        return PlainLinear(weight_KM, bias_M, self._exact[key])


def integer_products(x_TK: torch.Tensor, weight_MK: torch.Tensor) -> torch.Tensor:
    """(T, M) float32: the integer x · weightᵀ of int8 tensors, rounded to float32 once."""
    if x_TK.device.type == "cpu" and _integer_product_is_exact(x_TK.shape[1], torch.get_num_threads()):
        return torch._int_mm(x_TK, weight_MK.t()).float()
    return _products_in_floats(x_TK, weight_MK)


def _products_in_floats(x_TK: torch.Tensor, weight_MK: torch.Tensor) -> torch.Tensor:
    """In float32, in parts so short that every sum in them is an exact integer in whatever order it is made."""
    depth = x_TK.shape[1]
    total = torch.zeros(len(x_TK), len(weight_MK), dtype=torch.float64, device=x_TK.device)
    for first in range(0, depth, EXACT_DEPTH):
        part = slice(first, first + EXACT_DEPTH)
        total += x_TK[:, part].float() @ weight_MK[:, part].float().t()
    return total.float()


@functools.lru_cache
def _integer_product_is_exact(depth: int, num_threads: int) -> bool:
    """Whether torch's own integer product is one, here and for this depth.

    Measured with the largest numbers there are: without VNNI instructions, libraries add pairs of products in 16 bits,
    which saturate; and at a depth of 1 torch 2.13 returns what happened to be in memory.
    """
    generator = torch.Generator().manual_seed(1)
    x, weight = (torch.randint(-127, 128, (70, depth), generator=generator, dtype=torch.int8) for _ in range(2))
    x[::2], weight[::2], weight[::4] = 127, -127, 127
    try:
        return all(
            torch.equal(torch._int_mm(x[:rows], weight.t()).float(), _products_in_floats(x[:rows], weight))
            for rows in (1, 3, 64)
        )
    except RuntimeError:  # Not on this build of torch.
        return False
