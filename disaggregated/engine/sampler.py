"""The next token of each row, from its logits.

What a request wants changed in its logits is changed first (`logit_edits.py`). The rest is as Hugging Face has it,
order and meaning: temperature, then top_k, then top_p over what top_k left, then min_p. (vLLM puts min_p before top_k.)
All three keep the tokens at or above *some probability*, so each row gets one threshold, tokens that tie with it stay,
and no order among equals can matter. Then the row's one random number is looked up in the running sum of what is kept,
in the order of the vocabulary. Nothing of the vocabulary's size is ever sorted, except for the rare row whose nucleus
is larger than `NUCLEUS_MAX` tokens.

Every step keeps rows apart (see ops/row_invariant.py), and the random number is a function of (seed, position), so a
sequence gets the same tokens in any batch, and when another server continues it.

Legend: R rows, V vocabulary, C chunks of the vocabulary, W their width, K the likeliest tokens. A *weight* is a
probability relative to the likeliest token's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch

from disaggregated.engine.logit_edits import edits_of
from disaggregated.engine.ops.api import Ops
from disaggregated.engine.ops.reference import ReferenceOps
from disaggregated.engine.ops.row_invariant import row_cumsum, row_sum
from disaggregated.engine.philox import uniforms
from disaggregated.engine.sample_row import SampleRow

CHUNK_WIDTH: Final = 256
NUCLEUS_MAX: Final = 256
"""Tokens looked at for top_p before a row is done again with all of them."""
_UNDECIDED: Final = -1
_TORCH: Final = ReferenceOps()


def sample(logits_RV: torch.Tensor, rows: Sequence[SampleRow], ops: Ops = _TORCH) -> list[int]:
    """One token id a row, the same with any op table. The only wait for the device is the fetch of the tokens."""
    logits_RV = logits_RV.float()
    if (edits := edits_of(rows, logits_RV.shape[1])) is not None:
        edits.apply(logits_RV)
    tokens = ops.argmax(logits_RV)
    drawn = [i for i, row in enumerate(rows) if not row.sampling.is_greedy]
    if drawn:
        index = torch.tensor(drawn, device=logits_RV.device)
        draws = _Draws([rows[i] for i in drawn], logits_RV.device, ops)
        tokens[index] = draws.sample(logits_RV.index_select(0, index), NUCLEUS_MAX)
    chosen: list[int] = tokens.tolist()
    if undecided := [i for i, token in enumerate(chosen) if token == _UNDECIDED]:
        draws = _Draws([rows[i] for i in undecided], logits_RV.device, ops)
        again = draws.sample(logits_RV[torch.tensor(undecided, device=logits_RV.device)], logits_RV.shape[1])
        for i, token in zip(undecided, again.tolist(), strict=True):
            chosen[i] = token
    return chosen


class _Draws:
    """The rows that draw, as columns (R, 1) on the device."""

    def __init__(self, rows: Sequence[SampleRow], device: torch.device, ops: Ops) -> None:
        self._ops = ops
        params = [row.sampling for row in rows]
        columns = [
            uniforms([p.seed for p in params], [row.position for row in rows]),
            [p.temperature for p in params],
            [p.top_k for p in params],
            [p.top_p for p in params],
            [p.min_p for p in params],
        ]
        on_device = torch.from_numpy(np.array(columns, dtype=np.float64)).to(device, non_blocking=True)
        self._uniform, self._temperature, self._top_k, self._top_p, self._min_p = on_device[:, :, None]
        self._top_k_max = max(p.top_k for p in params)
        self._needs_sorted = any(p.top_k > 0 or p.top_p < 1 for p in params)

    def sample(self, logits_RV: torch.Tensor, num_sorted: int) -> torch.Tensor:
        """(R) int64; `_UNDECIDED` where top_p keeps more than `num_sorted` tokens."""
        scaled = (logits_RV - logits_RV.amax(-1, keepdim=True)).div_(self._temperature.float())
        weights_RV = scaled.exp_()
        weights_RCW = _chunks(weights_RV)
        threshold = self._min_p
        if not self._needs_sorted:
            return _look_up(weights_RCW, threshold, self._uniform)
        cut, is_decided = self._cut(weights_RV, _running_mass(weights_RCW)[:, -1:], num_sorted)
        tokens = _look_up(weights_RCW, torch.maximum(threshold, cut), self._uniform)
        return torch.where(is_decided.squeeze(1), tokens, _UNDECIDED)

    def _cut(self, weights_RV: torch.Tensor, total: torch.Tensor, num_sorted: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The smallest weight that top_k and top_p keep, and whether `num_sorted` tokens could tell; (R, 1)."""
        vocab_size = weights_RV.shape[1]
        num_sorted = min(vocab_size, max(num_sorted, self._top_k_max))
        largest_RK = self._ops.top_k(weights_RV, num_sorted)[0].double()
        mass_RK = row_cumsum(largest_RK)

        has_top_k = (self._top_k > 0) & (self._top_k < vocab_size)
        has_top_p = self._top_p < 1.0
        last_of_k = (self._top_k.long() - 1).clamp(0, num_sorted - 1)
        total = torch.where(has_top_k, mass_RK.gather(1, last_of_k), total)
        # The nucleus ends with the first token at which the mass reaches top_p, so at least one token stays.
        last_of_p = (mass_RK < self._top_p * total).sum(-1, keepdim=True)
        cut_by_k = torch.where(has_top_k, largest_RK.gather(1, last_of_k), 0.0)
        cut_by_p = torch.where(has_top_p, largest_RK.gather(1, last_of_p.clamp(max=num_sorted - 1)), 0.0)
        is_decided = has_top_k | ~has_top_p | (last_of_p < num_sorted) | (num_sorted == vocab_size)
        return torch.maximum(cut_by_k, cut_by_p), is_decided


def _chunks(weights_RV: torch.Tensor) -> torch.Tensor:
    """(R, C, W), padded with zeros."""
    padding = -weights_RV.shape[1] % CHUNK_WIDTH
    return torch.nn.functional.pad(weights_RV, (0, padding)).view(len(weights_RV), -1, CHUNK_WIDTH)


def _running_mass(weights_RCW: torch.Tensor) -> torch.Tensor:
    """(R, C) float64: the sum up to the end of each chunk."""
    return row_cumsum(row_sum(weights_RCW).double())


def _look_up(weights_RCW: torch.Tensor, threshold: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """(R): the token at which the running sum of kept weights passes `uniform` times their sum."""
    kept = weights_RCW.masked_fill(weights_RCW < threshold[:, :, None], 0.0)
    mass = _running_mass(kept)
    target = uniform * mass[:, -1:]
    chunk = _first_above(mass, kept.amax(-1), target)
    before = torch.where(chunk > 0, mass.gather(1, (chunk - 1).clamp(min=0)), 0.0)
    inside = kept.gather(1, chunk[:, :, None].expand(-1, -1, CHUNK_WIDTH)).squeeze(1)
    place = _first_above(row_cumsum(inside.double()), inside, target - before)
    return (chunk * CHUNK_WIDTH + place).squeeze(1)


def _first_above(sums: torch.Tensor, weights: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """(R, 1): the first entry with weight whose running sum is above `target`; the last one with weight where rounding
    left none. An entry without weight is never taken."""
    places = torch.arange(sums.shape[1], device=sums.device)
    has_weight = weights > 0
    first = torch.where(has_weight & (sums > target), places, sums.shape[1]).amin(-1, keepdim=True)
    last = torch.where(has_weight, places, 0).amax(-1, keepdim=True)
    return torch.minimum(first, last)
