"""In which precision a server computes: three choices of the configuration, checked against what its device can do.

- the dtype of activations, and of weights that are not quantised;
- how the weights of linears are quantised, and with them what they are multiplied with;
- the dtype of the entries of the KV pool.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Final, Literal

import torch

from disaggregated.config.kinds import in_words
from disaggregated.config.server import ServerConfig
from disaggregated.errors import ConfigError

Quantization = Literal["none", "int8", "fp8"]

DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}
QUANTIZATIONS: Final[Mapping[str, Quantization]] = {"none": "none", "int8": "int8", "fp8": "fp8"}
WEIGHT_BYTES: Final = {"int8": 1, "fp8": 1}
"""Of one number of a quantised weight; its scales, one a row, weigh nothing beside it."""

_AUTO_KV: Final[Mapping[Quantization, str]] = {"int8": "int8"}
"""KV entries follow the activations, but where weights are int8 they are too: beside these weights, KV in float32 is
most of what a decode step reads, and the quality is that of the weights (benchmarks/results/quality.md)."""
_LAYOUT_NAMES: Final = {"fp8": "float8_e4m3fn"}
"""A KV dtype of the configuration as `KVLayout` names it, where that is another name."""


@dataclasses.dataclass(frozen=True, slots=True)
class Precision:
    dtype: torch.dtype
    """Of activations, embeddings, norms, and of the weights of linears where `quantization` is "none"."""
    quantization: Quantization
    kv_dtype: str
    """As `KVLayout.dtype`."""

    @property
    def dtype_name(self) -> str:
        """As in the configuration: `float32`."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def name(self) -> str:
        """The shortest configuration of it, KV aside: `float32`, `int8`."""
        return self.dtype_name if self.quantization == "none" else self.quantization


@dataclasses.dataclass(frozen=True, slots=True)
class _Device:
    default: str
    quantizations: Mapping[Quantization, Sequence[str]]
    """What weights can be quantised to, and the dtypes of activations that goes with."""
    kv_dtypes: Sequence[str]


_DEVICES: Final[Mapping[str, _Device]] = {
    "cpu": _Device(
        default="float32",
        quantizations={"none": ("float32", "bfloat16"), "int8": ("float32",)},
        kv_dtypes=("float32", "bfloat16", "float16", "int8", "fp8"),
    ),
    "cuda": _Device(
        default="bfloat16",
        quantizations={"none": ("float32", "bfloat16"), "fp8": ("bfloat16",)},
        kv_dtypes=("float32", "bfloat16", "float16", "int8", "fp8"),
    ),
}


def precision_of(config: ServerConfig, device: torch.device) -> Precision:
    """
    Raises:
        ConfigError: this device cannot do it; names the key and what it can do.
    """
    able = _DEVICES[device.type]
    name, quantization = _dtype_and_quantization(config)
    if quantization not in able.quantizations:
        raise ConfigError(
            f"quant_config.quant_algo: must be {in_words(list(able.quantizations))} on {device.type}, "
            f"is {quantization!r}"
        )
    if name == "auto":
        name = able.default
    fitting = able.quantizations[quantization]
    if name not in fitting:
        spoken = "" if quantization == "none" else f" with {quantization} weights"
        raise ConfigError(f"dtype: must be {in_words(['auto', *fitting])}{spoken} on {device.type}, is {name!r}")
    kv = config.kv_cache_config.dtype
    if kv != "auto" and kv not in able.kv_dtypes:
        raise ConfigError(
            f"kv_cache_config.dtype: must be {in_words(['auto', *able.kv_dtypes])} on {device.type}, is {kv!r}"
        )
    if kv == "auto":
        kv = _AUTO_KV.get(quantization, name)
    return Precision(DTYPES[name], quantization, _LAYOUT_NAMES.get(kv, kv))


def _dtype_and_quantization(config: ServerConfig) -> tuple[str, Quantization]:
    """`dtype: int8` is short for quantised weights below the device's own activations."""
    if config.quantization not in QUANTIZATIONS:
        raise ConfigError(
            f"quant_config.quant_algo: must be {in_words(list(QUANTIZATIONS))}, is {config.quantization!r}"
        )
    asked = QUANTIZATIONS[config.quantization]
    short = QUANTIZATIONS.get(config.dtype, "none")
    if short == "none":
        return config.dtype, asked
    if asked not in ("none", short):
        raise ConfigError(
            f"dtype: is {short}, but quant_config.quant_algo is {asked}; name it in one of the two places"
        )
    return "auto", short
