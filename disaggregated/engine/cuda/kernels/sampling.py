"""The next token of each row, chosen on the device: nothing of it is fetched but the token.

The meaning is that of `engine/sampler.py`: temperature, then top_k, then top_p over what top_k left, then min_p, each
as a smallest weight that stays; then the row's one random number is looked up in the running sum of what is kept.
Instead of sorting, the smallest weight is found by bisection: weights lie between 0 and 1, where the bits of a float,
read as a whole number, are in the order of the floats, so thirty counts (or sums) over the row find it exactly. No row
is ever undecided, which is what lets the next step begin before this one's tokens are known on the host.

Legend: R rows, V vocabulary, W tokens looked at at once. Sums are in float64, in the order of the vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from disaggregated.engine.cuda.kernels import EXACT

NUM_COLUMNS = 5
"""uniform, temperature (0: greedy), top_k (0: all), top_p, min_p."""


@triton.jit
def _kept(weights, low, vocab_size, W: tl.constexpr):
    """How many weights are at or above `low` (as bits), and their sum."""
    count = low * 0
    mass = low.to(tl.float64) * 0.0
    for start in range(0, vocab_size, W):
        place = start + tl.arange(0, W)
        weight = tl.load(weights + place, mask=place < vocab_size, other=0.0)
        is_kept = (weight.to(tl.int32, bitcast=True) >= low) & (place < vocab_size)
        count += tl.sum(is_kept.to(tl.int32), 0)
        mass += tl.sum(tl.where(is_kept, weight.to(tl.float64), 0.0), 0)
    return count, mass


@triton.jit
def _largest_that_keeps(weights, num_wanted, mass_wanted, vocab_size, W: tl.constexpr):
    """The largest weight, as bits, such that those at or above are at least so many and weigh at least so much."""
    low = num_wanted * 0
    high = low + 0x3F800000  # 1.0
    while low < high:
        middle = (low + high + 1) // 2
        count, mass = _kept(weights, middle, vocab_size, W)
        is_enough = (count >= num_wanted) & (mass >= mass_wanted)
        low = tl.where(is_enough, middle, low)
        high = tl.where(is_enough, high, middle - 1)
    return low


@triton.jit
def _weigh(logits, weights, temperature, vocab_size, W: tl.constexpr):
    """Write each token's weight, relative to the likeliest one's; returns the first of the likeliest."""
    largest = temperature * 0.0 - float("inf")
    token = temperature.to(tl.int32) * 0
    for start in range(0, vocab_size, W):
        place = start + tl.arange(0, W)
        logit = tl.load(logits + place, mask=place < vocab_size, other=float("-inf")).to(tl.float32)
        here = tl.max(logit, 0)
        first = tl.min(tl.where(logit == here, place, vocab_size), 0)
        token = tl.where(here > largest, first, token)
        largest = tl.maximum(largest, here)
    if temperature > 0.0:
        for start in range(0, vocab_size, W):
            place = start + tl.arange(0, W)
            logit = tl.load(logits + place, mask=place < vocab_size, other=float("-inf")).to(tl.float32)
            tl.store(weights + place, tl.exp((logit - largest) / temperature), mask=place < vocab_size)
    return token


@triton.jit
def _look_up(weights, low, min_weight, uniform, vocab_size, W: tl.constexpr):
    """The first token at which the running sum of what is kept passes `uniform` times its whole."""
    whole = uniform * 0.0
    for start in range(0, vocab_size, W):
        place = start + tl.arange(0, W)
        weight = tl.load(weights + place, mask=place < vocab_size, other=0.0)
        is_kept = (weight.to(tl.int32, bitcast=True) >= low) & (weight >= min_weight)
        whole += tl.sum(tl.where(is_kept, weight.to(tl.float64), 0.0), 0)
    target = uniform * whole
    running = uniform * 0.0
    found = low * 0 + vocab_size
    last = low * 0
    for start in range(0, vocab_size, W):
        place = start + tl.arange(0, W)
        weight = tl.load(weights + place, mask=place < vocab_size, other=0.0)
        is_kept = (weight.to(tl.int32, bitcast=True) >= low) & (weight >= min_weight) & (weight > 0.0)
        kept = tl.where(is_kept, weight.to(tl.float64), 0.0)
        sums = running + tl.cumsum(kept, 0)
        found = tl.minimum(found, tl.min(tl.where(is_kept & (sums > target), place, vocab_size), 0))
        last = tl.maximum(last, tl.max(tl.where(is_kept, place, 0), 0))
        running += tl.sum(kept, 0)
    return tl.minimum(found, last)


@triton.jit(do_not_specialize=["num_rows"])
def _sample(logits, weights, columns, out, num_rows, vocab_size, W: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocab_size
    weights += row * vocab_size
    uniform = tl.load(columns + row)
    temperature = tl.load(columns + num_rows + row).to(tl.float32)
    top_k = tl.load(columns + 2 * num_rows + row).to(tl.int32)
    top_p = tl.load(columns + 3 * num_rows + row)
    min_weight = tl.load(columns + 4 * num_rows + row).to(tl.float32)
    token = _weigh(logits, weights, temperature, vocab_size, W)
    if temperature > 0.0:
        tl.debug_barrier()  # The weights are written before any thread reads them.
        nothing = uniform * 0.0
        low = top_k * 0
        if (top_k > 0) & (top_k < vocab_size):
            low = _largest_that_keeps(weights, top_k, nothing, vocab_size, W)
        if top_p < 1.0:
            count, mass = _kept(weights, low, vocab_size, W)
            if (top_k > 0) & (top_k < vocab_size):
                # Exactly top_k tokens count, though all that tie with the last one stay.
                mass -= (count - top_k).to(tl.float64) * low.to(tl.float32, bitcast=True).to(tl.float64)
            low = tl.maximum(low, _largest_that_keeps(weights, top_k * 0 + 1, top_p * mass, vocab_size, W))
        token = _look_up(weights, low, min_weight, uniform, vocab_size, W)
    tl.store(out + row, token.to(tl.int64))


def sample(logits_RV: torch.Tensor, columns: torch.Tensor, out_R: torch.Tensor) -> None:
    """Write each row's token, int64, into `out_R`. `columns` is (NUM_COLUMNS, R) float64, contiguous."""
    num_rows, vocab_size = logits_RV.shape
    assert columns.shape == (NUM_COLUMNS, num_rows) == (NUM_COLUMNS, len(out_R)), f"columns are {tuple(columns.shape)}"
    assert columns.is_contiguous(), "columns are not contiguous"
    assert logits_RV.is_contiguous(), "logits are not contiguous"
    weights = torch.empty(num_rows, vocab_size, dtype=torch.float32, device=logits_RV.device)
    width = min(4096, triton.next_power_of_2(vocab_size))
    _sample[(num_rows,)](logits_RV, weights, columns, out_R, num_rows, vocab_size, W=width, **EXACT, num_warps=8)
