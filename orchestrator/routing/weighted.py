"""Shares of the traffic by weight: a new version gets its tenth, whatever the number of servers that run it.

Smooth weighted round robin, as nginx does it (its commit 52327e0627f4, 2012): each turn everybody's credit grows by
their weight, who has most is taken, and pays what all have got together. So the turns of a small share are spread out
evenly, and over any `sum of weights` turns the counts are exact.
"""

from __future__ import annotations

import math
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

    def __init__(self, weights: Mapping[str, float]) -> None:
        """weights: at least one, none negative."""
        self._weights = dict(weights)
        self._credits = dict.fromkeys([*weights, REST], 0.0)
        self._least = {name: LeastLoaded() for name in self._credits}

    def choose(self, asked: Asked, candidates: Sequence[Candidate], *, avoid: Collection[str] = ()) -> Choice:
        groups: dict[str, list[Candidate]] = {}
        scores = {}
        for candidate in preferred(candidates, avoid):
            name = self._name_of(candidate)
            scores[candidate.instance_id] = self._weights.get(name, 0.0)
            if name in groups:
                groups[name].append(candidate)
            else:
                groups[name] = [candidate]
        weights = {name: self._weights.get(name, 0.0) for name in groups}
        total = sum(weights.values())
        if not total:  # Nobody with a weight is there: better served by the others than not at all.
            weights, scores = dict.fromkeys(groups, 1.0), dict.fromkeys(scores, 1.0)
            total = float(len(groups))
        name = self._next(weights, total)
        choice = self._least[name].choose(asked, groups[name])
        told = (weights[name] / total, name, *choice.told)
        return Choice(choice.instance_id, "share {:.0%} of {}; " + choice.words, told, scores)

    def _next(self, weights: Mapping[str, float], total: float) -> str:
        chosen, most = "", -math.inf
        for name, weight in weights.items():
            self._credits[name] = credit = self._credits[name] + weight
            if credit > most or (credit == most and name > chosen):
                chosen, most = name, credit
        self._credits[chosen] -= total
        return chosen

    def _name_of(self, candidate: Candidate) -> str:
        names = candidate.names
        for name in self._weights:
            if name in names:
                return name
        return REST
