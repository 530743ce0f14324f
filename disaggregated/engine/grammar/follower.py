"""One sequence under a grammar: it follows the tokens that were generated, and says which may come next.

The text may begin free, up to a run of tokens such as a model's `</think>`; the matcher begins after it. The text may
end only where the grammar says so: until then no token that ends it is allowed, and once nothing else can follow, one
of them is all that is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from disaggregated.engine.grammar.api import Mask, Matcher
from disaggregated.engine.grammar.bitmask import allows, forbid, full_mask


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

    @property
    def num_followed(self) -> int:
        """Tokens of the generated text that are known here."""
        return len(self._token_ids)

    def follow(self, token_ids: Iterable[int]) -> bool:
        """Go on by tokens that were sampled. False: the grammar does not allow one of them; the rest is left out."""
        return all(self._accept(token_id) for token_id in token_ids)

    def masks(self, draft_token_ids: Sequence[int], forbidden_token_ids: Collection[int]) -> list[Mask]:
        """What may follow, and what may follow each draft; nothing has changed afterwards.

        Where a draft is not allowed it cannot be accepted, so what may follow it never matters.
        `forbidden_token_ids`: not to be sampled yet; unless the grammar allows nothing else.
        """
        found = [self._mask(forbidden_token_ids)]
        num_tried = 0
        for draft in draft_token_ids:
            if not (draft < self._vocab_size and allows(found[-1], draft) and self._accept(draft)):
                break
            num_tried += 1
            found.append(self._mask(forbidden_token_ids))
        for _ in range(num_tried):
            self._take_back()
        return found + [full_mask(self._vocab_size)] * (1 + len(draft_token_ids) - len(found))

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
