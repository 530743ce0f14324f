"""Which implementation a model gets, ours or the transformers library's, and its weights.

`model_impl` decides: `auto` and `native` are the families that are implemented here; `transformers` is any other
causal model, computed by that library over our op table. It is never chosen unasked: it is slower, and trusts more.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Final

import torch

from disaggregated.config.server import ServerConfig
from disaggregated.engine.models import transformers_config, transformers_model
from disaggregated.engine.models.decoder import Model
from disaggregated.engine.ops.api import Ops
from disaggregated.engine.weights import DummySource, SafetensorsSource, build_model
from disaggregated.errors import ConfigError
from disaggregated.model_files import ModelConfig

_IMPLEMENTATIONS: Final = ("auto", "native", "transformers")


def read_model_config(config: ServerConfig, path: Path) -> ModelConfig:
    """
    Raises:
        ModelUnavailable: the implementation does not know the model in `path`, or its config is wrong.
        ConfigError: there is no such implementation, or it is not installed.
    """
    if config.model_impl not in _IMPLEMENTATIONS:
        raise ConfigError(f"model_impl: must be one of {', '.join(_IMPLEMENTATIONS)}, is {config.model_impl!r}")
    if config.model_impl == "transformers":
        return transformers_config.read_config(path, max_seq_len=config.max_seq_len)
    return ModelConfig.load(path)


def load_model(
    path: Path,
    config: ModelConfig,
    ops: Ops,
    *,
    device: torch.device,
    dtype: torch.dtype,
    num_positions: int,
    is_dummy: bool,
) -> Model:
    """`num_positions`: the longest sequence that the model will be asked for.

    Raises:
        ModelUnavailable: the weights in `path` are not the model's.
    """
    with torch.inference_mode(), contextlib.ExitStack() as stack:
        if config.transformers is not None:
            return transformers_model.load(path, ops, device=device, dtype=dtype, is_dummy=is_dummy)
        source = DummySource(config, device) if is_dummy else stack.enter_context(SafetensorsSource(path))
        return build_model(source, config, ops, device=device, dtype=dtype, num_positions=num_positions)
