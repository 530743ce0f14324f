"""Reductions whose result for a row does not depend on the other rows of the call.

BLAS libraries pick a kernel, and with it an order of summation, by the shape of the call: MKL adds one row up in
another order than thirty-two. So matrix products are cut into calls of a few fixed row counts that were *measured*, on
this machine and for this shape of matrix, to give the same bits; `exact_row_counts` does the measuring, on products
that cancel to nothing but the rounding errors of their additions, in which any other order of summation shows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Final

import torch

BASE_ROWS: Final = {"cpu": 16, "cuda": 128}
"""The row count whose result defines a product. A call of that size always works: short ones are padded to it."""

CANDIDATE_ROWS: Final = (2, 4, 8, 16, 32, 64, 128, 256)
PROBE_ROWS: Final = 2 * max(CANDIDATE_ROWS)
PROBE_FLOP_MAX: Final = 10e9
"""Row counts whose probe would cost more are not tried; their rows go in smaller calls."""

Product = Callable[[torch.Tensor], torch.Tensor]


def exact_row_counts(product: Product, rows: torch.Tensor, flop_per_row: float) -> tuple[int, ...]:
    """Row counts, ascending, at which `product` gives every row the bits that the base count gives it.

    `rows` are of `probe_pair()`, at least `2 * max(CANDIDATE_ROWS)` of them. The answer is `(1,)` when even the place
    of a row among its mates changes its bits: then each row goes alone.
    """
    base = BASE_ROWS[rows.device.type]
    counts = [base, *(n for n in CANDIDATE_ROWS if n != base and n * flop_per_row <= PROBE_FLOP_MAX)]
    num_tiles = -(-max(counts) // base)
    expected = torch.cat([product(rows[i * base : (i + 1) * base]) for i in range(num_tiles)])
    shift = base // 2 + 1
    if not torch.equal(product(rows[shift : shift + base])[: base - shift], expected[shift:base]):
        return (1,)
    return tuple(sorted(n for n in counts if torch.equal(product(rows[:n]), expected[:n])))


def probe_pair(num_rows: int, weight_KM: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (num_rows, K) and a matrix that lies in memory as `weight_KM` does, whose product cancels.

    Each term of a sum has its negative at a random other place. What is left is rounding error, at full precision even
    where results are rounded to bfloat16, which would hide most differences between ordinary sums.
    """
    generator = torch.Generator().manual_seed(1)
    length, width = weight_KM.shape
    places = torch.randperm(length, generator=generator)[: length // 2 * 2]
    half, mirrored = places.chunk(2) if length > 1 else (places, places)
    rows = torch.randn(num_rows, length, generator=generator).to(weight_KM.dtype)
    rows[:, mirrored] = -rows[:, half]
    # One random column, shifted: cheap to make for a matrix of any size, and no two columns are equal in their order.
    noise = torch.randn(length // 2 + width, generator=generator).to(weight_KM.dtype)
    matrix = torch.empty_like(weight_KM)
    matrix.copy_(torch.randn(length, 1, generator=generator))
    matrix[half] = noise.unfold(0, width, 1)[: len(half)].to(weight_KM.device)
    matrix[mirrored] = matrix[half]
    return rows.to(weight_KM.device), matrix


@functools.lru_cache(maxsize=4096)
def split_rows(num_rows: int, exact: tuple[int, ...]) -> tuple[int, ...]:
    """Cut `num_rows` into calls of exact row counts; the sum may exceed it, and the rest is padding."""
    sizes: list[int] = []
    left = num_rows
    while left > 0:
        fitting = next((count for count in exact if count >= left), None)
        below = [count for count in exact if count <= left]
        # A call reads the whole matrix again, so a little padding is cheaper than one more call.
        if fitting is not None and (not below or fitting - left <= max(left // 4, 8)):
            sizes.append(fitting)
        else:
            sizes.append(below[-1])
        left -= sizes[-1]
    return tuple(sizes)


def matmul_rows(
    x_TK: torch.Tensor, weight_KM: torch.Tensor, bias_M: torch.Tensor | None, exact: tuple[int, ...]
) -> torch.Tensor:
    """(T, M), computed in calls of exact row counts only."""
    num_rows = x_TK.shape[0]
    sizes = split_rows(num_rows, exact)
    padded = sum(sizes)
    if padded > num_rows:
        x_TK = torch.nn.functional.pad(x_TK, (0, 0, 0, padded - num_rows))
    out = x_TK.new_empty(padded, weight_KM.shape[1])
    start = 0
    for size in sizes:
        end = start + size
        if bias_M is None:
            torch.mm(x_TK[start:end], weight_KM, out=out[start:end])
        else:
            torch.addmm(bias_M, x_TK[start:end], weight_KM, out=out[start:end])
        start = end
    return out[:num_rows]


def row_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum over the last dimension (at most a few thousand long), in an order that its length alone decides."""
    if x.device.type == "cpu":
        return x.sum(-1)  # One row after the other. The property tests of rms_norm and attention stand guard.
    # CUDA reductions pick their tree by the number of rows; halving with plain additions leaves no choice.
    while (width := x.shape[-1]) > 1:
        half = width // 2
        folded = x[..., :half] + x[..., half : 2 * half]
        x = folded if width % 2 == 0 else torch.cat([folded, x[..., -1:]], -1)
    return x[..., 0]


def row_cumsum(x: torch.Tensor) -> torch.Tensor:
    """Inclusive running sum over the last dimension; an entry's bits depend on the entries before it alone."""
    distance = 1
    while distance < x.shape[-1]:
        x = torch.cat([x[..., :distance], x[..., distance:] + x[..., :-distance]], -1)
        distance *= 2
    return x
