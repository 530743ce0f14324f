"""How long the steps of a server that only prefills take, from the events of its engine. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from disaggregated.compute_cost import MeasuredStep, num_pairs
from disaggregated.engine.api import ChunkComputed, EngineEvent


class StepMeter:
    def __init__(self) -> None:
        self._finished_s = 0.0
        """Of the step before: a step that was launched ahead begins only then."""

    def measure(self, events: Iterable[EngineEvent]) -> Iterator[MeasuredStep]:
        """In the order in which they were finished."""
        steps: dict[float, list[ChunkComputed]] = {}
        for event in events:
            if isinstance(event, ChunkComputed):
                steps.setdefault(event.finished_s, []).append(event)
        for finished_s, chunks in sorted(steps.items()):
            seconds = finished_s - max(chunks[0].started_s, self._finished_s)
            self._finished_s = finished_s
            pairs = sum(num_pairs(c.num_computed_tokens - c.num_chunk_tokens, c.num_computed_tokens) for c in chunks)
            yield MeasuredStep(sum(chunk.num_chunk_tokens for chunk in chunks), pairs, seconds)
