"""Speculative decoding without a second model: what followed the last few tokens before may follow them again.

Texts repeat themselves: code, quotations of the prompt, names, tables. So the longest suffix of a sequence that has
occurred in it before is looked up, and what followed it there is computed along with the next token. A draft that
turns out wrong costs its computation and nothing else; which tokens come out never depends on the drafts.

The lookup is "prompt lookup decoding" (Saxena, 2023), a form of Yang et al., "Inference with reference: lossless
acceleration of large language models" (2023). How long a draft may be is ours: as long as its last token is likelier
to be right than it costs, both measured while serving.

Everything a draft is made of are the sequence's own tokens. So nothing has to travel with a sequence: the server that
continues it looks up the same tokens, and no request learns anything about another one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence as AnySequence
from typing import Final

import numpy as np
import numpy.typing as npt

from disaggregated.config.server import SpeculativeConfig
from disaggregated.engine.sequence import Sequence

LOOKBACK_MAX: Final = 1 << 16
"""Tokens that are searched, the last ones: bounds the cost of a lookup to tens of microseconds."""
NGRAM_SIZE_MIN: Final = 2
"""A single token that occurred before says too little about the next one."""
ACCEPTANCE_AT_START: Final = 0.6
PROBE_AFTER: Final = 32
"""Tokens that a sequence whose drafts don't pay goes without one; doubled after each try that fails."""
PROBE_AFTER_MAX: Final = 512

Tokens = npt.NDArray[np.int32]


def repeated_suffix(tokens: Tokens, *, size_max: int, is_oldest: bool = False) -> int:
    """The index after the longest suffix (of NGRAM_SIZE_MIN to `size_max` tokens) where it occurs before the end.

    0 when it does not. The latest such place, or the oldest one; it may overlap with the suffix itself.
    """
    last = len(tokens) - 1
    ends = np.flatnonzero(tokens[: max(last, 0)] == tokens[-1:])
    size = 1
    while len(ends) and size < size_max:
        longer = ends[ends >= size]
        longer = longer[tokens[longer - size] == tokens[last - size]]
        if not len(longer):
            break
        ends, size = longer, size + 1
    if not len(ends) or size < min(NGRAM_SIZE_MIN, size_max):
        return 0
    return int(ends[0 if is_oldest else -1]) + 1


class TextSoFar:
    """A sequence's tokens as an array that grows with them."""

    def __init__(self) -> None:
        self._tokens: Tokens = np.empty(256, dtype=np.int32)
        self._num_tokens = 0

    def follow(self, token_ids: AnySequence[int]) -> Tokens:
        """The array of `token_ids`, which are those of the call before and more. Copies only what is new."""
        if len(token_ids) > len(self._tokens):
            grown = np.empty(2 * len(token_ids), dtype=np.int32)
            grown[: self._num_tokens] = self._tokens[: self._num_tokens]
            self._tokens = grown
        self._tokens[self._num_tokens : len(token_ids)] = token_ids[self._num_tokens :]
        self._num_tokens = len(token_ids)
        return self._tokens[: self._num_tokens]


class Acceptance:
    """How likely the next draft of one sequence is right, from the drafts that it was given so far."""

    def __init__(self) -> None:
        self._tries = 4.0
        self._hits = 4.0 * ACCEPTANCE_AT_START
        self._next_probe = 0
        self._probe_after = PROBE_AFTER

    @property
    def probability(self) -> float:
        return self._hits / self._tries

    def verified(self, num_drafted: int, num_accepted: int) -> None:
        """What lies behind the first wrong token was not tried."""
        self._tries = 0.8 * self._tries + num_accepted + (num_accepted < num_drafted)
        self._hits = 0.8 * self._hits + num_accepted

    def num_drafts(self, num_max: int, *, worth: float, position: int) -> int:
        """So many that the last one is right with a probability of at least `worth`.

        When it is none, one is tried now and then: texts change.
        """
        probability = min(self.probability, 0.98)
        if probability >= worth:
            self._probe_after = PROBE_AFTER
            self._next_probe = position + PROBE_AFTER
            return min(num_max, int(math.log(worth) / math.log(probability) + 1e-9))
        if position < self._next_probe:
            return 0
        self._next_probe = position + self._probe_after
        self._probe_after = min(2 * self._probe_after, PROBE_AFTER_MAX)
        return min(num_max, 1)


class StepCost:
    """What one token more in a step costs, as a part of what the step costs anyway.

    A line through the durations of the last decode steps over their number of tokens, by least squares with weights
    that fade. While the numbers hardly differ nothing can be learnt, and what is known stays.
    """

    FADING: Final = 0.95

    def __init__(self, *, tokens_for_free: float = 10.0) -> None:
        self._sums = np.zeros(5)
        self.tokens_for_free = tokens_for_free
        """So many tokens double the duration of an empty step: large where weights are read for each step."""

    def took(self, num_tokens: int, seconds: float) -> None:
        x, y = float(num_tokens), seconds
        self._sums = self.FADING * self._sums + (1.0, x, y, x * x, x * y)
        n, sum_x, sum_y, sum_xx, sum_xy = self._sums.tolist()
        spread = n * sum_xx - sum_x * sum_x
        if spread < 0.5 * n * n or n < 4:
            return
        slope = (n * sum_xy - sum_x * sum_y) / spread
        intercept = (sum_y - slope * sum_x) / n
        if slope > 0:
            self.tokens_for_free = min(max(intercept / slope, 1.0), 1000.0)
        elif sum_y > 0:
            self.tokens_for_free = 1000.0

    def worth(self, num_tokens: int) -> float:
        """How likely a draft must be right to bring more than it costs, in a step of `num_tokens` without it.

        With a step of a + b n seconds, D drafts of which a part p is accepted raise the tokens a second from
        n / (a + b n) to (n + p D) / (a + b (n + D)) exactly when p > b n / (a + b n).
        """
        return num_tokens / (self.tokens_for_free + num_tokens)


@dataclasses.dataclass(slots=True)
class Drafting:
    """What speculation knows of one sequence; lies in `sequence.drafting` and ends with it."""

    text: TextSoFar = dataclasses.field(default_factory=TextSoFar)
    acceptance: Acceptance = dataclasses.field(default_factory=Acceptance)


class Speculation:
    """Makes the drafts of an engine's sequences, and learns from what became of them."""

    def __init__(
        self,
        *,
        max_draft_len: int,
        max_matching_ngram_size: int,
        is_use_oldest: bool = False,
        max_concurrency: int | None = None,
    ) -> None:
        """max_concurrency: no drafts in a step with more decoding sequences; None: as their cost says."""
        assert max_draft_len > 0, f"drafts of {max_draft_len} tokens"
        assert max_matching_ngram_size > 0, f"n-grams of {max_matching_ngram_size} tokens"
        self._draft_len_max = max_draft_len
        self._ngram_size_max = max_matching_ngram_size
        self._is_use_oldest = is_use_oldest
        self.max_concurrency = max_concurrency
        self._cost = StepCost()

    def draft(self, sequence: Sequence, num_max: int, *, num_tokens_in_step: int) -> list[int]:
        """Guesses of the tokens after the last one that `sequence` has; no more than it may still generate.

        `num_tokens_in_step`: what is computed in any case.
        """
        num_max = min(num_max, self._draft_len_max, _num_useful(sequence))
        if num_max < 1:
            return []
        drafting = sequence.drafting = sequence.drafting or Drafting()
        worth = self._cost.worth(num_tokens_in_step)
        num_drafts = drafting.acceptance.num_drafts(num_max, worth=worth, position=len(sequence.token_ids))
        return self.guess(sequence, num_drafts) if num_drafts else []

    def guess(self, sequence: Sequence, num_drafts: int) -> list[int]:
        """Tokens that may follow, `num_drafts` or none; a step with them has room, and they are worth trying."""
        assert sequence.drafting is not None, f"{sequence.request_id} is not drafting"
        tokens = sequence.drafting.text.follow(sequence.token_ids)[-LOOKBACK_MAX:]
        start = repeated_suffix(tokens, size_max=self._ngram_size_max, is_oldest=self._is_use_oldest)
        if start == 0:
            return []
        period = len(tokens) - start  # A repetition that reaches up to the end goes on with itself.
        return [int(tokens[start + index % period]) for index in range(num_drafts)]

    def verified(self, sequence: Sequence, num_drafted: int, num_accepted: int) -> None:
        assert sequence.drafting is not None, f"{sequence.request_id} was given no drafts"
        sequence.drafting.acceptance.verified(num_drafted, num_accepted)

    def step_took(self, num_tokens: int, seconds: float) -> None:
        """Of a step in which everybody decodes."""
        self._cost.took(num_tokens, seconds)


def speculation_of(config: SpeculativeConfig) -> Speculation | None:
    if config.decoding_type == "none":
        return None
    return Speculation(
        max_draft_len=config.max_draft_len,
        max_matching_ngram_size=config.max_matching_ngram_size,
        is_use_oldest=config.is_use_oldest,
        max_concurrency=config.max_concurrency,
    )


def _num_useful(sequence: Sequence) -> int:
    """A draft needs a token after it; and all tokens of one row have the same ones forbidden."""
    sampling, num_generated = sequence.sampling, sequence.num_generated
    left = min(sampling.max_tokens - num_generated, sequence.num_tokens_max - len(sequence.token_ids))
    if num_generated < sampling.min_tokens:
        left = min(left, sampling.min_tokens - num_generated)
    return left - 1
