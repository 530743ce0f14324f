"""What was decided for a request and what else could have been, kept in its story.

Most decisions are never looked at: what is kept are names and numbers, and words and tables are made of them when
somebody asks. No server is kept, with all that it knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from orchestrator.routing.candidate import Choice

CANDIDATES_TOLD: Final = 8
"""Of one decision that are told; the best ones."""


class Scored(NamedTuple):
    """One way that was weighed. Of a policy that looks at one hop, the other one's name is empty."""

    context: str
    generation: str
    score: float
    queue_s: float | None = None
    """From here on what the score of an estimate is made of, in seconds; a policy's has no parts."""
    compute_s: float | None = None
    gap_s: float | None = None
    harm_s: float | None = None
    num_cached_tokens: int | None = None

    def as_json(self) -> dict[str, Any]:
        return {name: value for name, value in self._asdict().items() if value is not None}


Prefilled = tuple[str, int, float, float]
"""What is kept of a server that could have computed the prompt: its name, tokens cached there, seconds until what is
before it has been computed, and seconds in which the prompt is."""
Alone = tuple[str, int, float, float, float, float]
"""Of a generation server that could have done everything: the same, and its gap and harm."""


class Weighed(NamedTuple):
    """The ways that were weighed by what they cost: each of `prefilled` with each of `decoded`, then those `alone`."""

    taken: int
    """Its place among all of them."""
    prefilled: Sequence[Prefilled] = ()
    decoded: Sequence[str] = ()
    gaps_s: Sequence[float] = ()
    """Of each with each."""
    alone: Sequence[Alone] = ()

    @property
    def why(self) -> str:
        num_pairs = len(self.gaps_s)
        if self.taken < num_pairs:
            _, num_cached, queue_s, compute_s = self.prefilled[self.taken // len(self.decoded)]
        else:
            _, num_cached, queue_s, compute_s, _, _ = self.alone[self.taken - num_pairs]
        cached = f", {num_cached} tokens cached" if num_cached else ""
        ttft_s = queue_s + compute_s
        return f"least of {num_pairs + len(self.alone)}: first token in {1000 * ttft_s:.1f} ms{cached}"

    def scored(self) -> list[Scored]:
        """The one that was taken first, then all others by what they cost."""
        gaps_s = iter(self.gaps_s)
        pairs = [(context, name) for context in self.prefilled for name in self.decoded]
        ways = [_scored(context[0], (name, *context[1:], next(gaps_s), 0.0)) for context, name in pairs]
        ways += [_scored("", alone) for alone in self.alone]
        taken = ways.pop(self.taken)
        return [taken, *sorted(ways, key=lambda way: way.score)]


def _scored(context: str, rest: Alone) -> Scored:
    generation, num_cached, queue_s, compute_s, gap_s, harm_s = rest
    score_s = queue_s + compute_s + gap_s + harm_s
    return Scored(context, generation, score_s, queue_s, compute_s, gap_s, harm_s, num_cached)


class Decision(NamedTuple):
    num_cached_tokens: int | None = None
    """Of the prompt, that whoever prefills is known to hold; None: its blocks are not followed."""
    ttft_s: float | None = None
    """Estimated, from now; None where nobody asked."""
    because: str = ""
    """Of a way that is not the rule."""
    context: Choice | None = None
    """What the policy of a hop has chosen, where it has one."""
    generation: Choice | None = None
    weighed: Weighed | None = None
    """Where a hop has no policy."""

    @property
    def why(self) -> str:
        if self.weighed is not None:
            reasons = [f"{choice.why}; " for choice in (self.context, self.generation) if choice is not None]
            return "".join([self.because, *reasons, self.weighed.why])
        hops = (("context", self.context), ("generation", self.generation))
        return self.because + "; ".join([f"{hop}: {choice.why}" for hop, choice in hops if choice is not None])

    @property
    def candidates(self) -> list[Scored]:
        """The chosen one first, then of estimates the least. The scores of two policies have no order between them."""
        if self.weighed is not None:
            return self.weighed.scored()[:CANDIDATES_TOLD]
        found = [Scored(name, "", score) for name, score in _of_policy(self.context)]
        return found + [Scored("", name, score) for name, score in _of_policy(self.generation)]

    def as_json(self) -> dict[str, Any]:
        return {
            "predicted_cached_tokens": self.num_cached_tokens,
            "predicted_ttft_s": self.ttft_s,
            "candidates": [scored.as_json() for scored in self.candidates],
        }


def _of_policy(choice: Choice | None) -> list[tuple[str, float]]:
    """The chosen one first, then others as the policy told them."""
    if choice is None or choice.instance_id not in choice.scores:
        return []
    mine = choice.instance_id
    names = [mine, *[name for name in choice.scores if name != mine]][:CANDIDATES_TOLD]
    return [(name, choice.scores[name]) for name in names]


NOTHING_WEIGHED: Final = Decision()
