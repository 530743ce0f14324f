"""From a server's configuration to an engine that can run: files, weights, KV pool, in that order.

Everything that can be wrong with the model, the machine or the configuration is found here, before the server is
ready, and said in one message.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Final

import psutil
import torch

from disaggregated import logs
from disaggregated.config.server import ServerConfig
from disaggregated.engine.api import OverlappingRunner, ScheduledSequence
from disaggregated.engine.engine import LLMEngine
from disaggregated.engine.engine_limits import EngineLimits, EngineOptions
from disaggregated.engine.fingerprint import (
    NUMERICS_VERSION,
    fingerprint,
    numerics_of,
    tokenizer_digest,
    weights_digest,
)
from disaggregated.engine.grammar.compiler import GrammarCompiler
from disaggregated.engine.grammar.configured import grammar_compiler
from disaggregated.engine.host_tier.copies import BlockCopier
from disaggregated.engine.host_tier.device_memory import StreamBlockCopier
from disaggregated.engine.host_tier.memory import MemoryBlockCopier
from disaggregated.engine.kv_cache import Allocate, KVCache
from disaggregated.engine.model_loading import load_model, read_model_config
from disaggregated.engine.models.decoder import Model
from disaggregated.engine.ops.api import Ops
from disaggregated.engine.ops.native import NativeOps
from disaggregated.engine.ops.reference import ReferenceOps
from disaggregated.engine.ops.select import select
from disaggregated.engine.pool_size import FreeMemory, PoolSize, size_pool
from disaggregated.engine.precision import Precision, precision_of
from disaggregated.engine.runner import TorchModelRunner
from disaggregated.engine.speculation import Speculation, speculation_of
from disaggregated.engine.weight_memory import is_stored_in_half, weight_bytes
from disaggregated.engine.weights import num_parameters, safetensors_paths
from disaggregated.errors import ConfigError, NotEnoughMemory
from disaggregated.kv_layout import KVLayout
from disaggregated.model_files import ModelConfig, ModelFiles, resolve
from disaggregated.sampling_params import SamplingParams

log = logs.get(__name__)

_MIB: Final = 1 << 20
_NOT_IN_KV: Final = ("max_position_embeddings", "eos_token_ids", "bos_token_id", "dtype", "remarks")
"""What of a model's config a token's KV does not depend on."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LoadedEngine:
    engine: LLMEngine
    runner: TorchModelRunner
    """The engine's own; whoever lets the engine step leaves it alone."""
    kv_cache: KVCache
    """For whoever moves whole blocks. On CUDA it has one more than `layout`, which is nobody's."""
    layout: KVLayout
    fingerprint: str
    """Servers with the same one may exchange KV."""
    files: ModelFiles
    config: ModelConfig
    device: str
    dtype: str
    """"float32", "bfloat16"; "int8" or "fp8" where the weights are."""
    ops_name: str
    grammars: GrammarCompiler | None
    """The engine's own, not loaded yet: whoever has the time may do it before the first grammar comes."""
    linear_bytes: Mapping[str, int]
    """What a decode step reads of the linears' weights, by the form they are held in; empty where that is not known."""
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
    model_config = read_model_config(config, files.path)
    max_seq_len = _max_seq_len(config, model_config)

    kv = model_config.kv_shape
    ops = select(
        device,
        precision,
        head_dim=kv.head_dim,
        num_planes=kv.num_planes,
        num_threads=config.num_threads,
        is_deterministic=config.deterministic,
        attn_backend=config.attn_backend,
    )
    is_narrow = not is_dummy and isinstance(ops, NativeOps) and ops.may_be_narrow
    is_half = is_narrow and is_stored_in_half(files, model_config)
    _check_weights_fit(model_config, device, precision, is_half=is_half)
    grammars = grammar_compiler(config, files, model_config)
    model = load_model(
        files.path,
        model_config,
        ops,
        device=device,
        dtype=precision.dtype,
        num_positions=max_seq_len,
        is_dummy=is_dummy,
    )
    if ops.linear_bytes:
        log.info("linears_packed", bytes=sum(ops.linear_bytes.values()), **{"in": dict(ops.linear_bytes)})
    size = _pool_size(config, model_config, device, precision.kv_dtype, max_seq_len=max_seq_len)
    layout = size.layout
    kv_cache = KVCache(_with_scratch_block(layout, device), device=device, allocate=allocate)
    runner = _runner(model, kv_cache, device, ops, config, max_seq_len=max_seq_len)
    speculation = speculation_of(config.speculative_config)
    return LoadedEngine(
        engine=LLMEngine(
            runner,
            EngineLimits(
                num_blocks=layout.num_blocks,
                block_size=layout.block_size,
                max_num_tokens=config.max_num_tokens,
                max_batch_size=config.max_batch_size,
                max_seq_len=max_seq_len,
                vocab_size=model_config.vocab_size,
                max_prefill_tokens_beside_decode=_max_prefill_tokens_beside_decode(config),
                enable_block_reuse=config.kv_cache_config.enable_block_reuse,
            ),
            EngineOptions(
                speculation=speculation,
                overlap=_overlaps(config, runner, speculation),
                grammars=grammars,
                copier=_copier(kv_cache, size.num_host_slots, device),
                event_buffer_max_size=config.kv_cache_config.event_buffer_max_size,
            ),
        ),
        runner=runner,
        kv_cache=kv_cache,
        layout=layout,
        fingerprint=_fingerprint(files, model_config, ops, precision, is_dummy=is_dummy),
        files=files,
        config=model_config,
        device=str(device),
        dtype=precision.name,
        ops_name=ops.name,
        grammars=grammars,
        linear_bytes=dict(ops.linear_bytes),
        max_seq_len=max_seq_len,
        num_parameters=num_parameters(model_config),
    )


def _runner(
    model: Model, kv_cache: KVCache, device: torch.device, ops: Ops, config: ServerConfig, *, max_seq_len: int
) -> TorchModelRunner:
    """Ready for its first real step: what is measured, compiled or captured has been."""
    if device.type == "cuda" and not isinstance(ops, ReferenceOps):
        from disaggregated.engine.cuda.start import start_runner

        return start_runner(model, kv_cache, device, ops, config, max_seq_len=max_seq_len)
    runner = TorchModelRunner(model, kv_cache, device)
    _warm_up(runner, min(config.max_num_tokens, max_seq_len, kv_cache.layout.block_size))
    return runner


def _max_prefill_tokens_beside_decode(config: ServerConfig) -> int:
    said = config.scheduler_config.max_prefill_tokens_beside_decode
    return said if said is not None else max(1, config.max_num_tokens // 4)


def _overlaps(config: ServerConfig, runner: TorchModelRunner, speculation: Speculation | None) -> bool:
    """A runner that computes while it is asked has nothing to overlap; and drafts continue tokens that are known."""
    return not config.disable_overlap_scheduler and speculation is None and isinstance(runner, OverlappingRunner)


def _with_scratch_block(layout: KVLayout, device: torch.device) -> KVLayout:
    """On CUDA the pool has one block more than the engine is told of, for the dummy requests of decode graphs."""
    return dataclasses.replace(layout, num_blocks=layout.num_blocks + (device.type != "cpu"))


def _pool_size(
    config: ServerConfig, model_config: ModelConfig, device: torch.device, kv_dtype: str, *, max_seq_len: int
) -> PoolSize:
    """The pool that the configuration asks for and the device has room for, weights already loaded."""
    one_block = KVLayout(
        **dataclasses.asdict(model_config.kv_shape),
        block_size=config.kv_cache_config.tokens_per_block,
        dtype=kv_dtype,
        num_blocks=1,
    )
    free = FreeMemory(
        device=available_bytes(device),
        host=available_bytes(torch.device("cpu")),
        device_is_host=device.type == "cpu",
    )
    size = size_pool(one_block, config.kv_cache_config, free, max_seq_len=max_seq_len)
    log.info("kv_pool_sized", blocks=size.layout.num_blocks, bytes=size.layout.pool_bytes, because=size.arithmetic)
    return size


def _copier(kv_cache: KVCache, num_slots: int, device: torch.device) -> BlockCopier | None:
    """The host tier's memory, if there is to be one."""
    if not num_slots:
        return None
    if device.type == "cpu":
        return MemoryBlockCopier(kv_cache.blocks_LBX.numpy(), num_slots)
    return StreamBlockCopier(kv_cache.blocks_LBX, num_slots)


def available_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def _check_weights_fit(model_config: ModelConfig, device: torch.device, precision: Precision, *, is_half: bool) -> None:
    needed, available = weight_bytes(model_config, precision, is_half=is_half), available_bytes(device)
    if needed > available:
        raise NotEnoughMemory(
            f"the weights, {num_parameters(model_config) / 1e6:.0f} million parameters in {precision.name}, take "
            f"{_mib(needed)}; {_mib(available)} are available on {device}"
        )


def _warm_up(runner: TorchModelRunner, num_tokens: int) -> None:
    """A short prompt into block 0, which nobody holds yet: what is measured or built at first use is done by now."""
    sampling = SamplingParams(max_tokens=1)
    for count in {1, num_tokens}:
        prompt = ScheduledSequence(
            request_id="warm-up", token_ids=[0] * count, first_position=0, block_table=[0], sampling=sampling
        )
        runner.execute([prompt])


def _fingerprint(files: ModelFiles, config: ModelConfig, ops: Ops, precision: Precision, *, is_dummy: bool) -> str:
    """What the numbers of a token's KV mean. In which dtype and blocks they are stored is the layout's: KV is converted
    between servers that differ in nothing else."""
    weights = "dummy" if is_dummy else weights_digest(safetensors_paths(files.path))
    mathematics = {name: value for name, value in dataclasses.asdict(config).items() if name not in _NOT_IN_KV}
    return fingerprint(
        weights,
        sorted(mathematics.items()),
        precision.name,
        precision.dtype_name,
        numerics_of(ops.name),
        NUMERICS_VERSION,
        tokenizer_digest(files.path),
    )


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
