"""Grammars over token ids that nobody has to compile, or that a test compiles when it likes.

The text of such a grammar is a number N: the sum of the tokens so far and of the next one must not be a multiple of N,
and the text may end, with token 0, when its sum leaves the remainder 1. After 40 tokens it must.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

import numpy as np

from disaggregated.engine.grammar.api import Mask
from disaggregated.engine.grammar.bitmask import forbid, full_mask
from disaggregated.engine.grammar.follower import GrammarFollower
from disaggregated.errors import GrammarRefused
from disaggregated.grammar import Grammar, GrammarKind
from tests.support.fake_runner import VOCAB_SIZE

END_ID = 0
NUM_TOKENS_MAX = 40


def fake_grammar(number: int, starts_after: tuple[int, ...] = ()) -> Grammar:
    return Grammar(GrammarKind.LARK, str(number), starts_after)


class FakeMatcher:
    """Implements `Matcher`."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._sums = [0]

    def fill(self, mask: Mask) -> None:
        mask[:] = full_mask(VOCAB_SIZE)
        forbid(mask, [token_id for token_id in range(VOCAB_SIZE) if not self._allows(token_id)])

    def accept(self, token_id: int) -> bool:
        if not self._allows(token_id):
            return False
        self._sums.append(self._sums[-1] + token_id)
        return True

    def rollback(self, num_tokens: int) -> None:
        assert num_tokens < len(self._sums), "more is taken back than was accepted"
        del self._sums[len(self._sums) - num_tokens :]

    def _allows(self, token_id: int) -> bool:
        if token_id == END_ID:
            return self._sums[-1] % self._number == 1 or len(self._sums) > NUM_TOKENS_MAX
        return len(self._sums) <= NUM_TOKENS_MAX and bool((self._sums[-1] + token_id) % self._number)


def follower_of(grammar: Grammar) -> GrammarFollower:
    return GrammarFollower(
        FakeMatcher(int(grammar.text)),
        starts_after=grammar.starts_after,
        eos_token_ids=[END_ID],
        vocab_size=VOCAB_SIZE,
    )


class FakeGrammars:
    """Implements `Grammars`. `is_slow`: nothing is there before compile_all(). A grammar of text "bad" is refused."""

    def __init__(self, *, is_slow: bool = False) -> None:
        self.eos_token_ids = frozenset({END_ID})
        self.is_slow = is_slow
        self._waiting: list[Callable[[], None]] = []

    def begin(self, grammar: Grammar) -> Future[GrammarFollower]:
        beginning: Future[GrammarFollower] = Future()

        def compile_now() -> None:
            if grammar.text == "bad":
                beginning.set_exception(GrammarRefused("grammar: bad", param="grammar"))
            else:
                beginning.set_result(follower_of(grammar))

        if self.is_slow:
            self._waiting.append(compile_now)
        else:
            compile_now()
        return beginning

    def compile_all(self) -> None:
        waiting, self._waiting = self._waiting, []
        for compile_now in waiting:
            compile_now()


def is_text_of(number: int, token_ids: list[int]) -> bool:
    """Whether a whole text, its end included, is one of `fake_grammar(number)`."""
    sums = np.cumsum(token_ids[:-1])
    return token_ids[-1] == END_ID and bool((sums % number).all()) and END_ID not in token_ids[:-1]
