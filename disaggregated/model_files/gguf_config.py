"""config.json and generation_config.json out of a GGUF's keys."""

from __future__ import annotations

import dataclasses
import math
import re
import struct
from collections.abc import Mapping
from typing import Any, Final

from disaggregated.errors import ModelUnavailable
from disaggregated.model_files.gguf_file import GgufFile


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How llama.cpp stores one architecture."""

    hugging_face: str
    model_type: str
    rope_is_permuted: bool = False
    """llama.cpp rotates neighbours where Hugging Face rotates halves, and reorders the q and k rows to suit."""


FAMILIES: Final[Mapping[str, Family]] = {
    "llama": Family(hugging_face="LlamaForCausalLM", model_type="llama", rope_is_permuted=True),
    "mistral": Family(hugging_face="MistralForCausalLM", model_type="mistral", rope_is_permuted=True),
    "qwen2": Family(hugging_face="Qwen2ForCausalLM", model_type="qwen2"),
    "qwen3": Family(hugging_face="Qwen3ForCausalLM", model_type="qwen3"),
}

_MODULES: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTER: Final = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
ROPE_FACTORS: Final = "rope_freqs.weight"
"""Not a weight: what Llama 3.1 divides its rotation frequencies by."""
_LAYER_TENSOR: Final = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


def family_of(gguf: GgufFile) -> Family:
    """Raises ModelUnavailable for architectures and variants that cannot be served."""
    architecture = gguf.architecture
    if architecture not in FAMILIES:
        raise ModelUnavailable(
            f"{gguf.path}: architecture {architecture!r} cannot be served; {', '.join(FAMILIES)} can"
        )
    if gguf.keys.get("split.count", 1) > 1:
        raise ModelUnavailable(f"{gguf.path} is one of several files; join them with `llama-gguf-split --merge` first")
    if gguf.keys.get(f"{architecture}.expert_count", 0):
        raise ModelUnavailable(f"{gguf.path}: mixture-of-experts models cannot be served")
    return FAMILIES[architecture]


def hugging_face_name(gguf: GgufFile, name: str) -> str:
    """The name that a tensor has in a Hugging Face checkpoint."""
    if name in _OUTER:
        return _OUTER[name]
    match = _LAYER_TENSOR.fullmatch(name)
    if match is None or match[2] not in _MODULES:
        raise ModelUnavailable(f"{gguf.path} has the tensor {name}, which {gguf.architecture} models do not have here")
    return f"model.layers.{match[1]}.{_MODULES[match[2]]}.{match[3]}"


def config_files(gguf: GgufFile) -> tuple[dict[str, Any], dict[str, Any]]:
    """The contents of config.json and generation_config.json."""
    family = family_of(gguf)
    tokens = {
        "bos_token_id": gguf.keys.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _eos(gguf),
        "pad_token_id": gguf.keys.get("tokenizer.ggml.padding_token_id"),
    }
    config = {
        "architectures": [family.hugging_face],
        "model_type": family.model_type,
        "hidden_act": "silu",
        **_shape(gguf),
        **_rope(gguf),
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "attention_bias": "blk.0.attn_q.bias" in gguf.tensors,
        "torch_dtype": _dtype(gguf),
        **tokens,
    }
    return config, tokens


def _shape(gguf: GgufFile) -> dict[str, Any]:
    def key(name: str) -> Any:
        return gguf.require(f"{gguf.architecture}.{name}")

    def optional(name: str, default: Any) -> Any:
        return gguf.keys.get(f"{gguf.architecture}.{name}", default)

    if "token_embd.weight" not in gguf.tensors:
        raise ModelUnavailable(f"{gguf.path} has no tensor token_embd.weight; it cannot be served")
    vocab_size, hidden_size = gguf.tensors["token_embd.weight"].shape
    num_heads = key("attention.head_count")
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": key("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": optional("attention.head_count_kv", num_heads),
        "head_dim": optional("attention.key_length", optional("rope.dimension_count", hidden_size // num_heads)),
        "intermediate_size": key("feed_forward_length"),
        "max_position_embeddings": key("context_length"),
        "sliding_window": optional("attention.sliding_window", None),
        "rms_norm_eps": _shortest_float(key("attention.layer_norm_rms_epsilon")),
    }


def _shortest_float(value: float) -> float:
    """GGUF keeps a float32: 9.999999747378752e-06 was written 1e-05, and 1e-05 is what the model was trained with."""
    for digits in range(1, 10):
        short = float(f"{value:.{digits}g}")
        if struct.pack("<f", short) == struct.pack("<f", value):
            return short
    return value


def _rope(gguf: GgufFile) -> dict[str, Any]:
    prefix = f"{gguf.architecture}.rope"
    theta = _shortest_float(gguf.keys.get(f"{prefix}.freq_base", 10000.0))
    kind = gguf.keys.get(f"{prefix}.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise ModelUnavailable(f"{gguf.path}: {prefix}.scaling.type {kind!r} is not supported; none and linear are")
    scaling: dict[str, Any] | None = None
    if kind == "linear":
        scaling = {"rope_type": "linear", "factor": gguf.require(f"{prefix}.scaling.factor")}
    if ROPE_FACTORS in gguf.tensors:
        scaling = _llama3_scaling(gguf, theta)
    return {"rope_theta": theta, "rope_scaling": scaling}


def _llama3_scaling(gguf: GgufFile, theta: float) -> dict[str, Any]:
    """What the factors were computed from: they tell `factor`, and the rest is the same in every Llama 3 model."""
    tensor = gguf.tensors[ROPE_FACTORS]
    (half,) = tensor.shape
    factors = struct.unpack(f"<{half}f", gguf.read(tensor, 4 * half))
    scaling = {
        "rope_type": "llama3",
        "factor": round(max(factors), 4),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    expected = [_llama3_factor(scaling, theta ** (-index / half)) for index in range(half)]
    if not all(math.isclose(found, want, rel_tol=1e-3) for found, want in zip(factors, expected, strict=True)):
        raise ModelUnavailable(f"{gguf.path}: {ROPE_FACTORS} is not Llama 3's; serve the original directory instead")
    return scaling


def _llama3_factor(scaling: Mapping[str, Any], frequency: float) -> float:
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    low, high, factor = scaling["low_freq_factor"], scaling["high_freq_factor"], scaling["factor"]
    if turns <= low:
        return float(factor)
    if turns >= high:
        return 1.0
    smooth = (turns - low) / (high - low)
    return float(1 / ((1 - smooth) / factor + smooth))


def _eos(gguf: GgufFile) -> int | list[int] | None:
    """End of text, and end of turn where the file tells them apart."""
    ends = [gguf.keys.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    found = list(dict.fromkeys(end for end in ends if end is not None))
    return found[0] if len(found) == 1 else found or None


def _dtype(gguf: GgufFile) -> str:
    """Of the embedding if it is a plain float type; quantised weights become float32."""
    return {1: "float16", 30: "bfloat16"}.get(gguf.tensors["token_embd.weight"].ggml_type, "float32")
