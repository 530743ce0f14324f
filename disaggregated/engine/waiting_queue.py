"""Who starts next: a queue in the order of priority, in which nobody is forgotten."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator

from disaggregated.engine.sequence import Sequence


class WaitingQueue:
    """Sequences by rank, the best first. Ranks never change, so a sorted list will do: a place is found in
    logarithmic time, and moving a few thousand pointers takes a microsecond.

    Invariant: sorted by rank, no two ranks alike.
    """

    def __init__(self) -> None:
        self._sequences: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    def __contains__(self, sequence: Sequence) -> bool:
        place = self._place(sequence)
        return place < len(self._sequences) and self._sequences[place] is sequence

    @property
    def first(self) -> Sequence | None:
        return self._sequences[0] if self._sequences else None

    def add(self, sequence: Sequence) -> None:
        assert sequence not in self, f"{sequence.request_id} waits already"
        self._sequences.insert(self._place(sequence), sequence)

    def remove(self, sequence: Sequence) -> None:
        assert sequence in self, f"{sequence.request_id} does not wait"
        del self._sequences[self._place(sequence)]

    def check_integrity(self) -> None:
        ranks = [sequence.rank for sequence in self._sequences]
        assert all(first < second for first, second in itertools.pairwise(ranks)), f"out of order: {ranks}"

    def _place(self, sequence: Sequence) -> int:
        return bisect.bisect_left(self._sequences, sequence.rank, key=_rank)


def _rank(sequence: Sequence) -> tuple[float, int]:
    return sequence.rank
