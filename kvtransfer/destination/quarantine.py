"""Memory that transfers were to land in and that cannot be taken back yet: how much there may be, and for how long.

Three things are kept apart: a request failed (its caller is told at once), its memory is quiet (its blocks come back),
the process is well. A few blocks in quarantine for a moment are the price of a dead peer; many, or some for ever, mean
that something below us does not end what it began, and that must be said before the pool has been eaten up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Final, Protocol

from kvtransfer.machine import STUCK_AFTER_S

QUARANTINE_SHARE_MAX: Final = 0.25
"""Of the pool."""


class Held(Protocol):
    """A transfer whose outcome stands; a `PendingTransfer` is one."""

    @property
    def transfer_id(self) -> str: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def decided_s(self) -> float | None: ...


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class QuarantineLimits:
    num_blocks: int
    """Of the pool."""
    share_max: float = QUARANTINE_SHARE_MAX
    stuck_after_s: float = STUCK_AFTER_S


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Quarantine:
    """What it is like at one moment."""

    num_blocks: int
    num_transfers: int
    oldest_s: float
    """For how long the first of them has been stopping; 0 when there is none."""
    unhealthy: str
    """In words, with the values; "" while it is within its limits."""


def judge(held: Iterable[Held], limits: QuarantineLimits, *, now_s: float) -> Quarantine:
    """Pure, and cheap enough for each heartbeat: only transfers that have not ended are looked at."""
    num_blocks = num_transfers = 0
    oldest_s, oldest = 0.0, ""
    for each in held:
        assert each.decided_s is not None, f"{each.transfer_id} is in quarantine and not decided"
        num_blocks += each.num_blocks
        num_transfers += 1
        if (age_s := now_s - each.decided_s) >= oldest_s:
            oldest_s, oldest = age_s, each.transfer_id
    reasons = []
    if num_blocks > limits.share_max * limits.num_blocks:
        reasons.append(f"{num_blocks} of {limits.num_blocks} blocks are in quarantine")
    if oldest_s > limits.stuck_after_s:
        reasons.append(f"a read of transfer {oldest} has not ended {oldest_s:.1f} s after it was stopped")
    return Quarantine(
        num_blocks=num_blocks, num_transfers=num_transfers, oldest_s=oldest_s, unhealthy="; ".join(reasons)
    )
