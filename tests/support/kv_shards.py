"""A whole model's KV as one array, and what each rank's pool must hold of it: written token by token, on purpose.

Legend: L layers, P planes, H heads, T tokens, D numbers of a token's key or value.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from disaggregated.engine.ops.quantise import quantise_rows
from disaggregated.kv_layout import QUANTISED, KVLayout
from disaggregated.kv_shard import KVHolding, context_parallel, pipeline_parallel, tensor_parallel

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


def model_layout(**changes: Any) -> KVLayout:
    values: dict[str, Any] = {
        "num_layers": 6, "num_kv_heads": 4, "head_dim": 4, "block_size": 8, "dtype": "float32", "num_blocks": 24,
    }  # fmt: skip
    return KVLayout(**{**values, **changes})


def model_kv(layout: KVLayout, num_tokens: int, *, seed: int = 0) -> Floats:
    """(L, P, H, T, D) of a prompt."""
    shape = (layout.num_layers, layout.num_planes, layout.num_kv_heads, num_tokens, layout.head_dim)
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@dataclasses.dataclass(frozen=True, slots=True)
class Ranks:
    """How a model is spread: `tensor` ranks in each of the `stages`, all of it for each of `context` token ranks."""

    tensor: int = 1
    stages: tuple[int, ...] = ()
    context: int = 1
    stripe_tokens: int = 0

    def __str__(self) -> str:
        words = [f"tp{self.tensor}"]
        words += [f"pp{'+'.join(map(str, self.stages))}"] if len(self.stages) > 1 else []
        words += [f"cp{self.context}{f'/{self.stripe_tokens}' * bool(self.stripe_tokens)}"] if self.context > 1 else []
        return "·".join(words)

    def holdings(self, layout: KVLayout) -> list[KVHolding]:
        whole = KVHolding.whole(layout)
        stages = self.stages or (layout.num_layers,)
        return [
            context_parallel(
                tensor_parallel(pipeline_parallel(whole, stages, stage), rank, self.tensor),
                token_rank,
                self.context,
                stripe_tokens=self.stripe_tokens,
            )
            for token_rank in range(self.context)
            for stage in range(len(stages))
            for rank in range(self.tensor)
        ]


def tokens_of(holding: KVHolding, num_tokens: int) -> list[int]:
    """Of a prompt, in the order in which this rank keeps them."""
    shard, block_size = holding.shard, holding.layout.block_size
    stripe = shard.stripe_tokens
    if not stripe:
        num_blocks = -(-num_tokens // block_size)
        stripe = max(1, -(-num_blocks // shard.num_token_ranks)) * block_size
    if shard.num_token_ranks == 1:
        return list(range(num_tokens))
    return [token for token in range(num_tokens) if token // stripe % shard.num_token_ranks == shard.token_rank]


def store(pool: memoryview, holding: KVHolding, table: Sequence[int], kv_LPHTD: Floats) -> int:
    """Write what this rank holds of `kv` into blocks `table`, in its dtype. Returns how many tokens that is."""
    tokens = tokens_of(holding, kv_LPHTD.shape[3])
    layers, heads = holding.layers, holding.heads
    held = kv_LPHTD[layers.start : layers.stop, :, heads.start : heads.stop]
    stored, scale = _in_dtype(torch.from_numpy(held.copy()), holding.layout.dtype)
    for (block, offset), token in zip(_places(holding.layout, table), tokens, strict=False):
        for layer in range(holding.layout.num_layers):
            values, scales = _block(pool, holding.layout, layer, block)
            values[:, :, offset] = stored[layer, :, :, token]
            if scales is not None and scale is not None:
                scales[:, :, offset] = scale[layer, :, :, token]
    return len(tokens)


def fetch(pool: memoryview, holding: KVHolding, table: Sequence[int], num_tokens: int) -> Bytes:
    """Everything a pool says about a prompt's tokens, as bytes: (T, L, P, H, bytes of numbers and scale)."""
    layout = holding.layout
    found = []
    for (block, offset), _ in zip(_places(layout, table), tokens_of(holding, num_tokens), strict=False):
        for layer in range(layout.num_layers):
            values, scales = _block(pool, layout, layer, block)
            row = values[:, :, offset]
            if scales is not None:
                scale_bytes = np.ascontiguousarray(scales[:, :, offset]).view(np.uint8)
                row = np.concatenate([row, scale_bytes.reshape(*row.shape[:2], 4)], axis=2)
            found.append(row)
    if not found:
        return np.zeros(0, np.uint8)
    return np.stack(found).reshape(-1, layout.num_layers, *found[0].shape)


def expected(holding: KVHolding, kv_LPHTD: Floats) -> Bytes:
    """What `fetch` gives when this rank computed `kv` itself."""
    layout = dataclasses.replace(holding.layout, num_blocks=holding.layout.num_blocks_for(kv_LPHTD.shape[3]) or 1)
    holding = dataclasses.replace(holding, layout=layout)
    pool = memoryview(bytearray(layout.pool_bytes))
    table = range(layout.num_blocks)
    store(pool, holding, table, kv_LPHTD)
    return fetch(pool, holding, table, kv_LPHTD.shape[3])


def _places(layout: KVLayout, table: Sequence[int]) -> Iterator[tuple[int, int]]:
    for block in table:
        for offset in range(layout.block_size):
            yield block, offset


def _block(pool: memoryview, layout: KVLayout, layer: int, block: int) -> tuple[Bytes, Floats | None]:
    """Bytes of the values, (P, H, block_size, bytes of D numbers), and the scales, (P, H, block_size)."""
    begin = layout.offset(layer, block)
    inner = (layout.num_planes, layout.num_kv_heads, layout.block_size)
    values = np.frombuffer(pool[begin : begin + layout.value_bytes], np.uint8).reshape(*inner, -1)
    if not layout.is_quantised:
        return values, None
    return values, np.frombuffer(pool[begin + layout.value_bytes : begin + layout.block_bytes], np.float32).reshape(
        inner
    )


def _in_dtype(x: torch.Tensor, dtype: str) -> tuple[Bytes, Floats | None]:
    """(…, D) as the engine writes it: (…, bytes of D numbers) and, of a quantised dtype, (…) scales."""
    target = getattr(torch, dtype)
    if dtype in QUANTISED:
        quantised, scales = quantise_rows(x, target)
        return quantised.view(torch.uint8).numpy(), scales.numpy()
    return x.to(target).view(torch.uint8).numpy(), None
