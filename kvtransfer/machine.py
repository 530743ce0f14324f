"""The two halves of one transfer as tables, without I/O: what may follow what, and who may free blocks when.

    source        OPENED ─▶ PUBLISHING ─▶ FINISHED ─▶ RELEASED
                    └────────────┴────────────┴─▶ GIVEN_UP │ FAILED │ EXPIRED

    destination   RESERVED ─▶ FOLLOWING ⇄ READING ─▶ … ─▶ CONFIRMING ─▶ LANDED
                    │             │          └▶ STOPPING ─┐    │
                    └─────────────┴───────────────────────┴────┴─▶ CANCELLED │ FAILED

Three things are kept apart: that a request failed, that its memory is quiet, and that a server is healthy. A failed or
cancelled transfer whose read is still running is STOPPING: its outcome is decided, its blocks are not free. A read that
ends later, even well, completes the stopping and revives nothing.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from typing import Final


class InvalidTransition(AssertionError):
    """Our own mistake; the message carries the story."""


# The source's half.


class SourcePhase(enum.StrEnum):
    OPENED = "opened"
    PUBLISHING = "publishing"
    FINISHED = "finished"
    RELEASED = "released"
    """The destination has verified every byte."""
    GIVEN_UP = "given_up"
    """The destination does not want it any more, or has gone."""
    FAILED = "failed"
    """The prefill failed or was cancelled."""
    EXPIRED = "expired"
    """No sign of life from a destination for as long as the lease."""


_SOURCE_ENDS: Final = frozenset({SourcePhase.RELEASED, SourcePhase.GIVEN_UP, SourcePhase.FAILED, SourcePhase.EXPIRED})
_SOURCE_ABANDONED: Final = _SOURCE_ENDS - {SourcePhase.RELEASED}

NEXT_SOURCE: Final[Mapping[SourcePhase, frozenset[SourcePhase]]] = {
    SourcePhase.OPENED: _SOURCE_ABANDONED | {SourcePhase.PUBLISHING, SourcePhase.FINISHED},
    SourcePhase.PUBLISHING: _SOURCE_ABANDONED | {SourcePhase.PUBLISHING, SourcePhase.FINISHED},
    SourcePhase.FINISHED: _SOURCE_ENDS,
    **dict.fromkeys(_SOURCE_ENDS, frozenset()),
}


@dataclasses.dataclass(slots=True)
class SourceTransfer:
    """Invariant: once `is_over`, nothing changes; the caller gives the blocks back at that very transition."""

    transfer_id: str
    phase: SourcePhase = SourcePhase.OPENED
    story: list[tuple[float, SourcePhase]] = dataclasses.field(default_factory=list)

    @property
    def is_over(self) -> bool:
        return self.phase in _SOURCE_ENDS

    def advance(self, to: SourcePhase, *, now_s: float) -> None:
        if to not in NEXT_SOURCE[self.phase]:
            raise InvalidTransition(f"{self.transfer_id}: {self.phase} -> {to}; story={self.story}")
        self.phase = to
        self.story.append((now_s, to))

    def end(self, to: SourcePhase, *, now_s: float) -> bool:
        """True for the one call that ended it; a later end, whatever it says, changes nothing."""
        if self.is_over:
            return False
        self.advance(to, now_s=now_s)
        return True


# The destination's half.


class DestinationPhase(enum.StrEnum):
    RESERVED = "reserved"
    """Blocks are ours; nobody was asked for anything."""
    FOLLOWING = "following"
    """Waiting for publications; no read is running."""
    READING = "reading"
    """Our own read writes into our blocks."""
    CONFIRMING = "confirming"
    """Every block is verified; the source is asked whether its lease held."""
    STOPPING = "stopping"
    """The outcome is decided, and a read has not ended: the blocks are quarantined."""
    LANDED = "landed"
    CANCELLED = "cancelled"
    FAILED = "failed"


class CancelResult(enum.Enum):
    """What a cancel found, and with it whether the blocks may be given back."""

    NOT_FOUND = enum.auto()
    """No such transfer, or one that is over and forgotten: nothing of it is here."""
    ALREADY_COMPLETE = enum.auto()
    CANCELLED_BEFORE_ADVERTISE = enum.auto()
    """The source had not been asked for anything."""
    CANCELLED_WHILE_QUIET = enum.auto()
    """Between two reads."""
    REQUESTED_IN_FLIGHT = enum.auto()
    """A read was told to stop, and has not ended."""
    NOT_CANCELLABLE = enum.auto()
    """A read is running that cannot be told to stop: it has to come to its own end."""
    BACKEND_UNHEALTHY = enum.auto()
    """A read was told to stop so long ago that nobody knows whether it ever will."""

    @property
    def may_free(self) -> bool:
        """Only when no byte can land any more."""
        return self not in _MUST_KEEP


_MUST_KEEP: Final = frozenset(
    {CancelResult.REQUESTED_IN_FLIGHT, CancelResult.NOT_CANCELLABLE, CancelResult.BACKEND_UNHEALTHY}
)
STUCK_AFTER_S: Final = 5.0
"""A read that was stopped ends at its next piece, or with its sockets: well within that. One that has not is stuck."""


_DESTINATION_ENDS: Final = frozenset({DestinationPhase.LANDED, DestinationPhase.CANCELLED, DestinationPhase.FAILED})
_STOP: Final = frozenset({DestinationPhase.CANCELLED, DestinationPhase.FAILED})

NEXT_DESTINATION: Final[Mapping[DestinationPhase, frozenset[DestinationPhase]]] = {
    DestinationPhase.RESERVED: _STOP | {DestinationPhase.FOLLOWING},
    DestinationPhase.FOLLOWING: _STOP | {DestinationPhase.READING, DestinationPhase.CONFIRMING},
    DestinationPhase.READING: frozenset({DestinationPhase.FOLLOWING, DestinationPhase.STOPPING}),
    DestinationPhase.CONFIRMING: _STOP | {DestinationPhase.LANDED},
    DestinationPhase.STOPPING: _STOP,
    **dict.fromkeys(_DESTINATION_ENDS, frozenset()),
}


@dataclasses.dataclass(slots=True)
class DestinationTransfer:
    """Invariant: blocks are writable exactly in READING and STOPPING, which are left only when the read has ended."""

    transfer_id: str
    can_stop: bool = True
    """Whether a read that is running can be told to stop."""
    phase: DestinationPhase = DestinationPhase.RESERVED
    story: list[tuple[float, DestinationPhase]] = dataclasses.field(default_factory=list)
    _decided: DestinationPhase = DestinationPhase.FAILED
    _stopping_since_s: float = 0.0

    @property
    def is_over(self) -> bool:
        return self.phase in _DESTINATION_ENDS

    @property
    def is_writable(self) -> bool:
        """Bytes may still land: the blocks must not be given to anybody."""
        return self.phase in {DestinationPhase.READING, DestinationPhase.STOPPING}

    def advance(self, to: DestinationPhase, *, now_s: float) -> None:
        if to not in NEXT_DESTINATION[self.phase]:
            raise InvalidTransition(f"{self.transfer_id}: {self.phase} -> {to}; story={self.story}")
        self.phase = to
        self.story.append((now_s, to))

    def read_ended(self, *, now_s: float) -> None:
        """The read can write no more, whether it succeeded or not. Completes a stop that was decided meanwhile."""
        stopped = self.phase is DestinationPhase.STOPPING
        self.advance(self._decided if stopped else DestinationPhase.FOLLOWING, now_s=now_s)

    def cancel(self, *, now_s: float) -> CancelResult:
        return self._stop(DestinationPhase.CANCELLED, now_s=now_s)

    def fail(self, *, now_s: float) -> CancelResult:
        return self._stop(DestinationPhase.FAILED, now_s=now_s)

    def _stop(self, outcome: DestinationPhase, *, now_s: float) -> CancelResult:
        """The first outcome stands; asking again only tells whether the memory is quiet by now."""
        if self.is_over:
            return CancelResult.ALREADY_COMPLETE
        if self.phase is DestinationPhase.STOPPING:
            return self._in_flight(now_s)
        if self.phase is DestinationPhase.READING:
            self._decided, self._stopping_since_s = outcome, now_s
            self.advance(DestinationPhase.STOPPING, now_s=now_s)
            return self._in_flight(now_s)
        before = self.phase is DestinationPhase.RESERVED
        self.advance(outcome, now_s=now_s)
        return CancelResult.CANCELLED_BEFORE_ADVERTISE if before else CancelResult.CANCELLED_WHILE_QUIET

    def _in_flight(self, now_s: float) -> CancelResult:
        if self.stuck_s(now_s) > STUCK_AFTER_S:
            return CancelResult.BACKEND_UNHEALTHY
        return CancelResult.REQUESTED_IN_FLIGHT if self.can_stop else CancelResult.NOT_CANCELLABLE

    def stuck_s(self, now_s: float) -> float:
        """For how long a read has been running whose outcome does not matter any more; 0 when none is."""
        return now_s - self._stopping_since_s if self.phase is DestinationPhase.STOPPING else 0.0
