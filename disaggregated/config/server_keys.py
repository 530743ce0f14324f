"""The keys of a server section, of a server's own `--config` file, and (under the same names) of its flags.

These are TensorRT-LLM's engine arguments and a few of ours. A key that asks for another *result* than ours is
refused or not built yet; one that only asks for another *way* to the same result has no effect, and says so in a line.
"""

from __future__ import annotations

from typing import Final

from disaggregated.config import scheduling_keys
from disaggregated.config.key_table import Alias, Key, KeyTable, honoured, no_effect, not_built, refused
from disaggregated.config.kinds import ANYTHING, BOOLEAN, CORES, COUNTS, TEXT, choice, integer, number
from disaggregated.config.text_keys import SERVER_TEXT_KEYS

AT_LEAST_0: Final = integer(0)
AT_LEAST_1: Final = integer(1)
FRACTION: Final = number(0, 1)

_SPELLINGS: Final = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16", "float": "float32"}
_DTYPE: Final = choice("auto", "float32", "bfloat16", "int8", "fp8", "float16", "nvfp4", spellings=_SPELLINGS)
_NO_SUCH_DTYPE: Final = {
    "float16": "this engine computes in float32 or bfloat16",
    "nvfp4": "weights are quantised to int8 or fp8",
}
_KV_DTYPE: Final = choice(
    *("auto", "float32", "bfloat16", "float16", "int8", "fp8", "nvfp4"),
    spellings={**_SPELLINGS, "fp8_e4m3": "fp8", "no_quant": "auto"},
)
_NO_SUCH_KV: Final = {"nvfp4": "quantised KV entries are int8 or fp8"}
_OTHER_QUANTISATIONS: Final = (
    *("W8A16", "W4A16", "W4A16_AWQ", "W4A8_AWQ", "W8A16_GPTQ", "W4A16_GPTQ", "W4A8_QSERVE_PER_GROUP"),
    *("W4A8_QSERVE_PER_CHANNEL", "W8A8_SQ_PER_CHANNEL", "W8A8_SQ_PER_TENSOR_PLUGIN", "FP8_BLOCK_SCALES"),
    *("W8A8_SQ_PER_CHANNEL_PER_TENSOR_PLUGIN", "W8A8_SQ_PER_TENSOR_PER_TOKEN_PLUGIN", "MIXED_PRECISION"),
    *("NVFP4", "NVFP4_AWQ", "W4A8_NVFP4_FP8", "W4A8_MXFP4_FP8", "W4A8_MXFP4_MXFP8", "W4A16_MXFP4", "MXFP8"),
)
_QUANTISATION: Final = choice(
    *("none", "int8", "fp8", *_OTHER_QUANTISATIONS),
    spellings={
        "no_quant": "none",
        "w8a8_sq_per_channel_per_token_plugin": "int8",
        "fp8_per_channel_per_token": "fp8",
    },
    words="NO_QUANT, INT8 (or W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN) or FP8 (or FP8_PER_CHANNEL_PER_TOKEN)",
)
_QUANTISED_LINEARS: Final = "every linear is quantised, but a router of experts; embeddings and norms never are"
_OTHER_ATTENTION: Final = dict.fromkeys(("trtllm", "vanilla", "flashinfer_star_attention", "flash_attention"), "auto")
_ONE_WAY: Final = "weights are quantised to INT8 or FP8, with a scale a row, and activations with a scale a token"
_ONE_RANK: Final = "a server has one rank for now, so only 1 starts"
_EXPERTS: Final = "experts are computed one after the other, by the kernels of the dense layers"
_ALL_TOKENS: Final = "every layer attends to as many tokens as the model says"

_HONOURED: Final = (
    honoured("model", TEXT, "Bundled name, Hugging Face directory or GGUF file."),
    honoured(
        "dtype",
        _DTYPE,
        "Of weights and activations; auto: float32 on CPU, bfloat16 on CUDA. int8, fp8: short for auto with that "
        "quant_config.quant_algo.",
        not_built_values=_NO_SUCH_DTYPE,
    ),
    honoured(
        "quant_config.quant_algo",
        _QUANTISATION,
        "How the weights of linears are stored and multiplied: INT8 on CPU, FP8 on CUDA. They are quantised as they "
        "are loaded; docs/precision.md tells what it costs.",
        target="quantization",
        not_built_values=dict.fromkeys(_OTHER_QUANTISATIONS, _ONE_WAY),
    ),
    honoured("device", TEXT, "cpu, cuda or cuda:N; auto is cuda where there is one."),
    honoured(
        "deterministic",
        BOOLEAN,
        "On cuda: a sequence's tokens do not depend on its batch, which failover with the same tokens needs.",
    ),
    honoured(
        "attn_backend",
        choice("auto", "triton", "flashinfer", spellings=_OTHER_ATTENTION),
        "Who computes decode attention on cuda. auto is triton, our kernel, until a run of `make gpu` shows that the "
        "other is faster. flashinfer is used if it is installed and deterministic is false, for float16 and bfloat16 "
        "pools with heads of 64, 128 or 256; the log says why not, and triton does the rest.",
    ),
    honoured(
        "use_cuda_graph", BOOLEAN, "Capture decode steps into CUDA graphs.", target="cuda_graph_config.is_enabled"
    ),
    honoured("cuda_graph_config.batch_sizes", COUNTS, "Sizes that are captured; left out: 1, 2, 4, 8, 16 and so on."),
    honoured("cuda_graph_config.max_batch_size", AT_LEAST_1, "Largest size captured; left out: max_batch_size."),
    honoured(
        "cuda_graph_config.enable_padding", BOOLEAN, "Fill a batch up to the next captured size with dummy requests."
    ),
    honoured(
        "model_impl",
        choice("auto", "native", "transformers"),
        "transformers: any causal model of the transformers library, computed by its code over paged attention; "
        "docs/models.md has the families of the others.",
    ),
    honoured("load_format", choice("auto", "dummy"), "dummy: random weights of the model's shape, for speed work."),
    honoured("max_batch_size", AT_LEAST_1, "Sequences computed in one step."),
    honoured(
        "max_num_tokens", AT_LEAST_1, "Tokens computed in one step; a longer prompt is prefilled in chunks of it."
    ),
    honoured("max_seq_len", AT_LEAST_1, "Prompt and generated tokens together; left out: the model's own limit."),
    honoured(
        "guided_decoding_backend",
        choice("auto", "xgrammar", "llguidance", spellings={"guidance": "llguidance"}),
        "Library that follows grammars, for structured output. auto is llguidance; xgrammar has to be installed, and "
        "gives what it cannot follow to llguidance. Loaded when the server starts.",
    ),
    honoured("num_threads", AT_LEAST_1, "CPU threads of the engine; left out: the launcher deals the cores out."),
    honoured("cpu_affinity", CORES, "Cores the server is pinned to; left out: the launcher deals the cores out."),
    honoured("kv_cache_config.enable_block_reuse", BOOLEAN, "Keep finished blocks for prompts that begin the same."),
    honoured(
        "kv_cache_config.max_tokens",
        AT_LEAST_1,
        "Size of the KV pool in tokens, rounded up to blocks. Of this, the fraction and the bytes the smallest counts.",
    ),
    honoured(
        "kv_cache_config.max_gpu_total_bytes", AT_LEAST_0, "Size of the KV pool in bytes, on CPU too; 0: no limit."
    ),
    honoured(
        "kv_cache_config.host_cache_size",
        AT_LEAST_0,
        "Bytes of host memory for blocks that the pool evicts: prefixes and preempted sequences come back from there.",
    ),
    honoured(
        "kv_cache_config.event_buffer_max_size",
        AT_LEAST_0,
        "Changes of the prefix cache kept for each who follows them (WatchBlocks), who gets everything anew when there "
        "are more; 0: nobody can follow.",
    ),
    honoured(
        "kv_cache_config.free_gpu_memory_fraction",
        FRACTION,
        "KV pool as a part of what is free once the weights are loaded; on CPU, of cpu_memory_budget_bytes.",
    ),
    honoured("kv_cache_config.cpu_memory_budget_bytes", AT_LEAST_1, "What a server on CPU may take for KV."),
    honoured("kv_cache_config.tokens_per_block", AT_LEAST_1, "Block size."),
    honoured(
        "kv_cache_config.dtype",
        _KV_DTYPE,
        "Of KV entries; auto: int8 with int8 weights, else that of the activations. int8 and fp8 have a scale for each "
        "token and head.",
        not_built_values=_NO_SUCH_KV,
    ),
    honoured(
        "cache_transceiver_config.backend",
        choice("DEFAULT", "SHM", "TCP", "UCX", "NIXL", "MPI", "NCCL", "MOONCAKE"),
        "How KV travels. DEFAULT negotiates the best that both ends have; a named one is the only one allowed, and a "
        "server that cannot use it says what is missing.",
        not_built_values={"MOONCAKE": "NIXL or UCX use the same networks"},
    ),
    honoured(
        "cache_transceiver_config.fallback",
        BOOLEAN,
        "Where the named backend cannot be used, take the next best that both ends have, and say so.",
    ),
    honoured(
        "cache_transceiver_config.max_tokens_in_buffer",
        AT_LEAST_0,
        "Tokens that a server which receives has under way at once, of all its transfers together; any value works, "
        "down to one block of one layer at a time. 0, or none: 64 MiB of each transfer.",
    ),
    honoured(
        "cache_transceiver_config.layer_group_bytes",
        AT_LEAST_0,
        "While a chunk of a prompt is computed, its layers are published in groups of so many bytes, or of a third of "
        "the chunk where that is less; 0: the whole chunk when it is computed. On CPU.",
    ),
    honoured(
        "cache_transceiver_config.cuda_ipc",
        BOOLEAN,
        "On cuda: two servers of one host that would use SHM copy blocks from pool to pool on the device; false at "
        "either end: by pinned host memory.",
    ),
    honoured(
        "cache_transceiver_config.pull_back",
        BOOLEAN,
        "Blocks of a prompt's beginning that a generation server holds are brought back from there where that is "
        "quicker than to compute them; docs/delta-transfer.md tells how that is decided.",
    ),
    honoured(
        "cache_transceiver_config.pull_back_patience_ms",
        AT_LEAST_0,
        "How long that may take, or ten times its estimate if that is more, before the prompt is computed after all; "
        "never longer than half of what it was to save.",
    ),
    honoured(
        "cache_transceiver_config.kv_transfer_timeout_ms",
        AT_LEAST_1,
        "A transfer of which so long nothing new is published or read, once something was, has failed.",
    ),
    honoured(
        "cache_transceiver_config.progress_timeout_s",
        number(0.05),
        "A source that answers nothing and moves no byte for so long is lost: crashed, stopped, or cut off.",
    ),
    honoured(
        "cache_transceiver_config.lease_s",
        number(0.1),
        "A context server gives blocks back that nobody has read for so long.",
    ),
)

_NOT_BUILT: Final = (
    not_built("tensor_parallel_size", AT_LEAST_1, _ONE_RANK, harmless=(1,)),
    not_built("pipeline_parallel_size", AT_LEAST_1, _ONE_RANK, harmless=(1,)),
    not_built("context_parallel_size", AT_LEAST_1, _ONE_RANK, harmless=(1,)),
    not_built("moe_expert_parallel_size", AT_LEAST_1, _ONE_RANK, harmless=(1,)),
    not_built("moe_tensor_parallel_size", AT_LEAST_1, _ONE_RANK, harmless=(1,)),
    not_built("moe_cluster_parallel_size", AT_LEAST_1, _ONE_RANK, harmless=(1,)),
    not_built("enable_attention_dp", BOOLEAN, _ONE_RANK, harmless=(False,)),
    not_built("cp_config", ANYTHING, _ONE_RANK, harmless=({},)),
    not_built("pp_partition", ANYTHING, _ONE_RANK),
    not_built("tokenizer", TEXT, "the tokenizer is the model's own"),
    not_built("custom_tokenizer", TEXT, "the tokenizer is the model's own"),
    not_built("revision", TEXT, "models are taken as they lie on disk"),
    not_built("tokenizer_revision", TEXT, "models are taken as they lie on disk"),
    not_built("served_model_name", TEXT, "a model is served under its own name and its basename"),
    not_built("chat_template", TEXT, "the chat template is the model's own"),
    not_built("enable_lora", BOOLEAN, "adapters are not loaded", harmless=(False,)),
    not_built("lora_config", ANYTHING, "adapters are not loaded"),
    not_built("quant_config.exclude_modules", ANYTHING, _QUANTISED_LINEARS, harmless=([],)),
    not_built("sparse_attention_config", ANYTHING, "attention is dense"),
    not_built("kv_connector_config", ANYTHING, "KV is not kept outside the servers"),
    not_built("gather_generation_logits", BOOLEAN, "logits are not returned", harmless=(False,)),
    not_built("env_overrides", ANYTHING, "set the environment of the command itself", harmless=({},)),
    not_built("max_beam_width", AT_LEAST_1, "there is no beam search", harmless=(1,)),
    not_built("max_input_len", AT_LEAST_1, "set max_seq_len, which bounds prompt and output together"),
    not_built("otlp_traces_endpoint", TEXT, "traces are not exported; GET /requests/{id} tells one request's story"),
    not_built("kv_cache_config.max_attention_window", ANYTHING, _ALL_TOKENS),
    not_built("kv_cache_config.sink_token_length", AT_LEAST_0, _ALL_TOKENS, harmless=(0,)),
    not_built("orchestrator_type", choice("rpc", "ray", "mpi"), _ONE_RANK, harmless=("rpc", "mpi")),
    not_built("mm_encoder_only", BOOLEAN, "only text models are served", harmless=(False,)),
)

_REFUSED: Final = (
    refused(
        "backend",
        choice(
            "pytorch", "default", "tensorrt", "_autodeploy", spellings={"trt": "tensorrt", "autodeploy": "_autodeploy"}
        ),
        "there is one engine, called pytorch, and no TensorRT engines are run; leave the key out",
        harmless=("pytorch", "default"),
    ),
    refused(
        "cache_transceiver_config.enable_cache_transceiver",
        BOOLEAN,
        "without KV transfer nothing is disaggregated; leave the key out",
        harmless=(True,),
    ),
    refused("skip_tokenizer_init", BOOLEAN, "text is handled by the orchestrator, which needs it", harmless=(False,)),
    refused("batched_logits_processor", ANYTHING, "code is not loaded from a configuration file"),
    refused("custom_module_dirs", ANYTHING, "code is not loaded from a configuration file"),
    refused("use_kv_cache", BOOLEAN, "without a KV cache there is nothing to hand over", harmless=(True,)),
)


def _without_effect(reason: str, *names: str) -> tuple[Key, ...]:
    return tuple(no_effect(name, ANYTHING, reason) for name in names)


_NO_EFFECT: Final = (
    no_effect(
        "enable_chunked_prefill",
        BOOLEAN,
        "a prompt over max_num_tokens is always prefilled in chunks",
        harmless=(True,),
    ),
    no_effect("trust_remote_code", BOOLEAN, "code of a model's directory is never run", harmless=(False,)),
    no_effect("enable_autotuner", BOOLEAN, "kernels are not tuned at start", harmless=(False,)),
    no_effect("torch_compile_enabled", BOOLEAN, "the model is not compiled", harmless=(False,)),
    no_effect(
        "kv_cache_config.onboard_blocks",
        BOOLEAN,
        "blocks of the host tier are copied back before they are attended to",
        harmless=(True,),
    ),
    no_effect(
        "kv_cache_config.secondary_offload_min_priority",
        ANYTHING,
        "every evicted block goes to the host tier if there is one",
    ),
    no_effect("kv_cache_config.enable_partial_reuse", BOOLEAN, "only whole blocks are reused", harmless=(False,)),
    no_effect("kv_cache_config.copy_on_partial_reuse", BOOLEAN, "only whole blocks are reused", harmless=(False,)),
    no_effect("kv_cache_config.use_uvm", BOOLEAN, "KV stays on its device", harmless=(False,)),
    no_effect("kv_cache_config.disk_cache_size", AT_LEAST_0, "KV stays on its device", harmless=(0,)),
    no_effect("num_postprocess_workers", AT_LEAST_0, "servers handle token ids only, never text", harmless=(0,)),
    no_effect("num_serve_frontends", AT_LEAST_1, "servers handle token ids only, never text", harmless=(1,)),
    *_without_effect("the model is not compiled", "torch_compile_config", "torch_compile_fullgraph"),
    *_without_effect(_EXPERTS, "moe_config", "moe_backend", "enable_layerwise_nvtx_marker", "nvfp4_gemm_config"),
    *_without_effect(_ONE_RANK, "attention_dp_config", "allreduce_strategy", "gpus_per_node", "ray_placement_config"),
    *_without_effect(_ONE_RANK, "ray_worker_extension_cls", "enable_lm_head_tp_in_adp"),
    *_without_effect("the best kernel present is used, and named at start", "sampler_type"),
    *_without_effect("the best kernel present is used, and named at start", "enable_min_latency"),
    *_without_effect("adapters are not loaded", "peft_cache_config"),
    *_without_effect(
        "a step never waits to be filled",
        "batch_wait_timeout_ms",
        "batch_wait_timeout_iters",
        "batch_wait_max_tokens_ratio",
    ),
    *_without_effect("every token is streamed as soon as it is there", "stream_interval"),
    *_without_effect(
        "statistics are always on and cost nothing extra: /metrics and GET /requests/{id}",
        "return_perf_metrics",
        "perf_metrics_max_requests",
        "enable_iter_perf_stats",
        "enable_iter_req_stats",
        "print_iter_log",
        "iter_stats_max_iterations",
        "request_stats_max_iterations",
        "prometheus_metrics_config",
    ),
    *_without_effect("weights are read from safetensors or GGUF", "checkpoint_format", "checkpoint_loader"),
    *_without_effect("weights are quantised as quant_config.quant_algo says", "force_dynamic_quantization"),
    *_without_effect(_ONE_WAY, "quant_config.group_size", "quant_config.smoothquant_val", "quant_config.clamp_val"),
    no_effect("quant_config.use_meta_recipe", BOOLEAN, _ONE_WAY, harmless=(False,)),
    no_effect("quant_config.has_zero_point", BOOLEAN, _ONE_WAY, harmless=(False,)),
    no_effect("quant_config.pre_quant_scale", BOOLEAN, _ONE_WAY, harmless=(False,)),
    *_without_effect(
        "text is handled by the orchestrator", "tokenizer_mode", "postprocess_tokenizer_dir", "media_io_kwargs"
    ),
    *_without_effect("the collector is tuned already", "garbage_collection_gen0_threshold"),
    *_without_effect("a server keeps its weights while it runs", "enable_sleep"),
    *_without_effect(_ALL_TOKENS, "fail_fast_on_attention_window_too_large"),
    *_without_effect("the first token always goes straight to the client", "enable_early_first_token_response"),
    *_without_effect("the sizes come from the other keys", "build_config"),
    *_without_effect(
        "the KV pool has one layout, with whole blocks reused by content",
        "kv_cache_config.attention_dp_events_gather_period_ms",
        "kv_cache_config.cross_kv_cache_fraction",
        "kv_cache_config.mamba_ssm_cache_dtype",
        "kv_cache_config.use_kv_cache_manager_v2",
        "kv_cache_config.max_util_for_resume",
        "kv_cache_config.avg_seq_len",
        "kv_cache_config.block_reuse_policy",
        "kv_cache_config.disk_prefetch_num_reqs",
        "kv_cache_config.enable_kv_pool_rebalance",
        "kv_cache_config.enable_swa_scratch_reuse",
        "kv_cache_config.iteration_stats_interval",
        "kv_cache_config.kv_cache_event_hash_algo",
        "kv_cache_config.pool_ratio",
    ),
    *_without_effect(
        "nothing waits for a sender and nothing is polled: a lease's end is an event (see lease_s, progress_timeout_s)",
        "cache_transceiver_config.kv_transfer_sender_future_timeout_ms",
        "cache_transceiver_config.kv_transfer_poll_interval_ms",
    ),
    *_without_effect(
        "the generation server pulls each chunk as soon as it is published, whatever the setting",
        "cache_transceiver_config.transceiver_runtime",
        "cache_transceiver_config.kv_cache_bounce_size_mb",
        "cache_transceiver_config.enable_pipelined_transfer",
    ),
)

_ALIASES: Final = (
    Alias(name="cuda_graph_config.padding_enabled", of="cuda_graph_config.enable_padding"),
    Alias(name="cuda_graph_batch_sizes", of="cuda_graph_config.batch_sizes"),
    Alias(name="cuda_graph_max_batch_size", of="cuda_graph_config.max_batch_size"),
    Alias(name="cuda_graph_padding_enabled", of="cuda_graph_config.enable_padding"),
    Alias(name="tp_size", of="tensor_parallel_size"),
    Alias(name="pp_size", of="pipeline_parallel_size"),
    Alias(name="cp_size", of="context_parallel_size"),
    Alias(name="ep_size", of="moe_expert_parallel_size"),
    Alias(name="expert_parallel_size", of="moe_expert_parallel_size", says="taken as moe_expert_parallel_size"),
    Alias(name="cluster_size", of="moe_cluster_parallel_size"),
    Alias(name="kv_cache_dtype", of="kv_cache_config.dtype"),
    Alias(name="quant_config.kv_cache_quant_algo", of="kv_cache_config.dtype"),
    Alias(name="quantization", of="quant_config.quant_algo"),
    Alias(name="kv_cache_free_gpu_memory_fraction", of="kv_cache_config.free_gpu_memory_fraction", yields=True),
    Alias(name="free_gpu_memory_fraction", of="kv_cache_config.free_gpu_memory_fraction", yields=True),
    Alias(
        name="cache_transceiver_config.max_num_tokens",
        of="cache_transceiver_config.max_tokens_in_buffer",
        says="old name, taken as max_tokens_in_buffer",
    ),
)

SERVER_KEYS: Final = KeyTable(
    [*_HONOURED, *scheduling_keys.KEYS, *_NOT_BUILT, *_REFUSED, *_NO_EFFECT, *SERVER_TEXT_KEYS],
    [*_ALIASES, *scheduling_keys.ALIASES],
)

FLATTENED: Final = "pytorch_backend_config"
"""An old sub-section whose keys now stand directly in the section; they are taken as if they did."""
