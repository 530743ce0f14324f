"""Encoding a chat by segments is encoding it whole, and costs only what is new."""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from disaggregated.model_files import resolve
from disaggregated.text import Tokenizer
from disaggregated.text.segments import SegmentedEncoder
from tests.unit.text import tiny_tokenizers

SPECIALS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<repo_name>")
PARTS = st.one_of(
    st.sampled_from(
        (*SPECIALS, "<|im_", "start|>", "|>", "<", "user\n", "\n", "  ", " a", "1234", "é", "\N{GRINNING FACE}")
    ),
    st.text(max_size=12),
)


@pytest.fixture(scope="module")
def backend() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(resolve("smollm2-135m-instruct", weights=False).path / "tokenizer.json"))


def bytes_alone() -> tokenizers.Tokenizer:
    """Every byte, and no added token yet."""
    vocabulary = {token: index for index, token in enumerate(tiny_tokenizers.alphabet())}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return backend


def whole(backend: tokenizers.Tokenizer) -> Callable[[str], list[int]]:
    return lambda text: list(backend.encode(text, add_special_tokens=False).ids)


def test_ids_by_segments_are_those_of_the_whole(backend: tokenizers.Tokenizer) -> None:
    by_segments = SegmentedEncoder.make(backend, whole(backend))
    assert by_segments is not None

    @given(st.lists(PARTS, max_size=12).map("".join))
    def check(text: str) -> None:
        expected = whole(backend)(text)
        assert by_segments.encode(text) == expected
        assert by_segments.encode(text) == expected, "from the cache"

    check()


def test_of_a_further_turn_only_what_is_new_is_encoded(backend: tokenizers.Tokenizer) -> None:
    encoded: list[str] = []

    def encode(text: str) -> list[int]:
        encoded.append(text)
        return whole(backend)(text)

    by_segments = SegmentedEncoder.make(backend, encode)
    assert by_segments is not None
    first = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    by_segments.encode(first)
    encoded.clear()
    by_segments.encode(f"{first}Hi!<|im_end|>\n<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n")
    assert encoded == ["assistant\nHi!", "user\nAnd now?"]


def test_one_added_token_within_another_is_cut_where_the_tokenizer_cuts_it() -> None:
    backend = bytes_alone()
    added = ["<|a|>", "<|a|><|b|>", "<|"]
    backend.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in added])
    by_segments = SegmentedEncoder.make(backend, whole(backend))
    assert by_segments is not None
    for text in ("<|a|><|b|>x", "<|a|><|b", "<|<|a|>", "x<|a|>y<|b|>"):
        assert by_segments.encode(text) == whole(backend)(text)


@pytest.mark.parametrize("kind", ["lstrip", "rstrip", "single_word", "normalized"])
def test_a_token_that_takes_its_neighbours_with_it_forbids_cutting(kind: str) -> None:
    backend = bytes_alone()
    backend.add_tokens([tokenizers.AddedToken("<|odd|>", **{"normalized": False, kind: True})])
    assert SegmentedEncoder.make(backend, whole(backend)) is None


@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer"),
    [
        (None, tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)),
        (None, tokenizers.pre_tokenizers.Metaspace()),
        (tokenizers.normalizers.Prepend("▁"), tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)),
        (tokenizers.normalizers.Strip(), tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)),
    ],
)
def test_a_tokenizer_that_treats_beginnings_apart_is_not_cut(normalizer: Any, pre_tokenizer: Any) -> None:
    backend = bytes_alone()
    backend.add_special_tokens(["<|x|>"])
    backend.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        backend.normalizer = normalizer
    assert SegmentedEncoder.make(backend, whole(backend)) is None


def test_a_normalizer_of_unicode_works_on_each_segment_as_on_the_whole() -> None:
    backend = bytes_alone()
    backend.add_special_tokens(["<|x|>"])
    backend.normalizer = tokenizers.normalizers.NFC()
    by_segments = SegmentedEncoder.make(backend, whole(backend))
    assert by_segments is not None
    for text in ("e\u0301<|x|>\u0301e", "<|x|>\u0301"):
        assert by_segments.encode(text) == whole(backend)(text)


def test_half_a_surrogate_pair_is_still_told(backend: tokenizers.Tokenizer) -> None:
    tokenizer = Tokenizer(backend, chat_template=None, eos_token_ids=())
    with pytest.raises(Exception, match="not valid Unicode"):
        tokenizer.encode(f"<|im_start|>{string.ascii_letters}\ud83d", add_special_tokens=False)
