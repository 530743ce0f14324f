"""How fast the queue moves and how long a request takes once it is dispatched, from what was seen of late. Pure.

Two promises rest on it: a Retry-After that is true, and that nobody is kept waiting who would be served too late. Both
look at times while there was more work than servers; an idle quarter of an hour says nothing about the pace.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Collection
from typing import Final, TypeVar

_DEPARTURES: Final = 64
_SEEN: Final = 128
"""Requests that ended, which estimates look back on."""
_SEEN_MIN: Final = 8
"""With fewer nothing is foretold, and after so many more it is foretold anew."""
_ANEW_MAX: Final = 32
"""When many were seen, after so many more: looking back on all of them takes as long as ten requests do here."""
_CAREFUL: Final = 0.9
"""The share of requests that take no longer than the estimate."""
RETRY_AFTER_S_MAX: Final = 60
RETRY_AFTER_S_UNKNOWN: Final = 5
"""While nothing has left the queue yet."""


Number = TypeVar("Number", int, float)


class QueuePace:
    """Tokens a second at which the queue is served while somebody waits.

    What was placed at once had no one to wait for and is not counted. Each other departure is counted with the time for
    which it, or whoever stood before it, was all that kept it waiting: since the departure before, or since it came.
    """

    def __init__(self) -> None:
        self._departures: deque[tuple[float, int]] = deque(maxlen=_DEPARTURES)
        self._last_s = -math.inf

    def departed(self, *, cost: int, since_s: float, now_s: float) -> None:
        """since_s: when it came into the queue."""
        if now_s > since_s:
            self._departures.append((now_s - max(since_s, self._last_s), cost))
        self._last_s = now_s

    def wait_s(self, tokens_ahead: int, *, now_s: float) -> float | None:
        """Until so many tokens are served; None when that is not known. A standstill counts as long as it lasts."""
        if not tokens_ahead:
            return 0.0
        if len(self._departures) < _SEEN_MIN:  # One short request that waited for a server to come back is no pace.
            return None
        served_s = sum(gap_s for gap_s, _ in self._departures)
        tokens = sum(cost for _, cost in self._departures)
        standstill_s = max(0.0, now_s - self._last_s - served_s / len(self._departures))
        return tokens_ahead * (served_s + standstill_s) / tokens

    def retry_after_s(self, tokens_ahead: int, *, now_s: float) -> int:
        """Whole seconds until a newcomer may hope to be taken; at least 1."""
        wait_s = self.wait_s(tokens_ahead, now_s=now_s)
        return whole_seconds(RETRY_AFTER_S_UNKNOWN if wait_s is None else wait_s)


class ServiceTimes:
    """What requests took from their dispatch on."""

    def __init__(self) -> None:
        self._answers: deque[int] = deque(maxlen=_SEEN)
        self._prompts: deque[int] = deque(maxlen=_SEEN)
        self._ttft_s: deque[float] = deque(maxlen=_SEEN)
        self._tpot_s: deque[float] = deque(maxlen=_SEEN)
        self._estimate = _Estimate()
        self._num_new = 0
        """That the estimate knows nothing of."""

    def ended(self, *, num_prompt: int, num_tokens: int, ttft_s: float, tpot_s: float | None) -> None:
        """ttft_s: from the dispatch. tpot_s: None where there was but one token."""
        self._answers.append(num_tokens)
        self._prompts.append(num_prompt)
        self._ttft_s.append(ttft_s)
        if tpot_s is not None:
            self._tpot_s.append(tpot_s)
        self._num_new += 1
        if self._num_new >= _SEEN_MIN and 4 * self._num_new >= min(len(self._answers), 4 * _ANEW_MAX):
            self._num_new = 0
            self._estimate = _Estimate(
                num_answer=math.ceil(sum(self._answers) / len(self._answers)),
                num_long_answer=_careful(self._answers),
                num_prompt=sum(self._prompts) / len(self._prompts),
                ttft_s=_careful(self._ttft_s),
                tpot_s=_careful(self._tpot_s) if self._tpot_s else 0.0,
            )

    def num_tokens(self, max_tokens: int) -> int:
        """Of an answer that may have `max_tokens`."""
        usual = self._estimate.num_answer
        return max_tokens if max_tokens < usual else usual

    def ttft_s(self, num_prompt: int) -> float:
        """From its dispatch, for a prompt of `num_prompt` tokens; 0 while nothing is known.

        A prompt that is longer than the usual one is thought to take longer in proportion.
        """
        return self._estimate.ttft_s * max(1.0, num_prompt / self._estimate.num_prompt)

    def total_s(self, num_prompt: int, max_tokens: int) -> float:
        """From its dispatch to its last token; 0 while nothing is known."""
        estimate = self._estimate
        num_tokens = min(max_tokens, estimate.num_long_answer)
        return self.ttft_s(num_prompt) + estimate.tpot_s * (num_tokens - 1)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Estimate:
    num_answer: int = 256
    num_long_answer: int = 256
    num_prompt: float = 1.0
    ttft_s: float = 0.0
    tpot_s: float = 0.0


def _careful(values: Collection[Number]) -> Number:
    return sorted(values)[math.ceil(_CAREFUL * len(values)) - 1]


def whole_seconds(seconds: float) -> int:
    """As Retry-After says it: rounded up, 1 at least, and not so long that a client gives up."""
    return min(max(1, math.ceil(seconds)), RETRY_AFTER_S_MAX)
