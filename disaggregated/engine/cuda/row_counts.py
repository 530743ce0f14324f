"""Which row counts of a matrix product give a row the same bits, measured on the device that will use them.

A BLAS picks a kernel by the shape of the call, and kernels add up in different orders. Counts whose results agree bit
for bit form a class; a deterministic linear calls with counts of one class only, and pads up to them. Decode wants
small counts (each call reads the whole weight), prefill wants large ones (each fills the machine), so the class that
serves both at the least cost is taken.

The numbers multiplied cancel to nothing but the rounding errors of their sums, in which any other order shows; an
ordinary product would hide most differences when it is rounded to bfloat16 (see `ops/row_invariant.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Final

import torch

COUNTS: Final = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
OUTPUT_BYTES_MAX: Final = 512 << 20
"""Counts whose result would be larger are not tried: nothing as wide as that (an output head) has so many rows."""
MEMORY_BOUND_ROWS: Final = 200
"""Up to that many rows a product costs what reading its weight costs: bf16 FLOP/s over bytes/s of a Hopper."""
TYPICAL_ROWS: Final = (1, 8, 32, 64, 128, 512, 2048, 8192)

Product = Callable[[torch.Tensor], torch.Tensor]


def exact_class(product: Product, rows: torch.Tensor, width: int) -> tuple[int, ...]:
    """Row counts, ascending, at which `product` gives every row the same bits, wherever it stands among its mates.

    `rows` are of `probe()`; `width` is the number of columns of the product. Never empty: the count of which nothing
    is known to agree is a class of its own, as long as the place of a row does not matter in it.

    Raises:
        RuntimeError: in every class the place of a row matters, so no call is deterministic in our sense.
    """
    counts = [n for n in COUNTS if 2 * n <= len(rows) and n * width * 2 <= OUTPUT_BYTES_MAX]
    assert counts, f"{len(rows)} rows are too few to tell anything"
    classes: list[tuple[list[int], torch.Tensor]] = []
    for count in reversed(counts):
        result = product(rows[:count])
        mates = next((mates for mates, first in classes if torch.equal(first[:count], result)), None)
        if mates is not None:
            mates.append(count)
        elif _is_place_irrelevant(product, rows, count, result):
            classes.append(([count], result))
    if not classes:
        raise RuntimeError(f"a row's bits depend on its place in every product of {width} columns")
    return min((tuple(sorted(mates)) for mates, _ in classes), key=_cost)


def probe(weight_MK: torch.Tensor, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (num_rows, K) and a matrix (M, K), both of the weight's dtype and device, whose product cancels.

    Each term of a sum has its negative at a random other place.
    """
    device = weight_MK.device
    generator = torch.Generator(device).manual_seed(1)
    width, length = weight_MK.shape
    places = torch.randperm(length, generator=generator, device=device)
    half, mirrored = places[: length // 2], places[length // 2 : length // 2 * 2]
    rows = torch.randn(num_rows, length, generator=generator, device=device).to(weight_MK.dtype)
    rows[:, mirrored] = -rows[:, half]
    matrix = torch.randn(width, length, generator=generator, device=device, dtype=weight_MK.dtype)
    matrix[:, mirrored] = matrix[:, half]
    return rows, matrix


@functools.lru_cache(maxsize=65536)
def split(num_rows: int, counts: tuple[int, ...]) -> tuple[int, ...]:
    """Cut `num_rows` into calls of `counts`; the sum may exceed it, and the rest is padding of the last call."""
    whole, rest = divmod(num_rows, counts[-1])
    if whole:
        return (counts[-1],) * whole + (split(rest, counts) if rest else ())
    padded = (next(n for n in counts if n >= num_rows),)
    if counts[0] >= num_rows:
        return padded
    largest_below = max(n for n in counts if n < num_rows)
    cut = (largest_below, *split(num_rows - largest_below, counts))
    return min(padded, cut, key=lambda sizes: (sum(map(_call_cost, sizes)), len(sizes)))


def _is_place_irrelevant(product: Product, rows: torch.Tensor, count: int, result: torch.Tensor) -> bool:
    shift = count // 2 + 1
    return torch.equal(product(rows[shift : shift + count])[: count - shift], result[shift:])


def _call_cost(num_rows: int) -> float:
    """In readings of the weight."""
    return max(1.0, num_rows / MEMORY_BOUND_ROWS)


def _cost(counts: Sequence[int]) -> float:
    """Of typical steps, each relative to one with exactly its rows."""
    return sum(sum(map(_call_cost, split(n, tuple(counts)))) / _call_cost(n) for n in TYPICAL_ROWS)
