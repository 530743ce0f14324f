"""Words that must not be generated, as the runs of tokens that spell them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from disaggregated.errors import InvalidRequest
from disaggregated.sampling_params import BAD_WORD_TOKENS_MAX
from disaggregated.text.tokenizer import Tokenizer

BAD_WORDS_MAX: Final = 256
_CHARACTERS_MAX: Final = 16 * BAD_WORD_TOKENS_MAX


def bad_word_ids(words: Sequence[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Each word as the tokenizer cuts it, at the beginning of a text and after a space.

    Raises:
        InvalidRequest: there are too many, or one is empty or too long.
    """
    if len(words) > BAD_WORDS_MAX:
        raise InvalidRequest(f"bad_words has {len(words)} strings, the limit is {BAD_WORDS_MAX}", param="bad_words")
    return tuple(dict.fromkeys(ids for word in words for ids in _spellings(word, tokenizer)))


def _spellings(word: str, tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    if not word.strip():
        raise InvalidRequest("bad_words: a word in it must not be empty", param="bad_words")
    if len(word) > _CHARACTERS_MAX:
        raise InvalidRequest(
            f"a bad word has {len(word)} characters, the limit is {_CHARACTERS_MAX}", param="bad_words"
        )
    spellings = [
        tuple(tokenizer.encode(text, add_special_tokens=False, param="bad_words"))
        for text in (word, " " + word.lstrip())
    ]
    if (longest := max(map(len, spellings))) > BAD_WORD_TOKENS_MAX:
        raise InvalidRequest(f"a bad word has {longest} tokens, the limit is {BAD_WORD_TOKENS_MAX}", param="bad_words")
    return [ids for ids in spellings if ids]
