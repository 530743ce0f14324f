"""What a request asks of its logits before a token is chosen: grammar, allowed and forbidden tokens, biases, penalties,
and the one token that has to come where a reply has reasoned for long enough.

In this order, each number changed by itself: nothing here looks at another row, or at another token of the same row, so
an edited row is bitwise the same whatever its batch mates and on whichever device. Repetition penalties are those of
Keskar et al., "CTRL" (2019), as Hugging Face and vLLM have them; presence and frequency penalties are OpenAI's.

Legend: R rows, V vocabulary, W words of 32 bits, N places in the logits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from disaggregated.engine.api import TokenMask
from disaggregated.engine.sample_row import SampleRow
from disaggregated.engine.upload import to_device

Floats = npt.NDArray[np.float32]
Places = npt.NDArray[np.int64]
"""(2, N): row and token."""


@dataclasses.dataclass(slots=True)
class LogitEdits:
    """On the host, for all rows of a step. What is biased or penalised is so in one place once."""

    masked_rows: list[int]
    masks: list[TokenMask]
    allowed: list[tuple[int, npt.NDArray[np.int64]]]
    """Of some rows: the only tokens that may come."""
    never: Places
    biased: Places
    biases: Floats
    penalised: Places
    repetition: Floats
    taken: Floats
    """From the logit, after `repetition` divided or multiplied it."""
    forced: Places
    """Of some rows, the token that comes whatever was said above."""

    def apply(self, logits_RV: torch.Tensor) -> None:
        """In place. Waits for nothing on the device."""
        assert logits_RV.dtype == torch.float32, f"logits to be edited are {logits_RV.dtype}"
        device = logits_RV.device
        if self.masked_rows:
            _keep_masked(logits_RV, self.masked_rows, np.stack(self.masks))
        for row, token_ids in self.allowed:
            ids = to_device(token_ids, device)
            kept = logits_RV[row].index_select(0, ids)
            logits_RV[row].fill_(-torch.inf).index_copy_(0, ids, kept)
        if self.never.size:
            rows, tokens = to_device(self.never, device).unbind(0)
            logits_RV.index_put_((rows, tokens), logits_RV.new_full((1,), -torch.inf))
        if self.biased.size:
            rows, tokens = to_device(self.biased, device).unbind(0)
            logits_RV.index_put_((rows, tokens), logits_RV[rows, tokens] + to_device(self.biases, device))
        if self.penalised.size:
            rows, tokens = to_device(self.penalised, device).unbind(0)
            repetition = to_device(self.repetition, device)
            logits = logits_RV[rows, tokens]
            logits = torch.where(logits > 0, logits / repetition, logits * repetition)
            logits_RV.index_put_((rows, tokens), logits - to_device(self.taken, device))
        if self.forced.size:
            rows, tokens = to_device(self.forced, device).unbind(0)
            logits_RV.index_fill_(0, rows, -torch.inf)
            logits_RV.index_put_((rows, tokens), logits_RV.new_zeros(1))


def edits_of(rows: Sequence[SampleRow], vocab_size: int) -> LogitEdits | None:
    """None when nobody asks for any. A tokenizer may know ids that the model does not: these are left out."""
    wanting = [
        (i, row)
        for i, row in enumerate(rows)
        if row.forbidden_token_ids or row.mask is not None or row.sampling.edits_logits
    ]
    if not wanting:
        return None
    masked = [(i, row.mask) for i, row in wanting if row.mask is not None]
    biases = [(i, token, bias) for i, row in wanting for token, bias in row.sampling.logit_bias if token < vocab_size]
    penalties = [_Penalties.of(i, row) for i, row in wanting if row.sampling.has_penalties and row.history is not None]
    return LogitEdits(
        masked_rows=[i for i, _ in masked],
        masks=[mask for _, mask in masked],
        allowed=[(i, _known(ids, vocab_size)) for i, row in wanting if (ids := row.sampling.allowed_token_ids)],
        never=_places([(i, token) for i, row in wanting for token in _never(row) if token < vocab_size]),
        biased=_places([(i, token) for i, token, _ in biases]),
        biases=np.array([bias for _, _, bias in biases], dtype=np.float32),
        penalised=_joined([each.places for each in penalties], np.empty((2, 0), dtype=np.int64)),
        repetition=_joined([each.repetition for each in penalties], np.empty(0, dtype=np.float32)),
        taken=_joined([each.taken for each in penalties], np.empty(0, dtype=np.float32)),
        forced=_places([(i, token) for i, row in wanting if (token := _forced(row)) is not None]),
    )


@dataclasses.dataclass(slots=True)
class _Penalties:
    places: Places
    repetition: Floats
    taken: Floats

    @classmethod
    def of(cls, index: int, row: SampleRow) -> _Penalties:
        assert row.history is not None, "penalties without a history"
        sampling = row.sampling
        ids, counts = row.history.counts(row.drafts)
        presence, frequency = np.float32(sampling.presence_penalty), np.float32(sampling.frequency_penalty)
        return cls(
            places=np.stack([np.full(len(ids), index, dtype=np.int64), ids]),
            repetition=np.full(len(ids), sampling.repetition_penalty, dtype=np.float32),
            taken=counts * frequency + (counts > 0).astype(np.float32) * presence,
        )


def _never(row: SampleRow) -> Iterator[int]:
    yield from row.forbidden_token_ids
    if row.sampling.bad_words:
        assert row.history is not None, "bad words without a history"
        before = (*row.history.tail, *row.drafts)
        for word in row.sampling.bad_words:
            if word[-1] not in row.forbidden_token_ids and _ends_with(before, word[:-1]):
                yield word[-1]


def _forced(row: SampleRow) -> int | None:
    if row.sampling.thinking is None:
        return None
    thinking = None if row.history is None else row.history.thinking
    assert thinking is not None, "a budget without a history"
    return thinking.forced(row.drafts)


def _ends_with(tokens: tuple[int, ...], end: tuple[int, ...]) -> bool:
    return not end or tokens[-len(end) :] == end


def _known(token_ids: frozenset[int], vocab_size: int) -> npt.NDArray[np.int64]:
    return np.array(sorted(token for token in token_ids if token < vocab_size), dtype=np.int64)


def _places(places: Sequence[tuple[int, int]]) -> Places:
    return np.array(places, dtype=np.int64).reshape(-1, 2).T.copy()


def _joined(arrays: Sequence[npt.NDArray[Any]], nothing: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.concatenate(arrays, axis=-1) if arrays else nothing


def _keep_masked(logits_RV: torch.Tensor, rows: Sequence[int], masks_RW: npt.NDArray[np.int32]) -> None:
    device, vocab_size = logits_RV.device, logits_RV.shape[1]
    assert masks_RW.shape[1] * 32 >= vocab_size, f"masks of {masks_RW.shape[1]} words, {vocab_size} tokens"
    words = to_device(masks_RW, device)
    bits = torch.arange(32, dtype=torch.int32, device=device)
    may_come = ((words[:, :, None] >> bits) & 1).flatten(1)[:, :vocab_size].bool()
    index = to_device(np.array(rows, dtype=np.int64), device)
    logits_RV.index_copy_(0, index, logits_RV.index_select(0, index).masked_fill_(~may_come, -torch.inf))
