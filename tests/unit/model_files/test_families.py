"""Each family's config.json: what transformers saves is read back, what checkpoints leave out defaults as there, and
what is not implemented is refused by name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from disaggregated.engine.models import families as engine_families
from disaggregated.errors import ModelUnavailable
from disaggregated.model_files import ModelConfig, read_num_tokens_max
from disaggregated.model_files.families import FAMILIES

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 2048,
}
DEEPSEEK: dict[str, Any] = {"num_key_value_heads": 4, "num_experts_per_tok": 2, "n_routed_experts": 8}


def load(folder: Path, architecture: str, **changes: Any) -> ModelConfig:
    content = {key: value for key, value in {**SIZES, **changes}.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps({"architectures": [architecture], **content}))
    return ModelConfig.load(folder)


def saved(folder: Path, name: str, **changes: Any) -> tuple[Any, ModelConfig]:
    """transformers' config, and ours of what it saves."""
    theirs = getattr(transformers, {"Gemma3": "Gemma3TextConfig"}.get(name, f"{name}Config"))(**{**SIZES, **changes})
    theirs.architectures = [f"{name}ForCausalLM"]
    theirs.save_pretrained(folder)
    return theirs, ModelConfig.load(folder)


def test_each_family_is_known_to_the_config_and_to_the_engine() -> None:
    assert FAMILIES.keys() == engine_families.FAMILIES.keys()


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2", "Gemma3", "Mixtral", "Qwen3Moe"])
def test_what_a_file_leaves_out_is_what_transformers_takes(tmp_path: Path, name: str) -> None:
    theirs, complete = saved(tmp_path, name)
    (tmp_path / "sparse").mkdir()
    sparse = load(tmp_path / "sparse", f"{name}ForCausalLM", max_position_embeddings=theirs.max_position_embeddings)
    for field in ("windows", "attention_scale", "attention_softcap", "final_softcap", "rms_norm_eps", "rope_theta",
                  "sliding_rope_theta", "tie_word_embeddings", "head_dim", "experts"):  # fmt: skip
        assert getattr(sparse, field) == getattr(complete, field), field


def test_gemma_2_alternates_and_bounds(tmp_path: Path) -> None:
    theirs, ours = saved(tmp_path, "Gemma2", sliding_window=512, query_pre_attn_scalar=144)
    assert ours.windows == (512, None) * 3
    assert ours.attention_scale == 144**-0.5
    assert (ours.attention_softcap, ours.final_softcap) == (50.0, 30.0)
    assert ours.tie_word_embeddings
    assert ours.head_dim == theirs.head_dim == 256
    unbounded = load(tmp_path, "Gemma2ForCausalLM", attn_logit_softcapping=None, final_logit_softcapping=None)
    assert (unbounded.attention_softcap, unbounded.final_softcap) == (None, None)


def test_gemma_3_has_two_ropes_in_either_spelling(tmp_path: Path) -> None:
    _, ours = saved(tmp_path, "Gemma3", sliding_window=512)
    assert ours.windows == (512,) * 5 + (None,)
    assert (ours.rope_theta, ours.sliding_rope_theta, ours.qk_norm) == (1e6, 1e4, True)
    older = load(
        tmp_path,
        "Gemma3ForCausalLM",
        rope_theta=5e5,
        rope_local_base_freq=7e3,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        sliding_window=512,
        sliding_window_pattern=3,
    )
    assert (older.rope_theta, older.sliding_rope_theta) == (5e5, 7e3)
    assert older.rope_scaling == {"rope_type": "linear", "factor": 8.0}
    assert older.windows == (512, 512, None) * 2


def test_qwen3_moe_says_which_layers_are_sparse_in_two_ways(tmp_path: Path) -> None:
    moe = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    every_second = load(tmp_path, "Qwen3MoeForCausalLM", **moe, decoder_sparse_step=2, mlp_only_layers=[5])
    assert every_second.experts is not None
    assert every_second.experts.is_sparse == (False, True, False, True, False, False)
    assert (every_second.experts.num_experts, every_second.experts.width) == (8, 48)
    assert not every_second.experts.is_normalised
    assert every_second.qk_norm


def test_mixtrals_experts_are_as_wide_as_its_feed_forward_part(tmp_path: Path) -> None:
    _, ours = saved(tmp_path, "Mixtral")
    assert ours.experts is not None
    assert (ours.experts.num_experts, ours.experts.num_chosen, ours.experts.width) == (8, 2, 128)
    assert ours.experts.is_normalised
    assert all(ours.experts.is_sparse)


def test_deepseek_keeps_one_latent_a_token(tmp_path: Path) -> None:
    _, ours = saved(tmp_path, "DeepseekV3", **DEEPSEEK, kv_lora_rank=32, qk_rope_head_dim=16, q_lora_rank=None)
    assert (ours.kv_shape.num_planes, ours.kv_shape.num_kv_heads, ours.kv_shape.head_dim) == (1, 1, 48)
    assert ours.latent is not None
    assert ours.latent.q_rank is None
    assert ours.experts is not None
    assert ours.experts.is_sparse == (False,) * 3 + (True,) * 3
    assert (ours.experts.scoring, ours.experts.scale, ours.experts.has_correction_bias) == ("sigmoid", 2.5, True)
    assert ours.head_dim == ours.latent.plain_dim + ours.latent.rope_dim


def test_deepseeks_yarn_widens_the_scores(tmp_path: Path) -> None:
    yarn = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
    small = {**DEEPSEEK, "topk_method": "greedy"}
    plain, stretched = (
        load(tmp_path, "DeepseekV2ForCausalLM", **small, rope_scaling=scaling)
        for scaling in (None, {**yarn, "mscale": 0.707, "mscale_all_dim": 0.707})
    )
    assert plain.attention_scale == 192**-0.5
    assert stretched.attention_scale == pytest.approx(plain.attention_scale * 1.2608**2, rel=1e-3)
    numbers = {key: value for key, value in yarn.items() if key != "type"}
    assert stretched.rope_scaling == {"rope_type": "yarn", **numbers, "mscale": 0.707, "mscale_all_dim": 0.707}


def test_groups_count_only_where_they_are_asked_for(tmp_path: Path) -> None:
    groups = {"n_group": 4, "topk_group": 2}
    greedy = load(tmp_path, "DeepseekV2ForCausalLM", **DEEPSEEK, **groups, topk_method="greedy")
    limited = load(tmp_path, "DeepseekV2ForCausalLM", **DEEPSEEK, **groups, topk_method="group_limited_greedy")
    assert greedy.experts is not None
    assert limited.experts is not None
    assert (greedy.experts.num_groups, greedy.experts.num_chosen_groups) == (1, 1)
    assert (limited.experts.num_groups, limited.experts.num_chosen_groups) == (4, 2)
    assert (limited.experts.scoring, limited.experts.shared_width) == ("softmax", 2 * 1407)


@pytest.mark.parametrize(
    ("architecture", "changes", "complaint"),
    [
        ("MistralForCausalLM", {"sliding_window": 0}, "sliding_window: must be a positive whole number, is 0"),
        ("Qwen2ForCausalLM", {"use_sliding_window": True, "layer_types": ["full_attention"]}, "layer_types: must be"),
        (
            "Qwen2ForCausalLM",
            {"use_sliding_window": True, "max_window_layers": -1},
            "max_window_layers: must be a whole",
        ),
        ("Gemma2ForCausalLM", {"hidden_activation": "silu"}, 'hidden_activation: must be "gelu_pytorch_tanh"'),
        ("Gemma2ForCausalLM", {"attn_logit_softcapping": -5}, "attn_logit_softcapping: must be a positive number"),
        ("Gemma2ForCausalLM", {"layer_types": ["chunked_attention"] * 6}, "layer_types: must be sliding_attention or"),
        ("Gemma3ForCausalLM", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: must be null"),
        ("Gemma3ForCausalLM", {"use_bidirectional_attention": True}, "use_bidirectional_attention: must be false"),
        (
            "Gemma3ForCausalLM",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2, "rope_theta": 1e4}}},
            "rope_parameters: of sliding_attention must have rope_type default",
        ),
        ("Gemma3ForConditionalGeneration", {}, "architectures: must be one of .*model_impl: transformers"),
        ("MixtralForCausalLM", {"num_experts_per_tok": 9}, "num_experts_per_tok: must be at most the experts"),
        ("Qwen3MoeForCausalLM", {"mlp_only_layers": ["first"]}, "mlp_only_layers: must be a list of whole numbers"),
        ("DeepseekV2ForCausalLM", {**DEEPSEEK, "norm_topk_prob": True}, "norm_topk_prob: must be false"),
        ("DeepseekV2ForCausalLM", {**DEEPSEEK, "topk_method": "noaux_tc"}, "topk_method: must be greedy or group_"),
        ("DeepseekV2ForCausalLM", {**DEEPSEEK, "moe_layer_freq": 2}, "moe_layer_freq: must be 1"),
        ("DeepseekV2ForCausalLM", {**DEEPSEEK, "num_experts_per_tok": ...}, "num_experts_per_tok: .*, is missing"),
        ("DeepseekV3ForCausalLM", {**DEEPSEEK, "scoring_func": "softmax"}, "scoring_func: must be sigmoid"),
        ("DeepseekV3ForCausalLM", {**DEEPSEEK, "n_group": 3}, "n_group: must divide 8 experts"),
        ("DeepseekV3ForCausalLM", {**DEEPSEEK, "qk_rope_head_dim": 15}, "qk_rope_head_dim: must be even"),
        (
            "DeepseekV3ForCausalLM",
            {**DEEPSEEK, "quantization_config": {"quant_method": "fp8"}},
            "quantization_config: must be absent",
        ),
        (
            "LlamaForCausalLM",
            {"rope_scaling": {"rope_type": "yarn", "factor": 2, "beta_fast": "much"}},
            "rope_scaling: beta_fast must be a positive number",
        ),
        (
            "LlamaForCausalLM",
            {"rope_scaling": {"rope_type": "yarn", "factor": 2, "truncate": False}},
            "rope_scaling: truncate must be true",
        ),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(
    tmp_path: Path, architecture: str, changes: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ModelUnavailable, match=rf"config\.json: {complaint}"):
        load(tmp_path, architecture, **changes)


@pytest.mark.parametrize("name", ["max_position_embeddings", "n_positions", "max_seq_len"])
def test_the_longest_sequence_is_found_under_any_familys_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["SomeLMHeadModel"], name: 1024}))
    assert read_num_tokens_max(tmp_path) == 1024


def test_a_model_that_does_not_say_how_long_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelUnavailable, match="max_position_embeddings: must be a positive whole number, is missing"):
        read_num_tokens_max(tmp_path)
