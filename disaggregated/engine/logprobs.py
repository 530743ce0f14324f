"""How likely the tokens of a step were, by the model's own logits.

The device finds a few numbers of each row: the token's logit, the largest one, the sum of all weights, the likeliest
tokens. The logarithm is taken on the host, where the same numbers give the same bits on every machine.

Legend: R rows, V vocabulary, K the likeliest tokens, A tokens that are asked for by their ids.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import torch

from disaggregated.engine.api import ScheduledSequence, WantedLogprobs
from disaggregated.engine.ops.api import Ops
from disaggregated.engine.ops.row_invariant import row_cumsum, row_sum
from disaggregated.engine.upload import to_device
from disaggregated.token_logprobs import TokenLogprob

NUM_SORTED: Final = 32
"""More than anybody may ask for: so which of equals are told does not depend on how many others want."""
CHUNK_WIDTH: Final = 256
PROMPT_TOKENS_AT_ONCE: Final = 64
_NUM_OWN: Final = 4
"""Columns of a row that are not about the likeliest tokens."""

Fetch = Callable[[torch.Tensor], torch.Tensor]
LogitsOf = Callable[[torch.Tensor], torch.Tensor]


def measured(
    logits_RV: torch.Tensor, tokens_R: torch.Tensor, ops: Ops, *, with_top: bool, asked_RA: torch.Tensor | None = None
) -> torch.Tensor:
    """(R, 4 + A + 2K) float64 on the device: each token's logit, the largest, the sum of the weights relative to it,
    the token's rank; the logits of those in `asked_RA`; then the K largest logits and whose they are. K is 0 unless
    `with_top`. Waits for nothing.

    `logits_RV` is float32 and is left as it is.
    """
    own = logits_RV.gather(1, tokens_R[:, None])
    largest = logits_RV.amax(-1, keepdim=True)
    total = _row_total((logits_RV - largest).exp_())
    rank = (logits_RV >= own).sum(-1, keepdim=True)
    columns = [own.double(), largest.double(), total, rank.double()]
    if asked_RA is not None:
        columns.append(logits_RV.gather(1, asked_RA).double())
    if with_top:
        values, ids = ops.top_k(logits_RV, min(NUM_SORTED, logits_RV.shape[1]))
        columns += [values.double(), ids.double()]
    return torch.cat(columns, 1)


def told(
    measured_RX: torch.Tensor, num_top: Sequence[int], asked: Sequence[Sequence[int]] | None = None
) -> list[TokenLogprob]:
    """What was measured, fetched to the host; `num_top` of each row, or those that it asked for by their ids."""
    num_asked = max(map(len, asked)) if asked else 0
    rows, first_top = measured_RX.numpy(), _NUM_OWN + num_asked
    own, largest, total, rank = rows[:, :_NUM_OWN].T
    log_norm = largest + np.array([math.log(one) for one in total.tolist()])
    values, ids = np.split(rows[:, first_top:], 2, axis=1)
    order = np.lexsort((ids, -values))  # Of equals the one with the lowest id comes first.
    values, ids = np.take_along_axis(values, order, 1), np.take_along_axis(ids, order, 1)
    logprobs = (own - log_norm).astype(np.float32).tolist()  # As they travel, so that they are the same anywhere.
    top_logprobs = (values - log_norm[:, None]).astype(np.float32).tolist()
    top_ids, ranks = ids.astype(np.int64).tolist(), rank.astype(np.int64).tolist()
    likeliest = [
        TokenLogprob(logprobs[i], ranks[i], tuple(top_ids[i][:count]), tuple(top_logprobs[i][:count]))
        for i, count in enumerate(num_top)
    ]
    if not asked:
        return likeliest
    found = (rows[:, _NUM_OWN:first_top] - log_norm[:, None]).astype(np.float32).tolist()
    return [
        dataclasses.replace(one, top_token_ids=tuple(wanted), top_logprobs=tuple(found[i][: len(wanted)]))
        if wanted
        else one
        for i, (one, wanted) in enumerate(zip(likeliest, asked, strict=True))
    ]


class StepLogprobs:
    """What one step measures for the rows that want it. On a CUDA device nothing here waits but `tell`.

    keep ─▶ (edits, sampling) ─▶ measure ─▶ tell          measure_prompts, whenever the hidden states are there
    """

    def __init__(self, batch: Sequence[ScheduledSequence], ops: Ops, fetch: Fetch) -> None:
        """`fetch` brings a tensor to the host; its numbers need to be right only when `tell` is called."""
        self._ops = ops
        self._fetch = fetch
        self._sampled: list[tuple[WantedLogprobs, range]] = []
        """Who wants to know of which sampled positions."""
        self._prompts: list[tuple[WantedLogprobs, range]] = []
        """Whose targets follow which of the step's tokens."""
        num_tokens = num_sampled = 0
        for row in batch:
            wanted, num_own = row.logprobs, 0 if row.sampling is None else 1 + len(row.draft_token_ids)
            if wanted is not None and num_own and wanted.num_top is not None:
                self._sampled.append((wanted, range(num_sampled, num_sampled + num_own)))
            if wanted is not None and wanted.prompt_targets:
                first = num_tokens + wanted.first_target
                self._prompts.append((wanted, range(first, first + len(wanted.prompt_targets))))
            num_sampled += num_own
            num_tokens += len(row.token_ids) + len(row.draft_token_ids)
        self._raw: torch.Tensor | None = None
        self._measured: torch.Tensor | None = None
        self._measured_prompts: list[torch.Tensor] = []

    def keep(self, logits_RV: torch.Tensor) -> None:
        """Before anything is changed in them."""
        if self._sampled:
            self._raw = logits_RV.index_select(0, self._positions(logits_RV.device)).float()

    def measure(self, tokens_R: torch.Tensor) -> None:
        """`tokens_R`: what was sampled in each position."""
        if self._raw is not None:
            tokens = tokens_R.index_select(0, self._positions(tokens_R.device)).to(self._raw.device)
            with_top = any(wanted.num_top for wanted, _ in self._sampled)
            asked_RA = self._asked_places(self._raw)
            self._measured = self._fetch(measured(self._raw, tokens, self._ops, with_top=with_top, asked_RA=asked_RA))
            self._raw = None

    def measure_prompts(self, hidden_TH: torch.Tensor, logits_of: LogitsOf) -> None:
        """A few tokens at a time: logits of a whole chunk would be larger than all else."""
        for wanted, tokens in self._prompts:
            for begin in range(0, len(tokens), PROMPT_TOKENS_AT_ONCE):
                some = tokens[begin : begin + PROMPT_TOKENS_AT_ONCE]
                targets = np.array(wanted.prompt_targets[begin : begin + len(some)], dtype=np.int64)
                logits = logits_of(hidden_TH[some.start : some.stop]).float()
                on_device = to_device(targets, logits.device)
                with_top = wanted.prompt_num_top > 0
                self._measured_prompts.append(self._fetch(measured(logits, on_device, self._ops, with_top=with_top)))

    def tell(self) -> None:
        """Fill in what the rows wanted: everything that was fetched is there."""
        if self._measured is not None:
            counts = [wanted.num_top or 0 for wanted, positions in self._sampled for _ in positions]
            all_told = iter(told(self._measured, counts, self._asked()))
            for wanted, positions in self._sampled:
                wanted.sampled = list(itertools.islice(all_told, len(positions)))
        measured_prompts = iter(self._measured_prompts)
        for wanted, tokens in self._prompts:
            num_parts = -(-len(tokens) // PROMPT_TOKENS_AT_ONCE)
            parts = itertools.islice(measured_prompts, num_parts)
            wanted.prompt = [one for part in parts for one in told(part, [wanted.prompt_num_top] * len(part))]

    def _asked(self) -> list[Sequence[int]] | None:
        """Of each position; None where nobody asks for any token by its id."""
        asked = [wanted.token_ids for wanted, positions in self._sampled for _ in positions]
        return asked if any(asked) else None

    def _asked_places(self, logits_RV: torch.Tensor) -> torch.Tensor | None:
        """(R, A), filled up with the first token."""
        asked = self._asked()
        if asked is None:
            return None
        places = np.zeros((len(asked), max(map(len, asked))), dtype=np.int64)
        for row, token_ids in zip(places, asked, strict=True):
            row[: len(token_ids)] = token_ids
        return to_device(places, logits_RV.device)

    def _positions(self, device: torch.device) -> torch.Tensor:
        positions = [position for _, positions in self._sampled for position in positions]
        return to_device(np.array(positions, dtype=np.int64), device)


def step_logprobs(batch: Sequence[ScheduledSequence], ops: Ops, fetch: Fetch = torch.Tensor.cpu) -> StepLogprobs | None:
    """None when no row wants any."""
    return StepLogprobs(batch, ops, fetch) if any(row.logprobs is not None for row in batch) else None


def _row_total(weights_RV: torch.Tensor) -> torch.Tensor:
    """(R, 1) float64, in an order that V alone decides."""
    padding = -weights_RV.shape[1] % CHUNK_WIDTH
    chunks = torch.nn.functional.pad(weights_RV, (0, padding)).view(len(weights_RV), -1, CHUNK_WIDTH)
    return row_cumsum(row_sum(chunks).double())[:, -1:]
