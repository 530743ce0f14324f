"""The op table: what every implementation (torch reference, native CPU kernels, later Triton) provides.

Legend of tensor names: T tokens of the step, R rows (sequences) of the step, H hidden, N query heads, G kv heads,
D head_dim, F ffn width, B blocks of the pool, P planes of a block (key and value; one for a latent), S block_size,
V vocabulary, K/M in and out features of a linear.

The law of this table: **a row's result is bitwise the same whatever other rows are in the call.** Failover, prefix
caching and "disaggregated equals one process" all stand on it, and a property test of each op proves it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from disaggregated.engine.layer_progress import LayerProgress

if TYPE_CHECKING:
    from disaggregated.engine.models.decoder import DecoderShape, DecoderWeights


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AttentionBatch:
    """Where the tokens of one step lie, as tensors on the model's device. Made once a step, used by every layer."""

    query_start: torch.Tensor
    """(R + 1) int32: row r's tokens are `[query_start[r], query_start[r + 1])` of T."""
    first_position: torch.Tensor
    """(R) int32: position in its sequence of each row's first token, i.e. how many tokens were cached before."""
    block_tables: torch.Tensor
    """(R, max_blocks) int32, padded with 0."""
    positions: torch.Tensor
    """(T) int64: position of each token in its sequence."""
    slots: torch.Tensor
    """(T) int64: `block_id * block_size + offset` where each token's key and value go."""
    max_context_len: int
    """Longest `first_position + query length` of the rows."""
    rows: tuple[tuple[int, int], ...] | None = None
    """(first position, number of tokens) of each row on the host, for implementations that plan there: saves a sync."""


@dataclasses.dataclass(frozen=True, slots=True)
class LayerPool:
    """One layer of the KV pool. Views of memory that transports read too; see `KVLayout` for how a block lies there."""

    values: torch.Tensor
    """(B, P, G, S, D) of the pool's dtype. A block is contiguous; the scales, if any, lie between two blocks."""
    scales: torch.Tensor | None = None
    """(B, P, G, S) float32, only of quantised dtypes: the factor of each token's key, or value, of a head."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """What a layer's attention computes, beside its tensors."""

    scale: float
    window: int | None = None
    """A token sees this many last tokens, itself among them; None: all."""
    softcap: float | None = None
    """Scores become softcap · tanh(score / softcap) before the softmax (Gemma 2)."""
    latent_value_dim: int | None = None
    """Of a pool with one plane: the first so many numbers of the stored latent are also the value (MLA)."""


class StepProgram(Protocol):
    def __call__(
        self,
        token_ids_T: torch.Tensor,
        batch: AttentionBatch,
        pools: Sequence[LayerPool],
        progress: LayerProgress | None = None,
    ) -> torch.Tensor:
        """(T, H) hidden states before the final norm; the same bits with and without `progress`.

        A program whose kernels run after it has returned tells no progress.
        """

    @property
    def decode(self) -> DecodeProgram | None:
        """None: decoding has no way of its own here."""


class DecodeRows(NamedTuple):
    """At least one row, of one token each; no block table is empty."""

    token_ids: list[int]
    positions: list[int]
    block_tables: list[Sequence[int]]


class DecodeProgram(Protocol):
    """A step in which every row is one token, sampled after: the bits of the way over tensors, in less time."""

    def likeliest(self, rows: DecodeRows, pools: Sequence[LayerPool]) -> list[int]:
        """The next token of each row. Each layer's keys and values are in `pools` then."""

    def logits(self, rows: DecodeRows, pools: Sequence[LayerPool]) -> torch.Tensor:
        """(R, V) instead: the caller's to change, until the next call works in the same memory."""


class Ops(Protocol):
    """All tensors are contiguous and of the model's dtype; results are new tensors unless said otherwise."""

    name: str
    """For logs and the numerics part of the model fingerprint: "torch", "native-avx512"."""
    linear_bytes: Mapping[str, int]
    """Bytes of the linears prepared so far, by the form they are held in; empty in a table that keeps no such books."""

    def prepare_linear(self, weight_MK: torch.Tensor, bias_M: torch.Tensor | None, *, exact: bool = False) -> Any:
        """Lay a weight out, and quantise it if this table does; what `linear` is then given.

        `exact`: never quantised, for a product in which a small error changes a decision, such as a router's.
        """

    def linear(self, x_TK: torch.Tensor, weight: Any) -> torch.Tensor:
        """(T, M) = x · weightᵀ + bias."""

    def embedding(self, token_ids_T: torch.Tensor, table_VH: torch.Tensor) -> torch.Tensor: ...

    def rms_norm(self, x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
        """Over the last dimension, in float32 inside, of a tensor of any rank."""

    def silu_mul(self, gate_up_TF2: torch.Tensor) -> torch.Tensor:
        """(T, F) = silu(first half) * second half."""

    def gelu_mul(self, gate_up_TF2: torch.Tensor) -> torch.Tensor:
        """(T, F) = gelu(first half) * second half, with the approximation of gelu by tanh."""

    def rope(self, x_TND: torch.Tensor, cos_PD: torch.Tensor, sin_PD: torch.Tensor, positions_T: torch.Tensor) -> None:
        """Rotate in place, halves convention (Hugging Face's): tables are (max positions, D / 2), float32."""

    def store_kv(
        self, key_TGD: torch.Tensor, value_TGD: torch.Tensor | None, pool: LayerPool, slots_T: torch.Tensor
    ) -> None:
        """Write each token's key and value into its slot of one layer's pool; no value where the pool has one plane.

        A quantised pool takes, for each token and head, the scale that its own largest number asks for: what is stored
        depends on the token alone.
        """

    def paged_attention(
        self, q_TND: torch.Tensor, pool: LayerPool, batch: AttentionBatch, spec: AttentionSpec
    ) -> torch.Tensor:
        """(T, N, D): causal attention of each token over its sequence's keys 0 … own position, read from the pool.

        The last dimension is `spec.latent_value_dim` for a pool of latents.
        """

    def argmax(self, logits_RV: torch.Tensor) -> torch.Tensor:
        """(R) int64: where each row's largest number is, of equals the first. NaN is larger than all else."""

    def top_k(self, values_RV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Each row's `k` largest numbers, the largest first, and their ids; (R, K) both. Which of equals is open."""

    def step_program(self, shape: DecoderShape, weights: DecoderWeights) -> StepProgram | None:
        """A whole forward pass in one call, with the very bits of the ops above; None: this table has none for it."""
