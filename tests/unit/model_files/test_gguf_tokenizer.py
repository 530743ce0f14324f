"""Tokenizers made from a GGUF's vocabulary, against the algorithms they stand for."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from disaggregated.errors import ModelUnavailable
from disaggregated.model_files import resolve
from disaggregated.model_files.gguf_file import GgufFile
from disaggregated.model_files.gguf_tokenizer import tokenizer_files
from tests.unit.model_files.gguf_samples import tiny_llama, write_gguf

PIECES = {
    "▁": -1.0, "a": -2.0, "b": -2.5, "n": -3.0, "ab": -4.0, "ba": -4.1, "an": -5.0, "na": -6.0, "ana": -7.0,
    "▁b": -5.5, "▁ba": -6.5, "▁ban": -8.0, "ana▁": -9.0, "▁▁": -3.5, "▁▁▁▁": -3.6, "é": -2.2,
}  # fmt: skip


def build(source: Path) -> tokenizers.Tokenizer:
    with GgufFile(source) as file:
        content, _ = tokenizer_files(file)
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def sentencepiece_ids(text: str, vocabulary: dict[str, int]) -> list[int]:
    """SentencePiece's BPE by its definition: join the neighbours with the best score, the leftmost first."""
    symbols = list("▁" + text.replace(" ", "▁"))
    while True:
        joined = [
            (PIECES[left + right], -at)
            for at, (left, right) in enumerate(itertools.pairwise(symbols))
            if left + right in PIECES
        ]
        if not joined:
            break
        at = -max(joined)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    ids = []
    for symbol in symbols:
        known = symbol in vocabulary
        ids += [vocabulary[symbol]] if known else [vocabulary[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return ids


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> tokenizers.Tokenizer:
    path = tmp_path_factory.mktemp("spm") / "tiny.gguf"
    return build(write_gguf(path, tiny_llama(), vocabulary=PIECES))


@settings(max_examples=300)
@given(text=st.text(st.sampled_from("abn é😀"), min_size=1, max_size=30))
def test_merges_from_scores_give_sentencepieces_ids(sentencepiece: tokenizers.Tokenizer, text: str) -> None:
    expected = sentencepiece_ids(text, sentencepiece.get_vocab())
    assert sentencepiece.encode(text, add_special_tokens=False).ids == expected
    assert sentencepiece.decode(expected) == text


def test_sentencepiece_begins_with_bos_unless_the_file_says_no(tmp_path: Path) -> None:
    with_bos = build(write_gguf(tmp_path / "a.gguf", tiny_llama(), vocabulary=PIECES))
    keys = {"tokenizer.ggml.add_bos_token": False}
    without = build(write_gguf(tmp_path / "b.gguf", tiny_llama(), vocabulary=PIECES, keys=keys))
    assert with_bos.encode("ab").tokens == ["<s>", *without.encode("ab").tokens]
    assert with_bos.encode("ab", add_special_tokens=False).ids == without.encode("ab").ids


def test_sentencepiece_without_a_space_prefix_adds_none(tmp_path: Path) -> None:
    keys = {"tokenizer.ggml.add_space_prefix": False}
    tokenizer = build(write_gguf(tmp_path / "tiny.gguf", tiny_llama(), vocabulary=PIECES, keys=keys))
    assert tokenizer.encode("ab", add_special_tokens=False).tokens == ["ab"]
    assert tokenizer.decode(tokenizer.encode(" ab").ids) == " ab"


CUTS = {
    "gpt-2": ["It", "'s", "Ġ1234", "Ġcaf", "Ã©", "Ġ", "ĊĊ", "x"],
    "smollm": ["It", "'s", "Ġ", "1", "2", "3", "4", "Ġcaf", "Ã©", "Ġ", "ĊĊ", "x"],
    "llama-bpe": ["It", "'s", "Ġ", "123", "4", "ĠcafÃ©", "ĠĊĊ", "x"],
    "qwen2": ["It", "'s", "Ġ", "1", "2", "3", "4", "ĠcafÃ©", "ĠĊĊ", "x"],
    "tekken": ["It", "'s", "Ġ", "1", "2", "3", "4", "ĠcafÃ©", "ĠĊĊ", "x"],
}


@pytest.mark.parametrize("cut", CUTS)
def test_text_is_cut_as_the_file_says(tmp_path: Path, cut: str) -> None:
    tokenizer = build(write_gguf(tmp_path / "tiny.gguf", tiny_llama(), cut=cut))
    cuts = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("It's 1234 café \n\nx")]
    if cut in ("gpt-2", "smollm"):
        assert "".join(cuts) == "".join(CUTS[cut])
        assert ("Ġ1234" in cuts) == (cut == "gpt-2")
    else:
        assert cuts == CUTS[cut]


def test_byte_level_tokenizers_give_every_text_back(tmp_path: Path) -> None:
    tokenizer = build(write_gguf(tmp_path / "tiny.gguf", tiny_llama()))
    text = "hello wörld 😀\n\t 123"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.encode("hello").tokens == ["hello"]


def test_control_tokens_are_found_in_text_and_left_out_of_it(tmp_path: Path) -> None:
    tokenizer = build(write_gguf(tmp_path / "tiny.gguf", tiny_llama()))
    ids = tokenizer.encode("<s>hello</s>").ids
    assert ids == [0, tokenizer.token_to_id("hello"), 1]
    assert tokenizer.decode(ids) == "hello"


def test_another_kind_of_tokenizer_is_refused_in_words(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama())
    path.write_bytes(path.read_bytes().replace(b"\x04\0\0\0\0\0\0\0gpt2", b"\x04\0\0\0\0\0\0\0bert"))
    with pytest.raises(ModelUnavailable, match=r"tokenizer\.ggml\.model is 'bert'; 'gpt2' and 'llama' can be read"):
        build(path)


@pytest.fixture(scope="module")
def bundled() -> Path:
    return resolve("smollm2-135m-instruct", weights=False).path


def english_and_others(num_texts: int) -> list[str]:
    """Words, digits, code, many scripts and plain noise; the same in every run."""
    rng = random.Random(7)
    words = [
        "The", "quick", "don't", "I'll", "naïve", "日本語", "Ελληνικά", "😀👩‍👩‍👧", "3.14159", "2026-11-21", "x86_64",
        "\n\n", "\t", "    ", "def f(x):", "<|im_start|>", "<|im_end|>", "#include", "مرحبا", "e=mc²", "A", "'s",
    ]  # fmt: skip
    return [rng.choice(["", " "]).join(rng.choices(words, k=rng.randrange(1, 40))) for _ in range(num_texts)]


def test_the_bundled_tokenizer_is_what_transformers_makes_of_the_converted_directory(bundled: Path) -> None:
    ours = tokenizers.Tokenizer.from_file(str(bundled / "tokenizer.json"))
    theirs = transformers.AutoTokenizer.from_pretrained(bundled)
    for text in english_and_others(300):
        ids = ours.encode(text).ids
        assert ids == theirs.encode(text)
        assert ours.decode(ids, skip_special_tokens=False) == text
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")


def test_the_bundled_tokenizer_takes_digits_one_by_one(bundled: Path) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(bundled / "tokenizer.json"))
    assert tokenizer.encode("in 2026, 10,000").tokens == [
        "in", "Ġ", "2", "0", "2", "6", ",", "Ġ", "1", "0", ",", "0", "0", "0",
    ]  # fmt: skip
