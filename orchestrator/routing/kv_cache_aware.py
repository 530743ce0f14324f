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
        self._use_tokens = use_tokens
        self._max_num_tokens = max_num_tokens
        self._turns = RoundRobin()

    def choose(self, asked: Asked, candidates: Sequence[Candidate], *, avoid: Collection[str] = ()) -> Choice:
        scores, held = {}, {}
        for candidate in preferred(candidates, avoid):
            name = candidate.instance_id
            held[name] = num_held = asked.num_cached_blocks(candidate)
            num_blocks = -(-asked.num_tokens // candidate.block_size) if candidate.block_size else 0
            scores[name] = num_held / max(1, num_blocks) - self._load(candidate)
        best = max(scores.values())
        chosen = self._turns.next_of([name for name, score in scores.items() if score == best])
        return Choice(chosen, "best score of {}: {:.3f}, {} blocks cached", (len(scores), best, held[chosen]), scores)

    def _load(self, candidate: Candidate) -> float:
        """As a share of what it can have."""
        if self._use_tokens:
            return candidate.num_tokens / self._max_num_tokens
        return candidate.num_requests / self._max_batch_size
