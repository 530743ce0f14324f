"""A step between its launch and the moment at which its tokens are known."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from collections.abc import Sequence as AnySequence

from disaggregated.engine.api import PLACEHOLDER, PendingStep, ScheduledSequence, TokenMask, WantedLogprobs
from disaggregated.engine.scheduler_limits import Chunk
from disaggregated.engine.sequence import Sequence


@dataclasses.dataclass(frozen=True, slots=True)
class ExecutedStep:
    """Implements `PendingStep` for a runner that computes while it is asked."""

    sampled: AnySequence[AnySequence[int]]

    def tokens(self) -> AnySequence[AnySequence[int]]:
        return self.sampled


@dataclasses.dataclass(slots=True)
class LaunchedRow:
    """What was asked of one sequence; the sequence itself may be steps ahead by now. Not frozen for the reason that
    `TokensSampled` gives."""

    sequence: Sequence
    num_tokens: int
    """Drafts not counted."""
    num_computed: int
    """Of its tokens when the step is finished, drafts not counted. Where it samples, this is the token's position."""
    num_drafts: int
    samples: bool
    tells_progress: bool
    """It is a chunk of a prompt that is computed for the first time."""
    logprobs: WantedLogprobs | None = None
    """Answered when the step is finished."""


@dataclasses.dataclass(slots=True)
class LaunchedStep:
    rows: list[LaunchedRow]
    pending: PendingStep
    started_s: float

    @property
    def num_tokens_decoded(self) -> int | None:
        """With drafts; None when there is a prompt among the rows."""
        if any(row.num_tokens > 1 or not row.samples for row in self.rows):
            return None
        return sum(1 + row.num_drafts for row in self.rows)

    @property
    def decides_what_may_follow(self) -> bool:
        """Of somebody among its rows, the next token cannot be asked for before this step's is known."""
        return any(row.samples and row.sequence.sampling.needs_known_tokens for row in self.rows)

    def row_of(self, sequence: Sequence) -> int:
        return next(index for index, row in enumerate(self.rows) if row.sequence is sequence)


def scheduled(chunk: Chunk, *, before: LaunchedStep | None) -> ScheduledSequence:
    """A chunk as the runner sees it. Its block table is the sequence's own, not a copy: it holds during the call.

    `before`: the step that is not finished yet, which samples the last token of whoever ends with a placeholder.
    """
    sequence, num_tokens, drafts = chunk
    first = sequence.num_computed
    token_ids = sequence.token_ids[first : first + num_tokens]
    waits = token_ids[-1] == PLACEHOLDER
    assert not waits or (before is not None and num_tokens == 1), f"{sequence.request_id}: {token_ids} are not known"
    samples = num_tokens == sequence.num_to_compute
    assert not (samples and sequence.awaits_grammar), f"{sequence.request_id}: its grammar is not there yet"
    if samples and sequence.history is not None:
        sequence.history.follow(sequence.token_ids)
    return ScheduledSequence(
        request_id=sequence.request_id,
        token_ids=token_ids,
        first_position=first,
        block_table=sequence.block_table,
        sampling=sequence.sampling if samples else None,
        forbidden_token_ids=frozenset() if sequence.grammar else sequence.forbidden_token_ids,
        draft_token_ids=drafts,
        history=sequence.history,
        masks=_masks(sequence, drafts) if samples else None,
        logprobs=_wanted_logprobs(sequence, num_tokens, samples=samples),
        previous_row=before.row_of(sequence) if waits and before is not None else None,
    )


def _masks(sequence: Sequence, drafts: AnySequence[int]) -> Callable[[], AnySequence[TokenMask]] | None:
    """Made when the forward pass has begun: a device computes meanwhile."""
    if sequence.grammar is None:
        return None
    return functools.partial(sequence.grammar.masks, drafts, sequence.forbidden_token_ids)


def _wanted_logprobs(sequence: Sequence, num_tokens: int, *, samples: bool) -> WantedLogprobs | None:
    sampling, first = sequence.sampling, sequence.num_computed
    num_top = sampling.logprobs if samples else None
    targets: AnySequence[int] = ()
    first_untold = max(first, len(sequence.prompt_logprobs))
    if sequence.wants_prompt_logprobs:
        targets = sequence.token_ids[first_untold + 1 : min(first + num_tokens + 1, sequence.num_prompt_tokens)]
    if num_top is None and not targets:
        return None
    return WantedLogprobs(
        num_top=num_top,
        token_ids=sampling.logprob_token_ids,
        prompt_num_top=sampling.prompt_logprobs or 0,
        prompt_targets=targets,
        first_target=first_untold - first,
    )


def launched(chunk: Chunk, logprobs: WantedLogprobs | None = None) -> LaunchedRow:
    """Count the chunk as computed, and its token, if it samples one, as there."""
    sequence, num_tokens, drafts = chunk
    tells_progress = sequence.num_generated == 0
    sequence.num_computed += num_tokens
    sequence.num_launched += 1
    samples = sequence.num_to_compute == 0
    if samples:
        sequence.token_ids.append(PLACEHOLDER)
    return LaunchedRow(sequence, num_tokens, sequence.num_computed, len(drafts), samples, tells_progress, logprobs)
