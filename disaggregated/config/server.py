"""What one context or generation server is told. Key names are TensorRT-LLM's where it has one."""

from __future__ import annotations

import dataclasses

from disaggregated.config.security import SecurityConfig


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class KVCacheConfig:
    enable_block_reuse: bool = True
    """Keep the blocks of finished sequences for prompts with the same beginning."""
    max_tokens: int | None = None
    """Size of the pool in tokens; None: no such limit. Of several limits the smallest counts."""
    free_gpu_memory_fraction: float = 0.9
    """Of the device's free memory after the weights are loaded; on CPU, of `cpu_memory_budget_bytes`."""
    max_gpu_total_bytes: int = 0
    """Size of the pool in bytes; 0: no such limit."""
    cpu_memory_budget_bytes: int = 1 << 30
    """What one server on CPU may take for KV."""
    host_cache_size: int = 0
    """Bytes of host memory for blocks that the pool has evicted; 0: they are gone."""
    event_buffer_max_size: int = 16_384
    """Changes of the prefix cache kept for whoever follows them; 0: nobody can."""
    tokens_per_block: int = 32
    dtype: str = "auto"
    """"auto" is int8 with int8 weights, else that of the activations; "float32", "bfloat16", "float16", "int8",
    "fp8"."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CacheTransceiverConfig:
    backend: str = "DEFAULT"
    """DEFAULT negotiates the best that both ends have; any other is used, or is an error that says what is missing."""
    fallback: bool = False
    """With a named backend that cannot be used: take the next best instead, and say so."""
    max_tokens_in_buffer: int | None = None
    """Bounds what a server has in flight of all transfers that it receives; None or 0: 64 MiB of each."""
    layer_group_bytes: int = 4 << 20
    """Of a context server: while a chunk is computed, layers are published in groups of so much KV, or of a third of
    the chunk where that is less; 0: when the chunk is computed."""
    pull_back: bool = True
    """Of a context server: have blocks of a prompt brought from a generation server that holds them, where that is
    quicker than to compute them. Of a generation server: lend them."""
    pull_back_patience_ms: int = 250
    """So long, or ten times its estimate, it may take; but never longer than half of what it was to save."""
    kv_transfer_timeout_ms: int = 60_000
    """Without anything new published or read, of a transfer that has begun."""
    progress_timeout_s: float = 1.0
    """Without an answer and without a byte."""
    lease_s: float = 30.0
    """Relative; renewed by progress. A context server gives the blocks back after that long without a sign of life."""
    cuda_ipc: bool = True
    """Where SHM is between two pools of GPUs on one host: copy from pool to pool, not by host memory."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CudaGraphConfig:
    """Of decode steps, on CUDA."""

    is_enabled: bool = True
    batch_sizes: tuple[int, ...] = ()
    """Empty: 1, 2, 4, 8 and multiples of 8 that grow with the size, up to `max_batch_size`."""
    max_batch_size: int | None = None
    """Of the sizes captured; None: the server's own."""
    enable_padding: bool = True
    """A batch of a size in between is filled up with dummy requests; without it, it is computed without a graph."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    max_prefill_tokens_beside_decode: int | None = None
    """Tokens of prompts in a step in which somebody decodes; None: a quarter of `max_num_tokens`."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SpeculativeConfig:
    """Drafts that are checked together with the next token. They change speed only."""

    decoding_type: str = "none"
    """"NGram": from the sequence's own text; "none"."""
    max_draft_len: int = 5
    """Tokens."""
    max_matching_ngram_size: int = 4
    """Tokens at the end of the text that are looked for in what comes before."""
    is_use_oldest: bool = False
    """Of several places the first one, not the last."""
    max_concurrency: int | None = None
    """No drafts in a step with more decoding sequences; None: as what they bring and cost says."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    model: str
    role: str
    """"context" or "generation"."""
    host: str = "localhost"
    port: int = 8000
    """0: any free one; the ready line tells which."""
    wire_port: int = 0
    """For calls in frames; 0: any free one. Callers are told by `Describe`."""
    dtype: str = "auto"
    """Of weights and activations: "auto" is float32 on CPU and bfloat16 on CUDA; "float32", "bfloat16"; "int8" and
    "fp8" are "auto" with that quantization."""
    quantization: str = "none"
    """Of the weights of linears, and of what they are multiplied with: "none", "int8", "fp8"."""
    device: str = "auto"
    """"cpu", "cuda", "cuda:1"; "auto" is CUDA where there is one."""
    deterministic: bool = True
    """On CUDA: a sequence's tokens do not depend on its batch, at the price of some padding. CPUs always are so."""
    attn_backend: str = "auto"
    """On CUDA: "flashinfer" computes decode attention where it can; "auto" and "triton" are our own kernels."""
    model_impl: str = "auto"
    """"native", and "auto", are the families that are implemented here; "transformers": any causal model of that
    library, if it is installed."""
    load_format: str = "auto"
    """"dummy": random weights of the model's shape, for speed work."""
    max_batch_size: int = 64
    max_num_tokens: int = 512
    """Tokens computed in one step, decode and prefill together: the size of a prefill chunk."""
    max_seq_len: int | None = None
    """Prompt and generated tokens; None: the model's own limit."""
    num_threads: int = 1
    """CPU threads of the engine."""
    cpu_affinity: tuple[int, ...] = ()
    """Cores the process is pinned to; empty: the operating system decides."""
    log_level: str = "info"
    """"debug", "info", "warning" or "error"."""
    security: SecurityConfig = SecurityConfig()
    cuda_graph_config: CudaGraphConfig = CudaGraphConfig()
    disable_overlap_scheduler: bool = False
    """Otherwise, on a device that works on its own, a step is launched before the tokens of the last one are known."""
    scheduler_config: SchedulerConfig = SchedulerConfig()
    speculative_config: SpeculativeConfig = SpeculativeConfig()
    guided_decoding_backend: str = "auto"
    """"xgrammar" or "llguidance" for grammars; "auto": the better one of those that are installed."""
    kv_cache_config: KVCacheConfig = KVCacheConfig()
    cache_transceiver_config: CacheTransceiverConfig = CacheTransceiverConfig()
