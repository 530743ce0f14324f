"""A model's tokens as grammar libraries want them: read from tokenizer.json, without the library that tokenizes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import orjson

from disaggregated.errors import ModelUnavailable
from disaggregated.model_files import read_eos_token_ids


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

    def read(self) -> Spelled:
        """Takes some hundredths of a second, and is not kept: libraries have it in a form of their own."""
        document = orjson.loads(self.path.read_bytes())
        vocab, added = document["model"]["vocab"], document.get("added_tokens") or []
        named = vocab.items() if isinstance(vocab, dict) else ((token, i) for i, (token, _) in enumerate(vocab))
        spelled = _byte_level if '"ByteLevel"' in json.dumps(document.get("decoder")) else _byte_fallback
        found = {token_id: spelled(token) for token, token_id in named}
        found |= {one["id"]: b"" if one["special"] else one["content"].encode() for one in added}
        return Spelled(
            tokens=[found.get(token_id, b"") for token_id in range(max(self.vocab_size, 1 + max(found)))],
            special={one["id"]: one["content"] for one in added if one["special"]},
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Spelled:
    tokens: list[bytes]
    """By id; b"" where there is none, and for special tokens, which have no text. As many as the model has columns, or
    more where the tokenizer has more ids."""
    special: Mapping[int, str]
    """Names of special tokens, which a grammar may ask for."""


def _byte_level(token: str) -> bytes:
    """In GPT-2's alphabet."""
    try:
        return token.translate(_BYTE_OF).encode("latin-1")
    except UnicodeEncodeError:  # Not of the alphabet: decoders take it as it is.
        return token.encode()


def _byte_fallback(token: str) -> bytes:
    """Text with ▁ for a space, or <0x0A> for a byte, as SentencePiece has it."""
    if len(token) == len("<0x0A>") and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()


def _byte_of() -> Mapping[int, int]:
    """GPT-2's alphabet: bytes that print are written as themselves, the others as characters from 256 on."""
    printed = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printed]
    return {byte: byte for byte in printed} | {256 + number: byte for number, byte in enumerate(others)}


_BYTE_OF: Final = _byte_of()
