"""One rule for every quantised number: a row shares one scale, which the row's largest magnitude decides.

    scale = max |x| / q_max        q = round to nearest, ties to even (x * (q_max / max |x|))        x ≈ q * scale

Every operation is in float32 and rounded by itself, so C, Triton and torch give the same bits. A row is a row of a
weight, a token's activations, or a token's key or value of one head; nothing beside the row matters, which is what
keeps quantised results independent of batch mates. Per-row and per-token scales: Xiao et al., SmoothQuant, 2022.

One scale for a token serves badly where a few channels are a hundred times larger than the rest, as in every language
model. So both sides of an int8 product are rotated before they are quantised, by a Walsh-Hadamard transform H of blocks
of channels: it spreads an outlier over its block, and leaves the product as it is, since (H x) · (H w) = n x · w for
blocks of n (Ashkboos et al., QuaRot, 2024; here within each linear, without calibration and for any model).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch

Q_MAX: Final[Mapping[torch.dtype, float]] = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
ROTATION_BLOCK_MAX: Final = 512
SMALLEST: Final[Mapping[torch.dtype, float]] = {torch.int8: 1e-36, torch.float8_e4m3fn: 1e-35}
"""A row whose largest magnitude is below becomes zeros: its factor might overflow float32."""


def quantise_rows(x: torch.Tensor, dtype: torch.dtype = torch.int8) -> tuple[torch.Tensor, torch.Tensor]:
    """(…, K) → the same shape in `dtype`, and (…) scales in float32.

    A row with a NaN or an infinity becomes zeros with the scale NaN, so that whatever is made of it is NaN as well.
    """
    x = x.float()
    limit, smallest = torch.tensor(Q_MAX[dtype], device=x.device), SMALLEST[dtype]
    largest = x.abs().amax(-1)
    usable = (largest >= smallest) & largest.isfinite()
    factor = torch.where(usable, limit / largest, 0.0)
    scaled = torch.where(usable[..., None], x * factor[..., None], 0.0)
    # A product may round to just above the limit, which float8 would make a NaN of.
    quantised = (scaled.round() if dtype is torch.int8 else scaled.clamp(-limit, limit)).to(dtype)
    scale = torch.where(usable, largest / limit, torch.where(largest < smallest, 0.0, torch.nan))
    return quantised, scale


def rotation_block(depth: int) -> int:
    """How many channels are rotated together: the largest power of two that divides `depth`, up to the maximum."""
    return min(depth & -depth, ROTATION_BLOCK_MAX)


def rotate(x: torch.Tensor) -> torch.Tensor:
    """(…, K) float32: each block of `rotation_block(K)` numbers through H, whose entries are 1 and -1.

    The fast transform: sums and differences at distances 1, 2, 4 …, each rounded, in this order everywhere.
    """
    x = x.float()
    shape, block = x.shape, rotation_block(x.shape[-1])
    distance = 1
    while distance < block:
        pairs = x.reshape(-1, 2, distance)
        first, second = pairs[:, 0], pairs[:, 1]
        x = torch.stack([first + second, first - second], 1)
        distance *= 2
    return x.reshape(shape)


def dequantise(quantised: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(…, K) and (…) → (…, K) float32."""
    return quantised.float() * scale[..., None]
