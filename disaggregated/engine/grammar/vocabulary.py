"""A model's tokens as grammar libraries want them: read from tokenizer.json, without the library that tokenizes."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

from disaggregated.errors import ModelUnavailable
from disaggregated.model_files import read_eos_token_ids
from disaggregated.model_files.checkpoint import read_json


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    path: Path
    """tokenizer.json."""
    vocab_size: int
    """Of the model: columns of its logits, whether the tokenizer knows as many ids or not."""
    eos_token_ids: tuple[int, ...]

    @classmethod
    def of_model(cls, folder: Path, vocab_size: int) -> Vocabulary:
        """
        Raises:
            ModelUnavailable: the model has no tokenizer.json, or nothing that ends a text.
        """
        eos_token_ids = tuple(token_id for token_id in read_eos_token_ids(folder) if token_id < vocab_size)
        if not eos_token_ids:
            raise ModelUnavailable(f"{folder} names no eos_token_id, so no text under a grammar could end")
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelUnavailable(f"{folder} has no tokenizer.json, so the text of its tokens is not known")
        return cls(path, vocab_size, eos_token_ids)

    @functools.cached_property
    def _document(self) -> dict[str, Any]:
        return read_json(self.path)

    @property
    def _added(self) -> list[dict[str, Any]]:
        return self._document.get("added_tokens") or []

    @property
    def is_byte_level(self) -> bool:
        """Tokens spell bytes in GPT-2's alphabet; else they are text with ▁ for a space, and <0x0A> for a byte."""
        decoder = json.dumps(self._document.get("decoder"))
        return '"ByteLevel"' in decoder

    @functools.cached_property
    def tokens(self) -> list[str]:
        """By id; "" where there is none, and for special tokens, which have no text."""
        tokens = [""] * self.vocab_size
        vocab = self._document["model"]["vocab"]
        named = vocab.items() if isinstance(vocab, dict) else ((token, i) for i, (token, _) in enumerate(vocab))
        for token, token_id in named:
            if token_id < self.vocab_size:
                tokens[token_id] = token
        for added in self._added:
            if added["id"] < self.vocab_size:
                tokens[added["id"]] = "" if added["special"] else added["content"]
        return tokens

    @property
    def num_tokenizer_ids(self) -> int:
        vocab = self._document["model"]["vocab"]
        ids = vocab.values() if isinstance(vocab, dict) else range(len(vocab))
        return 1 + max(int(token_id) for token_id in (*ids, *(added["id"] for added in self._added)))
