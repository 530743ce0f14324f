"""What C cannot check: a wrong dtype, stride or shape there would read foreign memory."""

from __future__ import annotations

import torch


def check_floats(x: torch.Tensor) -> None:
    assert x.dtype is torch.float32, f"dtype {x.dtype}, must be float32"
    assert x.is_contiguous(), f"strides {x.stride()} of {tuple(x.shape)} are not contiguous"


def check_shape(x: torch.Tensor, shape: tuple[int, ...]) -> None:
    assert x.shape == shape, f"shape {tuple(x.shape)}, must be {shape}"


def check_indices(x: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    assert x.dtype is dtype, f"dtype {x.dtype}, must be {dtype}"
    assert x.is_contiguous(), f"strides {x.stride()} of {tuple(x.shape)} are not contiguous"
    check_shape(x, shape)


def token_stride(x_TND: torch.Tensor) -> int:
    """Floats from one token to the next, of a tensor whose tokens are contiguous each."""
    assert x_TND.dtype is torch.float32, f"dtype {x_TND.dtype}, must be float32"
    _, num_heads, head_dim = x_TND.shape
    token_stride, head_stride, lane_stride = x_TND.stride()
    assert lane_stride == 1, f"strides {x_TND.stride()}: the last dimension is not contiguous"
    assert head_stride == head_dim or num_heads == 1, f"strides {x_TND.stride()}: a token is not contiguous"
    return token_stride
