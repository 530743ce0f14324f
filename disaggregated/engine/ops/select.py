"""Which implementation of the op table a server runs.

On CUDA the Triton kernels, where Triton is installed; on CPU native kernels, where they are built and know the
precision; else the torch reference, which knows them all. Native attention knows fewer models than the other native
kernels; the rest have theirs from the reference. The environment variable `DISAGG_OPS` insists: `torch`, or `native`,
which then is an error where there is none.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from typing import Final

import torch

from disaggregated.engine.ops import native
from disaggregated.engine.ops.api import Ops
from disaggregated.engine.ops.reference import ReferenceOps
from disaggregated.engine.ops.torch_attention import WithTorchAttention
from disaggregated.engine.precision import Precision
from disaggregated.errors import ConfigError

log = logging.getLogger(__name__)

VARIABLE: Final = "DISAGG_OPS"
FP8_CAPABILITY: Final = (9, 0)
"""Of the row-wise scaled product of 8-bit floats: Hopper and later."""


def select(
    device: torch.device,
    precision: Precision,
    *,
    head_dim: int,
    num_planes: int = 2,
    num_threads: int,
    is_deterministic: bool = True,
    attn_backend: str = "auto",
) -> Ops:
    """
    `head_dim` and `num_planes` are those of the KV pool.

    Raises:
        ConfigError: `DISAGG_OPS` asks for what is not there.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted not in ("", "torch", "native"):
        raise ConfigError(f"{VARIABLE}: must be torch or native, is {wanted!r}")
    if wanted == "torch":
        return _reference(precision)
    if device.type == "cuda" and (
        cuda := _cuda(device, precision, is_deterministic=is_deterministic, attn_backend=attn_backend)
    ):
        return cuda
    if attn_backend == "flashinfer":
        log.warning("flashinfer_not_used: it needs a CUDA device, and Triton for all but decode attention")
    reason = _unsupported(device, precision)
    ops = None if reason else _native(precision, num_threads)
    if ops is not None and not _attention_is_native(precision, head_dim, num_planes):
        ops = WithTorchAttention(ops)
    if ops is None and wanted == "native":
        raise ConfigError(f"{VARIABLE}: native kernels are not available: {reason or 'the log says why'}")
    return ops or _reference(precision)


def _reference(precision: Precision) -> Ops:
    if precision.quantization == "fp8":
        raise ConfigError("quant_config.quant_algo: fp8 needs the CUDA kernels, and with them Triton")
    return ReferenceOps(precision.quantization)


def _cuda(device: torch.device, precision: Precision, *, is_deterministic: bool, attn_backend: str) -> Ops | None:
    if importlib.util.find_spec("triton") is None:
        log.warning("cuda_kernels_unavailable: Triton is not installed; plain torch is used, which is slow")
        return None
    if precision.quantization == "fp8" and torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        raise ConfigError(f"quant_config.quant_algo: fp8 needs compute capability 9.0, {device} has less")
    from disaggregated.engine.cuda.ops import load  # It imports Triton, which nobody without a device needs.

    return load(device, precision.quantization, is_deterministic=is_deterministic, attn_backend=attn_backend)


def _native(precision: Precision, num_threads: int) -> Ops | None:
    assert precision.quantization != "fp8", "fp8 weights on a CPU"
    return native.load(num_threads, quantization=precision.quantization)


def _unsupported(device: torch.device, precision: Precision) -> str | None:
    if device.type != "cpu":
        return f"they run on CPU, not on {device}"
    if precision.dtype is not torch.float32:
        return f"they compute in float32, not in {precision.dtype_name}"
    return None


def _attention_is_native(precision: Precision, head_dim: int, num_planes: int) -> bool:
    is_known_size = head_dim % 16 == 0 and head_dim <= native.MAX_HEAD_DIM
    return is_known_size and num_planes == 2 and precision.kv_dtype in native.KV_DTYPES
