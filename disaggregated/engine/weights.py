"""From safetensors files, or from nothing but a config, to the merged weights of a decoder.

Files are mapped, not read: each tensor is touched once, when it is laid out for its operation.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import torch
import xxhash
from safetensors import SafetensorError, safe_open

from disaggregated.engine.models.attention import GroupedAttention
from disaggregated.engine.models.decoder import Decoder, DecoderShape, DecoderWeights, LayerWeights
from disaggregated.engine.models.mlp import GatedMlp
from disaggregated.engine.models.rope import rope_tables
from disaggregated.engine.ops.api import AttentionSpec, Ops
from disaggregated.errors import ModelUnavailable
from disaggregated.model_files import ModelConfig

INDEX_NAME: Final = "model.safetensors.index.json"
NAMES_SHOWN: Final = 4
DUMMY_STD: Final = 0.02

Shape = tuple[int, ...]


class TensorSource(Protocol):
    def shapes(self) -> Mapping[str, Shape]: ...

    def read(self, name: str) -> torch.Tensor: ...


def build_model(
    source: TensorSource,
    config: ModelConfig,
    ops: Ops,
    *,
    device: torch.device,
    dtype: torch.dtype,
    num_positions: int,
) -> Decoder:
    """Raises ModelUnavailable as `load_weights` does."""
    weights = load_weights(source, config, ops, device=device, dtype=dtype, num_positions=num_positions)
    return Decoder(decoder_shape(config), weights, ops)


def load_weights(
    source: TensorSource,
    config: ModelConfig,
    ops: Ops,
    *,
    device: torch.device,
    dtype: torch.dtype,
    num_positions: int,
) -> DecoderWeights:
    """Check that `source` has every tensor of the model and no other, then merge and lay them out.

    Raises:
        ModelUnavailable: tensors are missing, unexpected or of another shape; it names them.
    """
    _check(source.shapes(), expected_shapes(config), config)
    return _Builder(source, config, ops, device, dtype, num_positions).build()


def decoder_shape(config: ModelConfig) -> DecoderShape:
    return DecoderShape(
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.rms_norm_eps,
    )


def expected_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Hugging Face's name → shape of every tensor of the model."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layer: dict[str, Shape] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (q, hidden),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.o_proj.weight": (hidden, q),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (ffn, hidden),
        "mlp.up_proj.weight": (ffn, hidden),
        "mlp.down_proj.weight": (hidden, ffn),
    }
    if config.attention_bias:
        layer |= {f"self_attn.{name}_proj.bias": (size,) for name, size in (("q", q), ("k", kv), ("v", kv))}
        if config.architecture != "Qwen2ForCausalLM":
            layer["self_attn.o_proj.bias"] = (hidden,)
    if config.qk_norm:
        layer |= {f"self_attn.{name}_norm.weight": (config.head_dim,) for name in ("q", "k")}
    shapes = {f"model.layers.{i}.{name}": shape for i in range(config.num_layers) for name, shape in layer.items()}
    shapes |= {"model.embed_tokens.weight": (config.vocab_size, hidden), "model.norm.weight": (hidden,)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def num_parameters(config: ModelConfig) -> int:
    return sum(math.prod(shape) for shape in expected_shapes(config).values())


class SafetensorsSource:
    """The tensors of a directory: one file, or shards with or without their index. Use within `with`."""

    def __init__(self, directory: Path) -> None:
        self._paths = safetensors_paths(directory)
        self._stack = contextlib.ExitStack()
        self._files: dict[str, Any] = {}

    def __enter__(self) -> SafetensorsSource:
        for path in self._paths:
            try:
                file = self._stack.enter_context(safe_open(path, framework="pt", device="cpu"))
            except (SafetensorError, OSError) as error:
                self._stack.close()
                raise ModelUnavailable(f"{path}: not a readable safetensors file: {error}") from error
            self._files |= dict.fromkeys(file.keys(), file)
        return self

    def __exit__(self, *exception: object) -> None:
        self._files.clear()
        self._stack.close()

    def shapes(self) -> dict[str, Shape]:
        return {name: tuple(file.get_slice(name).get_shape()) for name, file in self._files.items()}

    def read(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._files[name].get_tensor(name)
        return tensor


class DummySource:
    """Random weights of a config's shape, the same in every process: for speed work, where no weights are at hand."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self._shapes = expected_shapes(config)
        self._device = device

    def shapes(self) -> dict[str, Shape]:
        return self._shapes

    def read(self, name: str) -> torch.Tensor:
        shape = self._shapes[name]
        if name.endswith("norm.weight"):
            return torch.ones(shape, device=self._device)
        generator = torch.Generator(self._device).manual_seed(xxhash.xxh3_64_intdigest(name.encode()) >> 1)
        bound = DUMMY_STD * math.sqrt(3)
        return torch.empty(shape, device=self._device).uniform_(-bound, bound, generator=generator)


def safetensors_paths(directory: Path) -> list[Path]:
    """The weight files of a Hugging Face directory, in name order.

    Raises:
        ModelUnavailable: there is none, or the index names one that is not there.
    """
    index = directory / INDEX_NAME
    if not index.exists():
        paths = sorted(directory.glob("*.safetensors"))
        if not paths:
            raise ModelUnavailable(f"{directory}: no *.safetensors file")
        return paths
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelUnavailable(f"{index}: not a safetensors index with a weight_map: {error!r}") from error
    if missing := [name for name in names if not (directory / name).exists()]:
        raise ModelUnavailable(f"{index}: names files that are not there: {_shown(missing)}")
    return [directory / name for name in names]


def _check(found: Mapping[str, Shape], expected: Mapping[str, Shape], config: ModelConfig) -> None:
    what = f"weights of a {config.architecture}"
    if missing := sorted(expected.keys() - found.keys()):
        raise ModelUnavailable(f"{what}: missing {_shown(missing)}")
    if unexpected := sorted(name for name in found.keys() - expected.keys() if not _is_redundant(name, config)):
        raise ModelUnavailable(f"{what}: unexpected {_shown(unexpected)}")
    wrong = [f"{name} is {found[name]}, should be {shape}" for name, shape in expected.items() if found[name] != shape]
    if wrong:
        raise ModelUnavailable(f"{what}: wrong shape: {_shown(wrong)}")


def _is_redundant(name: str, config: ModelConfig) -> bool:
    """Some checkpoints carry what follows from the rest."""
    return name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_word_embeddings)


def _shown(names: Sequence[str]) -> str:
    rest = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


class _Builder:
    def __init__(
        self,
        source: TensorSource,
        config: ModelConfig,
        ops: Ops,
        device: torch.device,
        dtype: torch.dtype,
        num_positions: int,
    ) -> None:
        self._source, self._config, self._ops = source, config, ops
        self._device, self._dtype = device, dtype
        cos, sin = rope_tables(
            theta=config.rope_theta, scaling=config.rope_scaling, head_dim=config.head_dim, num_positions=num_positions
        )
        self._rope = cos.to(device), sin.to(device)

    def build(self) -> DecoderWeights:
        embedding = self._tensor("model.embed_tokens.weight")
        tied = self._config.tie_word_embeddings
        return DecoderWeights(
            embedding_VH=embedding,
            layers=list(self._layers()),
            final_norm=self._tensor("model.norm.weight"),
            lm_head=self._ops.prepare_linear(embedding if tied else self._tensor("lm_head.weight"), None),
        )

    def _layers(self) -> Iterator[LayerWeights]:
        config = self._config
        out_bias = config.attention_bias and config.architecture != "Qwen2ForCausalLM"
        for i in range(config.num_layers):
            layer = f"model.layers.{i}."
            attention = layer + "self_attn."
            qkv = [f"{attention}{name}_proj" for name in "qkv"]
            cos_PD, sin_PD = self._rope
            yield LayerWeights(
                input_norm=self._tensor(layer + "input_layernorm.weight"),
                attention=GroupedAttention(
                    shape=decoder_shape(config),
                    qkv=self._linear(qkv, has_bias=config.attention_bias),
                    q_norm=self._tensor(attention + "q_norm.weight") if config.qk_norm else None,
                    k_norm=self._tensor(attention + "k_norm.weight") if config.qk_norm else None,
                    out=self._linear([attention + "o_proj"], has_bias=out_bias),
                    spec=AttentionSpec(scale=config.head_dim**-0.5),
                    cos_PD=cos_PD,
                    sin_PD=sin_PD,
                ),
                mlp_norm=self._tensor(layer + "post_attention_layernorm.weight"),
                mlp=GatedMlp(
                    gate_up=self._linear([layer + "mlp.gate_proj", layer + "mlp.up_proj"], has_bias=False),
                    down=self._linear([layer + "mlp.down_proj"], has_bias=False),
                ),
            )

    def _linear(self, names: Sequence[str], *, has_bias: bool) -> object:
        """One linear whose outputs are those of `names`, in order."""
        bias = self._joined([name + ".bias" for name in names]) if has_bias else None
        return self._ops.prepare_linear(self._joined([name + ".weight" for name in names]), bias)

    def _joined(self, names: Sequence[str]) -> torch.Tensor:
        tensors = [self._tensor(name) for name in names]
        return torch.cat(tensors) if len(tensors) > 1 else tensors[0]

    def _tensor(self, name: str) -> torch.Tensor:
        return self._source.read(name).to(device=self._device, dtype=self._dtype)
