"""Policies that count what a server has: turns, requests, tokens. Each hop of a request has one of its own.

A policy sees only servers that are ready and have room; servers that just failed this request stand behind all others,
whatever the rule says.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence

from orchestrator.routing.candidate import NO_SCORES, Asked, Candidate, Choice, preferred


class RoundRobin:
    """Takes turns in the order of names, so that servers that come and go do not disturb the others' turns."""

    wants_blocks = False

    def __init__(self) -> None:
        self._last = ""

    def choose(self, asked: Asked, candidates: Sequence[Candidate], *, avoid: Collection[str] = ()) -> Choice:
        names = [candidate.instance_id for candidate in preferred(candidates, avoid)]
        return tuple.__new__(Choice, (self.next_of(names), "its turn among {}", (len(names),), NO_SCORES))

    def next_of(self, names: Collection[str]) -> str:
        """Whose turn it is."""
        last = self._last
        self._last = min([name for name in names if name > last] or names)
        return self._last


class LeastLoaded:
    """The fewest active requests, or tokens; of equals who holds most of the prompt; of those each in its turn."""

    wants_blocks = False

    def __init__(self, *, use_tokens: bool = False) -> None:
        self._use_tokens = use_tokens
        self._words = "least loaded of {}: {} tokens" if use_tokens else "least loaded of {}: {} requests"
        self._turns = RoundRobin()

    def choose(self, asked: Asked, candidates: Sequence[Candidate], *, avoid: Collection[str] = ()) -> Choice:
        allowed = preferred(candidates, avoid)
        if self._use_tokens:
            loads = {candidate.instance_id: candidate.num_tokens for candidate in allowed}
        else:
            loads = {candidate.instance_id: candidate.num_requests for candidate in allowed}
        least = min(loads.values())
        idlest = [name for name, load in loads.items() if load == least]
        if asked.block_hashes and len(idlest) > 1:
            held = {each.instance_id: asked.num_cached_blocks(each) for each in allowed if each.instance_id in idlest}
            most = max(held.values())
            idlest = [name for name, num_blocks in held.items() if num_blocks == most]
        return Choice(self._turns.next_of(idlest), self._words, (len(loads), least), loads)


class PowerOfTwo:
    """Draws two servers, and takes the one with less: nearly as even as asking all, and no stampede to the idlest one
    when several orchestrators see the same figures.

    Mitzenmacher, The Power of Two Choices in Randomized Load Balancing, 1996.
    """

    wants_blocks = False

    def __init__(self, *, use_tokens: bool = False, dice: random.Random | None = None) -> None:
        self._least = LeastLoaded(use_tokens=use_tokens)
        self._random = (dice or random.Random()).random

    def choose(self, asked: Asked, candidates: Sequence[Candidate], *, avoid: Collection[str] = ()) -> Choice:
        allowed = preferred(candidates, avoid)
        choice = self._least.choose(asked, allowed if len(allowed) < 3 else self._two_of(allowed))
        told = (*choice.told, len(allowed))
        return Choice(choice.instance_id, choice.words + ", drawn from {}", told, choice.scores)

    def _two_of(self, allowed: Sequence[Candidate]) -> Sequence[Candidate]:
        """Each pair is as likely as another."""
        one, other = int(len(allowed) * self._random()), int((len(allowed) - 1) * self._random())
        return allowed[one], allowed[other + (other >= one)]
