"""The linears of the native op table: weights laid out as the C kernels read them, and the call. Legend: see api.py."""

from __future__ import annotations

import ctypes
import dataclasses
from ctypes import POINTER, Structure, c_bool, c_int64, c_void_p
from typing import Any, Final, Literal

import torch

from disaggregated.engine.ops.native_checks import check_floats, check_shape

Quantization = Literal["none", "int8"]


class LinearWeight(Structure):
    """`linear_weight` of csrc/linear.h."""

    _fields_ = [("kind", c_int64), ("num_columns", c_int64), ("depth", c_int64), ("panels", c_void_p)]


FLOAT32, INT8, FLOAT16, BFLOAT16, BYTES, NIBBLES, NIBBLES_AND_MINIMUM = range(7)
"""Kinds of a LinearWeight."""
NARROW_KINDS: Final = (NIBBLES, NIBBLES_AND_MINIMUM, BYTES, BFLOAT16, FLOAT16)
"""In which float32 weights are held where all of their numbers are such, narrowest first: csrc/linear_narrow.h."""
GROUP: Final = 32
"""The depth of a narrow weight is a multiple of it."""
FORMS: Final = ("float32", "int8", "float16", "bfloat16", "8 bits and scales", "4 bits and scales",
                "4 bits, scales and minima")  # fmt: skip
"""What each kind is called in logs and reports."""

INT8_DEPTH_MAX: Final = 1 << 17
"""So many products of 127 * 127 fit into a sum of 32 bits."""

SIGNATURES: Final[dict[str, tuple[Any, list[Any]]]] = {
    "linear_packed_bytes": (c_int64, [c_int64] * 3),
    "linear_pack_narrow": (c_bool, [c_int64] + [c_void_p] * 2 + [c_int64] * 2 + [c_void_p]),
    "linear_pack": (c_bool, [c_int64] + [c_void_p] * 2 + [c_int64] * 2 + [c_void_p]),
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

    @property
    def form(self) -> str:
        """One of `FORMS`."""
        return FORMS[self.weight.kind]

    @property
    def num_bytes(self) -> int:
        """What a step with few rows reads of it."""
        return self.panels.numel()


def prepare(
    kernels: ctypes.CDLL,
    weight_MK: torch.Tensor,
    bias_M: torch.Tensor | None,
    quantization: Quantization,
    *,
    may_be_narrow: bool = True,
) -> PackedLinear:
    """Rows of an int8 weight get a scale each: csrc/quantize.c has the formula, for weights and activations.

    A weight that is not quantised is held in the narrowest kind that has all of its numbers to the last bit, unless
    `may_be_narrow` forbids it: results are the same.
    """
    weight_MK = weight_MK.to(torch.float32).contiguous()
    num_columns, depth = weight_MK.shape
    assert weight_MK.numel() > 0, f"empty weight {tuple(weight_MK.shape)}"
    assert quantization == "none" or depth <= INT8_DEPTH_MAX, f"{depth} products of bytes do not fit into 32 bits"
    if bias_M is not None:
        check_shape(bias_M, (num_columns,))
        bias_M = bias_M.to(torch.float32).contiguous()
    bias = None if bias_M is None else bias_M.data_ptr()

    def packed(pack: Any, kind: int) -> PackedLinear | None:
        panels = torch.empty(kernels.linear_packed_bytes(kind, num_columns, depth), dtype=torch.uint8)
        fits = pack(kind, weight_MK.data_ptr(), bias, num_columns, depth, panels.data_ptr())
        return PackedLinear(LinearWeight(kind, num_columns, depth, panels.data_ptr()), panels) if fits else None

    if quantization == "none" and may_be_narrow and depth % GROUP == 0:
        for kind in NARROW_KINDS:
            if narrow := packed(kernels.linear_pack_narrow, kind):
                return narrow
    whole = packed(kernels.linear_pack, INT8 if quantization == "int8" else FLOAT32)
    assert whole is not None, "linear_pack takes every weight"
    return whole


def linear(kernels: ctypes.CDLL, team: int, x_TK: torch.Tensor, weight: PackedLinear) -> torch.Tensor:
    """(T, M), on the threads of `team`."""
    num_tokens = x_TK.shape[0]
    check_floats(x_TK)
    check_shape(x_TK, (num_tokens, weight.depth))
    out_TM = x_TK.new_empty(num_tokens, weight.num_columns)
    kernels.linear(team, weight.weight, x_TK.data_ptr(), num_tokens, out_TM.data_ptr())
    return out_TM
