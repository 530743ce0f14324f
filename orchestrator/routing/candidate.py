"""What a policy sees of a request and of the servers that could take it, and what it answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple, Protocol

from disaggregated.block_hash import BlockHash


class Asked(NamedTuple):
    """A request, as far as it decides where it goes."""

    num_tokens: int
    """Of its prompt, those generated before a loss included."""
    session: str = ""
    """Of the conversation it belongs to; "": nobody says."""
    block_hashes: Sequence[BlockHash] = ()
    """Of its prompt's full blocks, where somebody wants to know them."""
    now_s: float = 0.0


@dataclasses.dataclass(slots=True)
class Candidate:
    """A server that could take the request, with what is there now, other orchestrators' requests included."""

    instance_id: str
    num_requests: int
    num_tokens: int
    """Prompt and generated tokens of those requests."""
    num_cached_blocks: int = 0
    """Of the prompt, from the first on, that it is known to hold; 0 where nobody knows."""
    block_size: int = 0
    """In tokens; 0 where no server has told."""
    names: Collection[str] = ()
    """What a weight may call it: its address, its instance, its version."""


class Choice(NamedTuple):
    instance_id: str
    why: str
    scores: Mapping[str, float] = {}
    """Of every candidate that was weighed, by its instance; what they count is the policy's own."""


class Policy(Protocol):
    @property
    def wants_blocks(self) -> bool:
        """It looks at the prompt's blocks, or at who holds them."""

    @property
    def wants_tokens(self) -> bool:
        """It looks at `Candidate.num_tokens`."""

    def choose(self, asked: Asked, candidates: Sequence[Candidate], *, avoid: Collection[str] = ()) -> Choice:
        """One of `candidates`, of which there is at least one; one of `avoid` only when there is no other."""


def preferred(candidates: Sequence[Candidate], avoid: Collection[str]) -> Sequence[Candidate]:
    """Those that did not just fail the request, if there are any."""
    assert candidates, "a policy chooses among servers, and there is none"
    return [candidate for candidate in candidates if candidate.instance_id not in avoid] or candidates
