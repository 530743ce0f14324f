"""Hands a prompt's KV on while its chunk is still computed: a server is told, layers by layers, what has been written.

A forward pass is one call. Where a watched prompt is among its rows, the runner makes it in several, each of some
layers, and between two of them the watcher hears which layers of which blocks are there. All else is as in one call,
to the bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as AnySequence
from typing import Protocol, runtime_checkable

from disaggregated.engine.api import ModelRunner, RequestKind, ScheduledSequence
from disaggregated.engine.layer_progress import LayerProgress
from disaggregated.engine.scheduler_limits import Chunk


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ChunkUnderWay:
    """A part of a prompt that a step computes now."""

    request_id: str
    first_position: int
    """Of its first token. All tokens before it are in their blocks, in every layer."""
    num_computed_tokens: int
    """Of the prompt, when the step is finished."""
    block_ids: tuple[int, ...]
    """The whole table so far."""


class LayerWatcher(Protocol):
    """Called on the engine's thread, which waits for it. What it raises ends the engine."""

    def chunks_begin(self, chunks: AnySequence[ChunkUnderWay]) -> int | None:
        """After how many layers to be told each time; None: nobody wants any of these before its step is over."""

    def layers_written(self, chunks: AnySequence[ChunkUnderWay], num_layers: int) -> None:
        """The first `num_layers` layers of the chunks that began last are in their blocks."""


@runtime_checkable
class LayeredRunner(ModelRunner, Protocol):
    """A runner that computes while it is called, and can say how far it is."""

    def execute_layered(
        self, batch: AnySequence[ScheduledSequence], progress: LayerProgress
    ) -> AnySequence[AnySequence[int]]:
        """As execute(), to the bit; `progress` is told on the way."""


def progress_of(chunks: AnySequence[Chunk], watcher: LayerWatcher, *, block_size: int) -> LayerProgress | None:
    """What the runner must tell during the step that computes `chunks`, which has not begun; None: nothing."""
    under_way = [_under_way(chunk, block_size) for chunk in chunks if _is_prompt_for_others(chunk)]
    every = watcher.chunks_begin(under_way) if under_way else None
    if every is None:
        return None
    return LayerProgress(every, lambda num_layers: watcher.layers_written(under_way, num_layers))


def _is_prompt_for_others(chunk: Chunk) -> bool:
    return chunk.sequence.kind is RequestKind.PREFILL_ONLY and chunk.sequence.num_generated == 0


def _under_way(chunk: Chunk, block_size: int) -> ChunkUnderWay:
    sequence = chunk.sequence
    end = sequence.num_computed + chunk.num_tokens
    return ChunkUnderWay(
        request_id=sequence.request_id,
        first_position=sequence.num_computed,
        num_computed_tokens=end,
        block_ids=tuple(sequence.block_table[: -(-end // block_size)]),
    )
