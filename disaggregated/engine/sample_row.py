"""The tokens that a step has to choose: one for each row that samples, and one after each of its drafts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from disaggregated.engine.api import ScheduledSequence, TokenMask
from disaggregated.engine.token_history import TokenHistory
from disaggregated.sampling_params import SamplingParams


@dataclasses.dataclass(slots=True)
class SampleRow:
    """One token to be chosen. Not frozen for the reason that `TokensSampled` gives."""

    sampling: SamplingParams
    position: int
    """Index in the sequence, prompt included, of the token to be sampled."""
    forbidden_token_ids: frozenset[int] = frozenset()
    history: TokenHistory | None = None
    """Of the sequence up to its last token, where its sampling looks at it."""
    drafts: Sequence[int] = ()
    """Guesses after that last token; the one to be sampled comes after all of them."""
    mask: TokenMask | None = None
    """None: each token may come."""


def sample_rows(batch: Sequence[ScheduledSequence]) -> list[SampleRow]:
    """Of all that is sampled, in the order of the logits: row by row, after the last token and after each draft."""
    rows = []
    for sequence in batch:
        if sequence.sampling is None:
            continue
        masks = None if sequence.masks is None else sequence.masks()
        first = sequence.first_position + len(sequence.token_ids)
        rows += [
            SampleRow(
                sequence.sampling,
                first + num_drafts,
                sequence.forbidden_token_ids,
                sequence.history,
                sequence.draft_token_ids[:num_drafts],
                None if masks is None else masks[num_drafts],
            )
            for num_drafts in range(1 + len(sequence.draft_token_ids))
        ]
    return rows
