"""One sequence under a grammar: it follows the tokens that were generated, and says which may come next.

The text may begin free, up to a run of tokens such as a model's `</think>`; the matcher begins after it. The text may
end only where the grammar says so: until then no token that ends it is allowed, and once nothing else can follow, one
of them is all that is.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from typing import Final

from disaggregated.engine.grammar.api import Mask, Matcher
from disaggregated.engine.grammar.bitmask import allows, forbid, full_mask
from disaggregated.errors import GrammarRefused

TIME_MAX_S: Final = 0.1
"""Of this thread's own time, for one token: to follow it, or to find what may come after it. Both take microseconds, at
worst a few milliseconds; but everybody's step waits for them, and where a text can be read in ever more ways they take
longer with each token."""


class GrammarFollower:
    """Owned by the engine's thread.

    Invariant: the matcher has accepted exactly the tokens from `_begins_at` on, end-of-text tokens excepted.
    """

    def __init__(
        self, matcher: Matcher, *, starts_after: Sequence[int], eos_token_ids: Collection[int], vocab_size: int
    ) -> None:
        self._matcher = matcher
        self._starts_after = list(starts_after)
        self._eos_token_ids = frozenset(eos_token_ids)
        self._vocab_size = vocab_size
        self._token_ids: list[int] = []
        self._begins_at: int | None = None if starts_after else 0
        """How many tokens come before the grammar; None while the text is still free."""
        self._num_ended = 0
        """Of the last tokens: end-of-text tokens, and what follows them, which the matcher never sees."""
        self.problem: GrammarRefused | None = None
        """Why this grammar is followed no longer: from here on every token is allowed, and none is followed."""

    @property
    def num_followed(self) -> int:
        """Tokens of the generated text that are known here."""
        return len(self._token_ids)

    def follow(self, token_ids: Sequence[int]) -> bool:
        """Go on by tokens that were sampled. False: the grammar does not allow one of them, or there is a problem; the
        rest is left out."""
        started_s = time.thread_time()
        try:
            follows = self.problem is None and all(self._accept(token_id) for token_id in token_ids)
        except GrammarRefused as problem:
            self.problem, follows = problem, False
        self._check_time(started_s, len(token_ids))
        return follows

    def masks(self, draft_token_ids: Sequence[int], forbidden_token_ids: Collection[int]) -> list[Mask]:
        """What may follow, and what may follow each draft; nothing has changed afterwards.

        Where a draft is not allowed it cannot be accepted, so what may follow it never matters.
        `forbidden_token_ids`: not to be sampled yet; unless the grammar allows nothing else.
        """
        started_s = time.thread_time()
        num_wanted = 1 + len(draft_token_ids)
        try:
            found = self._masks(draft_token_ids, forbidden_token_ids) if self.problem is None else []
        except GrammarRefused as problem:
            self.problem, found = problem, []
        self._check_time(started_s, num_wanted)
        return found + [full_mask(self._vocab_size)] * (num_wanted - len(found))

    def _check_time(self, started_s: float, num_tokens: int) -> None:
        spent_s = time.thread_time() - started_s
        if spent_s > TIME_MAX_S * max(1, num_tokens) and self.problem is None:
            self.problem = GrammarRefused(
                f"grammar: too ambiguous, a token takes {spent_s:.2f} s, the limit is {TIME_MAX_S} s", param="grammar"
            )

    def _masks(self, draft_token_ids: Sequence[int], forbidden_token_ids: Collection[int]) -> list[Mask]:
        """Up to the first draft that is not allowed."""
        found = [self._mask(forbidden_token_ids)]
        num_tried = 0
        for draft in draft_token_ids:
            if not (draft < self._vocab_size and allows(found[-1], draft) and self._accept(draft)):
                break
            num_tried += 1
            found.append(self._mask(forbidden_token_ids))
        for _ in range(num_tried):
            self._take_back()
        return found

    def _accept(self, token_id: int) -> bool:
        if self._begins_at is not None:
            if self._num_ended or token_id in self._eos_token_ids:
                self._num_ended += 1
            elif not self._matcher.accept(token_id):
                return False
        self._token_ids.append(token_id)
        if self._begins_at is None and self._token_ids[-len(self._starts_after) :] == self._starts_after:
            self._begins_at = len(self._token_ids)
        return True

    def _take_back(self) -> None:
        if self._begins_at == len(self._token_ids) and self._starts_after:
            self._begins_at = None
        elif self._num_ended:
            self._num_ended -= 1
        elif self._begins_at is not None:
            self._matcher.rollback(1)
        self._token_ids.pop()

    def _mask(self, forbidden_token_ids: Collection[int]) -> Mask:
        mask = full_mask(self._vocab_size)
        if self._num_ended:
            return mask  # Nobody reads what is sampled here.
        if self._begins_at is None:
            forbid(mask, self._eos_token_ids)
        else:
            last = mask[-1]
            self._matcher.fill(mask)
            mask[-1] &= last
        if forbidden_token_ids:
            narrowed = mask.copy()
            forbid(narrowed, forbidden_token_ids)
            mask = narrowed if narrowed.any() else mask
        return mask
