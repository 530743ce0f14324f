"""What a policy sees of a request and of the servers that could take it, and what it answers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Final, NamedTuple, Protocol

from disaggregated.block_hash import BlockHash
from orchestrator.routing.known_blocks import KnownBlocks


class Candidate(Protocol):
    """A server that could take the request, with what is there now, other orchestrators' requests included.

    Servers are looked at as they are: most policies ask for one or two of these, for each request and each server.
    """

    @property
    def instance_id(self) -> str: ...

    @property
    def num_requests(self) -> int: ...

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens of those requests."""

    @property
    def block_size(self) -> int:
        """In tokens; 0 where no server has told."""

    @property
    def names(self) -> Collection[str]:
        """What a weight may call it: its address, its instance, its version."""

    @property
    def known_blocks(self) -> KnownBlocks: ...


class Asked(NamedTuple):
    """A request, as far as it decides where it goes."""

    num_tokens: int
    """Of its prompt, those generated before a loss included."""
    session: str = ""
    """Of the conversation it belongs to; "": nobody says."""
    block_hashes: Sequence[BlockHash] = ()
    """Of its prompt's full blocks, where somebody wants to know them."""
    now_s: float = 0.0

    def num_cached_blocks(self, candidate: Candidate) -> int:
        """Of the prompt, from the first on, that it is known to hold; 0 where nobody knows."""
        return num_blocks_held(candidate, self.num_tokens, self.block_hashes)


def num_blocks_held(server: Candidate, num_tokens: int, hashes: Sequence[BlockHash]) -> int:
    """Whole blocks of a prompt that the server is known to hold; the prompt's last token is computed anyway."""
    known = server.known_blocks
    if not known.num_blocks or not hashes:
        return 0
    return known.num_held(hashes, (num_tokens - 1) // server.block_size) if server.block_size else 0


NO_SCORES: Final[Mapping[str, float]] = {}


class Choice(NamedTuple):
    """Who was chosen; the words are put together when somebody reads them, which nearly nobody does."""

    instance_id: str
    words: str
    """With a place for each of `told`, as `str.format` has it."""
    told: tuple[str | int | float, ...] = ()
    scores: Mapping[str, float] = NO_SCORES
    """Of every candidate that was weighed, by its instance; what they count is the policy's own."""

    @property
    def why(self) -> str:
        return self.words.format(*self.told)


class Policy(Protocol):
    @property
    def wants_blocks(self) -> bool:
        """It looks at the prompt's blocks, or at who holds them."""

    def choose(self, asked: Asked, candidates: Sequence[Candidate], *, avoid: Collection[str] = ()) -> Choice:
        """One of `candidates`, of which there is at least one; one of `avoid` only when there is no other."""


def preferred(candidates: Sequence[Candidate], avoid: Collection[str]) -> Sequence[Candidate]:
    """Those that did not just fail the request, if there are any."""
    assert candidates, "a policy chooses among servers, and there is none"
    if not avoid:
        return candidates
    return [candidate for candidate in candidates if candidate.instance_id not in avoid] or candidates
