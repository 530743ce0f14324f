"""Whether blocks are better brought from a peer that holds them than computed here. Pure: time comes in as an argument.

    bringing  =  asking + bytes / rate      both measured, for each peer
    computing =  the steps that are saved   `disaggregated/compute_cost.py`

Guesses stand in for what was not measured yet, and they are on the side of computing: who waits for a transfer that
turns out slow has waited in vain. What was measured and is worse than the guess fades back to it, or a peer that was
slow for a moment would never be asked again.
"""

from __future__ import annotations

import dataclasses
import enum
from collections import OrderedDict
from typing import Final

from disaggregated.compute_cost import StepCost

ASKING_S: Final = 0.010
"""Guess: to be told which blocks a peer holds, and to have their release confirmed."""
MEETING_S: Final = 0.040
"""Guess: the same of a peer that has to be connected first."""
BYTE_S: Final = 1e-9
"""Guess: one gigabyte a second."""
RECENT: Final = 0.3
"""Weight of the last measurement."""
FADES_IN_S: Final = 30.0
"""Half of what was worse than the guess is forgotten after that long."""
MARGIN: Final = 1.25
"""Bringing must be cheaper than computing by this factor, and by GAIN_S_MIN: an estimate is no promise."""
GAIN_S_MIN: Final = 0.002
PULL_S_MAX: Final = 2.0
"""Estimated. Of more blocks only the beginning is brought."""
PATIENCE: Final = 10.0
"""A pull may take that many times its estimate, or `patience_s`; less where that is half of what it was to save."""
REST_S: Final = 1.0
"""A peer that failed us is not asked for so long; doubled with each failure in a row."""
REST_S_MAX: Final = 60.0
PEERS_MAX: Final = 256
"""Known at a time; when full, the one that was not asked for longest is forgotten."""
BYTES_FOR_RATE_MIN: Final = 1 << 18
"""Fewer bytes say something about asking, and nothing about the rate."""


class Verdict(enum.StrEnum):
    """What becomes of a hint; the words are the metric's labels."""

    PULLED = "pulled"
    COMPUTING_IS_CHEAPER = "computing_is_cheaper"
    ALREADY_HERE = "already_here"
    NOT_THERE = "not_there"
    """It was asked, and holds nothing of it any more."""
    NO_ROOM = "no_room"
    """For the blocks, in our own pool."""
    TOO_LATE = "too_late"
    FAILED = "failed"
    RESTING = "resting"
    """It failed a moment ago, and is not asked."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PullPlan:
    """What is worth bringing. `num_blocks` of 0: nothing."""

    num_blocks: int
    pull_s: float
    """Estimated, of these blocks; of all that were offered when there are none."""
    compute_s: float
    num_considered_blocks: int
    """Offered, and not here already."""

    def deadline_s(self, patience_s: float) -> float:
        """The most that a pull may delay a prompt."""
        return min(max(PATIENCE * self.pull_s, patience_s), (self.pull_s + self.compute_s) / 2)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Quote:
    """The prices of one moment, for one peer. Immutable: any thread may plan with it."""

    step: StepCost
    asking_s: float
    byte_s: float
    block_size: int
    """Tokens."""
    block_bytes: int
    """Of all layers."""
    chunk_size: int
    """Tokens of a step."""

    def pull_s(self, num_blocks: int) -> float:
        return self.asking_s + self.byte_s * self.block_bytes * num_blocks

    def compute_s(self, num_cached: int, num_blocks: int, *, num_tokens: int) -> float:
        """Of `num_blocks` blocks after the first `num_cached`, in a prompt of `num_tokens`."""
        begin, end = num_cached * self.block_size, (num_cached + num_blocks) * self.block_size
        return self.step.part_s(begin, end, num_tokens=num_tokens, chunk_size=self.chunk_size)

    def plan(self, num_cached: int, num_offered: int, *, num_tokens: int) -> PullPlan:
        """The first `num_cached` blocks of a prompt are here, the first `num_offered` there.

        A later token costs more to compute, and none costs more to bring: so of what is brought at all, the more the
        better. Only PULL_S_MAX makes it a part.
        """
        considered = max(0, num_offered - num_cached)
        block_s = self.byte_s * self.block_bytes
        most = considered if self.pull_s(considered) <= PULL_S_MAX else int((PULL_S_MAX - self.asking_s) / block_s)
        most = max(0, most)
        pull_s, compute_s = self.pull_s(most), self.compute_s(num_cached, most, num_tokens=num_tokens)
        is_worth_it = most > 0 and MARGIN * pull_s <= compute_s and compute_s - pull_s >= GAIN_S_MIN
        return PullPlan(
            num_blocks=most if is_worth_it else 0,
            pull_s=pull_s,
            compute_s=compute_s,
            num_considered_blocks=considered,
        )


@dataclasses.dataclass(slots=True)
class _Average:
    guess: float
    value: float
    measured_at_s: float | None = None

    def at(self, now_s: float) -> float:
        if self.measured_at_s is None or self.value <= self.guess:
            return self.value
        kept: float = 0.5 ** ((now_s - self.measured_at_s) / FADES_IN_S)
        return self.guess + (self.value - self.guess) * kept

    def add(self, measured: float, *, now_s: float) -> None:
        """A first measurement replaces the guess."""
        now = measured if self.measured_at_s is None else self.at(now_s)
        self.value = now + RECENT * (measured - now)
        self.measured_at_s = now_s


@dataclasses.dataclass(slots=True)
class _Peer:
    asking: _Average = dataclasses.field(default_factory=lambda: _Average(ASKING_S, ASKING_S))
    meeting: _Average = dataclasses.field(default_factory=lambda: _Average(MEETING_S, MEETING_S))
    byte: _Average = dataclasses.field(default_factory=lambda: _Average(BYTE_S, BYTE_S))
    num_failures: int = 0
    """In a row."""
    rests_until_s: float = 0.0


class PullCosts:
    """What asking and bringing has cost, by peer. Invariant: at most PEERS_MAX are known."""

    def __init__(self) -> None:
        self._peers: OrderedDict[str, _Peer] = OrderedDict()

    def prices(self, instance_id: str, *, is_connected: bool, now_s: float) -> tuple[float, float] | None:
        """Seconds for asking, and for a byte; None while the peer is not to be asked."""
        peer = self._peer(instance_id)
        if now_s < peer.rests_until_s:
            return None
        asking = peer.asking if is_connected else peer.meeting
        return asking.at(now_s), peer.byte.at(now_s)

    def pulled(
        self,
        instance_id: str,
        *,
        was_connected: bool,
        asking_s: float,
        num_bytes: int,
        transfer_s: float,
        now_s: float,
    ) -> None:
        """asking_s: what was spent beside the transfer."""
        peer = self._peer(instance_id)
        peer.num_failures = 0
        (peer.asking if was_connected else peer.meeting).add(asking_s, now_s=now_s)
        if num_bytes >= BYTES_FOR_RATE_MIN:
            peer.byte.add(transfer_s / num_bytes, now_s=now_s)

    def failed(self, instance_id: str, *, now_s: float) -> None:
        peer = self._peer(instance_id)
        peer.rests_until_s = now_s + min(REST_S_MAX, REST_S * 2.0**peer.num_failures)
        peer.num_failures = min(peer.num_failures + 1, 16)

    def _peer(self, instance_id: str) -> _Peer:
        peer = self._peers.setdefault(instance_id, _Peer())
        self._peers.move_to_end(instance_id)
        while len(self._peers) > PEERS_MAX:
            self._peers.popitem(last=False)
        return peer
