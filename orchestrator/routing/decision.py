"""What was decided for a request and what else could have been, kept in its story.

Most decisions are never looked at: what is kept are names and numbers, and the rest is made when somebody asks.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

CANDIDATES_KEPT: Final = 8
"""Of one decision; the best ones."""


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


class Decision(NamedTuple):
    weighed: tuple[tuple[Any, ...], ...] = ()
    """The fields of a `Scored` each, the chosen one first; empty where nothing was weighed, as in taking turns."""
    num_cached_tokens: int | None = None
    """Of the prompt, that whoever prefills is known to hold; None: its blocks are not followed."""
    ttft_s: float | None = None
    """Estimated, from now; None where nobody asked."""

    @property
    def candidates(self) -> list[Scored]:
        """The chosen one first, then of estimates the least. The scores of two policies have no order between them."""
        scored = [Scored(*fields) for fields in self.weighed]
        if scored and scored[0].queue_s is not None:
            scored[1:] = sorted(scored[1:], key=lambda each: each.score)
        return scored

    def as_json(self) -> dict[str, Any]:
        return {
            "predicted_cached_tokens": self.num_cached_tokens,
            "predicted_ttft_s": self.ttft_s,
            "candidates": [scored.as_json() for scored in self.candidates],
        }


NOTHING_WEIGHED: Final = Decision()
