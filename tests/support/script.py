"""A chat that says what the model will answer: `says(text)` as a message makes every fake server generate the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from tokenizers import pre_tokenizers

END_ID: Final = 256
"""Of the byte model."""
_BEGIN: Final = "\x01\x02\x01\x02"
_END: Final = "\x02\x01\x02\x01"
_REPLY: Final = "[assistant]"
"""With which the byte model's template ends a prompt."""


def says(reply: str) -> str:
    return f"{_BEGIN}{reply}{_END}"


def next_of_script(sequence: Sequence[int]) -> int | None:
    """The next token of the reply that was scripted last; None where nothing was."""
    ids = np.asarray(sequence, dtype=np.uint32).tobytes()
    begin = ids.rfind(_bytes_of(_BEGIN))
    if begin < 0:
        return None
    end = ids.find(_bytes_of(_END), begin)
    reply = ids.find(_bytes_of(_REPLY), end) + len(_bytes_of(_REPLY))
    script = np.frombuffer(ids[begin + len(_bytes_of(_BEGIN)) : end], dtype=np.uint32)
    num_said = (len(ids) - reply) // 4
    return int(script[num_said]) if num_said < len(script) else END_ID


def _alphabet() -> dict[int, int]:
    """The byte model's ids: it numbers the bytes by how GPT-2 spells them."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return {byte: characters.index(chr(byte if byte in printable else next(others))) for byte in range(256)}


_ID_OF_BYTE: Final = _alphabet()


def _bytes_of(text: str) -> bytes:
    return np.asarray([_ID_OF_BYTE[byte] for byte in text.encode()], dtype=np.uint32).tobytes()
