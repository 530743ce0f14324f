"""What a transfer that has landed tells."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Landed:
    """A transfer of which every byte is here, verified, and confirmed by its source."""

    first_token: int
    num_tokens: int
    """Of the prompt."""
    num_bytes: int
    """That travelled; blocks that were skipped did not."""
    transfer_s: float
    """First block asked for to last block verified; 0 when nothing travelled."""
    exposed_s: float
    """Last publication received to last block verified: what the prefill did not hide."""
    transport: str
    num_publications: int = 1
    """In which the source published it, by chunks or by layers."""
    hidden_bytes: int = 0
    """Of `num_bytes`: verified before the last publication came."""
