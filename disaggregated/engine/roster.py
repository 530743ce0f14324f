"""Everybody who is here: the sequences of an engine from their first block to their last, and what is told of them
outside of a step."""

from __future__ import annotations

from collections.abc import Callable, Collection

from disaggregated.engine.api import EngineEvent, RequestFailed, RequestKind
from disaggregated.engine.scheduler import Scheduler
from disaggregated.engine.sequence import Phase, Sequence


class Roster:
    """Part of an engine, and owned by its thread.

    Invariant: a sequence is here from add() until it has ended and no launched step computes it any more; then its id
    may be used again.
    """

    def __init__(self, scheduler: Scheduler, clock: Callable[[], float]) -> None:
        self._scheduler = scheduler
        self._clock = clock
        self._sequences: dict[str, Sequence] = {}
        self._unsent: list[EngineEvent] = []

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._sequences

    @property
    def sequences(self) -> Collection[Sequence]:
        return self._sequences.values()

    @property
    def has_unsent(self) -> bool:
        return bool(self._unsent)

    def get(self, request_id: str) -> Sequence | None:
        return self._sequences.get(request_id)

    def add(self, sequence: Sequence) -> None:
        self._sequences[sequence.request_id] = sequence

    def tell(self, event: EngineEvent) -> None:
        """With the next step's events, before them."""
        self._unsent.append(event)

    def take_unsent(self) -> list[EngineEvent]:
        events, self._unsent = self._unsent, []
        return events

    def cancel(self, sequence: Sequence) -> None:
        """Its blocks are back afterwards, or when the step that computes it is finished; except those that a transfer
        may still touch, which wait for end(). Idempotent."""
        if sequence.phase is Phase.RESERVED:
            self._scheduler.quarantine(sequence, now_s=self._clock())
        elif sequence.phase in {Phase.QUARANTINED, Phase.LEASED, Phase.ENDING}:
            return
        elif sequence.kind is RequestKind.PREFILL_ONLY and sequence.is_published:
            self._scheduler.lease(sequence, now_s=self._clock())
        else:
            self.end(sequence)

    def fail(self, sequence: Sequence, error: Exception) -> None:
        self.tell(RequestFailed(request_id=sequence.request_id, error=error))
        self.cancel(sequence)

    def end(self, sequence: Sequence) -> None:
        """From any phase; no transfer touches its blocks any more."""
        self._scheduler.end(sequence, now_s=self._clock())
        if sequence.phase is Phase.ENDED:
            del self._sequences[sequence.request_id]
