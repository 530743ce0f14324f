"""Which server of a pool takes the next request. Pure: who may take it goes in, one of them and the reason come out.

Each pool has a policy of its own, so the two hops of a request are chosen by separate rules. A policy sees only servers
that are ready and have room; servers that just failed this request stand behind all others, whatever the rule says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Protocol

from disaggregated.config.deployment import RouterConfig
from disaggregated.errors import ConfigError


@dataclasses.dataclass(frozen=True, slots=True)
class Candidate:
    """A server that could take the request, with what this orchestrator has there now."""

    instance_id: str
    num_requests: int
    num_tokens: int
    """Prompt and generated tokens of those requests."""
    num_cached_blocks: int = 0
    """Of the prompt, from the first on, that it is known to hold; 0 where nobody knows."""


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    instance_id: str
    why: str


class Policy(Protocol):
    def choose(self, candidates: Sequence[Candidate], *, avoid: Collection[str] = ()) -> Choice:
        """One of `candidates`, of which there is at least one; one of `avoid` only when there is no other."""


class RoundRobin:
    """Takes turns in the order of names, so that servers that come and go do not disturb the others' turns."""

    def __init__(self) -> None:
        self._last = ""

    def choose(self, candidates: Sequence[Candidate], *, avoid: Collection[str] = ()) -> Choice:
        names = sorted(candidate.instance_id for candidate in _preferred(candidates, avoid))
        self._last = next((name for name in names if name > self._last), names[0])
        return Choice(self._last, f"its turn among {len(names)}")


class LeastLoaded:
    """The fewest active requests, or tokens; of equals who holds most of the prompt; of those each in its turn."""

    def __init__(self, *, use_tokens: bool = False) -> None:
        self._use_tokens = use_tokens
        self._turns = RoundRobin()

    def choose(self, candidates: Sequence[Candidate], *, avoid: Collection[str] = ()) -> Choice:
        allowed = _preferred(candidates, avoid)
        least = min(self._load(candidate) for candidate in allowed)
        idlest = [candidate for candidate in allowed if self._load(candidate) == least]
        most = max(candidate.num_cached_blocks for candidate in idlest)
        chosen = self._turns.choose([each for each in idlest if each.num_cached_blocks == most]).instance_id
        return Choice(chosen, f"least loaded of {len(allowed)}: {least} {'tokens' if self._use_tokens else 'requests'}")

    def _load(self, candidate: Candidate) -> int:
        return candidate.num_tokens if self._use_tokens else candidate.num_requests


def _preferred(candidates: Sequence[Candidate], avoid: Collection[str]) -> Sequence[Candidate]:
    assert candidates, "a policy chooses among servers, and there is none"
    return [candidate for candidate in candidates if candidate.instance_id not in avoid] or candidates


def make_policy(router: RouterConfig) -> Policy:
    """
    Raises:
        ConfigError: names the router type that does not exist.
    """
    match router.type:
        case "round_robin":
            return RoundRobin()
        case "load_balancing":
            return LeastLoaded(use_tokens=bool(router.args.get("use_tokens", False)))
        case unknown:
            raise ConfigError(f"router type {unknown!r} is neither 'round_robin' nor 'load_balancing'")
