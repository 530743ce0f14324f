"""Multi-head latent attention (DeepSeek V2, V3): what is cached of a token is one short vector for all heads.

A key is a matrix of its head times the latent, so a query times the key is the query times that matrix, times the
latent: the matrix goes to the query's side, and likewise a value's matrix behind the attention. What is left is
attention with a single kv head whose keys are latents, with the rotated part behind, and whose values are the latents
themselves (DeepSeek-V2, 2024, section 2.1, calls it absorbing).

Legend: C latent, E rotated part of a head, U its plain part, W value size of a head, others as in `ops/api.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Final

import torch

from disaggregated.engine.models.rope import RopeTables
from disaggregated.engine.models.weight_reader import NamedWeights, joined
from disaggregated.engine.ops.api import AttentionBatch, AttentionSpec, LayerPool, Ops
from disaggregated.model_files import ModelConfig
from disaggregated.model_files.model_parts import LatentConfig

LATENT_NORM_EPS: Final = 1e-6
"""Of the norms within the attention, whatever the model's own is."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttention:
    """Implements `Attention`."""

    latent: LatentConfig
    num_heads: int
    first: Any
    """H → queries (or, where they are squeezed, what becomes them), latent, rotated key."""
    q_norm: torch.Tensor | None
    q_second: Any
    """Squeezed → queries: all heads' plain parts, then all heads' rotated ones. None where they are not squeezed."""
    kv_norm: torch.Tensor
    key_to_latent: Sequence[Any]
    """For each head U → C: from a plain query to what latents are multiplied with."""
    latent_to_value: Sequence[Any]
    """For each head C → W."""
    out: Any
    spec: AttentionSpec
    rope: RopeTables

    @classmethod
    def read(cls, weights: NamedWeights, config: ModelConfig, rope: RopeTables) -> LatentAttention:
        latent, heads = config.latent, config.num_heads
        assert latent is not None, f"{config.architecture} has no latent attention"
        key_to_latent, latent_to_value = _read_absorbed(weights, latent, heads)
        return cls(
            latent=latent,
            num_heads=heads,
            first=_read_first(weights, config, latent),
            q_norm=weights.norm("q_a_layernorm", latent.q_rank) if latent.q_rank is not None else None,
            q_second=_read_second(weights, config, latent),
            kv_norm=weights.norm("kv_a_layernorm", latent.kv_rank),
            key_to_latent=key_to_latent,
            latent_to_value=latent_to_value,
            out=weights.linear(
                {"o_proj": config.hidden_size},
                heads * latent.value_dim,
                biased=["o_proj"] if config.attention_out_bias else [],
            ),
            spec=AttentionSpec(scale=config.attention_scale, latent_value_dim=latent.kv_rank),
            rope=rope,
        )

    def forward(self, normed_TH: torch.Tensor, batch: AttentionBatch, pool: LayerPool, ops: Ops) -> torch.Tensor:
        latent, num_tokens = self.latent, len(normed_TH)
        first = ops.linear(normed_TH, self.first)
        widths = [first.shape[1] - latent.kv_rank - latent.rope_dim, latent.kv_rank, latent.rope_dim]
        q, latent_TC, k_TE = torch.split(first, widths, -1)
        if self.q_norm is not None:
            q = ops.linear(ops.rms_norm(q.contiguous(), self.q_norm, LATENT_NORM_EPS), self.q_second)
        keys = self._keys(latent_TC, k_TE, batch, ops)
        ops.store_kv(keys, None, pool, batch.slots)
        attended_TNC = ops.paged_attention(self._queries(q, batch, ops), pool, batch, self.spec)
        values = [ops.linear(attended_TNC[:, n].contiguous(), self.latent_to_value[n]) for n in range(self.num_heads)]
        return ops.linear(torch.stack(values, 1).view(num_tokens, -1), self.out)

    def _keys(self, latent_TC: torch.Tensor, k_TE: torch.Tensor, batch: AttentionBatch, ops: Ops) -> torch.Tensor:
        """(T, 1, C + E)"""
        k_T1E = k_TE.unsqueeze(1).contiguous()
        ops.rope(k_T1E, self.rope.cos_PD, self.rope.sin_PD, batch.positions)
        normed = ops.rms_norm(latent_TC.contiguous(), self.kv_norm, LATENT_NORM_EPS)
        return torch.cat([normed.unsqueeze(1), k_T1E], -1)

    def _queries(self, q: torch.Tensor, batch: AttentionBatch, ops: Ops) -> torch.Tensor:
        """(T, N, C + E), of all heads' plain parts and then all heads' rotated ones."""
        latent, heads = self.latent, self.num_heads
        plain, rotated = torch.split(q, [heads * latent.plain_dim, heads * latent.rope_dim], -1)
        plain_NTU = plain.reshape(-1, heads, latent.plain_dim).transpose(0, 1).contiguous()
        rotated_TNE = rotated.reshape(-1, heads, latent.rope_dim).contiguous()
        ops.rope(rotated_TNE, self.rope.cos_PD, self.rope.sin_PD, batch.positions)
        absorbed = [ops.linear(plain_NTU[n], self.key_to_latent[n]) for n in range(heads)]
        return torch.cat([torch.stack(absorbed, 1), rotated_TNE], -1)


def _read_first(weights: NamedWeights, config: ModelConfig, latent: LatentConfig) -> Any:
    """One linear for all that begins at the hidden states; only projections into something narrower have biases."""
    hidden, kv_width, has_bias = config.hidden_size, latent.kv_rank + latent.rope_dim, config.attention_bias
    name, width = ("q_a_proj", latent.q_rank) if latent.q_rank else ("q_proj", config.num_heads * config.head_dim)
    q = weights.tensor(f"{name}.weight", width, hidden)
    kv = weights.tensor("kv_a_proj_with_mqa.weight", kv_width, hidden)
    q_bias = weights.tensor(f"{name}.bias", width) if has_bias and latent.q_rank else q.new_zeros(width)
    kv_bias = weights.tensor("kv_a_proj_with_mqa.bias", kv_width) if has_bias else None
    order = [*range(latent.kv_rank), *(latent.kv_rank + i for i in _halves_order(latent))]

    def make() -> tuple[torch.Tensor, torch.Tensor | None]:
        rows = [q] if latent.q_rank else _query_rows(q, config, latent)
        return joined([*rows, kv[order]]), None if kv_bias is None else joined([q_bias, kv_bias[order]])

    return weights.prepare(make)


def _read_second(weights: NamedWeights, config: ModelConfig, latent: LatentConfig) -> Any:
    if latent.q_rank is None:
        return None
    q = weights.tensor("q_b_proj.weight", config.num_heads * config.head_dim, latent.q_rank)
    return weights.prepare(lambda: (joined(_query_rows(q, config, latent)), None))


def _query_rows(q: torch.Tensor, config: ModelConfig, latent: LatentConfig) -> list[torch.Tensor]:
    """The rows of all heads' plain parts, and of their rotated ones."""
    heads = q.view(config.num_heads, config.head_dim, -1)
    plain, rotated = torch.split(heads, [latent.plain_dim, latent.rope_dim], 1)
    return [plain.flatten(0, 1), rotated[:, _halves_order(latent)].flatten(0, 1)]


def _read_absorbed(weights: NamedWeights, latent: LatentConfig, num_heads: int) -> tuple[Sequence[Any], Sequence[Any]]:
    width = latent.plain_dim + latent.value_dim
    kv = weights.tensor("kv_b_proj.weight", num_heads * width, latent.kv_rank)

    def make_key(head: int) -> tuple[torch.Tensor, None]:
        start = head * width
        return kv[start : start + latent.plain_dim].t().contiguous(), None

    def make_value(head: int) -> tuple[torch.Tensor, None]:
        end = (head + 1) * width
        return kv[end - latent.value_dim : end].contiguous(), None

    return (
        [weights.prepare(functools.partial(make_key, head)) for head in range(num_heads)],
        [weights.prepare(functools.partial(make_value, head)) for head in range(num_heads)],
    )


def _halves_order(latent: LatentConfig) -> list[int]:
    """Which row of a rotated part goes where, so that what was rotated with its neighbour is half of them away."""
    if not latent.rope_is_interleaved:
        return list(range(latent.rope_dim))
    return [*range(0, latent.rope_dim, 2), *range(1, latent.rope_dim, 2)]
