from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Temper:
    """How badly a server behaves. Probabilities are per call."""

    latency_s: float = 0.002
    step_s: float = 0.01
    prefill_token_s: float = 0.0002
    refusal: float = 0.0
    damaged_transfer: float = 0.0
    max_batch_size: int = 8
    max_seq_len: int = 4096
    num_blocks: int = 400
    tokens_a_step_max: int = 1
    """More than one: as speculative decoding brings them."""
    cache_blocks: int = 0
    """Of the prefix cache; 0: there is none."""
    prefills_in_turn: bool = False
    """One prompt at a time, as it is in truth; else all at once, each as fast as if it were alone."""
