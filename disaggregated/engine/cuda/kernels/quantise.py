"""Activations to 8-bit floats, one scale a token, by the rule of `ops/quantise.py`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from disaggregated.engine.cuda.kernels import EXACT
from disaggregated.engine.cuda.kernels.elementwise import _factor_and_scale, _is_not_finite, _quantised
from disaggregated.engine.ops.quantise import Q_MAX


@triton.jit
def _quantise_rows(x, out, scales, width, BLOCK: tl.constexpr, LARGEST: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    is_here = column < width
    value = tl.load(x + row * width + column, mask=is_here, other=0.0).to(tl.float32)
    is_broken = tl.max(_is_not_finite(value), 0)
    factor, scale = _factor_and_scale(tl.max(tl.abs(value), 0), is_broken, LARGEST)
    tl.store(scales + row, scale)
    value = tl.where(is_broken == 0, value * factor, 0.0)
    tl.store(out + row * width + column, _quantised(value, out.dtype.element_ty, LARGEST), mask=is_here)


def quantise_rows(x_TK: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(T, K) in `dtype`, and (T) float32 scales, of a contiguous tensor."""
    num_tokens, width = x_TK.shape
    out = torch.empty(num_tokens, width, dtype=dtype, device=x_TK.device)
    scales = torch.empty(num_tokens, dtype=torch.float32, device=x_TK.device)
    if num_tokens:
        _quantise_rows[(num_tokens,)](
            x_TK, out, scales, width, BLOCK=triton.next_power_of_2(width), LARGEST=Q_MAX[dtype], **EXACT,
            num_warps=4 if width <= 2048 else 8,
        )  # fmt: skip
    return out, scales
