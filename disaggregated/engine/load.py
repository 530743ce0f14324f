"""From a server's configuration to an engine that can run: files, weights, KV pool, in that order.

Everything that can be wrong with the model, the machine or the configuration is found here, before the server is
ready, and said in one message.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Final

import psutil
import torch

from disaggregated.config.server import ServerConfig
from disaggregated.engine.api import ScheduledSequence
from disaggregated.engine.engine import LLMEngine
from disaggregated.engine.fingerprint import fingerprint, numerics_of, weights_digest
from disaggregated.engine.kv_cache import Allocate, KVCache
from disaggregated.engine.models.decoder import Decoder
from disaggregated.engine.ops.api import Ops
from disaggregated.engine.ops.select import select
from disaggregated.engine.precision import WEIGHT_BYTES, Precision, precision_of
from disaggregated.engine.runner import TorchModelRunner
from disaggregated.engine.weights import (
    DummySource,
    SafetensorsSource,
    build_model,
    num_parameters,
    safetensors_paths,
)
from disaggregated.errors import ConfigError, NotEnoughMemory
from disaggregated.kv_layout import KVLayout
from disaggregated.model_files import ModelConfig, ModelFiles, resolve
from disaggregated.sampling_params import SamplingParams

_MIB: Final = 1 << 20
_NOT_IN_KV: Final = ("max_position_embeddings", "eos_token_ids", "bos_token_id", "dtype", "remarks")
"""What of a model's config a token's KV does not depend on."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LoadedEngine:
    engine: LLMEngine
    layout: KVLayout
    fingerprint: str
    """Servers with the same one may exchange KV."""
    files: ModelFiles
    config: ModelConfig
    device: str
    dtype: str
    """"float32", "bfloat16"; "int8" or "fp8" where the weights are."""
    ops_name: str
    max_seq_len: int
    num_parameters: int


def load_engine(
    config: ServerConfig, *, allocate: Allocate, progress: Callable[[str], None] | None = None
) -> LoadedEngine:
    """
    `allocate` gives the memory of the KV pool on CPU, once its layout is known; the engine uses it until the end.
    `progress` is told before anything slow, such as a download.

    Raises:
        ModelUnavailable: missing, damaged or unsupported.
        NotEnoughMemory: with the numbers.
        ConfigError: a value that this model or machine cannot have.
    """
    torch.set_num_threads(config.num_threads)
    device = _device(config)
    precision = precision_of(config, device)
    is_dummy = _is_dummy(config)
    files = resolve(config.model, weights=not is_dummy, progress=progress)
    model_config = ModelConfig.load(files.path)
    max_seq_len = _max_seq_len(config, model_config)
    _check_weights_fit(model_config, device, precision)

    ops = select(device, precision, head_dim=model_config.head_dim, num_threads=config.num_threads)
    model = _load_model(files, model_config, ops, device, precision.dtype, num_positions=max_seq_len, is_dummy=is_dummy)
    layout = kv_layout(config, model_config, device, precision.kv_dtype)
    runner = TorchModelRunner(model, KVCache(layout, device=device, allocate=allocate), device)
    _warm_up(runner, min(config.max_num_tokens, max_seq_len, layout.block_size))
    return LoadedEngine(
        engine=LLMEngine(
            runner,
            num_blocks=layout.num_blocks,
            block_size=layout.block_size,
            max_num_tokens=config.max_num_tokens,
            max_batch_size=config.max_batch_size,
            max_seq_len=max_seq_len,
            vocab_size=model_config.vocab_size,
            enable_block_reuse=config.kv_cache_config.enable_block_reuse,
        ),
        layout=layout,
        fingerprint=_fingerprint(files, model_config, ops, precision, is_dummy=is_dummy),
        files=files,
        config=model_config,
        device=str(device),
        dtype=precision.name,
        ops_name=ops.name,
        max_seq_len=max_seq_len,
        num_parameters=num_parameters(model_config),
    )


def kv_layout(config: ServerConfig, model_config: ModelConfig, device: torch.device, dtype: str) -> KVLayout:
    """The pool that the configuration asks for and the device has room for, weights already loaded.

    Raises:
        NotEnoughMemory: it does not fit, or holds not even one block.
    """
    kv_config = config.kv_cache_config
    one_block = KVLayout(
        **dataclasses.asdict(model_config.kv_shape),
        block_size=kv_config.tokens_per_block,
        dtype=dtype,
        num_blocks=1,
    )
    available = available_bytes(device)
    if kv_config.max_tokens is not None:
        num_blocks = one_block.num_blocks_for(kv_config.max_tokens)
    else:
        budget = available if device.type != "cpu" else min(kv_config.cpu_memory_budget_bytes, available)
        num_blocks = int(budget * kv_config.free_gpu_memory_fraction) // one_block.pool_bytes
    layout = dataclasses.replace(one_block, num_blocks=max(1, num_blocks))
    if layout.pool_bytes > available:
        raise NotEnoughMemory(
            f"a KV pool of {layout.num_blocks * layout.block_size} tokens takes {_mib(layout.pool_bytes)} "
            f"({layout.token_bytes} bytes a token); {_mib(available)} are available on {device}"
        )
    return layout


def available_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def _check_weights_fit(model_config: ModelConfig, device: torch.device, precision: Precision) -> None:
    needed, available = weight_bytes(model_config, precision), available_bytes(device)
    if needed > available:
        raise NotEnoughMemory(
            f"the weights, {num_parameters(model_config) / 1e6:.0f} million parameters in {precision.name}, take "
            f"{_mib(needed)}; {_mib(available)} are available on {device}"
        )


def weight_bytes(config: ModelConfig, precision: Precision) -> int:
    """Of a loaded model. The embedding is never quantised; an output head tied to it is then a matrix of its own."""
    table = config.vocab_size * config.hidden_size
    if precision.quantization == "none":
        return num_parameters(config) * precision.dtype.itemsize
    num_quantised = num_parameters(config) - (0 if config.tie_word_embeddings else table)
    return num_quantised * WEIGHT_BYTES[precision.quantization] + table * precision.dtype.itemsize


def _load_model(
    files: ModelFiles,
    config: ModelConfig,
    ops: Ops,
    device: torch.device,
    dtype: torch.dtype,
    *,
    num_positions: int,
    is_dummy: bool,
) -> Decoder:
    with torch.inference_mode(), contextlib.ExitStack() as stack:
        source = DummySource(config, device) if is_dummy else stack.enter_context(SafetensorsSource(files.path))
        return build_model(source, config, ops, device=device, dtype=dtype, num_positions=num_positions)


def _warm_up(runner: TorchModelRunner, num_tokens: int) -> None:
    """A short prompt into block 0, which nobody holds yet: what is measured or built at first use is done by now."""
    sampling = SamplingParams(max_tokens=1)
    for count in {1, num_tokens}:
        prompt = ScheduledSequence(
            request_id="warm-up", token_ids=[0] * count, first_position=0, block_table=[0], sampling=sampling
        )
        runner.execute([prompt])


def _fingerprint(files: ModelFiles, config: ModelConfig, ops: Ops, precision: Precision, *, is_dummy: bool) -> str:
    weights = "dummy" if is_dummy else weights_digest(safetensors_paths(files.path))
    mathematics = {name: value for name, value in dataclasses.asdict(config).items() if name not in _NOT_IN_KV}
    return fingerprint(weights, sorted(mathematics.items()), precision.name, precision.kv_dtype, numerics_of(ops.name))


def _device(config: ServerConfig) -> torch.device:
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(config.device)
    except RuntimeError as error:
        raise ConfigError(f"device: must be auto, cpu, cuda or cuda:N, is {config.device!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device: must be auto, cpu, cuda or cuda:N, is {config.device!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device: {config.device} is not there, torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def _is_dummy(config: ServerConfig) -> bool:
    if config.load_format not in ("auto", "dummy"):
        raise ConfigError(f"load_format: must be auto or dummy, is {config.load_format!r}")
    return config.load_format == "dummy"


def _max_seq_len(config: ServerConfig, model_config: ModelConfig) -> int:
    limit = model_config.max_position_embeddings
    if config.max_seq_len is not None and not 1 <= config.max_seq_len <= limit:
        raise ConfigError(f"max_seq_len: must be 1 to {limit}, the model's limit, is {config.max_seq_len}")
    return config.max_seq_len or limit


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / _MIB:,.0f} MiB"
