"""What the engine is asked and what it answers: plain values, so that schedulers and servers test without torch.

A request goes one of three ways through an engine:

    PREFILL_ONLY   context server       chunks → first token → blocks stay leased until release()
    FROM_REMOTE    generation server    reserve() → blocks are filled by a transfer → admit() → decode
    FULL           anywhere             chunks → first token → decode (local prefill, and the one-process oracle)
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Sequence
from typing import Final, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from disaggregated.engine.token_history import TokenHistory
from disaggregated.sampling_params import SamplingParams
from disaggregated.token_logprobs import TokenLogprob


class RequestKind(enum.Enum):
    PREFILL_ONLY = "prefill_only"
    FROM_REMOTE = "from_remote"
    FULL = "full"


class FinishReason(enum.StrEnum):
    STOP = "stop"
    LENGTH = "length"
    REPETITION = "repetition"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    request_id: str
    kind: RequestKind
    token_ids: Sequence[int]
    sampling: SamplingParams
    priority: int = 0
    """Lower goes first."""
    cache_salt: str = ""
    """Its blocks are found only by requests with the same one."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """Blocks of a FROM_REMOTE request. The caller fills `block_ids[num_cached_blocks:]`, then calls `admit()`.

    The first `num_cached_blocks` are prefix-cache hits: shared, already right, never to be written.
    """

    request_id: str
    block_ids: tuple[int, ...]
    num_cached_blocks: int


# What a step tells, in order. The server sends each on to whoever waits for it.


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ChunkComputed:
    """The KV of the first `num_computed_tokens` of the prompt is in `block_ids` (the whole table so far)."""

    request_id: str
    num_computed_tokens: int
    num_cached_tokens: int
    block_ids: tuple[int, ...]
    num_chunk_tokens: int = 0
    """Computed in this step; the ones before them were there."""
    started_s: float = 0.0
    """When the step that computed it began, on the engine's clock."""
    finished_s: float = 0.0


@dataclasses.dataclass(slots=True, kw_only=True)
class TokensSampled:
    """Nobody changes one. It is not frozen because one is made for each row of each step: that would take three times
    as long."""

    request_id: str
    first_position: int
    """Index in the sequence, prompt included, of `token_ids[0]`."""
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    """When set, the request is over; its blocks are back, except a PREFILL_ONLY's, which wait for release()."""
    logprobs: Sequence[TokenLogprob] = ()
    """Of `token_ids`, where the request asks for them."""
    prompt_logprobs: Sequence[TokenLogprob] = ()
    """Once, with the first token, where the request asks for them: of the prompt's second token and those after it."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RequestFailed:
    """The request is over without a finish reason; its blocks are back."""

    request_id: str
    error: Exception


EngineEvent = ChunkComputed | TokensSampled | RequestFailed


TokenMask = npt.NDArray[np.int32]
"""Bit i % 32 of word i // 32 says whether token i may come."""


@dataclasses.dataclass(slots=True, kw_only=True)
class WantedLogprobs:
    """What a row is to tell beside its tokens. The runner fills in the answers before it gives the tokens out."""

    num_top: int | None = None
    """Likeliest tokens for each one that is sampled; None: nothing is told of these."""
    token_ids: Sequence[int] = ()
    """Told of instead of the likeliest, in this order."""
    prompt_num_top: int = 0
    prompt_targets: Sequence[int] = ()
    """Tokens of the prompt, of which it is told how likely they were: the ones after the row's tokens, from
    `token_ids[first_target]` on."""
    first_target: int = 0
    sampled: Sequence[TokenLogprob] = ()
    """Of what was sampled after the last token and after each draft, rejected ones too."""
    prompt: Sequence[TokenLogprob] = ()
    """Of `prompt_targets`."""


@dataclasses.dataclass(slots=True, kw_only=True)
class ScheduledSequence:
    """One row of a forward pass: `token_ids` at positions `first_position…` of one sequence. Not frozen for the reason
    that `TokensSampled` gives."""

    request_id: str
    token_ids: Sequence[int]
    first_position: int
    block_table: Sequence[int]
    """Covers at least `first_position + len(token_ids)` tokens."""
    sampling: SamplingParams | None
    """None: a chunk in the middle of a prompt, nothing is sampled after it."""
    forbidden_token_ids: frozenset[int] = frozenset()
    """Stop tokens, while `min_tokens` is not reached: for each token that this row may bring."""
    draft_token_ids: Sequence[int] = ()
    """Guesses of what follows `token_ids`, computed right after them. Only where something is sampled."""
    history: TokenHistory | None = None
    """Up to the last of `token_ids`, where the sampling looks at it. The sequence's own: it holds during the call."""
    logprobs: WantedLogprobs | None = None
    masks: Callable[[], Sequence[TokenMask | None]] | None = None
    """Which tokens may come, in each place that is sampled; asked for when the logits are under way."""
    previous_row: int | None = None
    """Not None: `token_ids` is one token that the host does not know yet, `PLACEHOLDER` stands for it. It is what this
    row of the batch launched before samples. Only a runner that can `launch()` is given such rows."""


PLACEHOLDER: Final = -1
"""No token id of any model."""


class ModelRunner(Protocol):
    """Runs one forward pass over the paged KV cache. Owned by the engine's thread."""

    def execute(self, batch: Sequence[ScheduledSequence]) -> Sequence[Sequence[int]]:
        """Write the batch's KV and return the tokens sampled for each row.

        None for a chunk in the middle of a prompt, else the token after the last of `token_ids`; and after each draft
        that is the very token sampled in its place, one more. So a row brings 1 + the number of drafts accepted, and
        they are what would have been sampled one by one. The KV of rejected drafts is garbage that a later step
        overwrites before anything attends to it.

        Rows are independent: a row's tokens and KV are bitwise the same whatever its batch mates and chunking.
        """


class PendingStep(Protocol):
    """A forward pass that the device has been given."""

    def tokens(self) -> Sequence[Sequence[int]]:
        """Wait for the device; then as of `ModelRunner.execute`. Called once, in the order of the launches."""


@runtime_checkable
class OverlappingRunner(ModelRunner, Protocol):
    """A runner on a device that works on its own: the next step is prepared while it computes this one."""

    def launch(self, batch: Sequence[ScheduledSequence]) -> PendingStep:
        """Give the device a forward pass and return without waiting for it.

        The device does them in the order of launching. At most two are unfinished at any time, and only the token of a
        row without drafts is asked for by `previous_row`.
        """


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatistics:
    """A consistent snapshot, taken between two steps."""

    step: int
    step_age_s: float
    num_running: int
    num_waiting: int
    num_waiting_tokens: int
    num_blocks: int
    num_blocks_free: int
    """Including cached blocks that can be evicted."""
    num_blocks_leased: int
    """Held for a transfer, on either side; quarantined ones among them."""
    num_blocks_quarantined: int = 0
    """Of a cancelled transfer that may still write into them."""
    prompt_tokens_total: int
    prompt_cached_tokens_total: int
    generation_tokens_total: int
    draft_tokens_total: int = 0
    """Guessed by speculative decoding, and computed."""
    accepted_draft_tokens_total: int = 0
    """Of these, the ones that were right."""
    preemptions_total: int
    num_host_slots: int = 0
    """Blocks that the host tier has room for."""
    num_host_slots_used: int = 0
    num_host_slots_claimed: int = 0
    """Kept for swapped-out sequences until they return."""
    offloaded_blocks_total: int = 0
    """Copied to the host tier."""
    onboarded_blocks_total: int = 0
    """Copied back from it."""
    swapped_sequences_total: int = 0
    """Preempted ones whose blocks were kept for them."""
