"""Sequences in a paged pool, cut into steps in any way: what the property tests of ops and models are made of."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Sequence

import torch

from disaggregated.engine.ops.api import AttentionBatch, AttentionSpec, LayerPool, Ops

NUM_BLOCKS = 96


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """Tokens `[first_position, first_position + num_tokens)` of a sequence whose KV lies in `blocks`."""

    first_position: int
    num_tokens: int
    blocks: Sequence[int]


def attention_batch(rows: Sequence[Row], block_size: int, device: str = "cpu") -> AttentionBatch:
    width = max(len(row.blocks) for row in rows)
    positions = [range(row.first_position, row.first_position + row.num_tokens) for row in rows]
    slots = [
        row.blocks[p // block_size] * block_size + p % block_size
        for row, own in zip(rows, positions, strict=True)
        for p in own
    ]
    starts = [0, *itertools.accumulate(row.num_tokens for row in rows)]
    return AttentionBatch(
        query_start=torch.tensor(starts, dtype=torch.int32, device=device),
        first_position=torch.tensor([row.first_position for row in rows], dtype=torch.int32, device=device),
        block_tables=torch.tensor(
            [[*row.blocks, *[0] * (width - len(row.blocks))] for row in rows], dtype=torch.int32, device=device
        ),
        positions=torch.tensor(list(itertools.chain(*positions)), dtype=torch.int64, device=device),
        slots=torch.tensor(slots, dtype=torch.int64, device=device),
        max_context_len=max(row.first_position + row.num_tokens for row in rows),
    )


@dataclasses.dataclass(frozen=True, slots=True)
class SequenceKV:
    """Queries, keys and values of one whole sequence; of latents, keys alone."""

    q_LND: torch.Tensor
    k_LGD: torch.Tensor
    v_LGD: torch.Tensor

    @classmethod
    def random(
        cls, length: int, heads: tuple[int, int, int], seed: int, dtype: torch.dtype, device: str = "cpu"
    ) -> SequenceKV:
        """`heads`: query heads, kv heads, head size."""
        num_heads, num_kv_heads, head_dim = heads
        generator = torch.Generator().manual_seed(seed)
        q, k, v = (
            torch.randn(length, n, head_dim, generator=generator).to(device, dtype)
            for n in (num_heads, num_kv_heads, num_kv_heads)
        )
        return cls(q, k, v)


def dense_attention(sequence: SequenceKV, spec: AttentionSpec | float) -> torch.Tensor:
    """(L, N, value size) in float64: the textbook formula. A number stands for a spec with that scale."""
    if isinstance(spec, float):
        spec = AttentionSpec(scale=spec)
    heads_per_kv = sequence.q_LND.shape[1] // sequence.k_LGD.shape[1]
    values = sequence.v_LGD if spec.latent_value_dim is None else sequence.k_LGD[..., : spec.latent_value_dim]
    q = sequence.q_LND.double().transpose(0, 1)
    k = sequence.k_LGD.double().repeat_interleave(heads_per_kv, 1).transpose(0, 1)
    v = values.double().repeat_interleave(heads_per_kv, 1).transpose(0, 1)
    scores = q @ k.transpose(1, 2) * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    everything = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
    hidden = everything.triu(1)
    if spec.window is not None:
        hidden |= everything.tril(-spec.window)
    return (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(0, 1)


def chunks_of(length: int, sizes: Sequence[int]) -> list[tuple[int, int]]:
    """(start, number of tokens), cycling through `sizes`."""
    cuts: list[tuple[int, int]] = []
    start = 0
    for size in itertools.cycle(sizes):
        if start >= length:
            return cuts
        cuts.append((start, min(size, length - start)))
        start += size
    raise AssertionError("cycle() ended")


class PagedSequences:
    """A pool full of NaN, and sequences that get their keys and values only as their chunks are computed."""

    def __init__(
        self,
        ops: Ops,
        sequences: Sequence[SequenceKV],
        block_size: int,
        seed: int,
        *,
        spec: AttentionSpec | None = None,
    ) -> None:
        self.ops, self.sequences, self.block_size = ops, sequences, block_size
        _, num_kv_heads, head_dim = sequences[0].k_LGD.shape
        self.spec = spec or AttentionSpec(scale=head_dim**-0.5)
        num_planes = 1 if self.spec.latent_value_dim else 2
        size = (NUM_BLOCKS, num_planes, num_kv_heads, block_size, head_dim)
        self.device = str(sequences[0].q_LND.device)
        self.pool = LayerPool(torch.full(size, torch.nan, dtype=sequences[0].q_LND.dtype, device=self.device))
        free = random.Random(seed).sample(range(NUM_BLOCKS), NUM_BLOCKS)
        self.blocks = [
            [free.pop() for _ in range(-(-len(sequence.q_LND) // block_size))] for sequence in self.sequences
        ]
        value_dim = self.spec.latent_value_dim or head_dim
        self.out = [torch.full_like(sequence.q_LND[..., :value_dim], torch.nan) for sequence in sequences]

    def step(self, parts: Sequence[tuple[int, int, int]]) -> None:
        """`parts`: (sequence, start, number of tokens)."""
        rows = [Row(start, n, self.blocks[i]) for i, start, n in parts]
        batch = attention_batch(rows, self.block_size, self.device)
        q, k, v = (
            torch.cat([getattr(self.sequences[i], name)[start : start + n] for i, start, n in parts])
            for name in ("q_LND", "k_LGD", "v_LGD")
        )
        self.ops.store_kv(k, None if self.spec.latent_value_dim else v, self.pool, batch.slots)
        out = self.ops.paged_attention(q, self.pool, batch, self.spec)
        for (i, start, n), own in zip(parts, torch.split(out, [n for _, _, n in parts]), strict=True):
            self.out[i][start : start + n] = own

    @property
    def scale(self) -> float:
        return self.spec.scale
