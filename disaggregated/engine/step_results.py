"""What a finished step brought to each of its rows, and what was computed in all."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as AnySequence

from disaggregated.engine.api import PLACEHOLDER, ChunkComputed, EngineStatistics, TokensSampled
from disaggregated.engine.block_pool import BlockPool
from disaggregated.engine.launched_step import LaunchedRow
from disaggregated.engine.scheduler import Scheduler
from disaggregated.engine.sequence import Sequence
from disaggregated.engine.tiered_cache import TieredCache


@dataclasses.dataclass(slots=True)
class Totals:
    """Tokens since the engine was made."""

    prompt: int = 0
    prompt_cached: int = 0
    generation: int = 0
    draft: int = 0
    accepted_draft: int = 0

    def count_prompt(self, sequence: Sequence) -> None:
        self.prompt += sequence.num_prompt_tokens
        self.prompt_cached += sequence.num_cached_prompt_tokens

    def count_drafts(self, num_drafts: int, num_accepted: int) -> None:
        self.draft += num_drafts
        self.accepted_draft += num_accepted


def chunk_computed(row: LaunchedRow, *, num_blocks: int, started_s: float, finished_s: float) -> ChunkComputed:
    """num_blocks: of the sequence, that hold what is computed of it by now."""
    sequence = row.sequence
    return ChunkComputed(
        request_id=sequence.request_id,
        num_computed_tokens=row.num_computed,
        num_cached_tokens=sequence.num_cached_prompt_tokens,
        block_ids=tuple(sequence.block_table[:num_blocks]),
        num_chunk_tokens=row.num_tokens,
        started_s=started_s,
        finished_s=finished_s,
    )


def take_tokens(row: LaunchedRow, token_ids: AnySequence[int]) -> TokensSampled:
    """One token and the accepted drafts, up to the one that ends the sequence; nothing in a prompt's midst.

    The sequence has them afterwards.
    """
    sequence, finish_reason = row.sequence, None
    if row.logprobs is not None:
        sequence.prompt_logprobs.extend(row.logprobs.prompt)
    kept: list[int] = []
    for position, token_id in enumerate(token_ids, start=row.num_computed):
        if kept:
            sequence.token_ids.append(PLACEHOLDER)
            sequence.num_computed += 1
        finish_reason = sequence.learn(position, token_id)
        kept.append(token_id)
        if finish_reason is not None:
            break
    return TokensSampled(
        request_id=sequence.request_id,
        first_position=row.num_computed,
        token_ids=tuple(kept),
        finish_reason=finish_reason,
        logprobs=() if row.logprobs is None else tuple(row.logprobs.sampled[: len(kept)]),
        prompt_logprobs=tuple(sequence.prompt_logprobs) if row.num_computed == sequence.num_prompt_tokens else (),
    )


def snapshot(
    scheduler: Scheduler, pool: BlockPool, cache: TieredCache, totals: Totals, *, step: int, step_age_s: float
) -> EngineStatistics:
    return EngineStatistics(
        step=step,
        step_age_s=step_age_s,
        num_running=scheduler.num_running,
        num_waiting=scheduler.num_waiting,
        num_waiting_tokens=scheduler.num_prompt_tokens_left,
        num_blocks=pool.num_blocks,
        num_blocks_free=pool.num_free,
        num_blocks_leased=pool.num_leased,
        num_blocks_quarantined=pool.num_quarantined,
        prompt_tokens_total=totals.prompt,
        prompt_cached_tokens_total=totals.prompt_cached,
        generation_tokens_total=totals.generation,
        draft_tokens_total=totals.draft,
        accepted_draft_tokens_total=totals.accepted_draft,
        preemptions_total=scheduler.preemptions_total,
        num_host_slots=cache.host.num_slots,
        num_host_slots_used=cache.host.num_used,
        num_host_slots_claimed=cache.host.num_claimed,
        offloaded_blocks_total=cache.offloaded_blocks_total,
        onboarded_blocks_total=cache.onboarded_blocks_total,
        swapped_sequences_total=cache.swapped_sequences_total,
    )
