"""What the engine is asked and what it answers: plain values, so that schedulers and servers test without torch.

A request goes one of three ways through an engine:

    PREFILL_ONLY   context server       chunks → first token → blocks stay leased until release()
    FROM_REMOTE    generation server    reserve() → blocks are filled by a transfer → admit() → decode
    FULL           anywhere             chunks → first token → decode (local prefill, and the one-process oracle)
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from typing import Protocol

from disaggregated.sampling_params import SamplingParams


class RequestKind(enum.Enum):
    PREFILL_ONLY = "prefill_only"
    FROM_REMOTE = "from_remote"
    FULL = "full"


class FinishReason(enum.StrEnum):
    STOP = "stop"
    LENGTH = "length"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    request_id: str
    kind: RequestKind
    token_ids: Sequence[int]
    sampling: SamplingParams


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
    started_s: float = 0.0
    """When the step that computed it began, on the engine's clock."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TokensSampled:
    request_id: str
    first_position: int
    """Index in the sequence, prompt included, of `token_ids[0]`."""
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    """When set, the request is over; its blocks are back, except a PREFILL_ONLY's, which wait for release()."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RequestFailed:
    """The request is over without a finish reason; its blocks are back."""

    request_id: str
    error: Exception


EngineEvent = ChunkComputed | TokensSampled | RequestFailed


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledSequence:
    """One row of a forward pass: `token_ids` at positions `first_position…` of one sequence."""

    request_id: str
    token_ids: Sequence[int]
    first_position: int
    block_table: Sequence[int]
    """Covers at least `first_position + len(token_ids)` tokens."""
    sampling: SamplingParams | None
    """None: a chunk in the middle of a prompt, nothing is sampled after it."""
    forbidden_token_ids: frozenset[int] = frozenset()
    """Stop tokens, while `min_tokens` is not reached."""


class ModelRunner(Protocol):
    """Runs one forward pass over the paged KV cache. Owned by the engine's thread."""

    def execute(self, batch: Sequence[ScheduledSequence]) -> Sequence[int | None]:
        """Write the batch's KV and return, for each row, the token sampled after its last position.

        Rows are independent: a row's token and KV are bitwise the same whatever its batch mates and chunking.
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
    preemptions_total: int
