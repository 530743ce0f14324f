"""What an engine is told when it is made: its bounds, and what it has beside them."""

from __future__ import annotations

import dataclasses

from disaggregated.engine.grammar.api import Grammars
from disaggregated.engine.host_tier.copies import BlockCopier
from disaggregated.engine.scheduler_limits import SchedulerLimits
from disaggregated.engine.speculation import Speculation


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits(SchedulerLimits):
    """Those of a step, and those of a request."""

    num_blocks: int
    """Size of the runner's pool, in blocks of `block_size` tokens."""
    max_seq_len: int
    """Prompt and generated tokens of one sequence."""
    num_waiting_max: int = 4096
    """Requests that wait to start; submit() refuses when there are as many."""
    vocab_size: int = 2**31
    """Token ids that the runner takes; a request with another one is refused, and cannot crash it."""

    def __post_init__(self) -> None:
        least = min(self.block_size, self.max_num_tokens, self.max_batch_size, self.max_seq_len)
        assert least > 0, f"a limit is not positive: {self}"

    @property
    def num_tokens_max(self) -> int:
        """Prompt and generated tokens at which a sequence ends, its last token needing no room in the pool."""
        return min(self.max_seq_len, self.num_blocks * self.block_size + 1)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """What an engine may have and may be without."""

    speculation: Speculation | None = None
    """Makes drafts; None: every step brings a sequence one token. Not together with `overlap`: a draft continues tokens
    that the host knows."""
    overlap: bool = False
    """The runner is an OverlappingRunner, and a step is launched before the one before it is finished."""
    copier: BlockCopier | None = None
    """The host tier's memory, in which evicted blocks live on; None: there is none."""
    grammars: Grammars | None = None
    """Compiles what texts must match; None: a request with a grammar is refused."""
    event_buffer_max_size: int = 0
    """Changes of the prefix cache kept between two steps, for take_block_events(); 0: none."""

    def __post_init__(self) -> None:
        assert not (self.overlap and self.speculation), "a draft continues tokens that the host knows"
