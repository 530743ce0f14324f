"""What this machine can do at all, measured in the same run, and the least time that a step could take on it."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Final

import torch

from benchmarks.engines.measurement import CONTEXT_LEN
from disaggregated.model_files import ModelConfig

DRAM_BYTES: Final = 512 << 20
SQUARE: Final = 1536
ROUNDS: Final = 7


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    bytes_per_s: float
    """Read from DRAM."""
    flops_per_s: float
    """Of a large fp32 matrix product."""

    def decode_s(self, model: ModelConfig, batch_size: int, weight_bytes: int) -> float:
        """Every weight and every sequence's keys and values are read once; the sums are fp32 ones."""
        kv_bytes = 4 * 2 * model.num_layers * model.num_kv_heads * model.head_dim * CONTEXT_LEN * batch_size
        return max(
            (num_matrix_weights(model) * weight_bytes + kv_bytes) / self.bytes_per_s,
            self._flops(model, batch_size, batch_size * CONTEXT_LEN) / self.flops_per_s,
        )

    def prefill_s(self, model: ModelConfig, length: int) -> float:
        """All but the output head, which one token needs."""
        head = 2 * model.vocab_size * model.hidden_size
        flops = self._flops(model, length, length * (length + 1) // 2) - (length - 1) * head
        return flops / self.flops_per_s

    def _flops(self, model: ModelConfig, num_tokens: int, num_keys_seen: int) -> float:
        attention = 4 * model.num_layers * model.num_heads * model.head_dim * num_keys_seen
        return 2 * num_matrix_weights(model) * num_tokens + attention


def num_matrix_weights(model: ModelConfig) -> int:
    """Weights that each token is multiplied by: the output head too, the embedding table not."""
    q, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    layer = model.hidden_size * (2 * q + 2 * kv + 3 * model.intermediate_size)
    return model.num_layers * layer + model.vocab_size * model.hidden_size


def measure(threads: int) -> Roofline:
    torch.set_num_threads(threads)
    large, square = torch.ones(DRAM_BYTES // 4), torch.randn(SQUARE, SQUARE)
    return Roofline(
        bytes_per_s=DRAM_BYTES / best_s(large.sum),
        flops_per_s=2 * SQUARE**3 / best_s(lambda: square @ square),
    )


def best_s(call: Callable[[], object]) -> float:
    """The median of the better half: a limit is what the machine does when nobody disturbs it."""
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(sorted(seconds)[: ROUNDS // 2 + 1])
