"""Small tokenizers of both kinds, so that every odd sequence of ids is likely in a few hundred tries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers

from disaggregated.text import Tokenizer

FIRST_BYTE = 2
"""The id of `<0x00>` in `sentencepiece()`."""


def alphabet() -> list[str]:
    """GPT-2's spelling of the 256 bytes, in the order of the bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def byte_level() -> tokenizers.Tokenizer:
    """Every byte; parts of characters as tokens of their own; a special token, and an added one that is not."""
    joined = ["".join(alphabet()[byte] for byte in text) for text in (b"\xf0\x9f", b"\x98\x80", b" the", b"\xe2\x82")]
    vocabulary = {token: index for index, token in enumerate([*alphabet(), *joined])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.add_tokens(["<tool call 😀>"])
    return tokenizer


def sentencepiece(*, strip: bool = True) -> tokenizers.Tokenizer:
    """Llama 2's kind: bytes, a few pieces with and without `▁`, a special token."""
    pieces = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", "he", "é", "▁▁", "<0xZZ>", "€"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    steps = [
        tokenizers.decoders.Replace("▁", " "),
        tokenizers.decoders.ByteFallback(),
        tokenizers.decoders.Fuse(),
        *([tokenizers.decoders.Strip(" ", 1, 0)] if strip else []),
    ]
    tokenizer.decoder = tokenizers.decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<unk>", "<s>"])
    return tokenizer


def load(backend: tokenizers.Tokenizer) -> Tokenizer:
    return Tokenizer(backend, chat_template=None, eos_token_ids=())


def save(folder: Path, backend: tokenizers.Tokenizer, config: dict[str, Any] | None = None) -> Path:
    """A directory with everything that Tokenizer.load asks for."""
    backend.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 1}))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
