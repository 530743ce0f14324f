"""From safetensors files, or from nothing but a config, to the merged weights of a decoder.

Files are mapped, not read: each tensor is touched once, when it is laid out for its operation.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
import xxhash
from safetensors import SafetensorError, safe_open

from disaggregated.engine.models.decoder import Decoder
from disaggregated.engine.models.families import read_decoder
from disaggregated.engine.models.weight_reader import (
    LoadingReader,
    NamedWeights,
    Shape,
    ShapeRecorder,
    TensorSource,
    num_numbers,
)
from disaggregated.engine.ops.api import Ops
from disaggregated.errors import ModelUnavailable
from disaggregated.model_files import ModelConfig

INDEX_NAME: Final = "model.safetensors.index.json"
NAMES_SHOWN: Final = 4
DUMMY_STD: Final = 0.02


def build_model(
    source: TensorSource,
    config: ModelConfig,
    ops: Ops,
    *,
    device: torch.device,
    dtype: torch.dtype,
    num_positions: int,
) -> Decoder:
    """Check that `source` has every tensor of the model and no other, then merge them and lay them out.

    `num_positions`: the longest sequence that the model will be asked for.

    Raises:
        ModelUnavailable: tensors are missing, unexpected or of another shape; it names them.
    """
    _check(source.shapes(), expected_shapes(config), config)
    weights = NamedWeights(LoadingReader(source, ops, device=device, dtype=dtype))
    shape, decoder_weights = read_decoder(weights, config, dtype=dtype, num_positions=num_positions)
    return Decoder(shape, decoder_weights, ops)


def expected_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Hugging Face's name → shape of every tensor of the model."""
    recorder = ShapeRecorder()
    read_decoder(NamedWeights(recorder), config, dtype=torch.float32, num_positions=1)
    return recorder.shapes


def num_parameters(config: ModelConfig) -> int:
    if config.transformers is not None:
        return config.transformers.num_parameters
    return num_numbers(expected_shapes(config))


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
    """Some checkpoints carry what follows from the rest, or DeepSeek's layer that guesses one more token."""
    return (
        name.endswith("rotary_emb.inv_freq")
        or (name == "lm_head.weight" and config.tie_word_embeddings)
        or (config.latent is not None and name.startswith(f"model.layers.{config.num_layers}."))
    )


def _shown(names: Sequence[str]) -> str:
    rest = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
