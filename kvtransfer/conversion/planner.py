"""Which part of which source rank's pool goes where in ours. Pure: the same holdings give the same plan everywhere.

Our layers and heads are cut at every bound of a source's, so that each cell lies within one source or outside it:

    heads   0       2       4
    layer 0 ┌───────┬───────┐      sources: 2 pipeline stages × 2 tensor-parallel ranks
            │ rank 0│ rank 1│      ours: all of it
         16 ├───────┼───────┤
            │ rank 2│ rank 3│      4 cells, each from the one rank that holds it
         30 └───────┴───────┘

Where several hold a cell, `turn` and our own replica number choose: transfers take turns, and so do our replicas.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

from disaggregated.errors import LayoutMismatch
from disaggregated.kv_layout import DTYPE_BYTES
from disaggregated.kv_shard import KVHolding


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """A box of layers and heads. Ranges count within the pools, not within the model."""

    layers: range
    """Of the source's pool."""
    into_layer: int
    """Of ours, where the first of `layers` goes."""
    heads: range
    into_head: int

    @property
    def into_layers(self) -> range:
        return range(self.into_layer, self.into_layer + len(self.layers))

    @property
    def into_heads(self) -> range:
        return range(self.into_head, self.into_head + len(self.heads))

    def within(self, layers: range) -> Piece | None:
        """What of this piece lies in `layers` of the source's pool; None when nothing does."""
        begin, end = max(self.layers.start, layers.start), min(self.layers.stop, layers.stop)
        if begin >= end:
            return None
        into_layer = self.into_layer + begin - self.layers.start
        return dataclasses.replace(self, layers=range(begin, end), into_layer=into_layer)


@dataclasses.dataclass(frozen=True, slots=True)
class ConversionPlan:
    """`pieces[i]` is what we take from source i; a source that nothing is taken from has none.

    Invariant: for each token rank of the sources, the pieces fill every layer and head of our pool exactly once.
    """

    pieces: tuple[tuple[Piece, ...], ...]

    def is_needed(self, source: int) -> bool:
        return bool(self.pieces[source])


@dataclasses.dataclass(frozen=True, slots=True)
class _Cell:
    """Of the model's layers and heads."""

    layers: range
    heads: range

    def is_in(self, holding: KVHolding) -> bool:
        return _is_within(self.layers, holding.layers) and _is_within(self.heads, holding.heads)


def refusal(source: KVHolding, ours: KVHolding) -> str | None:
    """In words, why nothing of `source` can ever be converted into `ours`; None when it may be."""
    for name, holding in (("source", source), ("destination", ours)):
        if fault := holding.shard.fault(holding.layout):
            return f"the {name} says that it holds {fault}"
        if holding.layout.dtype not in DTYPE_BYTES:
            return f"the {name}'s dtype {holding.layout.dtype!r} is not known"
        if min(holding.layout.block_size, holding.layout.head_dim, holding.layout.num_planes) < 1:
            return f"the {name}'s blocks are empty: {holding.layout}"
    return ours.model_shape.difference(source.model_shape)


def plan_conversion(sources: Sequence[KVHolding], ours: KVHolding, *, turn: int = 0) -> ConversionPlan:
    """Take each part of our pool from one of `sources`.

    `turn` is any number; equal numbers choose equally among replicas, consecutive ones spread evenly.
    Raises LayoutMismatch, in words, when a part of ours is nowhere, or a source is of another model.
    """
    for source in sources:
        if reason := refusal(source, ours):
            raise LayoutMismatch(reason)
    taken: list[list[Piece]] = [[] for _ in sources]
    for members in _token_ranks(sources):
        for cell in _cells([sources[member] for member in members], ours):
            holders = [member for member in members if cell.is_in(sources[member])]
            if not holders:
                raise LayoutMismatch(f"no source holds {_in_words(cell)}")
            chosen = holders[(turn + ours.shard.head_replica) % len(holders)]
            _take(taken[chosen], _piece(cell, sources[chosen], ours))
    return ConversionPlan(tuple(tuple(pieces) for pieces in taken))


def _token_ranks(sources: Sequence[KVHolding]) -> Iterator[list[int]]:
    """The sources that hold the same tokens, rank by rank."""
    if not sources:
        raise LayoutMismatch("there is no source")
    ways = {(each.shard.num_token_ranks, each.shard.stripe_tokens) for each in sources}
    if len(ways) > 1:
        raise LayoutMismatch(f"sources cut a prompt's tokens in {len(ways)} different ways")
    ((num_token_ranks, stripe_tokens),) = ways
    if num_token_ranks > 1 and not stripe_tokens and len({each.layout.block_size for each in sources}) > 1:
        raise LayoutMismatch("sources cut a prompt at their blocks, which are of different sizes")
    for token_rank in range(num_token_ranks):
        members = [number for number, each in enumerate(sources) if each.shard.token_rank == token_rank]
        if not members:
            raise LayoutMismatch(f"no source holds the tokens of rank {token_rank} of {num_token_ranks}")
        yield members


def _cells(sources: Sequence[KVHolding], ours: KVHolding) -> Iterator[_Cell]:
    """Heads outermost, so that the layers of one source's heads come together and are joined."""
    for heads in _cut(ours.heads, [each.heads for each in sources]):
        for layers in _cut(ours.layers, [each.layers for each in sources]):
            yield _Cell(layers, heads)


def _cut(whole: range, parts: Sequence[range]) -> Iterator[range]:
    bounds = sorted(
        {whole.start, whole.stop} | {bound for part in parts for bound in (part.start, part.stop) if bound in whole}
    )
    for begin, end in itertools.pairwise(bounds):
        yield range(begin, end)


def _piece(cell: _Cell, source: KVHolding, ours: KVHolding) -> Piece:
    first_layer, first_head = source.layers.start, source.heads.start
    return Piece(
        layers=range(cell.layers.start - first_layer, cell.layers.stop - first_layer),
        into_layer=cell.layers.start - ours.layers.start,
        heads=range(cell.heads.start - first_head, cell.heads.stop - first_head),
        into_head=cell.heads.start - ours.heads.start,
    )


def _take(pieces: list[Piece], piece: Piece) -> None:
    """Add a piece, joined with the last one when it goes on where that one ended, in layers or in heads."""
    if pieces:
        last = pieces[-1]
        if (last.heads, last.into_head, last.layers.stop) == (piece.heads, piece.into_head, piece.layers.start):
            pieces[-1] = dataclasses.replace(last, layers=range(last.layers.start, piece.layers.stop))
            return
        if (last.layers, last.into_layer, last.heads.stop) == (piece.layers, piece.into_layer, piece.heads.start):
            pieces[-1] = dataclasses.replace(last, heads=range(last.heads.start, piece.heads.stop))
            return
    pieces.append(piece)


def _is_within(part: range, whole: range) -> bool:
    return whole.start <= part.start and part.stop <= whole.stop


def _in_words(cell: _Cell) -> str:
    return f"layers {cell.layers.start}-{cell.layers.stop - 1}, KV heads {cell.heads.start}-{cell.heads.stop - 1}"
