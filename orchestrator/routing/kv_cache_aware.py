"""TensorRT-LLM's `kv_cache_aware` rule: the share of the prompt that is cached, less the share of the batch in use."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from orchestrator.routing.candidate import Asked, Candidate, Choice, preferred
from orchestrator.routing.policies import RoundRobin


class KvCacheAware:
    """Scores `cached blocks / blocks of the prompt - active requests / max_batch_size`; of equals each in its turn.

    What is cached is known block by block from the servers' own events, so a prediction is right but for what changed
    in the last milliseconds.
    """

    wants_blocks = True

    def __init__(self, *, max_batch_size: int = 64, use_tokens: bool = False, max_num_tokens: int = 8192) -> None:
        """use_tokens: load is active tokens over `max_num_tokens` instead."""
        self._max_batch_size = max_batch_size
        self.wants_tokens = use_tokens
        self._max_num_tokens = max_num_tokens
        self._turns = RoundRobin()

    def choose(self, asked: Asked, candidates: Sequence[Candidate], *, avoid: Collection[str] = ()) -> Choice:
        allowed = preferred(candidates, avoid)
        scores = {candidate.instance_id: self._score(asked, candidate) for candidate in allowed}
        best = max(scores.values())
        chosen = self._turns.next_of([name for name, score in scores.items() if score == best])
        held = next(each.num_cached_blocks for each in allowed if each.instance_id == chosen)
        return Choice(chosen, f"best score of {len(allowed)}: {best:.3f}, {held} blocks cached", scores)

    def _score(self, asked: Asked, candidate: Candidate) -> float:
        num_blocks = -(-asked.num_tokens // candidate.block_size) if candidate.block_size else 0
        cached = candidate.num_cached_blocks / max(1, num_blocks)
        if self.wants_tokens:
            return cached - candidate.num_tokens / self._max_num_tokens
        return cached - candidate.num_requests / self._max_batch_size
