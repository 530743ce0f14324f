"""Policies that count what a server has: turns, requests, tokens. Each hop of a request has one of its own.

A policy sees only servers that are ready and have room; servers that just failed this request stand behind all others,
whatever the rule says.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence

from orchestrator.routing.candidate import Asked, Candidate, Choice, preferred


class RoundRobin:
    """Takes turns in the order of names, so that servers that come and go do not disturb the others' turns."""

    wants_blocks = False
    wants_tokens = False

    def __init__(self) -> None:
        self._last = ""

    def choose(self, asked: Asked, candidates: Sequence[Candidate], *, avoid: Collection[str] = ()) -> Choice:
        names = [candidate.instance_id for candidate in preferred(candidates, avoid)]
        return Choice(self.next_of(names), f"its turn among {len(names)}")

    def next_of(self, names: Collection[str]) -> str:
        """Whose turn it is."""
        self._last = min([name for name in names if name > self._last] or names)
        return self._last


class LeastLoaded:
    """The fewest active requests, or tokens; of equals who holds most of the prompt; of those each in its turn."""

    wants_blocks = False

    def __init__(self, *, use_tokens: bool = False) -> None:
        self.wants_tokens = use_tokens
        self._turns = RoundRobin()

    def choose(self, asked: Asked, candidates: Sequence[Candidate], *, avoid: Collection[str] = ()) -> Choice:
        allowed = preferred(candidates, avoid)
        loads = {candidate.instance_id: self.load(candidate) for candidate in allowed}
        least = min(loads.values())
        idlest = [candidate for candidate in allowed if loads[candidate.instance_id] == least]
        most = max(candidate.num_cached_blocks for candidate in idlest)
        chosen = self._turns.next_of([each.instance_id for each in idlest if each.num_cached_blocks == most])
        return Choice(chosen, f"least loaded of {len(allowed)}: {least} {self.unit}", loads)

    def load(self, candidate: Candidate) -> int:
        return candidate.num_tokens if self.wants_tokens else candidate.num_requests

    @property
    def unit(self) -> str:
        return "tokens" if self.wants_tokens else "requests"


class PowerOfTwo:
    """Draws two servers, and takes the one with less: nearly as even as asking all, and no stampede to the idlest one
    when several orchestrators see the same figures.

    Mitzenmacher, The Power of Two Choices in Randomized Load Balancing, 1996.
    """

    wants_blocks = False

    def __init__(self, *, use_tokens: bool = False, dice: random.Random | None = None) -> None:
        self.wants_tokens = use_tokens
        self._least = LeastLoaded(use_tokens=use_tokens)
        self._dice = dice or random.Random()

    def choose(self, asked: Asked, candidates: Sequence[Candidate], *, avoid: Collection[str] = ()) -> Choice:
        allowed = preferred(candidates, avoid)
        drawn = self._dice.sample(list(allowed), min(2, len(allowed)))
        choice = self._least.choose(asked, drawn)
        return Choice(choice.instance_id, f"{choice.why}, drawn from {len(allowed)}", choice.scores)
