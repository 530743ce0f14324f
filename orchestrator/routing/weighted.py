"""Shares of the traffic by weight: a new version gets its tenth, whatever the number of servers that run it.

Smooth weighted round robin, as nginx does it (its commit 52327e0627f4, 2012): each turn everybody's credit grows by
their weight, who has most is taken, and pays what all have got together. So the turns of a small share are spread out
evenly, and over any `sum of weights` turns the counts are exact.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from orchestrator.routing.candidate import Asked, Candidate, Choice, preferred
from orchestrator.routing.policies import LeastLoaded

REST = "*"
"""The weight of all servers together that no other weight names."""


class Weighted:
    """A weight belongs to a name: a server's address, instance or version. Servers of one name share its turns, the
    least loaded first. A name whose servers are all away costs the others nothing.

    Invariant: credits add up to 0 but for rounding.
    """

    wants_blocks = False
    wants_tokens = False

    def __init__(self, weights: Mapping[str, float]) -> None:
        """weights: at least one, none negative."""
        self._weights = dict(weights)
        self._credits = dict.fromkeys([*weights, REST], 0.0)
        self._least = {name: LeastLoaded() for name in self._credits}

    def choose(self, asked: Asked, candidates: Sequence[Candidate], *, avoid: Collection[str] = ()) -> Choice:
        groups: dict[str, list[Candidate]] = {}
        for candidate in preferred(candidates, avoid):
            groups.setdefault(self._name_of(candidate), []).append(candidate)
        weights = {name: self._weights.get(name, 0.0) for name in groups}
        if not any(weights.values()):  # Nobody with a weight is there: better served by the others than not at all.
            weights = dict.fromkeys(groups, 1.0)
        name = self._next(weights)
        choice = self._least[name].choose(asked, groups[name])
        share = weights[name] / sum(weights.values())
        scores = {each.instance_id: weights[group] for group, members in groups.items() for each in members}
        return Choice(choice.instance_id, f"share {share:.0%} of {name}; {choice.why}", scores)

    def _next(self, weights: Mapping[str, float]) -> str:
        for name, weight in weights.items():
            self._credits[name] += weight
        chosen = max(weights, key=lambda name: (self._credits[name], name))
        self._credits[chosen] -= sum(weights.values())
        return chosen

    def _name_of(self, candidate: Candidate) -> str:
        return next((name for name in self._weights if name in candidate.names), REST)
