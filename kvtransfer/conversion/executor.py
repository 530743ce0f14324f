"""Copies verified blocks of a source's shape into blocks of ours: a strided copy for each piece and segment.

Blocks are head-major, `[planes][heads][tokens][head_dim]`, so a box of layers and heads is one slice of a pool that is
viewed with six axes, and a copy within it runs over `count * head_dim` neighbouring numbers. Where only the place
changes, bytes are copied and no number is looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from disaggregated.kv_layout import SCALE_BYTES, KVLayout
from kvtransfer.conversion.planner import Piece
from kvtransfer.conversion.tokens import Segment
from kvtransfer.conversion.values import NUMPY_DTYPE, Numbers, convert

Axes = npt.NDArray[Any]
Box = tuple[slice | int, ...]


class PoolView:
    """A pool's memory with its axes: `values` is (layers, blocks, planes, heads, tokens, head_dim), `scales` the same
    without the last, and None where the dtype has none. Both are views: writing to them writes the pool."""

    def __init__(self, pool: memoryview, layout: KVLayout) -> None:
        self.dtype = layout.dtype
        number = NUMPY_DTYPE[layout.dtype]
        token = layout.head_dim * number.itemsize
        outer = (layout.num_layers, layout.num_blocks)
        inner = (layout.num_planes, layout.num_kv_heads, layout.block_size)
        self.values: Axes = np.ndarray(
            (*outer, *inner, layout.head_dim),
            number,
            pool,
            strides=(layout.layer_bytes, layout.block_bytes, *_strides(inner, token), number.itemsize),
        )
        self.scales: Axes | None = None
        if layout.is_quantised:
            self.scales = np.ndarray(
                (*outer, *inner),
                np.float32,
                pool,
                layout.value_bytes,
                (layout.layer_bytes, layout.block_bytes, *_strides(inner, SCALE_BYTES)),
            )


class Executor:
    """Writes into `ours`, and nowhere but where pieces and segments say. Threads may share it when their pieces or
    segments differ."""

    def __init__(self, source: PoolView, ours: PoolView, pieces: Sequence[Piece]) -> None:
        self._source = source
        self._ours = ours
        self._pieces = pieces

    def convert(self, block: int, segment: Segment, into: int, layers: range) -> None:
        """Bring what is wanted of `layers` and `segment` of the source's block `block` to our block `into`."""
        for group in self._groups(layers):
            for piece in self._pieces:
                if (part := piece.within(group)) is not None:
                    self._copy(
                        _box(part.layers, part.heads, block, segment.tokens),
                        _box(part.into_layers, part.into_heads, into, segment.into_tokens),
                    )

    def _groups(self, layers: range) -> Iterable[range]:
        """All at once where only the place changes. Else one by one: what lies between the dtypes stays in a cache."""
        if self._source.dtype == self._ours.dtype:
            return [layers]
        return [range(layer, layer + 1) for layer in layers]

    def _copy(self, there: Box, here: Box) -> None:
        source, ours = self._source, self._ours
        scales = None if source.scales is None else source.scales[there]
        found = convert(Numbers(source.dtype, source.values[there], scales), ours.dtype)
        ours.values[here] = found.values
        if ours.scales is not None:
            assert found.scales is not None, f"{ours.dtype} without scales"
            ours.scales[here] = found.scales


def _box(layers: range, heads: range, block: int, tokens: range) -> Box:
    return (_slice(layers), block, slice(None), _slice(heads), _slice(tokens))


def _slice(numbers: range) -> slice:
    return slice(numbers.start, numbers.stop)


def _strides(inner: tuple[int, int, int], innermost: int) -> tuple[int, int, int]:
    _, heads, tokens = inner
    return (heads * tokens * innermost, tokens * innermost, innermost)
