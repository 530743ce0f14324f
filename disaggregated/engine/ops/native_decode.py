"""A step of nothing but decoding as one call of the C kernels, without a tensor made on the way.

A server does little else, and what the host does between two kernels is slow there: the weights have just driven its
code and objects out of the caches. So the memory that a step works in is kept, and the host lists no more of each row
than it knows: token, position, block table. `csrc/decode.c` does the rest. Same bits as the way over
`NativeStepProgram` and the op table. Legend: see api.py.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_int64, c_void_p
from typing import Any, Final

import torch

from disaggregated.engine.models.decoder import DecoderWeights
from disaggregated.engine.ops.api import DecodeRows, LayerPool
from disaggregated.engine.ops.native_checks import check_floats, check_shape
from disaggregated.engine.ops.native_kv import KVPool, PoolTable
from disaggregated.engine.ops.native_linear import LinearWeight

_INTS: Final = "i"
assert array(_INTS).itemsize == 4, "an array of ints is not what C calls int32_t"


class DecodeHead(Structure):
    """`decode_head` of csrc/decode.c."""

    _fields_ = [("norm", c_void_p), ("lm_head", LinearWeight)]


class RowsInC(Structure):
    """`decode_rows` of csrc/decode.c."""

    _fields_ = [
        ("num_rows", c_int64), ("table_width", c_int64), ("token_ids", c_void_p), ("positions", c_void_p),
        ("block_tables", c_void_p), ("places", c_void_p), ("hidden", c_void_p), ("logits", c_void_p),
        ("likeliest", c_void_p),
    ]  # fmt: skip


SIGNATURES: Final[dict[str, tuple[Any, list[Any]]]] = {
    "run_decode": (
        c_int64,
        [c_void_p, c_void_p, POINTER(DecodeHead), POINTER(KVPool), POINTER(RowsInC), POINTER(c_int64)],
    ),
}
"""Return type and arguments of each function; csrc/ says what they mean."""


class _Memory:
    """What steps of up to `num_rows` rows work in."""

    def __init__(self, num_rows: int, hidden: int, vocabulary: int) -> None:
        self.num_rows = num_rows
        self.places = (c_int64 * (4 * num_rows + 1))()
        self.likeliest = (c_int64 * num_rows)()
        self.hidden = torch.empty(2, num_rows, hidden)
        self.logits_RV = torch.empty(num_rows, vocabulary)
        self.to_places, self.to_likeliest = ctypes.addressof(self.places), ctypes.addressof(self.likeliest)
        self.to_hidden, self.to_logits = self.hidden.data_ptr(), self.logits_RV.data_ptr()


class NativeDecode:
    """Implements `DecodeProgram`. Owned by one thread, like the op table."""

    def __init__(
        self,
        kernels: ctypes.CDLL,
        team: int,
        model: Structure,
        weights: DecoderWeights,
        pools: PoolTable,
    ) -> None:
        """`model` is the `StepModel` of the weights' layers. Whoever calls this keeps what `team` belongs to."""
        final_norm, lm_head = weights.final_norm, weights.lm_head
        hidden = lm_head.depth
        check_floats(final_norm)
        check_shape(final_norm, (hidden,))
        self._run, self._team = kernels.run_decode, team
        self._model = model
        self._kept_alive = weights
        self._head = DecodeHead(final_norm.data_ptr(), lm_head.weight)
        self._pools = pools
        self._hidden, self._vocabulary = hidden, lm_head.num_columns
        self._memory = _Memory(0, hidden, self._vocabulary)
        self._where = c_int64(-1)

    def likeliest(self, rows: DecodeRows, pools: Sequence[LayerPool]) -> list[int]:
        memory = self._decode(rows, pools, chooses=True)
        return memory.likeliest[: len(rows.token_ids)]

    def logits(self, rows: DecodeRows, pools: Sequence[LayerPool]) -> torch.Tensor:
        memory = self._decode(rows, pools, chooses=False)
        return memory.logits_RV[: len(rows.token_ids)]

    def _decode(self, rows: DecodeRows, pools: Sequence[LayerPool], *, chooses: bool) -> _Memory:
        num_rows, width = len(rows.token_ids), max(map(len, rows.block_tables))
        memory = self._room_for(num_rows)
        ints = _ints(rows, width)
        address, num_ints = ints.buffer_info()
        assert num_ints == num_rows * (2 + width), f"{num_ints} numbers of {num_rows} rows, of {width} blocks at most"
        in_c = RowsInC(
            num_rows, width, address, address + 4 * num_rows, address + 8 * num_rows, memory.to_places,
            memory.to_hidden, memory.to_logits, memory.to_likeliest if chooses else None,
        )  # fmt: skip
        wrong = self._run(
            self._team, byref(self._model), byref(self._head), self._pools.of(pools), byref(in_c), byref(self._where)
        )
        assert wrong == 0, f"wrong ({wrong}) in row {self._where.value}: {rows}, in a pool of {len(pools[0].values)}"
        return memory

    def _room_for(self, num_rows: int) -> _Memory:
        """Grown by doubling: the batch of a server that fills up grows by one row after the other."""
        if num_rows > self._memory.num_rows:
            self._memory = _Memory(max(num_rows, 2 * self._memory.num_rows), self._hidden, self._vocabulary)
        return self._memory


def _ints(rows: DecodeRows, width: int) -> array[int]:
    """Tokens, positions, and the block tables, each filled up with zeros to `width`."""
    ints = array(_INTS, rows.token_ids)
    ints.extend(rows.positions)
    for table in rows.block_tables:
        ints.extend(table)
        if len(table) < width:
            ints.extend([0] * (width - len(table)))
    return ints
