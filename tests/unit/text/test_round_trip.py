"""Text to ids and back is the same text, whatever it is, where each byte is a token."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.support.byte_model import byte_tokenizer

TOKENIZER = byte_tokenizer()


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_every_text_survives_the_way_there_and_back(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text
    assert all(TOKENIZER.pieces(ids))
