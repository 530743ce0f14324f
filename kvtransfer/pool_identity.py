"""Who one end of a transfer is, as Connect tells the other."""

from __future__ import annotations

import dataclasses
from typing import Self

from disaggregated.kv_layout import KVLayout
from disaggregated.kv_shard import KVHolding


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PoolIdentity:
    """A pool, and the process that owns it. Both ends have one; they must be of one model to exchange blocks."""

    instance_id: str
    epoch: int
    """Grows when the process starts again: what was agreed with an earlier one holds no more."""
    fingerprint: str
    """Of the model, whose KV is exchanged only with its like."""
    holding: KVHolding
    """What of the model the pool holds, and in which shape."""
    device: str = "cpu"
    """Where the pool is."""

    @classmethod
    def whole(cls, layout: KVLayout, *, instance_id: str, epoch: int, fingerprint: str, device: str = "cpu") -> Self:
        """Of a pool that holds the whole model."""
        holding = KVHolding.whole(layout)
        return cls(instance_id=instance_id, epoch=epoch, fingerprint=fingerprint, holding=holding, device=device)

    @property
    def layout(self) -> KVLayout:
        return self.holding.layout
