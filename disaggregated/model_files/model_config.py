"""What config.json says about a model, checked once and turned into numbers the engine is built from.

A value that would change the mathematics and is not implemented is refused here, in words: a model that loads and then
talks nonsense is worse than one that does not load. What each family's keys are called and default to is in
`families.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Self

from disaggregated.model_files.config_keys import Keys
from disaggregated.model_files.families import read_family
from disaggregated.model_files.model_parts import ExpertsConfig, KVShape, LatentConfig, TransformersConfig

_LENGTH_NAMES: Final = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    architecture: str
    """A key of `families.FAMILIES`; any, if the transformers library computes it."""
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
    """None, or `rope_type` "linear", "llama3" or "yarn" with its numbers under Hugging Face's names."""
    tie_word_embeddings: bool
    attention_bias: bool
    """Biases on q, k and v; of latent attention, on its first projections."""
    attention_out_bias: bool
    qk_norm: bool
    """An RMS norm of each head's query and key before rope."""
    attention_scale: float
    """What the product of query and key is multiplied with."""
    windows: tuple[int | None, ...]
    """For each layer, how many last tokens a token sees, itself among them; None: all."""
    sliding_rope_theta: float | None = None
    """Layers with a window rotate with this theta and no scaling (Gemma 3); None: as the others do."""
    attention_softcap: float | None = None
    final_softcap: float | None = None
    """Gemma 2's bounds on attention scores and on logits."""
    experts: ExpertsConfig | None = None
    latent: LatentConfig | None = None
    transformers: TransformersConfig | None = None
    """Of a model that the transformers library computes; None for the families that are implemented here."""
    max_position_embeddings: int
    """The longest sequence served, in tokens."""
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    dtype: str
    """Of the weights on disk: "float32", "bfloat16" or "float16"."""
    remarks: tuple[str, ...] = ()
    """What an operator should know about how this model is served, a sentence each; the server logs them."""

    @property
    def kv_shape(self) -> KVShape:
        if self.latent is None:
            num_kv_heads, head_dim, num_planes = self.num_kv_heads, self.head_dim, 2
        else:
            num_kv_heads, head_dim, num_planes = 1, self.latent.kv_rank + self.latent.rope_dim, 1
        return KVShape(num_layers=self.num_layers, num_kv_heads=num_kv_heads, head_dim=head_dim, num_planes=num_planes)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read `path`/config.json and generation_config.json. Raises ModelUnavailable naming file and key."""
        keys = Keys(path / "config.json")
        return cls(**read_family(keys), eos_token_ids=read_eos_token_ids(path), bos_token_id=keys.token("bos_token_id"))


def read_eos_token_ids(path: Path) -> tuple[int, ...]:
    """The tokens that end a reply: generation_config.json's if it names any, else config.json's. May be empty."""
    for name in ("generation_config.json", "config.json"):
        if name == "generation_config.json" and not (path / name).is_file():
            continue
        keys = Keys(path / name)
        value = keys.get("eos_token_id")
        ends = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(end, bool) or not isinstance(end, int) for end in ends):
            raise keys.bad("eos_token_id", "must be a token id or a list of them")
        if ends:
            return tuple(dict.fromkeys(ends))
    return ()


def read_num_tokens_max(path: Path) -> int:
    """The longest sequence that the model in `path` says it can take, whoever computes it, under its many names.

    Raises:
        ModelUnavailable: there is no config.json, or it does not say.
    """
    keys = Keys(path / "config.json")
    name = next((name for name in _LENGTH_NAMES if name in keys), _LENGTH_NAMES[0])
    return keys.positive_int(name)
