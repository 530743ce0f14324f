"""The least time that a step of a model could take on this machine: its bytes from DRAM or its sums, the longer one."""

from __future__ import annotations

from benchmarks.engines.measurement import CONTEXT_LEN
from benchmarks.roofline import Arithmetic, Roofline
from disaggregated.model_files import ModelConfig

KV_BYTES = {"float32": 4, "int8": 1}
"""Of a number of the KV pool."""


def decode_s(
    roofline: Roofline, model: ModelConfig, batch_size: int, precision: Arithmetic, *, weight_bytes: int
) -> float:
    """All weights, `weight_bytes` as they are held, and every sequence's keys and values are read once."""
    kv_numbers = 2 * model.num_layers * model.num_kv_heads * model.head_dim * CONTEXT_LEN * batch_size
    num_bytes = weight_bytes + KV_BYTES[precision] * kv_numbers
    return max(
        num_bytes / roofline.bytes_per_s,
        _sums_s(roofline, model, batch_size, batch_size * CONTEXT_LEN, precision),
    )


def prefill_s(roofline: Roofline, model: ModelConfig, length: int, precision: Arithmetic) -> float:
    """All tokens go through all layers; one needs the output head."""
    head = 2 * model.vocab_size * model.hidden_size / roofline.operations_per_s[precision]
    whole = _sums_s(roofline, model, length, length * (length + 1) // 2, precision)
    return whole - (length - 1) * head


def num_matrix_weights(model: ModelConfig) -> int:
    """Weights that each token is multiplied by: the output head too, the embedding table not."""
    q, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    layer = model.hidden_size * (2 * q + 2 * kv + 3 * model.intermediate_size)
    return model.num_layers * layer + model.vocab_size * model.hidden_size


def _sums_s(roofline: Roofline, model: ModelConfig, num_tokens: int, num_keys: int, precision: Arithmetic) -> float:
    """Products with weights in the model's precision, those of attention (`num_keys` seen by all tokens) in float32."""
    linears = 2 * num_matrix_weights(model) * num_tokens
    attention = 4 * model.num_layers * model.num_heads * model.head_dim * num_keys
    return linears / roofline.operations_per_s[precision] + attention / roofline.operations_per_s["float32"]
