"""What of a transfer's blocks can be published next, given how far its publications have come."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from kvtransfer.source.lease import Published


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """Blocks number `begin` to `end` (excluded) of a prompt, in `layers`."""

    begin: int
    end: int
    layers: range


def unpublished(
    before: Published, *, num_blocks: int, num_layers: int, of_layers: int, cuts: Collection[int] = ()
) -> list[Span]:
    """The spans to publish, in order, when the first `num_blocks` blocks are written in the first `num_layers` layers.

    Blocks of which some layers are published get their other layers before any block behind them is begun. Who says
    that some layers are written of blocks behind those must have said before that those are written in all layers.
    No span goes across one of `cuts`, layers at which somebody's share of the model begins: a publication is verified
    as a whole, by readers who want all of it.
    """
    return [part for span in _spans(before, num_blocks, num_layers, of_layers) for part in _cut(span, cuts)]


def _spans(before: Published, num_blocks: int, num_layers: int, of_layers: int) -> list[Span]:
    begin = before.num_blocks
    spans: list[Span] = []
    if before.begun:
        begin += len(before.begun)
        if num_blocks < begin:
            return []
        if num_layers > before.num_layers_begun:
            spans.append(Span(before.num_blocks, begin, range(before.num_layers_begun, num_layers)))
        if num_layers < of_layers:
            return spans
    if num_blocks > begin and num_layers > 0:
        spans.append(Span(begin, num_blocks, range(num_layers)))
    return spans


def _cut(span: Span, cuts: Collection[int]) -> list[Span]:
    bounds = [span.layers.start, *sorted(cut for cut in cuts if span.layers.start < cut < span.layers.stop)]
    ends = [*bounds[1:], span.layers.stop]
    return [dataclasses.replace(span, layers=range(*pair)) for pair in zip(bounds, ends, strict=True)]
