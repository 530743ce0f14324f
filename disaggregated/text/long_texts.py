"""Texts that no model takes, told from others without encoding all of them.

A tokenizer needs a hundred bytes of memory for each token and seconds for a million of them. What is twice too long,
or a thousand times, is found out from its beginning.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

SLICE_CHARACTERS: Final = 1 << 16
CHARACTERS_A_TOKEN: Final = 8
"""Of a text that is not looked at: what people write has about four."""
CERTAIN: Final = 2
"""Times too many tokens. Encoded in slices a text has a few more of them than as a whole, and never so many more."""


def is_longer_for_certain(text: str, num_tokens: int, count: Callable[[str], int]) -> bool:
    """Whether `text` has many more than `num_tokens`. `count` is asked for the tokens of its slices, until they are too
    many."""
    if len(text) <= max(SLICE_CHARACTERS, CHARACTERS_A_TOKEN * num_tokens):
        return False
    num_found = 0
    for begin in range(0, len(text), SLICE_CHARACTERS):
        num_found += count(text[begin : begin + SLICE_CHARACTERS])
        if num_found > CERTAIN * num_tokens:
            return True
    return False
