"""Conversations stay where they are: TensorRT-LLM's `conversation` rule, by real block hashes.

a session is named                the server it was last on, if that can take it; else the one that its name draws,
                                  unless that has far more requests than the others
a prompt begins as one before     the server that got that one, if enough of the prompt is the same
neither                           the server with the fewest active tokens

What a session was last on is this orchestrator's own knowledge. A name draws the same server everywhere, so the turns
of a chat find each other's blocks whichever orchestrator, or worker of one, they come to.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

from disaggregated.block_hash import BlockHash
from orchestrator.routing.candidate import Asked, Candidate, Choice, preferred
from orchestrator.routing.policies import LeastLoaded
from orchestrator.routing.rendezvous import rendezvous
from orchestrator.routing.sessions import BeginningTable, SessionTable

BLOCKS_MAX: Final = 200_000
"""Blocks of beginnings that are remembered: about 30 MB."""


class Conversation:
    """A session whose server is lost, full or to be avoided moves, and stays where it has moved to."""

    wants_blocks = True

    def __init__(
        self,
        *,
        match_threshold: float = 0.75,
        hash_skip_count: int = 0,
        max_sessions: int = 100_000,
        session_ttl_s: float = 3600.0,
    ) -> None:
        """match_threshold: the share of a prompt's blocks that must have been sent there before.

        hash_skip_count: tokens at the beginning that all conversations share, and that therefore tell nothing.
        """
        self._match_threshold = match_threshold
        self._hash_skip_count = hash_skip_count
        self._sessions = SessionTable(sessions_max=max_sessions, ttl_s=session_ttl_s)
        self._beginnings = BeginningTable(blocks_max=BLOCKS_MAX)
        self._least = LeastLoaded(use_tokens=True)

    def choose(self, asked: Asked, candidates: Sequence[Candidate], *, avoid: Collection[str] = ()) -> Choice:
        allowed = preferred(candidates, avoid)
        if asked.session:
            choice = self._of_session(asked, allowed)
            self._sessions.bind(asked.session, choice.instance_id, now_s=asked.now_s)
        else:
            choice = self._of_beginning(asked, allowed) or self._least.choose(asked, allowed)
            self._beginnings.sent(asked.block_hashes, choice.instance_id)
        return choice

    def _of_session(self, asked: Asked, allowed: Sequence[Candidate]) -> Choice:
        instance_id = self._sessions.find(asked.session, now_s=asked.now_s)
        loads = _loads(allowed)
        if instance_id in loads:
            return Choice(instance_id, "its session is there", (), loads)
        drawn = rendezvous(asked.session, allowed).instance_id
        return Choice(drawn, "its session's name draws it from {}", (len(allowed),), loads)

    def _of_beginning(self, asked: Asked, allowed: Sequence[Candidate]) -> Choice | None:
        depth, instance_id = self._beginnings.deepest(asked.block_hashes)
        if not self._is_same_conversation(depth, asked.block_hashes, allowed[0].block_size):
            return None
        loads = _loads(allowed)
        if instance_id not in loads:
            return None
        told = (depth, len(asked.block_hashes))
        return Choice(instance_id, "{} of its {} blocks were sent there before", told, loads)

    def _is_same_conversation(self, depth: int, hashes: Sequence[BlockHash], block_size: int) -> bool:
        num_skipped = -(-self._hash_skip_count // block_size) if block_size else 0
        num_telling = len(hashes) - num_skipped
        return num_telling > 0 and depth - num_skipped >= self._match_threshold * num_telling


def _loads(candidates: Sequence[Candidate]) -> dict[str, float]:
    """Requests: what else could have been, for who asks why."""
    return {candidate.instance_id: float(candidate.num_requests) for candidate in candidates}
