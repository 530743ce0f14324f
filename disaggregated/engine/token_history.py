"""Which tokens a sequence has and how often they were generated: what penalties, bad words and budgets look at.

It follows its sequence token by token, so a step costs what is new, not what is there; and it is made of nothing but
the sequence's tokens, so a server that continues a sequence makes the same one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from disaggregated.engine.thinking import Thinking
from disaggregated.sampling_params import BAD_WORD_TOKENS_MAX, SamplingParams

Ids = npt.NDArray[np.int64]
Counts = npt.NDArray[np.float32]


class TokenHistory:
    """Invariant: after `follow`, each token that was generated, and where `counts_prompt` each of the prompt, is in
    `_ids` once, and its count, at the same place, is how often it was generated."""

    __slots__ = ("_counts", "_counts_prompt", "_ids", "_num_prompt_tokens", "_num_seen", "_place", "tail", "thinking")

    def __init__(self, *, num_prompt_tokens: int, counts_prompt: bool, thinking: Thinking | None = None) -> None:
        """`num_prompt_tokens` of the client's own prompt: everything behind it was generated, here or elsewhere."""
        self._num_prompt_tokens = num_prompt_tokens
        self._counts_prompt = counts_prompt
        self._num_seen = 0
        self._ids: Ids = np.empty(64, dtype=np.int64)
        self._counts: Counts = np.zeros(64, dtype=np.float32)
        self._place: dict[int, int] = {}
        self.tail: tuple[int, ...] = ()
        """The tokens generated last, as many as a bad word may look back on."""
        self.thinking = thinking
        """Has followed the same tokens; None: the reply may reason as long as it wants."""

    def follow(self, token_ids: Sequence[int]) -> None:
        """`token_ids` are those of the call before and more: the prompt and what came after it, all of them known."""
        if self._num_seen == 0:
            self._num_seen = self._num_prompt_tokens
            if self._counts_prompt:
                self._see_prompt(token_ids[: self._num_prompt_tokens])
        new = token_ids[self._num_seen :]
        for token_id in new:
            assert token_id >= 0, "a token that is not known yet"
            self._counts[self._place_of(token_id)] += 1.0
        if self.thinking is not None:
            self.thinking.follow(new)
        self._num_seen = len(token_ids)
        self.tail = tuple(token_ids[max(self._num_prompt_tokens, len(token_ids) - BAD_WORD_TOKENS_MAX + 1) :])

    def counts(self, drafts: Sequence[int] = ()) -> tuple[Ids, Counts]:
        """(N) token ids, each once, and how often each was generated; as if `drafts` had been generated too."""
        size = len(self._place)
        ids, counts = self._ids[:size], self._counts[:size]
        if not drafts:
            return ids, counts
        counts = counts.copy()
        new: dict[int, int] = {}
        for draft in drafts:
            if (place := self._place.get(draft)) is not None:
                counts[place] += 1.0
            else:
                new[draft] = new.get(draft, 0) + 1
        return (
            np.concatenate([ids, np.fromiter(new.keys(), np.int64, len(new))]),
            np.concatenate([counts, np.fromiter(new.values(), np.float32, len(new))]),
        )

    def _see_prompt(self, token_ids: Sequence[int]) -> None:
        unique = np.unique(np.asarray(token_ids, dtype=np.int64))
        self._ids = np.concatenate([unique, np.empty(64, dtype=np.int64)])
        self._counts = np.zeros(len(self._ids), dtype=np.float32)
        self._place = {token_id: place for place, token_id in enumerate(unique.tolist())}

    def _place_of(self, token_id: int) -> int:
        place = self._place.get(token_id)
        if place is None:
            place = self._place[token_id] = len(self._place)
            if place == len(self._ids):
                self._ids = np.concatenate([self._ids, np.empty_like(self._ids)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._ids[place] = token_id
        return place


def history_of(sampling: SamplingParams, num_tokens: int) -> TokenHistory | None:
    """For a request that came with `num_tokens`; None where nothing asks for its history."""
    if not (sampling.has_penalties or sampling.bad_words or sampling.thinking):
        return None
    return TokenHistory(
        num_prompt_tokens=max(0, num_tokens - sampling.num_emitted),
        counts_prompt=sampling.repetition_penalty != 1.0,
        thinking=None if sampling.thinking is None else Thinking(sampling.thinking),
    )
