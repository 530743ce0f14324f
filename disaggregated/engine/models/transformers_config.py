"""`model_impl: transformers`: what the transformers library's own config of a model means for the engine.

Only what the engine must know to lay out the KV pool and to refuse what cannot be served; the mathematics are the
library's. It is imported here and in `transformers_model.py`, and only when it is asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from disaggregated.errors import ConfigError, ModelUnavailable
from disaggregated.model_files import ModelConfig, read_eos_token_ids
from disaggregated.model_files.checkpoint import read_json
from disaggregated.model_files.model_parts import TransformersConfig

_LAYER_TYPES: Final = frozenset({"full_attention", "sliding_attention"})
_ROPE_TYPES_BY_LENGTH: Final = frozenset({"dynamic", "longrope"})
"""Their rotation depends on how long the longest sequence of a batch is: a token's KV would depend on its mates."""


def library() -> Any:
    """The transformers library.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise ConfigError(
            f"model_impl: transformers needs the transformers library ({error}); "
            "install it with: pip install 'disaggregated[transformers]'"
        ) from error
    transformers.utils.logging.disable_progress_bar()  # Servers log lines, which a bar would draw over.
    return transformers


def read_theirs(path: Path) -> Any:
    """The library's config object for the model in `path`. Raises ModelUnavailable if it knows no such causal model."""
    transformers = library()
    try:
        theirs = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise ModelUnavailable(f"{path / 'config.json'}: the transformers library cannot read it: {error}") from error
    if type(theirs) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelUnavailable(f"{path / 'config.json'}: model_type: {theirs.model_type!r} is no causal language model")
    return theirs


def read_config(path: Path, *, max_seq_len: int | None) -> ModelConfig:
    """
    Raises:
        ModelUnavailable: the library does not know the model, or it needs what paged attention cannot do.
        ConfigError: the library is not installed.
    """
    theirs = read_theirs(path)
    refuse_what_cannot_work(theirs, path, max_seq_len=max_seq_len)
    heads, hidden_size = int(theirs.num_attention_heads), int(theirs.hidden_size)
    head_dim = int(getattr(theirs, "head_dim", None) or hidden_size // heads)
    num_layers = int(theirs.num_hidden_layers)
    return ModelConfig(
        architecture=(theirs.architectures or [theirs.model_type])[0],
        vocab_size=int(theirs.vocab_size),
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=_num_kv_heads(theirs, heads),
        head_dim=head_dim,
        intermediate_size=0,
        rms_norm_eps=0.0,
        rope_theta=0.0,
        rope_scaling=None,
        tie_word_embeddings=bool(getattr(theirs, "tie_word_embeddings", False)),
        attention_bias=False,
        attention_out_bias=False,
        qk_norm=False,
        attention_scale=head_dim**-0.5,
        windows=(None,) * num_layers,
        transformers=TransformersConfig(file=read_json(path / "config.json"), num_parameters=_num_parameters(theirs)),
        max_position_embeddings=int(theirs.max_position_embeddings),
        eos_token_ids=read_eos_token_ids(path),
        bos_token_id=theirs.bos_token_id if isinstance(theirs.bos_token_id, int) else None,
        dtype=str(theirs.dtype or "float32").removeprefix("torch."),
    )


def _num_parameters(theirs: Any) -> int:
    """Counted without making them."""
    with torch.device("meta"):
        model = library().AutoModelForCausalLM.from_config(theirs)
    return sum(parameter.numel() for parameter in model.parameters())


def _num_kv_heads(theirs: Any, num_heads: int) -> int:
    """Falcon and its like say with a flag that there is one."""
    if getattr(theirs, "multi_query", False) and not getattr(theirs, "new_decoder_architecture", False):
        return 1
    names = ("num_key_value_heads", "num_kv_heads")
    return int(next((value for name in names if (value := getattr(theirs, name, None))), num_heads))


def refuse_what_cannot_work(theirs: Any, path: Path, *, max_seq_len: int | None) -> None:
    def bad(key: str, why: str) -> ModelUnavailable:
        return ModelUnavailable(f"{path / 'config.json'}: {key}: {why}")

    if theirs.is_encoder_decoder:
        raise bad("is_encoder_decoder", "only decoders can be served, not encoder-decoder models")
    for key in ("vision_config", "audio_config", "text_config"):
        if getattr(theirs, key, None) is not None:
            raise bad(key, "only text models can be served, not ones that also take images or sound")
    if getattr(theirs, "quantization_config", None) is not None:
        raise bad("quantization_config", "quantised checkpoints cannot be served")
    if others := sorted(set(getattr(theirs, "layer_types", None) or ()) - _LAYER_TYPES):
        raise bad("layer_types", f"layers of type {', '.join(others)} keep something else than keys and values")
    if getattr(theirs, "max_position_embeddings", None) is None:
        raise bad("max_position_embeddings", "is missing")
    _refuse_rope_by_length(theirs, bad, max_seq_len=max_seq_len)


def _refuse_rope_by_length(theirs: Any, bad: Any, *, max_seq_len: int | None) -> None:
    longest = max_seq_len or theirs.max_position_embeddings
    parameters = getattr(theirs, "rope_parameters", None) or {}
    each: Sequence[Mapping[str, Any]] = [parameters, *(p for p in parameters.values() if isinstance(p, dict))]
    for rope in each:
        original = rope.get("original_max_position_embeddings") or theirs.max_position_embeddings
        if rope.get("rope_type") in _ROPE_TYPES_BY_LENGTH and longest > original:
            raise bad(
                "rope_parameters",
                f"{rope['rope_type']} rotates longer texts in another way, which a shared batch cannot; "
                f"set max_seq_len to {original} or less",
            )
