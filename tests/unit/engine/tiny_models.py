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


def _llama(**changes: Any) -> Callable[[], Any]:
    return lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**_COMMON, **changes}))


FAMILIES: Final[Mapping[str, Callable[[], Any]]] = {
    "llama": _llama(),
    "llama-tied": _llama(tie_word_embeddings=True, num_attention_heads=8, num_key_value_heads=2, head_dim=16),
    "llama-biased": _llama(attention_bias=True),
    "llama-llama3-rope": _llama(rope_parameters=dict(LLAMA3_SCALING)),
    "llama-linear-rope": _llama(rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}),
    "mistral": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(**{**_COMMON, "sliding_window": None, "head_dim": 32})
    ),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**_COMMON)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**{**_COMMON, "head_dim": 32, "tie_word_embeddings": True})
    ),
}


@dataclasses.dataclass(frozen=True, slots=True)
class TinyModel:
    path: Path
    reference: Any
    """transformers' model, float32, on CPU."""

    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """(tokens, V) by transformers."""
        with torch.inference_mode():
            out: torch.Tensor = self.reference(torch.tensor([list(token_ids)])).logits[0]
        return out

    def greedy(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        """What transformers continues with, recomputed from the start for every token."""
        tokens = list(prompt)
        for _ in range(num_tokens):
            tokens.append(int(self.logits(tokens)[-1].argmax()))
        return tokens[len(prompt) :]


def write_model(family: str, path: Path, **save_arguments: Any) -> TinyModel:
    transformers.utils.logging.disable_progress_bar()
    with _seeded(0):
        model = FAMILIES[family]().eval()
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "norm.weight")):
                torch.nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.3)
        model.save_pretrained(path, **save_arguments)
    return TinyModel(path, model)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
