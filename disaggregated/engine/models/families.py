"""Which family is made of which parts, and how its checkpoints name them.

A family is one function that reads a layer. All have the same embedding, final norm and output head around it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch

from disaggregated.engine.models.attention import GroupedAttention
from disaggregated.engine.models.decoder import (
    DecoderShape,
    DecoderWeights,
    FeedForward,
    LayerWeights,
    decoder_shape,
)
from disaggregated.engine.models.mla import LatentAttention
from disaggregated.engine.models.mlp import GatedMlp
from disaggregated.engine.models.moe import MixtureOfExperts, Router
from disaggregated.engine.models.rope import RopeTables, rope_tables
from disaggregated.engine.models.weight_reader import NamedWeights
from disaggregated.model_files import ModelConfig


@dataclasses.dataclass(frozen=True, slots=True)
class Ropes:
    full: RopeTables
    sliding: RopeTables
    """Of layers with a window; the same as `full` but in Gemma 3."""


ReadLayer = Callable[[NamedWeights, ModelConfig, int, Ropes], LayerWeights]
"""The layer of that number, from weights whose names are relative to it."""


def read_decoder(
    weights: NamedWeights, config: ModelConfig, *, dtype: torch.dtype, num_positions: int
) -> tuple[DecoderShape, DecoderWeights]:
    """`num_positions`: the longest sequence that will be asked for."""
    is_gemma, read_layer = config.architecture in GEMMA, FAMILIES[config.architecture]
    model, ropes = weights.within("model"), _ropes(weights, config, num_positions)
    embedding_VH = model.tensor("embed_tokens.weight", config.vocab_size, config.hidden_size)
    head_VH = embedding_VH
    if not config.tie_word_embeddings:
        head_VH = weights.tensor("lm_head.weight", config.vocab_size, config.hidden_size)
    decoder = DecoderWeights(
        embedding_VH=embedding_VH,
        layers=[read_layer(model.within(f"layers.{i}"), config, i, ropes) for i in range(config.num_layers)],
        final_norm=(_gemma_norm if is_gemma else NamedWeights.norm)(model, "norm", config.hidden_size),
        lm_head=weights.prepare(lambda: (head_VH, None)),
    )
    # Gemma was trained with this number rounded to the dtype of its weights.
    embedding_scale = float(torch.tensor(config.hidden_size**0.5, dtype=dtype)) if is_gemma else 1.0
    return decoder_shape(config, embedding_scale=embedding_scale), decoder


def _ropes(weights: NamedWeights, config: ModelConfig, num_positions: int) -> Ropes:
    dim = config.head_dim if config.latent is None else config.latent.rope_dim

    def tables(theta: float, scaling: Mapping[str, Any] | None) -> RopeTables:
        pair = rope_tables(theta=theta, scaling=scaling, head_dim=dim, num_positions=num_positions)
        return RopeTables(*map(weights.to_device, pair))

    full = tables(config.rope_theta, config.rope_scaling)
    return Ropes(full, full if config.sliding_rope_theta is None else tables(config.sliding_rope_theta, None))


def _llama(weights: NamedWeights, config: ModelConfig, index: int, ropes: Ropes) -> LayerWeights:
    """Llama, Mistral, Qwen2 and Qwen3: they differ in what the config says of the attention."""
    return _layer(weights, config, index, ropes, _dense(weights, config))


def _mixtral(weights: NamedWeights, config: ModelConfig, index: int, ropes: Ropes) -> LayerWeights:
    mlp = _experts(weights.within("block_sparse_moe"), config, names=("w1", "w3", "w2"))
    return _layer(weights, config, index, ropes, mlp)


def _qwen3_moe(weights: NamedWeights, config: ModelConfig, index: int, ropes: Ropes) -> LayerWeights:
    return _layer(weights, config, index, ropes, _sparse_or_dense(weights, config, index))


def _deepseek(weights: NamedWeights, config: ModelConfig, index: int, ropes: Ropes) -> LayerWeights:
    return LayerWeights(
        input_norm=weights.norm("input_layernorm", config.hidden_size),
        attention=LatentAttention.read(weights.within("self_attn"), config, ropes.full),
        mlp_norm=weights.norm("post_attention_layernorm", config.hidden_size),
        mlp=_sparse_or_dense(weights, config, index),
    )


def _gemma(weights: NamedWeights, config: ModelConfig, index: int, ropes: Ropes) -> LayerWeights:
    """Gemma 2 and 3: norms on both sides of each part, a gate with gelu."""
    hidden = config.hidden_size
    return LayerWeights(
        input_norm=_gemma_norm(weights, "input_layernorm", hidden),
        attention=_attention(weights, config, index, ropes, norm=_gemma_norm),
        attention_post_norm=_gemma_norm(weights, "post_attention_layernorm", hidden),
        mlp_norm=_gemma_norm(weights, "pre_feedforward_layernorm", hidden),
        mlp=GatedMlp.read(weights.within("mlp"), hidden, config.intermediate_size, activation="gelu"),
        mlp_post_norm=_gemma_norm(weights, "post_feedforward_layernorm", hidden),
    )


def _gemma_norm(weights: NamedWeights, name: str, width: int) -> torch.Tensor:
    """Gemma multiplies with 1 + what it stores."""
    return weights.norm(name, width) + 1.0


def _layer(weights: NamedWeights, config: ModelConfig, index: int, ropes: Ropes, mlp: FeedForward) -> LayerWeights:
    return LayerWeights(
        input_norm=weights.norm("input_layernorm", config.hidden_size),
        attention=_attention(weights, config, index, ropes),
        mlp_norm=weights.norm("post_attention_layernorm", config.hidden_size),
        mlp=mlp,
    )


def _attention(
    weights: NamedWeights,
    config: ModelConfig,
    index: int,
    ropes: Ropes,
    norm: Callable[[NamedWeights, str, int], torch.Tensor] = NamedWeights.norm,
) -> GroupedAttention:
    window = config.windows[index]
    rope = ropes.full if window is None else ropes.sliding
    return GroupedAttention.read(weights.within("self_attn"), config, rope, window=window, norm=norm)


def _dense(weights: NamedWeights, config: ModelConfig) -> GatedMlp:
    return GatedMlp.read(weights.within("mlp"), config.hidden_size, config.intermediate_size)


def _sparse_or_dense(weights: NamedWeights, config: ModelConfig, index: int) -> FeedForward:
    assert config.experts is not None, f"{config.architecture} has no experts"
    return _experts(weights.within("mlp"), config) if config.experts.is_sparse[index] else _dense(weights, config)


def _experts(
    weights: NamedWeights, config: ModelConfig, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> MixtureOfExperts:
    experts, hidden = config.experts, config.hidden_size
    assert experts is not None, f"{config.architecture} has no experts"
    shared = weights.within("shared_experts")
    return MixtureOfExperts(
        router=Router.read(weights.within("gate"), experts, hidden),
        experts=[
            GatedMlp.read(weights.within(f"experts.{i}"), hidden, experts.width, names=names)
            for i in range(experts.num_experts)
        ],
        shared=GatedMlp.read(shared, hidden, experts.shared_width) if experts.shared_width else None,
    )


GEMMA: Final = frozenset({"Gemma2ForCausalLM", "Gemma3ForCausalLM"})
FAMILIES: Final[Mapping[str, ReadLayer]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _llama,
    "Qwen2ForCausalLM": _llama,
    "Qwen3ForCausalLM": _llama,
    **dict.fromkeys(GEMMA, _gemma),
    "MixtralForCausalLM": _mixtral,
    "Qwen3MoeForCausalLM": _qwen3_moe,
    "DeepseekV2ForCausalLM": _deepseek,
    "DeepseekV3ForCausalLM": _deepseek,
}
"""The same architectures as `disaggregated.model_files.families.FAMILIES`, which reads their configs."""
