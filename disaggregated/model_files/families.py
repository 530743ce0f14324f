"""What each family's config.json means: the names of its keys, their defaults, and what of them is not implemented.

Defaults are those of the transformers library, because that is who wrote the files that leave keys out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from disaggregated.model_files.config_keys import Keys
from disaggregated.model_files.model_parts import ExpertsConfig, LatentConfig

Fields = dict[str, Any]
"""Of `ModelConfig`, by name."""
SLIDING: Final = "sliding_attention"
FULL: Final = "full_attention"


def read_family(keys: Keys) -> Fields:
    """All fields of `ModelConfig` but its tokens.

    Raises:
        ModelUnavailable: the architecture is unknown, a key is missing or wrong, or asks for what is not implemented.
    """
    named = keys.get("architectures")
    if not isinstance(named, list) or len(named) != 1 or named[0] not in FAMILIES:
        raise keys.bad(
            "architectures",
            f"must be one of {', '.join(FAMILIES)} (model_impl: transformers serves most other causal models)",
        )
    _refuse_other_mathematics(keys)
    fields = FAMILIES[named[0]](keys) | {"architecture": named[0], "dtype": keys.dtype()}
    if fields["num_heads"] % fields["num_kv_heads"]:
        raise keys.bad("num_key_value_heads", f"must divide num_attention_heads, {fields['num_heads']}")
    if fields["head_dim"] % 2:
        raise keys.bad("head_dim", "must be even")
    return fields


def _refuse_other_mathematics(keys: Keys) -> None:
    if keys.get("mlp_bias"):
        raise keys.bad("mlp_bias", "must be false (biases in the feed-forward layers are not supported)")
    if keys.get("quantization_config"):
        raise keys.bad("quantization_config", "must be absent (quantised checkpoints are not supported)")
    if keys.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise keys.bad("partial_rotary_factor", "must be 1")


def _llama(keys: Keys, *, eps: float = 1e-6, theta: float = 10000.0, tied: bool = False) -> Fields:
    """What all families have, with Llama's names and, where they differ, the given defaults."""
    if keys.get("hidden_act") not in (None, "silu", "swish"):
        raise keys.bad("hidden_act", 'must be "silu"')
    return _common(keys, eps=eps, tied=tied) | _rope(keys, theta)


def _common(keys: Keys, *, eps: float, tied: bool) -> Fields:
    heads, hidden_size = keys.positive_int("num_attention_heads"), keys.positive_int("hidden_size")
    head_dim = keys.positive_int("head_dim", max(1, hidden_size // heads))
    num_layers, has_bias = keys.positive_int("num_hidden_layers"), keys.flag("attention_bias", False)
    return {
        "vocab_size": keys.positive_int("vocab_size"),
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "num_heads": heads,
        "num_kv_heads": keys.positive_int("num_key_value_heads", heads),
        "head_dim": head_dim,
        "intermediate_size": keys.positive_int("intermediate_size"),
        "rms_norm_eps": keys.number("rms_norm_eps", eps),
        "tie_word_embeddings": keys.flag("tie_word_embeddings", tied),
        "attention_bias": has_bias,
        "attention_out_bias": has_bias,
        "qk_norm": False,
        "attention_scale": head_dim**-0.5,
        "windows": (None,) * num_layers,
        "max_position_embeddings": keys.positive_int("max_position_embeddings"),
    }


def _rope(keys: Keys, theta: float, layer_type: str | None = None) -> Fields:
    rope_theta, scaling = keys.rope(theta, layer_type)
    return {"rope_theta": rope_theta, "rope_scaling": scaling}


def _mistral(keys: Keys) -> Fields:
    fields = _llama(keys)
    return fields | {"windows": (keys.optional_int("sliding_window", 4096),) * fields["num_layers"]}


def _qwen2(keys: Keys) -> Fields:
    fields = _llama(keys)
    return fields | _qwen_windows(keys, fields) | {"attention_bias": True, "attention_out_bias": False}


def _qwen3(keys: Keys) -> Fields:
    fields = _llama(keys)
    fields["head_dim"] = keys.positive_int("head_dim", 128)
    return fields | _qwen_windows(keys, fields) | {"qk_norm": True, "attention_scale": fields["head_dim"] ** -0.5}


def _qwen_windows(keys: Keys, fields: Fields) -> Fields:
    """Only where it is switched on, and only from one layer on or as `layer_types` says."""
    if not keys.flag("use_sliding_window", False):
        return {}
    window = keys.positive_int("sliding_window", 4096)
    first = keys.natural("max_window_layers", 28)
    default = [FULL if i < first else SLIDING for i in range(fields["num_layers"])]
    return {"windows": _windows(keys, fields, window, default)}


def _windows(keys: Keys, fields: Fields, window: int, default: Sequence[str]) -> tuple[int | None, ...]:
    types = default if keys.get("layer_types") is None else keys.get("layer_types")
    if not isinstance(types, Sequence) or len(types) != fields["num_layers"] or not set(types) <= {SLIDING, FULL}:
        raise keys.bad("layer_types", f"must be {SLIDING} or {FULL} for each of {fields['num_layers']} layers")
    return tuple(window if kind == SLIDING else None for kind in types)


def _gemma(keys: Keys, *, pattern: int) -> Fields:
    """`pattern`: each so manieth layer has no window."""
    if keys.get("hidden_activation") not in (None, "gelu_pytorch_tanh"):
        raise keys.bad("hidden_activation", 'must be "gelu_pytorch_tanh"')
    if keys.flag("use_bidirectional_attention", False):
        raise keys.bad("use_bidirectional_attention", "must be false")
    fields = _common(keys, eps=1e-6, tied=True)
    types = [SLIDING if (i + 1) % pattern else FULL for i in range(fields["num_layers"])]
    window = keys.positive_int("sliding_window", 4096)
    return fields | {
        "head_dim": keys.positive_int("head_dim", 256),
        "attention_scale": keys.number("query_pre_attn_scalar", 256.0) ** -0.5,
        "windows": _windows(keys, fields, window, types),
    }


def _gemma2(keys: Keys) -> Fields:
    return (
        _gemma(keys, pattern=2)
        | _rope(keys, 10000.0)
        | {
            "attention_softcap": keys.optional_number("attn_logit_softcapping", 50.0),
            "final_softcap": keys.optional_number("final_logit_softcapping", 30.0),
        }
    )


def _gemma3(keys: Keys) -> Fields:
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if keys.get(key) is not None:
            raise keys.bad(key, "must be null")
    parameters = keys.get("rope_parameters")
    if isinstance(parameters, dict) and SLIDING in parameters:
        sliding_theta, scaling = keys.rope(10000.0, SLIDING)
        if scaling is not None:
            raise keys.bad("rope_parameters", f"of {SLIDING} must have rope_type default")
    else:
        sliding_theta = keys.number("rope_local_base_freq", 10000.0)
    fields = _gemma(keys, pattern=keys.positive_int("sliding_window_pattern", 6))
    return fields | _rope(keys, 1e6, FULL) | {"qk_norm": True, "sliding_rope_theta": sliding_theta}


def _mixtral(keys: Keys) -> Fields:
    fields = _llama(keys, eps=1e-5, theta=1e6)
    num_layers = fields["num_layers"]
    fields["windows"] = (keys.optional_int("sliding_window"),) * num_layers
    fields["experts"] = ExpertsConfig(
        is_sparse=(True,) * num_layers,
        num_experts=keys.positive_int("num_local_experts", 8),
        num_chosen=keys.positive_int("num_experts_per_tok", 2),
        width=fields["intermediate_size"],
        scoring="softmax",
        is_normalised=True,
    )
    return _with_experts_checked(keys, fields)


def _qwen3_moe(keys: Keys) -> Fields:
    fields = _llama(keys) | {"qk_norm": True}
    if keys.flag("use_sliding_window", False):
        fields["windows"] = (keys.optional_int("sliding_window", 4096),) * fields["num_layers"]
    step, dense = keys.positive_int("decoder_sparse_step", 1), keys.ints("mlp_only_layers")
    num_experts = "num_experts" if "num_experts" in keys else "num_local_experts"
    fields["experts"] = ExpertsConfig(
        is_sparse=tuple((i + 1) % step == 0 and i not in dense for i in range(fields["num_layers"])),
        num_experts=keys.positive_int(num_experts, 128),
        num_chosen=keys.positive_int("num_experts_per_tok", 8),
        width=keys.positive_int("moe_intermediate_size", 768),
        scoring="softmax",
        is_normalised=keys.flag("norm_topk_prob", False),
    )
    return _with_experts_checked(keys, fields)


def _deepseek(keys: Keys) -> Fields:
    fields = _llama(keys)
    latent = LatentConfig(
        q_rank=keys.optional_int("q_lora_rank", 1536),
        kv_rank=keys.positive_int("kv_lora_rank", 512),
        plain_dim=keys.positive_int("qk_nope_head_dim", 128),
        rope_dim=keys.positive_int("qk_rope_head_dim", 64),
        value_dim=keys.positive_int("v_head_dim", 128),
        rope_is_interleaved=keys.flag("rope_interleave", True),
    )
    if latent.rope_dim % 2:
        raise keys.bad("qk_rope_head_dim", "must be even")
    head_dim = latent.plain_dim + latent.rope_dim
    return fields | {
        "num_kv_heads": fields["num_heads"],  # The key says the same or nothing: every head has its own.
        "head_dim": head_dim,
        "latent": latent,
        "attention_scale": head_dim**-0.5 * _yarn_attention(fields["rope_scaling"]) ** 2,
    }


def _yarn_attention(scaling: Mapping[str, Any] | None) -> float:
    """DeepSeek widens its scores with the stretch of the positions, beside what yarn does to the tables."""
    if scaling is None or not scaling.get("mscale_all_dim") or scaling["factor"] <= 1:
        return 1.0
    return float(0.1 * scaling["mscale_all_dim"] * math.log(scaling["factor"]) + 1.0)


def _deepseek_experts(keys: Keys, fields: Fields, *, first_dense: int, shared: int, experts: Fields) -> Fields:
    if keys.get("moe_layer_freq") not in (None, 1):
        raise keys.bad("moe_layer_freq", "must be 1")
    first = keys.natural("first_k_dense_replace", first_dense)
    width = keys.positive_int("moe_intermediate_size", 1407)
    fields["experts"] = ExpertsConfig(
        is_sparse=tuple(i >= first for i in range(fields["num_layers"])),
        num_experts=keys.positive_int("n_routed_experts", 64),
        num_chosen=keys.positive_int("num_experts_per_tok"),
        width=width,
        shared_width=width * keys.natural("n_shared_experts", shared),
        **experts,
    )
    return _with_experts_checked(keys, fields)


def _deepseek_v2(keys: Keys) -> Fields:
    if keys.flag("norm_topk_prob", False):
        raise keys.bad("norm_topk_prob", "must be false")
    keys.choice("scoring_func", ("softmax",), "softmax")
    is_grouped = keys.choice("topk_method", ("greedy", "group_limited_greedy"), "greedy") != "greedy"
    experts = {
        "scoring": "softmax",
        "is_normalised": False,
        "scale": keys.number("routed_scaling_factor", 1.0),
        "num_groups": keys.positive_int("n_group") if is_grouped else 1,
        "num_chosen_groups": keys.positive_int("topk_group") if is_grouped else 1,
    }
    return _deepseek_experts(keys, _deepseek(keys), first_dense=0, shared=2, experts=experts)


def _deepseek_v3(keys: Keys) -> Fields:
    keys.choice("scoring_func", ("sigmoid",), "sigmoid")
    keys.choice("topk_method", ("noaux_tc",), "noaux_tc")
    experts = {
        "scoring": "sigmoid",
        "is_normalised": keys.flag("norm_topk_prob", True),
        "scale": keys.number("routed_scaling_factor", 2.5),
        "num_groups": keys.positive_int("n_group", 8),
        "num_chosen_groups": keys.positive_int("topk_group", 4),
        "has_correction_bias": True,
    }
    return _deepseek_experts(keys, _deepseek(keys), first_dense=3, shared=1, experts=experts)


def _with_experts_checked(keys: Keys, fields: Fields) -> Fields:
    experts: ExpertsConfig = fields["experts"]
    if experts.num_experts % experts.num_groups or experts.num_chosen_groups > experts.num_groups:
        raise keys.bad("n_group", f"must divide {experts.num_experts} experts, and be at least topk_group")
    if experts.num_chosen > experts.num_experts // experts.num_groups * experts.num_chosen_groups:
        raise keys.bad("num_experts_per_tok", f"must be at most the experts to choose from, of {experts.num_experts}")
    return fields


FAMILIES: Final[Mapping[str, Callable[[Keys], Fields]]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
    "Gemma2ForCausalLM": _gemma2,
    "Gemma3ForCausalLM": _gemma3,
    "MixtralForCausalLM": _mixtral,
    "Qwen3MoeForCausalLM": _qwen3_moe,
    "DeepseekV2ForCausalLM": _deepseek_v2,
    "DeepseekV3ForCausalLM": _deepseek_v3,
}
