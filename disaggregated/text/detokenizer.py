"""Ids to text as they come, and never half a character.

Both kinds of tokenizer served here turn each token into bytes, or into characters, on its own; only what a character
needs from its neighbours has to be remembered. So the text of any sequence of pushes is exactly the text of the whole,
each token costs one look-up, and nothing is ever decoded twice.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, Protocol

import orjson

REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"
_UTF8_BYTES_MAX: Final = 4
ESCAPED_MAX: Final = 512
"""Bytes of one token's text in JSON, if it is told by itself. Tokens are short, but nobody has to make them so."""
_Utf8Decoder: Final = codecs.getincrementaldecoder("utf-8")

Piece = Callable[[int], str | None]
"""A token as the vocabulary spells it; None for ids that print nothing (special tokens, ids outside the vocabulary)."""


class Detokenizer(Protocol):
    def push(self, ids: Iterable[int]) -> str:
        """The text that these ids complete; what is left of a character waits for the next ones."""

    def flush(self) -> str:
        """The reply is over: the replacement character for bytes that never became one."""

    def escaped(self, token_id: int) -> bytes | None:
        """As `push` of one token, as JSON spells its text and without quotes: ESCAPED_MAX bytes at most. None, and
        nothing was taken: the token begins or ends within a character, is longer, or depends on its neighbours; it has
        to be pushed."""

    def known(self) -> Mapping[int, bytes]:
        """What `escaped` would say of some tokens, and goes on saying until the next `push`: for who cannot afford to
        call it for each token. It grows; none are in it while a character has begun and has not ended."""


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 characters stand for themselves, the other bytes for U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTES: Final = _byte_of_character()
_OUTSIDE: Final = chr(0x100)
"""Of Latin-1: stands for Latin-1's characters that are not in the alphabet."""
_LATIN: Final = dict.fromkeys(range(256), _OUTSIDE) | {ord(letter): chr(byte) for letter, byte in _BYTES.items()}
_NONE: Final[Mapping[int, bytes]] = {}
_ESCAPED: Final = re.compile(rb'["\\\x00-\x1f]')
"""What JSON spells otherwise in its strings."""


def byte_level_spelling(piece: str) -> bytes:
    try:
        return piece.translate(_LATIN).encode("latin-1")
    except UnicodeEncodeError:
        return piece.encode()  # Added tokens are spelled as they are.


def sentencepiece_spelling(piece: str) -> bytes:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        try:
            return bytes([int(piece[3:5], 16)])
        except ValueError:
            pass
    return piece.replace("▁", " ").encode()


class _Spellings(dict[int, bytes]):
    """Of tokens, each spelled when it is first asked for."""

    def __init__(self, piece: Piece) -> None:
        super().__init__()
        self._piece = piece

    def __missing__(self, token_id: int) -> bytes:
        spelled = self[token_id] = byte_level_spelling(self._piece(token_id) or "")
        return spelled


class ByteLevelCache:
    """What is known of tokens by now. Shared by all requests of a tokenizer; it grows to one entry a token of the
    vocabulary."""

    def __init__(self, piece: Piece) -> None:
        self._spellings = _Spellings(piece)
        self.bytes_of: Callable[[int], bytes] = self._spellings.__getitem__
        self.escaped: dict[int, bytes] = {}
        """Text in JSON, of those that are text by themselves."""
        self.parts: set[int] = set()
        """Those that are not, or too long."""

    def escape(self, token_id: int) -> bytes | None:
        """Text in JSON; None: it is not text by itself, or too long."""
        spelled = self._spellings[token_id]
        try:
            text = spelled.decode()
        except UnicodeDecodeError:
            escaped = None
        else:
            escaped = orjson.dumps(text)[1:-1] if _ESCAPED.search(spelled) else spelled
        if escaped is None or len(escaped) > ESCAPED_MAX:
            self.parts.add(token_id)
            return None
        self.escaped[token_id] = escaped
        return escaped

    def escape_all(self, num_tokens: int) -> None:
        """Of the whole vocabulary, a microsecond or two for each token: no stream waits for it any more."""
        for token_id in range(num_tokens):
            self.escape(token_id)


class ByteLevelDetokenizer:
    """Tokens are bytes in GPT-2's alphabet (Llama 3, Qwen, SmolLM)."""

    def __init__(self, cache: ByteLevelCache, prompt_ids: Sequence[int] = ()) -> None:
        self._cache = cache
        self._bytes = cache.bytes_of
        self._escaped = cache.escaped
        self._parts = cache.parts
        self._decoder: codecs.IncrementalDecoder | None = None
        """Made when a character is met that does not end where it should."""
        self._is_within = False
        """A character has begun and has not ended."""
        # A prompt of raw ids may end within a character, which the reply then completes.
        tail = b"".join(map(self._bytes, prompt_ids[-_UTF8_BYTES_MAX:]))
        if not tail.isascii():
            self._decode(tail)

    def push(self, ids: Iterable[int]) -> str:
        spelled = b"".join(map(self._bytes, ids))
        if not self._is_within:
            try:
                return spelled.decode()
            except UnicodeDecodeError:
                pass  # The end of it belongs to what follows, or to nothing.
        return self._decode(spelled)

    def _decode(self, spelled: bytes) -> str:
        if self._decoder is None:
            self._decoder = _Utf8Decoder("replace")
        text = self._decoder.decode(spelled)
        self._is_within = bool(self._decoder.getstate()[0])
        return text

    def flush(self) -> str:
        return "" if self._decoder is None else self._decoder.decode(b"", True)

    def escaped(self, token_id: int) -> bytes | None:
        if self._is_within or token_id in self._parts:
            return None
        escaped = self._escaped.get(token_id)
        return self._cache.escape(token_id) if escaped is None else escaped

    def known(self) -> Mapping[int, bytes]:
        return _NONE if self._is_within else self._escaped


class SentencePieceDetokenizer:
    """Tokens are characters, `▁` for a space, `<0x…>` for the bytes of what no token has (Llama 2, Mistral).

    A run of byte tokens is text only if all of it is valid UTF-8, else each byte is a replacement character. That is
    decided at its end, so a run is held back until the next ordinary token.
    """

    def __init__(
        self, piece: Piece, *, byte_fallback: bool, strip_first_space: bool, prompt_ids: Sequence[int] = ()
    ) -> None:
        self._piece = piece
        self._byte_fallback = byte_fallback
        self._run = bytearray()
        # The space before the very first word was put there by the tokenizer. With a prompt, that word is not ours.
        self._strip = strip_first_space and not any(piece(token_id) for token_id in prompt_ids)

    def push(self, ids: Iterable[int]) -> str:
        return self._stripped("".join(map(self._text, ids)))

    def flush(self) -> str:
        return self._stripped(self._end_run())

    def escaped(self, token_id: int) -> bytes | None:
        return None

    def known(self) -> Mapping[int, bytes]:
        return _NONE

    def _text(self, token_id: int) -> str:
        piece = self._piece(token_id)
        if piece is None:
            return ""
        if self._byte_fallback and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            try:
                self._run.append(int(piece[3:5], 16))
                return ""
            except ValueError:
                pass
        return self._end_run() + piece.replace("▁", " ")

    def _end_run(self) -> str:
        if not self._run:
            return ""
        run = bytes(self._run)
        self._run.clear()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return REPLACEMENT * len(run)

    def _stripped(self, text: str) -> str:
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text
