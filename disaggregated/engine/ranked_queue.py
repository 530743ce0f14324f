"""Sequences in the order in which they are served."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator

from disaggregated.engine.sequence import Sequence


class RankedQueue:
    """By rank, the best first. A rank never changes, so a sorted list will do: a place is found in logarithmic time,
    and moving a few thousand pointers takes a microsecond.

    Invariant: sorted by rank, no two ranks alike.
    """

    def __init__(self) -> None:
        self._sequences: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    def __reversed__(self) -> Iterator[Sequence]:
        return reversed(self._sequences)

    def __contains__(self, sequence: Sequence) -> bool:
        place = self._place(sequence)
        return place < len(self._sequences) and self._sequences[place] is sequence

    @property
    def first(self) -> Sequence | None:
        return self._sequences[0] if self._sequences else None

    def add(self, sequence: Sequence) -> None:
        place = self._place(sequence)
        assert sequence not in self._sequences[place : place + 1], f"{sequence.request_id} is here already"
        self._sequences.insert(place, sequence)

    def remove(self, sequence: Sequence) -> None:
        place = self._place(sequence)
        assert sequence in self._sequences[place : place + 1], f"{sequence.request_id} is not here"
        del self._sequences[place]

    def discard(self, sequence: Sequence) -> None:
        if sequence in self:
            self.remove(sequence)

    def check_integrity(self) -> None:
        ranks = [sequence.rank for sequence in self._sequences]
        assert all(first < second for first, second in itertools.pairwise(ranks)), f"out of order: {ranks}"

    def _place(self, sequence: Sequence) -> int:
        return bisect.bisect_left(self._sequences, sequence.rank, key=_rank)


def _rank(sequence: Sequence) -> tuple[float, int]:
    return sequence.rank
