"""The life of one request, as a table: where it may be, and where it may go from there.

    QUEUED ──▶ PREFILLING ──▶ TRANSFERRING ──▶ DECODING ──▶ FINISHED
       ▲            │               │              │
       └────────────┴───────────────┴──────────────┘      a server was lost: it goes on elsewhere

A request that is prefilled where it decodes skips TRANSFERRING; one whose first token is its last goes from PREFILLING
to FINISHED. Whoever drives a request reports each step here, with the time; the story that results is what metrics,
logs and `GET /requests/{id}` tell.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Final


class Phase(enum.StrEnum):
    QUEUED = "queued"
    PREFILLING = "prefilling"
    TRANSFERRING = "transferring"
    DECODING = "decoding"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"


_STOP: Final = frozenset({Phase.FAILED, Phase.CANCELLED})

NEXT: Final[Mapping[Phase, frozenset[Phase]]] = {
    Phase.QUEUED: _STOP | {Phase.PREFILLING},
    Phase.PREFILLING: _STOP | {Phase.TRANSFERRING, Phase.DECODING, Phase.FINISHED, Phase.QUEUED},
    Phase.TRANSFERRING: _STOP | {Phase.DECODING, Phase.QUEUED},
    Phase.DECODING: _STOP | {Phase.FINISHED, Phase.QUEUED},
    Phase.FINISHED: frozenset(),
    Phase.FAILED: frozenset(),
    Phase.CANCELLED: frozenset(),
}


class InvalidTransition(AssertionError):
    """Our own mistake: somebody reported a step that cannot follow the one before."""


class RequestLife:
    """Invariant: `story` begins with QUEUED, its times never fall, and each phase in it may follow the one before."""

    __slots__ = ("phase", "request_id", "story")

    def __init__(self, request_id: str, *, now_s: float) -> None:
        self.request_id = request_id
        self.phase = Phase.QUEUED
        self.story: list[tuple[float, Phase]] = [(now_s, Phase.QUEUED)]

    @property
    def is_over(self) -> bool:
        return not NEXT[self.phase]

    def advance(self, to: Phase, *, now_s: float) -> None:
        """Enter `to` at `now_s`, a monotonic clock's seconds.

        Raises:
            InvalidTransition: `to` cannot follow the present phase; nothing has changed.
        """
        if to not in NEXT[self.phase]:
            raise InvalidTransition(f"{self.request_id}: {self.phase} -> {to}; story={self.story}")
        self.phase = to
        self.story.append((now_s, to))

    def seconds_in(self, phase: Phase, *, now_s: float) -> float:
        """Time spent in `phase`, all visits together; a visit that lasts still counts up to `now_s`."""
        ends_s = [began_s for began_s, _ in self.story[1:]] + [self.story[-1][0] if self.is_over else now_s]
        return sum(
            end_s - began_s for (began_s, visited), end_s in zip(self.story, ends_s, strict=True) if visited is phase
        )

    def check_integrity(self) -> None:
        assert self.story[0][1] is Phase.QUEUED, "a life begins in the queue"
        assert self.story[-1][1] is self.phase, "the story and the phase disagree"
        for (earlier_s, before), (later_s, after) in zip(self.story, self.story[1:], strict=False):
            assert after in NEXT[before], f"{before} -> {after} cannot have happened"
            assert earlier_s <= later_s, "time ran backwards"
