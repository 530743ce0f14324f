"""Grammars by llguidance: compiles in a millisecond, because it derives what it needs while the text is followed.

Its parser counts its steps, so no grammar takes it long: one that would is an error of the matcher instead.
"""

from __future__ import annotations

from typing import Final

import llguidance
import numpy as np

from disaggregated.engine.grammar.api import Mask
from disaggregated.engine.grammar.bitmask import num_words
from disaggregated.engine.grammar.vocabulary import Vocabulary
from disaggregated.errors import GrammarRefused
from disaggregated.grammar import Grammar
from disaggregated.structured.grammar_text import to_llguidance

BYTES_EACH: Final = 1 << 20
"""What a compiled grammar is taken to need, the states of its lexer among them: llguidance tells no figure."""


class LLGuidanceBackend:
    """Implements `Backend`."""

    name = "llguidance"

    def __init__(self, vocabulary: Vocabulary) -> None:
        """Takes a sixth of a second for 50,000 tokens, and keeps the interpreter's lock meanwhile."""
        spelling = _Spelling(vocabulary)
        wrapped = llguidance.TokenizerWrapper(spelling)
        self._tokenizer = llguidance.LLTokenizer(wrapped, eos_token=list(vocabulary.eos_token_ids))
        spelling.tokens.clear()  # The library keeps us, and has read them.
        self._limits = llguidance.LLParserLimits(verbose_errors=False)

    def compile(self, grammar: Grammar) -> LLGuidanceGrammar:
        try:
            source = to_llguidance(grammar)
        except ValueError as error:
            raise GrammarRefused(f"grammar: {error}", param="grammar") from error
        matcher = llguidance.LLMatcher(self._tokenizer, source, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise GrammarRefused(f"grammar: {matcher.get_error()}", param="grammar")
        return LLGuidanceGrammar(matcher, num_words=num_words(self._tokenizer.vocab_size))


class _Spelling:
    """A tokenizer as the library wants one: it spells tokens, and need not tokenize. Read from our own vocabulary that
    takes a fifth of the memory and half of the time of the library's own reader."""

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        spelled = vocabulary.read()
        self.eos_token_id = vocabulary.eos_token_ids[0]
        self.special_token_ids = list(spelled.special)
        self.tokens = spelled.tokens
        for token_id, name in spelled.special.items():
            self.tokens[token_id] = name.encode()

    def __call__(self, text: str | bytes) -> list[int]:
        raise NotImplementedError("grammars leave it to the model how a text is spelled")


class LLGuidanceGrammar:
    """Implements `CompiledGrammar`."""

    num_bytes = BYTES_EACH

    def __init__(self, fresh: llguidance.LLMatcher, *, num_words: int) -> None:
        self._fresh = fresh
        self._num_words = num_words

    def matcher(self) -> LLGuidanceMatcher:
        return LLGuidanceMatcher(self._fresh.deep_copy(), num_words=self._num_words)


class LLGuidanceMatcher:
    """Implements `Matcher`."""

    def __init__(self, matcher: llguidance.LLMatcher, *, num_words: int) -> None:
        """num_words: of a mask over all ids that the tokenizer has, which may be more than the model has."""
        self._matcher = matcher
        self._words = np.zeros(num_words, dtype=np.int32)

    def fill(self, mask: Mask) -> None:
        self._matcher.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.nbytes)
        self._check()
        mask[:] = self._words[: len(mask)]

    def accept(self, token_id: int) -> bool:
        accepted = self._matcher.try_consume_tokens([token_id]) == 1
        self._check()
        return accepted

    def rollback(self, num_tokens: int) -> None:
        self._matcher.rollback(num_tokens)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarRefused(f"grammar: {self._matcher.get_error()}", param="grammar")
