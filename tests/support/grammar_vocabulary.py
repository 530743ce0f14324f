"""A vocabulary of bytes and a few longer tokens, in a model's folder: large enough for any text, loaded in no time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from disaggregated.engine.grammar.vocabulary import Vocabulary

MERGES = (
    ("t", "r"),
    ("u", "e"),
    ("tr", "ue"),
    ("{", '"'),
    ('"', ":"),
    ('":', "Ġ"),
    (",", "Ġ"),
    (",Ġ", '"'),
    ("a", "b"),
)
END = "<|end|>"
THINK_END = "</think>"
"""Special to the model, and part of no text under a grammar."""
END_ID = 256 + len(MERGES)
THINK_END_ID = END_ID + 1
VOCAB_SIZE = 300
"""The model has a few columns more than the tokenizer has ids, as many have."""


def make_vocabulary(folder: Path, *, vocab_size: int = VOCAB_SIZE) -> Vocabulary:
    tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": END_ID}))
    return Vocabulary.of_model(folder, vocab_size)


def tokenizer() -> tokenizers.Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *("".join(pair) for pair in MERGES)]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=list(MERGES))
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([END, THINK_END])
    return backend


def ids_of(text: str) -> list[int]:
    return list(tokenizer().encode(text).ids)


def text_of(token_ids: Sequence[int]) -> str:
    return str(tokenizer().decode(list(token_ids)))
