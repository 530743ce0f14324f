"""Which part of a whole model's KV one rank's pool holds; its layout says in which shape.

    layers   [first_layer, first_layer + layout.num_layers) of num_model_layers        pipeline parallel
    heads    [first_head, first_head + layout.num_kv_heads) of num_model_heads         tensor parallel
    tokens   those whose stripe's number is token_rank modulo num_token_ranks          context parallel

Ranks that hold the same heads, because there are fewer heads than ranks, are told apart by `head_replica` alone. With
`stripe_tokens` 0 a prompt is cut into one stripe for each rank, whose length follows from the prompt's.
"""

from __future__ import annotations

import dataclasses
from typing import Self

from disaggregated.kv_layout import KVLayout
from disaggregated.v1 import kv_pb2


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class KVShard:
    num_model_layers: int
    num_model_heads: int
    first_layer: int = 0
    first_head: int = 0
    head_replica: int = 0
    """Which of the ranks with these very heads this is: ours to spread load by, nothing else depends on it."""
    token_rank: int = 0
    num_token_ranks: int = 1
    stripe_tokens: int = 0

    @classmethod
    def whole(cls, layout: KVLayout) -> Self:
        return cls(num_model_layers=layout.num_layers, num_model_heads=layout.num_kv_heads)

    def fault(self, layout: KVLayout) -> str | None:
        """In words, why no pool of `layout` can hold this part; None when one can."""
        if not layout.num_layers or self.first_layer + layout.num_layers > self.num_model_layers:
            return f"{_count(layout.num_layers, 'layer')} from {self.first_layer} on, of {self.num_model_layers}"
        if not layout.num_kv_heads or self.first_head + layout.num_kv_heads > self.num_model_heads:
            return f"{_count(layout.num_kv_heads, 'KV head')} from {self.first_head} on, of {self.num_model_heads}"
        if not 0 <= self.token_rank < self.num_token_ranks:
            return f"token rank {self.token_rank} of {self.num_token_ranks}"
        return None

    def to_proto(self) -> kv_pb2.KVShard:
        return kv_pb2.KVShard(**dataclasses.asdict(self))

    @classmethod
    def from_proto(cls, message: kv_pb2.KVShard) -> Self:
        return cls(**{field.name: getattr(message, field.name) for field in dataclasses.fields(cls)})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class KVHolding:
    """One rank's pool: what of the model it holds, and in which shape."""

    layout: KVLayout
    shard: KVShard

    @classmethod
    def whole(cls, layout: KVLayout) -> Self:
        return cls(layout=layout, shard=KVShard.whole(layout))

    @classmethod
    def from_proto(cls, layout: kv_pb2.KVLayout, shard: kv_pb2.KVShard | None) -> Self:
        """A shard that was not sent is the whole model."""
        held = KVLayout.from_proto(layout)
        return cls.whole(held) if shard is None else cls(layout=held, shard=KVShard.from_proto(shard))

    @property
    def layers(self) -> range:
        """Of the model's."""
        return range(self.shard.first_layer, self.shard.first_layer + self.layout.num_layers)

    @property
    def heads(self) -> range:
        """Of the model's."""
        return range(self.shard.first_head, self.shard.first_head + self.layout.num_kv_heads)

    @property
    def model_shape(self) -> KVLayout:
        """What must be equal where KV is exchanged, and nothing else: block size, dtype and blocks are blanked out."""
        return dataclasses.replace(
            self.layout,
            num_layers=self.shard.num_model_layers,
            num_kv_heads=self.shard.num_model_heads,
            block_size=0,
            dtype="",
            num_blocks=0,
        )

    def is_like(self, other: KVHolding) -> bool:
        """Blocks of the one are blocks of the other, byte for byte: nothing has to be converted."""
        ours, theirs = (dataclasses.replace(each.shard, head_replica=0) for each in (self, other))
        return ours == theirs and self.shard.num_token_ranks == 1 and self.layout.difference(other.layout) is None

    def describe(self) -> str:
        """For a log line: `layers 0-15 of 30, heads 0-1 of 4, 32-token bfloat16`."""
        parts = [
            _part("layers", self.layers, self.shard.num_model_layers),
            _part("heads", self.heads, self.shard.num_model_heads),
            f"tokens {self.shard.token_rank + 1}/{self.shard.num_token_ranks}" * (self.shard.num_token_ranks > 1),
            f"{self.layout.block_size}-token {self.layout.dtype}",
        ]
        return ", ".join(filter(None, parts)) if any(parts[:3]) else f"whole, {parts[3]}"


def tensor_parallel(model: KVHolding, rank: int, num_ranks: int) -> KVHolding:
    """The heads of one of `num_ranks` ranks: split while there are enough, replicated on neighbours when not.

    Raises ValueError when heads and ranks do not divide each other.
    """
    num_heads = model.layout.num_kv_heads
    if max(num_heads, num_ranks) % min(num_heads, num_ranks):
        raise ValueError(f"{num_heads} KV heads cannot be spread over {num_ranks} ranks")
    count = max(1, num_heads // num_ranks)
    num_replicas = max(1, num_ranks // num_heads)
    return KVHolding(
        layout=dataclasses.replace(model.layout, num_kv_heads=count),
        shard=dataclasses.replace(
            model.shard,
            first_head=model.shard.first_head + rank // num_replicas * count,
            head_replica=rank % num_replicas,
        ),
    )


def pipeline_parallel(model: KVHolding, stages: tuple[int, ...], rank: int) -> KVHolding:
    """The layers of stage `rank`, when stage i computes `stages[i]` of them. Raises ValueError for a wrong sum."""
    if sum(stages) != model.layout.num_layers or min(stages) < 1:
        raise ValueError(f"{model.layout.num_layers} layers cannot be cut into {stages}")
    return KVHolding(
        layout=dataclasses.replace(model.layout, num_layers=stages[rank]),
        shard=dataclasses.replace(model.shard, first_layer=model.shard.first_layer + sum(stages[:rank])),
    )


def context_parallel(model: KVHolding, rank: int, num_ranks: int, *, stripe_tokens: int = 0) -> KVHolding:
    """The tokens of one of `num_ranks` ranks: every `num_ranks`-th stripe, or with 0 one contiguous part."""
    return KVHolding(
        layout=model.layout,
        shard=dataclasses.replace(model.shard, token_rank=rank, num_token_ranks=num_ranks, stripe_tokens=stripe_tokens),
    )


def _part(name: str, held: range, total: int) -> str:
    return "" if len(held) == total else f"{name} {held.start}-{held.stop - 1} of {total}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
