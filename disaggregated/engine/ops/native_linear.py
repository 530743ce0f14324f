"""The linears of the native op table: weights laid out as the C kernels read them, and the call. Legend: see api.py."""

from __future__ import annotations

import ctypes
import dataclasses
from ctypes import POINTER, Structure, c_int64, c_void_p
from typing import Any, Final, Literal

import torch

from disaggregated.engine.ops.native_checks import check_floats, check_shape

Quantization = Literal["none", "int8"]


class LinearWeight(Structure):
    """`linear_weight` of csrc/linear.h."""

    _fields_ = [("kind", c_int64), ("num_columns", c_int64), ("depth", c_int64), ("panels", c_void_p)]


FLOAT32, INT8 = 0, 1
"""Kinds of a LinearWeight."""
_KINDS: Final[dict[Quantization, int]] = {"none": FLOAT32, "int8": INT8}

INT8_DEPTH_MAX: Final = 1 << 17
"""So many products of 127 * 127 fit into a sum of 32 bits."""

SIGNATURES: Final[dict[str, tuple[Any, list[Any]]]] = {
    "linear_packed_bytes": (c_int64, [c_int64] * 3),
    "linear_pack": (None, [c_int64] + [c_void_p] * 2 + [c_int64] * 2 + [c_void_p]),
    "linear": (None, [c_void_p, POINTER(LinearWeight), c_void_p, c_int64, c_void_p]),
}
"""Return type and arguments of each function; csrc/ says what they mean."""


@dataclasses.dataclass(frozen=True, slots=True)
class PackedLinear:
    """A weight and its bias as `linear` reads them; the original may be freed."""

    weight: LinearWeight
    """What C is given; it points into `panels` and is valid as long as this object."""
    panels: torch.Tensor

    @property
    def num_columns(self) -> int:
        return int(self.weight.num_columns)

    @property
    def depth(self) -> int:
        return int(self.weight.depth)


def prepare(
    kernels: ctypes.CDLL, weight_MK: torch.Tensor, bias_M: torch.Tensor | None, quantization: Quantization
) -> PackedLinear:
    """Rows of an int8 weight get a scale each: csrc/quantize.c has the formula, for weights and activations."""
    kind = _KINDS[quantization]
    weight_MK = weight_MK.to(torch.float32).contiguous()
    num_columns, depth = weight_MK.shape
    assert weight_MK.numel() > 0, f"empty weight {tuple(weight_MK.shape)}"
    assert kind == FLOAT32 or depth <= INT8_DEPTH_MAX, f"{depth} products of bytes do not fit into 32 bits"
    if bias_M is not None:
        check_shape(bias_M, (num_columns,))
        bias_M = bias_M.to(torch.float32).contiguous()
    bias = None if bias_M is None else bias_M.data_ptr()
    panels = torch.empty(kernels.linear_packed_bytes(kind, num_columns, depth), dtype=torch.uint8)
    kernels.linear_pack(kind, weight_MK.data_ptr(), bias, num_columns, depth, panels.data_ptr())
    return PackedLinear(LinearWeight(kind, num_columns, depth, panels.data_ptr()), panels)


def linear(kernels: ctypes.CDLL, team: int, x_TK: torch.Tensor, weight: PackedLinear) -> torch.Tensor:
    """(T, M), on the threads of `team`."""
    num_tokens = x_TK.shape[0]
    check_floats(x_TK)
    check_shape(x_TK, (num_tokens, weight.depth))
    out_TM = x_TK.new_empty(num_tokens, weight.num_columns)
    kernels.linear(team, weight.weight, x_TK.data_ptr(), num_tokens, out_TM.data_ptr())
    return out_TM
