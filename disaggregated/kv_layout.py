"""The shape of a KV pool, shared by the engine that fills it and the transfer layer that moves it.

A pool is one region of `[num_layers][num_blocks]` blocks. One block of one layer is contiguous (`block_bytes`), which
is what decode attention walks over and what a transport copies in one go. In it lie the values,
`[num_planes][num_kv_heads][block_size][head_dim]`, and behind them, where the dtype is a quantised one, their scales,
`[num_planes][num_kv_heads][block_size]` in float32: a block means the same wherever it is copied to.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Final

from disaggregated.errors import LayoutMismatch
from disaggregated.v1 import kv_pb2

DTYPE_BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "float8_e4m3fn": 1}
QUANTISED: Final = frozenset({"int8", "float8_e4m3fn"})
SCALE_BYTES: Final = 4
_MOST: Final = {
    "num_layers": 4096,
    "num_kv_heads": 65_536,
    "head_dim": 65_536,
    "block_size": 65_536,
    "num_blocks": 1 << 31,
    "num_planes": 2,
}
"""Of another process's layout: far more than any model has, and little enough to be computed with."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVLayout:
    """Two pools can exchange blocks when everything but `num_blocks` is equal."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    """Tokens in a block."""
    dtype: str
    num_blocks: int
    num_planes: int = 2
    """Keys and values; 1 for latents that stand for both (MLA)."""

    @property
    def is_quantised(self) -> bool:
        return self.dtype in QUANTISED

    @property
    def value_bytes(self) -> int:
        """Of one block of one layer, without its scales."""
        return self.num_planes * self.num_kv_heads * self.block_size * self.head_dim * DTYPE_BYTES[self.dtype]

    @functools.cached_property
    def block_bytes(self) -> int:
        """Bytes of one block of one layer: keys and values, and their scales."""
        num_scales = self.num_planes * self.num_kv_heads * self.block_size if self.is_quantised else 0
        return self.value_bytes + num_scales * SCALE_BYTES

    @property
    def layer_bytes(self) -> int:
        return self.num_blocks * self.block_bytes

    @property
    def pool_bytes(self) -> int:
        return self.num_layers * self.layer_bytes

    @property
    def token_bytes(self) -> int:
        """Bytes that one token takes in all layers."""
        return self.num_layers * self.block_bytes // self.block_size

    def offset(self, layer: int, block_id: int) -> int:
        """Where block `block_id` of `layer` begins in the pool, in bytes."""
        assert 0 <= layer < self.num_layers, f"layer {layer} of {self.num_layers}"
        assert 0 <= block_id < self.num_blocks, f"block {block_id} of {self.num_blocks}"
        return (layer * self.num_blocks + block_id) * self.block_bytes

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def difference(self, other: KVLayout) -> str | None:
        """In words, the first field in which two ends differ; None when they can exchange blocks."""
        for field in dataclasses.fields(self):
            ours, theirs = getattr(self, field.name), getattr(other, field.name)
            if field.name != "num_blocks" and ours != theirs:
                return f"{field.name} is {ours} here and {theirs} there"
        return None

    def to_proto(self) -> kv_pb2.KVLayout:
        return kv_pb2.KVLayout(**dataclasses.asdict(self))

    @classmethod
    def from_proto(cls, message: kv_pb2.KVLayout) -> KVLayout:
        """Raises LayoutMismatch for what can be no pool's shape, so that whoever computes with it may rely on it."""
        _check_plausible(message)
        return cls(**{field.name: getattr(message, field.name) for field in dataclasses.fields(cls)})


def _check_plausible(message: kv_pb2.KVLayout) -> None:
    if message.dtype not in DTYPE_BYTES:
        raise LayoutMismatch(f"a layout of dtype {message.dtype[:40]!r}; known are {', '.join(DTYPE_BYTES)}")
    for name, most in _MOST.items():
        value = getattr(message, name)
        if not 1 <= value <= most:
            raise LayoutMismatch(f"a layout whose {name} is {value}; it must be between 1 and {most}")
