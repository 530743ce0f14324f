"""A model of Llama-3-8B's shape with random weights: nothing to download."""

from __future__ import annotations

import json
import pathlib
from typing import Final

NUM_LAYERS, HIDDEN, FFN, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, VOCABULARY = 32, 4096, 14336, 32, 8, 128, 128256
LINEAR_WEIGHTS: Final = NUM_LAYERS * (
    HIDDEN * (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM + NUM_HEADS * HEAD_DIM * HIDDEN + 3 * HIDDEN * FFN
)
"""Numbers, without embedding and output head."""
HEAD_WEIGHTS: Final = HIDDEN * VOCABULARY


def write_model(folder: pathlib.Path) -> pathlib.Path:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 16384,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "eos_token_id": 128001,
        "bos_token_id": 128000,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    path = folder / "llama-3-8b-shape"
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    return path


def decode_bytes(batch_size: int, context: int, *, weight_bytes: int, kv_bytes: int) -> float:
    """That one decode step must read: every weight once, and each sequence's keys and values."""
    weights = (LINEAR_WEIGHTS + HEAD_WEIGHTS) * weight_bytes
    kv_token = 2 * NUM_LAYERS * NUM_KV_HEADS * (HEAD_DIM * kv_bytes + (4 if kv_bytes == 1 else 0))
    return weights + batch_size * context * kv_token


def prefill_flops(num_tokens: int) -> float:
    """Of one prompt from its beginning: products with every weight, and causal attention; one row of logits."""
    attention = 2 * 2 * NUM_LAYERS * NUM_HEADS * HEAD_DIM * num_tokens * (num_tokens + 1) / 2
    return 2 * LINEAR_WEIGHTS * num_tokens + attention + 2 * HEAD_WEIGHTS
