"""config.json: what is read, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from disaggregated.errors import ModelUnavailable
from disaggregated.model_files import ModelConfig, read_eos_token_ids

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 2048,
    "eos_token_id": 2,
    "bos_token_id": 1,
}


def load(folder: Path, **changes: Any) -> ModelConfig:
    content = {key: value for key, value in {**LLAMA, **changes}.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(content))
    return ModelConfig.load(folder)


def test_defaults_are_those_of_transformers(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert (config.head_dim, config.rms_norm_eps, config.rope_theta, config.rope_scaling) == (16, 1e-6, 10000.0, None)
    assert (config.tie_word_embeddings, config.attention_bias, config.qk_norm) == (False, False, False)
    assert (config.eos_token_ids, config.bos_token_id, config.dtype, config.remarks) == ((2,), 1, "float32", ())
    assert load(tmp_path, num_key_value_heads=...).num_kv_heads == 4


@pytest.mark.parametrize(
    ("config_class", "bias", "qk_norm"),
    [
        (transformers.LlamaConfig, False, False),
        (transformers.MistralConfig, False, False),
        (transformers.Qwen2Config, True, False),
        (transformers.Qwen3Config, False, True),
    ],
)
def test_what_transformers_saves_is_read_back(tmp_path: Path, config_class: Any, bias: bool, qk_norm: bool) -> None:
    theirs = config_class(
        **{key: value for key, value in LLAMA.items() if key != "architectures"},
        head_dim=32,
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5},
        dtype="bfloat16",
        sliding_window=None,
    )
    theirs.architectures = [config_class.__name__.replace("Config", "ForCausalLM")]
    theirs.save_pretrained(tmp_path)
    ours = ModelConfig.load(tmp_path)
    assert ours.architecture == theirs.architectures[0]
    assert (ours.attention_bias, ours.qk_norm, ours.dtype) == (bias, qk_norm, "bfloat16")
    assert (ours.rope_theta, ours.rope_scaling) == (5e5, {"rope_type": "linear", "factor": 2.0})
    assert (ours.num_layers, ours.num_heads, ours.num_kv_heads, ours.head_dim) == (2, 4, 2, 32)
    assert ours.rms_norm_eps == theirs.rms_norm_eps


def test_the_older_spelling_of_rope_scaling_is_read(tmp_path: Path) -> None:
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config = load(tmp_path, rope_theta=500000, rope_scaling={"type": "llama3", **llama3})
    assert (config.rope_theta, config.rope_scaling) == (500000.0, {"rope_type": "llama3", **llama3})
    assert load(tmp_path, rope_scaling={"rope_type": "default"}).rope_scaling is None


def test_mistrals_sliding_window_is_that_of_the_file_or_else_of_transformers(tmp_path: Path) -> None:
    mistral = {"architectures": ["MistralForCausalLM"], "max_position_embeddings": 32768}
    assert load(tmp_path, **mistral, sliding_window=2048).windows == (2048, 2048)
    assert load(tmp_path, **mistral, sliding_window=None).windows == (None, None)
    assert load(tmp_path, **mistral).windows == (4096, 4096)
    assert load(tmp_path, **mistral).max_position_embeddings == 32768


def test_qwens_sliding_window_counts_only_where_it_is_used(tmp_path: Path) -> None:
    qwen = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 1024, "max_window_layers": 1}
    assert load(tmp_path, **qwen).windows == (None, None)
    assert load(tmp_path, **qwen, use_sliding_window=True).windows == (None, 1024)
    types = ["sliding_attention", "full_attention"]
    assert load(tmp_path, **qwen, use_sliding_window=True, layer_types=types).windows == (1024, None)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architectures: must be one of LlamaForCausalLM"),
        ({"architectures": ...}, "architectures: must be one of .*, is missing"),
        ({"hidden_size": ...}, "hidden_size: must be a positive whole number, is missing"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: must be a positive whole number, is 0"),
        ({"vocab_size": "many"}, "vocab_size: must be a positive whole number, is 'many'"),
        ({"num_attention_heads": True}, "num_attention_heads: must be a positive whole number, is True"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: must divide num_attention_heads, 4, is 3"),
        ({"head_dim": 15}, "head_dim: must be even, is 15"),
        ({"rms_norm_eps": -1}, "rms_norm_eps: must be a positive number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: must be true or false"),
        ({"hidden_act": "gelu"}, "hidden_act: must be \"silu\", is 'gelu'"),
        ({"mlp_bias": True}, "mlp_bias: must be false"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config: must be absent"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: must be 1"),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 4}},
            "rope_scaling: rope_type must be default, linear or llama3 or yarn",
        ),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling: factor must be a positive number"),
        ({"rope_scaling": ["linear"]}, "rope_scaling: must be an object"),
        ({"rope_parameters": {"rope_theta": "big"}}, "rope_parameters: rope_theta must be a positive number"),
        ({"eos_token_id": "</s>"}, "eos_token_id: must be a token id or a list of them"),
        ({"bos_token_id": [1]}, "bos_token_id: must be a token id or null"),
        ({"dtype": "int4"}, "dtype: must be one of float32, bfloat16, float16, is 'int4'"),
    ],
)
def test_a_bad_value_is_refused_with_file_and_key(tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ModelUnavailable, match=rf"config\.json: {complaint}"):
        load(tmp_path, **changes)


def test_a_generation_config_says_better_when_a_reply_ends(tmp_path: Path) -> None:
    load(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8, 7]}')
    assert read_eos_token_ids(tmp_path) == (7, 8)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6}')
    assert read_eos_token_ids(tmp_path) == (2,)


def test_a_model_without_an_end_is_allowed(tmp_path: Path) -> None:
    assert load(tmp_path, eos_token_id=None).eos_token_ids == ()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "config.json is damaged"),
        ("[]", "it is not a JSON object"),
        (None, "not a model directory: it has no config"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, content: str | None, complaint: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelUnavailable, match=complaint):
        ModelConfig.load(tmp_path)
