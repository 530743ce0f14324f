"""Texts that no model takes are refused without being encoded whole."""

from __future__ import annotations

import random

import pytest

from disaggregated.errors import InvalidRequest, PromptTooLong
from disaggregated.text.long_texts import CERTAIN, CHARACTERS_A_TOKEN, SLICE_CHARACTERS, is_longer_for_certain
from tests.support.byte_model import byte_tokenizer

LIMIT = 30_000


def counted(text: str) -> tuple[bool, int]:
    """The verdict on a text whose tokens are its letters, and of how many characters tokens were asked for."""
    asked = 0

    def count(part: str) -> int:
        nonlocal asked
        asked += len(part)
        return len(part.replace(" ", ""))

    return is_longer_for_certain(text, LIMIT, count), asked


def test_of_a_text_that_is_far_too_long_only_the_beginning_is_encoded() -> None:
    assert counted("x" * 20_000_000) == (True, SLICE_CHARACTERS)


@pytest.mark.parametrize("num_characters", [0, 100, LIMIT, CHARACTERS_A_TOKEN * LIMIT])
def test_a_text_of_an_ordinary_length_is_not_looked_at(num_characters: int) -> None:
    assert counted("x" * num_characters) == (False, 0)


def test_blanks_of_which_a_token_takes_many_are_no_reason_to_refuse() -> None:
    long = " " * 5_000_000 + "x" * CERTAIN * LIMIT
    assert counted(long) == (False, len(long))
    assert counted(long + "x")[0]


def test_a_text_is_never_refused_that_has_as_many_tokens_as_there_may_be() -> None:
    tokenizer, random_ = byte_tokenizer(), random.Random(1)
    text = "".join(random_.choices(" \nabcé漢", k=SLICE_CHARACTERS + 5000))
    num_tokens = len(text.encode())
    assert len(tokenizer.encode(text, num_tokens_max=num_tokens)) == num_tokens
    with pytest.raises(PromptTooLong, match="more than 1000 tokens") as refused:
        tokenizer.encode(text, num_tokens_max=1000, param="prompt")
    assert refused.value.param == "prompt"


def test_half_of_a_surrogate_pair_is_told_of_a_long_text_too() -> None:
    with pytest.raises(InvalidRequest, match="surrogate"):
        byte_tokenizer().encode("\ud800" + "x" * 5 * SLICE_CHARACTERS, num_tokens_max=1)
