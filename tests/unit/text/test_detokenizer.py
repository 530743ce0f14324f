"""Streamed text equals the text of the whole, however the ids come."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from disaggregated.errors import ModelUnavailable
from disaggregated.model_files import resolve
from disaggregated.text import Detokenizer, Tokenizer
from tests.unit.text import tiny_tokenizers

BYTE_LEVEL = tiny_tokenizers.load(tiny_tokenizers.byte_level())
SENTENCEPIECE = tiny_tokenizers.load(tiny_tokenizers.sentencepiece())
UNSTRIPPED = tiny_tokenizers.load(tiny_tokenizers.sentencepiece(strip=False))
TINY = [BYTE_LEVEL, SENTENCEPIECE, UNSTRIPPED]
TINY_NAMES = ["byte-level", "sentencepiece", "sentencepiece without strip"]


@pytest.fixture(scope="module")
def bundled() -> Tokenizer:
    return Tokenizer.load(resolve("smollm2-135m-instruct", weights=False).path)


def chunks(ids: Sequence[int], cuts: Sequence[int]) -> Iterator[Sequence[int]]:
    bounds = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    for start, end in itertools.pairwise(bounds):
        yield ids[start:end]


def streamed(detokenizer: Detokenizer, ids: Sequence[int], cuts: Sequence[int]) -> str:
    return "".join(detokenizer.push(chunk) for chunk in chunks(ids, cuts)) + detokenizer.flush()


any_cuts = st.lists(st.integers(0, 30), max_size=10)


def any_ids(vocab_size: int) -> st.SearchStrategy[list[int]]:
    """Anything at all, with the ends of the vocabulary (where the odd tokens are) often."""
    return st.lists(st.one_of(st.integers(0, vocab_size + 1), st.integers(vocab_size - 12, vocab_size)), max_size=30)


@pytest.mark.parametrize("tokenizer", TINY, ids=TINY_NAMES)
@settings(max_examples=500)
@given(draw=st.data(), cuts=any_cuts, skip=st.booleans())
def test_any_ids_in_any_chunks_give_the_text_of_the_whole(
    tokenizer: Tokenizer, draw: st.DataObject, cuts: list[int], skip: bool
) -> None:
    ids = draw.draw(any_ids(tokenizer.vocab_size))
    whole = tokenizer.decode(ids, skip_special_tokens=skip)
    assert streamed(tokenizer.detokenizer(skip_special_tokens=skip), ids, cuts) == whole


@settings(max_examples=300)
@given(ids=st.lists(st.integers(0, 49151), max_size=40), cuts=any_cuts)
def test_any_ids_of_the_bundled_model_give_the_text_of_the_whole(
    bundled: Tokenizer, ids: list[int], cuts: list[int]
) -> None:
    assert streamed(bundled.detokenizer(), ids, cuts) == bundled.decode(ids)


@settings(max_examples=300)
@given(text=st.text(max_size=40), cuts=any_cuts)
def test_any_text_comes_back_in_any_chunks(bundled: Tokenizer, text: str, cuts: list[int]) -> None:
    ids = bundled.encode(text)
    # Not always `text`: this vocabulary lacks the tokens of a few control characters.
    assert streamed(bundled.detokenizer(skip_special_tokens=False), ids, cuts) == bundled.decode(
        ids, skip_special_tokens=False
    )


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, UNSTRIPPED], ids=["byte-level", "sentencepiece"])
@settings(max_examples=300)
@given(ids=st.lists(st.integers(0, 255), max_size=12), cut=st.integers(0, 12))
def test_the_text_of_a_prompt_and_its_reply_is_the_text_of_both(tokenizer: Tokenizer, ids: list[int], cut: int) -> None:
    prompt = [*ids[:cut], *tokenizer.encode("é")]
    whole, before = tokenizer.decode([*prompt, *ids[cut:]]), tokenizer.decode(prompt)
    if whole.startswith(before):  # Else a run of bytes of the prompt was made invalid by what follows it.
        assert before + streamed(tokenizer.detokenizer(prompt), ids[cut:], [1, 2, 3]) == whole


def test_half_a_character_waits_for_the_rest() -> None:
    detokenizer = BYTE_LEVEL.detokenizer()
    assert [detokenizer.push([byte]) for byte in "é😀".encode()] == ["", "é", "", "", "", "😀"]
    assert detokenizer.flush() == ""


def test_bytes_that_never_become_a_character_are_replaced_as_soon_as_that_is_certain() -> None:
    detokenizer = BYTE_LEVEL.detokenizer()
    assert detokenizer.push([0xE2, 0x82]) == ""
    assert detokenizer.push([ord("a")]) == "\ufffda"
    assert detokenizer.push([0xF0, 0x9F]) == ""
    assert detokenizer.flush() == "\ufffd"


def test_a_prompt_that_ends_within_a_character_is_completed_by_the_reply() -> None:
    assert BYTE_LEVEL.detokenizer([ord("a"), 0xE2, 0x82]).push([0xAC]) == "€"


def test_a_run_of_byte_tokens_is_decided_at_its_end() -> None:
    the = 259
    euro = [tiny_tokenizers.FIRST_BYTE + byte for byte in "€".encode()]
    detokenizer = SENTENCEPIECE.detokenizer([the])
    assert [detokenizer.push([token]) for token in [*euro, the]] == ["", "", "", "€ the"]
    assert detokenizer.push([*euro[:2], the]) == "\ufffd\ufffd the"
    assert detokenizer.push([*euro[:1], 1, *euro[1:]]) == ""
    assert detokenizer.flush() == "€"


def test_the_space_before_the_first_word_belongs_to_nobody() -> None:
    the = 259
    assert SENTENCEPIECE.detokenizer().push([1, the, the]) == "the the"
    assert SENTENCEPIECE.detokenizer([1]).push([the]) == "the"
    assert SENTENCEPIECE.detokenizer([1, the]).push([the]) == " the"


def test_special_tokens_are_left_out_unless_asked_for() -> None:
    end = BYTE_LEVEL.encode("<|end|>")
    assert BYTE_LEVEL.detokenizer().push(end) == ""
    assert BYTE_LEVEL.detokenizer(skip_special_tokens=False).push(end) == "<|end|>"
    assert BYTE_LEVEL.detokenizer().push(BYTE_LEVEL.encode("<tool call 😀>")) == "<tool call 😀>"


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, UNSTRIPPED], ids=["byte-level", "sentencepiece"])
def test_replies_do_not_disturb_each_other(tokenizer: Tokenizer) -> None:
    ids = [index for index in range(200) if index % 3] * 2
    alone = streamed(tokenizer.detokenizer(), ids, [])
    first, second = tokenizer.detokenizer(), tokenizer.detokenizer()
    texts = [(first.push([token]), second.push([token])) for token in ids]
    assert "".join(text for text, _ in texts) + first.flush() == alone
    assert "".join(text for _, text in texts) + second.flush() == alone


@pytest.mark.parametrize("decoder", [None, tokenizers.decoders.WordPiece(), tokenizers.decoders.CTC()])
def test_a_decoder_that_cannot_be_streamed_is_refused_at_start(decoder: object) -> None:
    backend = tiny_tokenizers.byte_level()
    backend.decoder = decoder  # type: ignore[assignment]
    with pytest.raises(ModelUnavailable, match=r"decoder .* is not supported; ByteLevel and SentencePiece's are"):
        tiny_tokenizers.load(backend)
