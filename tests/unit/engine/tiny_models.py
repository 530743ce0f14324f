"""Tiny random models of every family, written by transformers, and transformers' own answers for them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
import transformers

VOCAB_SIZE: Final = 211
_COMMON: Final[Mapping[str, Any]] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
LLAMA3_SCALING: Final[Mapping[str, Any]] = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
YARN_SCALING: Final[Mapping[str, Any]] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 128,
    "mscale": 0.707,
    "mscale_all_dim": 1.0,
}
_LATENT: Final[Mapping[str, Any]] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 20,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 48,
    "first_k_dense_replace": 1,
}
WINDOW: Final = 100
"""Much shorter than the tests' prompts, and no multiple of a block or a tile."""


CONFIGS: Final = {"Gemma3": "Gemma3TextConfig"}
CLASSES: Final = {"GPT2": "GPT2LMHeadModel"}


def _of(family: str, **changes: Any) -> Callable[[], Any]:
    """A model of transformers' `{family}ForCausalLM`."""
    config_class = getattr(transformers, CONFIGS.get(family, f"{family}Config"))
    model_class = getattr(transformers, CLASSES.get(family, f"{family}ForCausalLM"))
    return lambda: model_class(config_class(**{**_COMMON, **changes}))


OTHERS: Final[Mapping[str, Callable[[], Any]]] = {
    "gpt2": _of("GPT2", n_inner=176, num_key_value_heads=None),
    "opt": _of("OPT", num_key_value_heads=None, ffn_dim=176, word_embed_proj_dim=64, pad_token_id=0),
    "phi3": _of("Phi3", pad_token_id=0, sliding_window=WINDOW),
    "cohere2": _of("Cohere2", pad_token_id=0, sliding_window=WINDOW, head_dim=22),
    "granite": _of("Granite", logits_scaling=3.0),
    "olmoe": _of("Olmoe", num_experts=8, num_experts_per_tok=3, pad_token_id=0),
}
"""Models that only the transformers library computes."""
FAMILIES: Final[Mapping[str, Callable[[], Any]]] = {
    "llama": _of("Llama"),
    "llama-tied": _of("Llama", tie_word_embeddings=True, num_attention_heads=8, num_key_value_heads=2, head_dim=16),
    "llama-biased": _of("Llama", attention_bias=True),
    "llama-odd": _of("Llama", head_dim=22),
    "llama-llama3-rope": _of("Llama", rope_parameters=dict(LLAMA3_SCALING)),
    "llama-linear-rope": _of(
        "Llama", rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    ),
    "llama-yarn-rope": _of("Llama", rope_parameters={**YARN_SCALING, "mscale": None, "mscale_all_dim": None}),
    "mistral": _of("Mistral", sliding_window=None, head_dim=32),
    "mistral-window": _of("Mistral", sliding_window=WINDOW, head_dim=32),
    "qwen2": _of("Qwen2"),
    "qwen2-window": _of("Qwen2", use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    "qwen3": _of("Qwen3", head_dim=32, tie_word_embeddings=True),
    "gemma2": _of(
        "Gemma2", head_dim=32, sliding_window=WINDOW, query_pre_attn_scalar=24, attn_logit_softcapping=5.0,
        final_logit_softcapping=4.0, tie_word_embeddings=True,
    ),
    "gemma3": _of(
        "Gemma3", head_dim=32, sliding_window=WINDOW, sliding_window_pattern=3, query_pre_attn_scalar=24,
        tie_word_embeddings=True,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "mixtral": _of("Mixtral", num_local_experts=4, num_experts_per_tok=2),
    "qwen3-moe": _of(
        "Qwen3Moe", head_dim=16, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=48, norm_topk_prob=True,
        decoder_sparse_step=1, mlp_only_layers=[1],
    ),
    "deepseek-v2": _of(
        "DeepseekV2", **_LATENT, q_lora_rank=None, topk_method="group_limited_greedy", n_group=4, topk_group=2,
        routed_scaling_factor=1.5, rope_parameters=dict(YARN_SCALING),
    ),
    "deepseek-v2-greedy": _of("DeepseekV2", **_LATENT, q_lora_rank=48, attention_bias=True),
    "deepseek-v3": _of(
        "DeepseekV3", **_LATENT, q_lora_rank=48, n_group=4, topk_group=2, n_shared_experts=2,
        rope_parameters=dict(YARN_SCALING),
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class TinyModel:
    path: Path
    reference: Any
    """transformers' model, float32, on CPU."""
    known: dict[tuple[tuple[int, ...], int], list[int]] = dataclasses.field(default_factory=dict)
    """Answers of `greedy`."""

    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """(tokens, V) by transformers."""
        with torch.inference_mode():
            out: torch.Tensor = self.reference(torch.tensor([list(token_ids)])).logits[0]
        return out

    def greedy(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        """What transformers continues with, recomputed from the start for every token."""
        key = (tuple(prompt), num_tokens)
        if key not in self.known:
            tokens = list(prompt)
            for _ in range(num_tokens):
                tokens.append(int(self.logits(tokens)[-1].argmax()))
            self.known[key] = tokens[len(prompt) :]
        return self.known[key]


def write_model(family: str, path: Path, **save_arguments: Any) -> TinyModel:
    transformers.utils.logging.disable_progress_bar()
    with _seeded(0):
        model = {**FAMILIES, **OTHERS}[family]().eval()
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "norm.weight")):
                is_scale = name.endswith("weight") and not family.startswith("gemma")
                torch.nn.init.normal_(parameter, mean=float(is_scale), std=0.3)
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):
                torch.nn.init.normal_(buffer, std=0.3)
        model.save_pretrained(path, **save_arguments)
    return TinyModel(path, model)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
