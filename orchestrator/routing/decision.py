"""What was decided for a request and what else could have been, kept in its story."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

CANDIDATES_KEPT: Final = 8
"""Of one decision; the best ones."""


class Scored(NamedTuple):
    """One way that was weighed. Of a policy that looks at one hop, the other one's name is empty."""

    context: str
    generation: str
    score: float
    parts: Mapping[str, float]
    """What the score is made of."""

    def as_json(self) -> dict[str, Any]:
        return {"context": self.context, "generation": self.generation, "score": self.score, **self.parts}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    candidates: tuple[Scored, ...] = ()
    """The chosen one first, then the others by their score; empty where nothing was weighed, as in taking turns."""
    num_cached_tokens: int | None = None
    """Of the prompt, that whoever prefills is known to hold; None: its blocks are not followed."""
    ttft_s: float | None = None
    """Estimated, from now; None where nobody asked."""

    def as_json(self) -> dict[str, Any]:
        return {
            "predicted_cached_tokens": self.num_cached_tokens,
            "predicted_ttft_s": self.ttft_s,
            "candidates": [scored.as_json() for scored in self.candidates],
        }


NOTHING_WEIGHED: Final = Decision()
