"""Masks of tokens, packed as grammar libraries pack them: a bit for each token id."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import numpy as np

from disaggregated.engine.grammar.api import Mask

WORD_BITS: Final = 32


def num_words(vocab_size: int) -> int:
    return -(-vocab_size // WORD_BITS)


def full_mask(vocab_size: int) -> Mask:
    """Every token is allowed; the bits after the last one are 0."""
    mask = np.full(num_words(vocab_size), -1, dtype=np.int32)
    if left := vocab_size % WORD_BITS:
        mask[-1] = (1 << left) - 1
    return mask


def allows(mask: Mask, token_id: int) -> bool:
    return bool(int(mask[token_id // WORD_BITS]) >> token_id % WORD_BITS & 1)


def forbid(mask: Mask, token_ids: Iterable[int]) -> None:
    """In place. Ids that the mask has no bit for are left alone."""
    words = mask.view(np.uint32)
    for token_id in token_ids:
        if token_id < len(mask) * WORD_BITS:
            words[token_id // WORD_BITS] &= ~np.uint32(1 << token_id % WORD_BITS)
