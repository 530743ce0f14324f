"""What a configuration asks for, and what a device can do of it."""

from __future__ import annotations

import pytest
import torch

from disaggregated.config.server import KVCacheConfig, ServerConfig
from disaggregated.engine.precision import Precision, precision_of
from disaggregated.errors import ConfigError

CPU, CUDA = torch.device("cpu"), torch.device("cuda:1")


def asked(dtype: str = "auto", quantization: str = "none", kv_dtype: str = "auto") -> ServerConfig:
    return ServerConfig(
        model="m",
        role="context",
        dtype=dtype,
        quantization=quantization,
        kv_cache_config=KVCacheConfig(dtype=kv_dtype),
    )


@pytest.mark.parametrize(
    ("config", "device", "expected"),
    [
        (asked(), CPU, Precision(torch.float32, "none", "float32")),
        (asked(), CUDA, Precision(torch.bfloat16, "none", "bfloat16")),
        (asked("bfloat16"), CPU, Precision(torch.bfloat16, "none", "bfloat16")),
        (asked("int8"), CPU, Precision(torch.float32, "int8", "int8")),
        (asked(quantization="int8"), CPU, Precision(torch.float32, "int8", "int8")),
        (asked("float32", "int8"), CPU, Precision(torch.float32, "int8", "int8")),
        (asked("int8", "int8", "float16"), CPU, Precision(torch.float32, "int8", "float16")),
        (asked("fp8"), CUDA, Precision(torch.bfloat16, "fp8", "bfloat16")),
        (asked("fp8", kv_dtype="fp8"), CUDA, Precision(torch.bfloat16, "fp8", "float8_e4m3fn")),
        (asked(kv_dtype="float16"), CPU, Precision(torch.float32, "none", "float16")),
    ],
)
def test_a_configuration_comes_to_a_precision(config: ServerConfig, device: torch.device, expected: Precision) -> None:
    assert precision_of(config, device) == expected


@pytest.mark.parametrize(
    ("config", "device", "message"),
    [
        (asked("int3"), CPU, "dtype: must be auto, float32 or bfloat16 on cpu, is 'int3'"),
        (asked("float16"), CUDA, "dtype: must be auto, float32 or bfloat16 on cuda, is 'float16'"),
        (asked("fp8"), CPU, "quant_config.quant_algo: must be none or int8 on cpu, is 'fp8'"),
        (asked(quantization="int8"), CUDA, "quant_config.quant_algo: must be none or fp8 on cuda, is 'int8'"),
        (asked(quantization="int2"), CPU, "quant_config.quant_algo: must be none, int8 or fp8, is 'int2'"),
        (
            asked("bfloat16", "int8"),
            CPU,
            "dtype: must be auto or float32 with int8 weights on cpu, is 'bfloat16'",
        ),
        (
            asked("int8", "fp8"),
            CPU,
            "dtype: is int8, but quant_config.quant_algo is fp8; name it in one of the two places",
        ),
        (
            asked(kv_dtype="nvfp4"),
            CPU,
            "kv_cache_config.dtype: must be auto, float32, bfloat16, float16, int8 or fp8 on cpu, is 'nvfp4'",
        ),
    ],
)
def test_what_a_device_cannot_do_is_refused_with_the_key_and_what_it_can(
    config: ServerConfig, device: torch.device, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        precision_of(config, device)
    assert str(caught.value) == message


def test_a_precision_is_called_as_it_is_asked_for() -> None:
    for name in ("float32", "bfloat16", "int8"):
        assert precision_of(asked(name), CPU).name == name
    assert precision_of(asked("float32", "int8"), CPU).name == "int8"
