"""What config.json says about a model, checked once and turned into numbers the engine is built from.

A value that would change the mathematics and is not implemented is refused here, in words: a model that loads and then
talks nonsense is worse than one that does not load.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Self

from disaggregated.errors import ModelUnavailable
from disaggregated.model_files.checkpoint import read_json

ARCHITECTURES: Final = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_DTYPES: Final = ("float32", "bfloat16", "float16")
_ROPE_SCALING_KEYS: Final[Mapping[str, tuple[str, ...]]] = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    architecture: str
    """One of ARCHITECTURES."""
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Mapping[str, Any] | None
    """None, or `rope_type` "linear" or "llama3" with its numbers under Hugging Face's names."""
    tie_word_embeddings: bool
    attention_bias: bool
    """Biases on q, k and v; the Llama and Qwen3 families then have one on o too, Qwen2 does not."""
    qk_norm: bool
    """Qwen3's RMS norm of each head's query and key before rope."""
    max_position_embeddings: int
    """The longest sequence served, in tokens; already cut to a sliding window (see `remarks`)."""
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    dtype: str
    """Of the weights on disk: "float32", "bfloat16" or "float16"."""
    remarks: tuple[str, ...] = ()
    """What an operator should know about how this model is served, a sentence each; the server logs them."""

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read `path`/config.json and generation_config.json. Raises ModelUnavailable naming file and key."""
        keys = _Keys(path / "config.json")
        architecture = _architecture(keys)
        _refuse_other_mathematics(keys)
        heads, hidden_size = keys.positive_int("num_attention_heads"), keys.positive_int("hidden_size")
        longest, remarks = _longest_sequence(keys, architecture)
        theta, scaling = _rope(keys)
        config = cls(
            architecture=architecture,
            vocab_size=keys.positive_int("vocab_size"),
            hidden_size=hidden_size,
            num_layers=keys.positive_int("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=keys.positive_int("num_key_value_heads", heads),
            head_dim=keys.positive_int("head_dim", max(1, hidden_size // heads)),
            intermediate_size=keys.positive_int("intermediate_size"),
            rms_norm_eps=keys.number("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=keys.flag("tie_word_embeddings", False),
            attention_bias=keys.flag("attention_bias", False) or architecture == "Qwen2ForCausalLM",
            qk_norm=architecture == "Qwen3ForCausalLM",
            max_position_embeddings=longest,
            eos_token_ids=read_eos_token_ids(path),
            bos_token_id=keys.token("bos_token_id"),
            dtype=_dtype(keys),
            remarks=remarks,
        )
        if config.num_heads % config.num_kv_heads:
            raise keys.bad("num_key_value_heads", f"must divide num_attention_heads, {heads}")
        if config.head_dim % 2:
            raise keys.bad("head_dim", "must be even")
        return config


def read_eos_token_ids(path: Path) -> tuple[int, ...]:
    """The tokens that end a reply: generation_config.json's if it names any, else config.json's. May be empty."""
    for name in ("generation_config.json", "config.json"):
        if name == "generation_config.json" and not (path / name).is_file():
            continue
        keys = _Keys(path / name)
        value = keys.get("eos_token_id")
        ends = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(end, bool) or not isinstance(end, int) for end in ends):
            raise keys.bad("eos_token_id", "must be a token id or a list of them")
        if ends:
            return tuple(dict.fromkeys(ends))
    return ()


class _Keys:
    """A JSON file's keys; each reader checks the type and complains by name."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._values = read_json(file)

    def bad(self, key: str, must: str) -> ModelUnavailable:
        found = f"is {self._values[key]!r}" if key in self._values else "is missing"
        return ModelUnavailable(f"{self._file}: {key}: {must}, {found}")

    def get(self, key: str) -> Any:
        return self._values.get(key)

    def positive_int(self, key: str, default: int | None = None) -> int:
        value = self.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.bad(key, "must be a positive whole number")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            raise self.bad(key, "must be a positive number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.bad(key, "must be true or false")
        return value

    def token(self, key: str) -> int | None:
        value = self.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise self.bad(key, "must be a token id or null")
        return value


def _architecture(keys: _Keys) -> str:
    named = keys.get("architectures")
    if not isinstance(named, list) or len(named) != 1 or named[0] not in ARCHITECTURES:
        raise keys.bad("architectures", f"must be one of {', '.join(ARCHITECTURES)}")
    return str(named[0])


def _refuse_other_mathematics(keys: _Keys) -> None:
    if keys.get("hidden_act") not in (None, "silu", "swish"):
        raise keys.bad("hidden_act", 'must be "silu"')
    if keys.get("mlp_bias"):
        raise keys.bad("mlp_bias", "must be false (biases in the feed-forward layers are not supported)")
    if keys.get("quantization_config"):
        raise keys.bad("quantization_config", "must be absent (quantised checkpoints are not supported)")
    if keys.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise keys.bad("partial_rotary_factor", "must be 1")


def _rope(keys: _Keys) -> tuple[float, Mapping[str, Any] | None]:
    """Theta and scaling; newer files have both in `rope_parameters`, older ones theta outside and `rope_scaling`."""
    key = "rope_parameters" if keys.get("rope_parameters") is not None else "rope_scaling"
    rope = keys.get(key)
    if rope is None:
        return keys.number("rope_theta", 10000.0), None
    if not isinstance(rope, dict):
        raise keys.bad(key, "must be an object")
    theta = rope.get("rope_theta", keys.number("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not _is_positive(theta):
        raise keys.bad(key, "rope_theta must be a positive number")
    if kind == "default":
        return float(theta), None
    if not isinstance(kind, str) or kind not in _ROPE_SCALING_KEYS:
        raise keys.bad(key, f"rope_type must be default, {' or '.join(_ROPE_SCALING_KEYS)} (others are not supported)")
    for name in _ROPE_SCALING_KEYS[kind]:
        if not _is_positive(rope.get(name)):
            raise keys.bad(key, f"{name} must be a positive number")
    return float(theta), {"rope_type": kind, **{name: rope[name] for name in _ROPE_SCALING_KEYS[kind]}}


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _longest_sequence(keys: _Keys, architecture: str) -> tuple[int, tuple[str, ...]]:
    """A sequence no longer than the sliding window is computed the same with and without one, so it is cut to that."""
    longest = keys.positive_int("max_position_embeddings")
    window = keys.get("sliding_window")
    if architecture.startswith("Qwen") and not keys.flag("use_sliding_window", False):
        window = None
    if window is None:
        return longest, ()
    window = keys.positive_int("sliding_window")
    if window >= longest:
        return longest, ()
    return window, (
        f"sequences are limited to {window} tokens instead of {longest}: beyond that the model uses "
        "sliding-window attention, which is not supported",
    )


def _dtype(keys: _Keys) -> str:
    key = "dtype" if keys.get("dtype") is not None else "torch_dtype"
    dtype = keys.get(key)
    if dtype is None:
        return "float32"
    if dtype not in _DTYPES:
        raise keys.bad(key, f"must be one of {', '.join(_DTYPES)}")
    return str(dtype)
