"""A deployment file: what loads, what it comes to, and the one line that a mistake gets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final, Protocol

import pytest

from disaggregated.config.deployment import DeploymentConfig
from disaggregated.config.load import check_can_start, load_deployment
from disaggregated.config.server import CudaGraphConfig
from disaggregated.config.server_cli import server_config
from disaggregated.errors import ConfigError

FILES: Final = Path(__file__).parent / "files"
CONFIGS: Final = Path(__file__).parents[3] / "configs"


class Load(Protocol):
    def __call__(self, text: str, environ: Mapping[str, str] = ...) -> DeploymentConfig: ...


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def from_text(text: str, environ: Mapping[str, str] = MappingProxyType({})) -> DeploymentConfig:
        path = tmp_path / "disagg-config.yml"
        path.write_text(text)
        return load_deployment(path, environ)

    return from_text


def test_the_superset_of_tensorrt_llm_spellings_loads() -> None:
    config = load_deployment(FILES / "superset.yml", {})
    assert config.model == "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
    assert config.context.urls == ("localhost:8001", "localhost:8002")
    assert config.context.router.type == "load_balancing"
    assert config.context.router.args == {"use_tokens": True}
    assert config.generation.num_instances == 2
    assert (config.max_local_prefill_length, config.perf_metrics_max_requests, config.node_id) == (100, 1000, 7)
    check_can_start(config)  # Its servers run already: what the file says about their ranks is their affair.


def test_the_superset_without_urls_loads_but_does_not_start(tmp_path: Path) -> None:
    path = tmp_path / "superset.yml"
    path.write_text("\n".join(x for x in (FILES / "superset.yml").read_text().splitlines() if "urls:" not in x))
    config = load_deployment(path, {})
    assert config.context.server.max_num_tokens == 3000
    assert config.context.server.kv_cache_config.free_gpu_memory_fraction == 0.2
    assert config.generation.server.kv_cache_config.free_gpu_memory_fraction == 0.25
    assert config.context.server.cache_transceiver_config.backend == "UCX"
    with pytest.raises(ConfigError, match=r"^context_servers\.tensor_parallel_size: 2 is not built yet: "):
        check_can_start(config)


def test_the_shape_with_service_discovery_loads_but_does_not_start() -> None:
    config = load_deployment(FILES / "service_discovery.yml", {})
    assert (config.context.num_instances, config.generation.num_instances) == (2, 2)
    with pytest.raises(ConfigError, match=r"^disagg_cluster\.cluster_uri: .* is not built yet: "):
        check_can_start(config)


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yml")), ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_file_in_configs_loads_and_can_start(path: Path) -> None:
    if path.name in ("context_config.yml", "generation_config.yml"):
        server_config(path.name.removesuffix("_config.yml"), "smollm2-135m-instruct", path)
    else:
        check_can_start(load_deployment(path, {}))


def test_the_commented_file_names_the_defaults(load: Load) -> None:
    commented = load_deployment(CONFIGS / "disagg-config.yml", {})
    default = load("model: smollm2-135m-instruct\n")
    assert commented.context.server == default.context.server
    assert commented.generation.server == default.generation.server
    for name in ("port", "max_retries", "request_timeout_s", "progress_timeout_s", "queue_depth_max", "node_id"):
        assert getattr(commented, name) == getattr(default, name)
    assert commented.notes == ()


def test_a_file_with_only_a_model_is_one_server_of_each_role(load: Load) -> None:
    config = load("model: smollm2-135m-instruct\n")
    assert (config.context.num_instances, config.generation.num_instances) == (1, 1)
    assert (config.context.server.role, config.generation.server.role) == ("context", "generation")
    assert config.context.server.port == 0
    assert config.context.spread_threads
    assert config.notes == ()


def test_servers_with_urls_need_no_model(load: Load) -> None:
    config = load("context_servers: {urls: ['a:1']}\ngeneration_servers: {urls: ['http://b:2/', 'c:3']}\n")
    assert config.model is None
    assert config.generation.urls == ("b:2", "c:3")
    assert config.generation.num_instances == 2


def test_no_context_server_is_a_deployment(load: Load) -> None:
    assert load("model: m\ncontext_servers: {num_instances: 0}\n").context.num_instances == 0


@pytest.mark.parametrize(
    "spelling",
    [
        "cuda_graph_config: None",
        "cuda_graph_config: null",
        "backend: default",
        "backend: DEFAULT",
        'backend: "pytorch"',
        "disable_overlap_scheduler: True",
        "context_servers:",
        "cache_transceiver_config: {enable_cache_transceiver: True}",
        "tensor_parallel_size: 1",
        "max_batch_size: null",
        "env_overrides: {}",
    ],
)
def test_a_key_that_asks_for_what_is_done_anyway_loads_in_silence(load: Load, spelling: str) -> None:
    config = load(f"model: m\n{spelling}\n")
    assert (config.notes, config.not_built) == ((), ())


@pytest.mark.parametrize(
    ("spelling", "note"),
    [
        (
            "cache_transceiver_config: {max_num_tokens: 77}",
            "cache_transceiver_config.max_num_tokens: old name, taken as max_tokens_in_buffer",
        ),
        (
            "pytorch_backend_config: {use_cuda_graph: true, max_batch_size: 8}",
            "pytorch_backend_config: old shape; its keys are taken as if they stood in the section itself",
        ),
        (
            "speculative_config: {decoding_type: NGram, prompt_lookup_num_tokens: 4}",
            "speculative_config.prompt_lookup_num_tokens: old name, taken as max_draft_len",
        ),
        (
            "speculative_config: {decoding_type: Eagle3, speculative_model_dir: /models/draft}",
            "speculative_config.decoding_type: 'Eagle3': drafts come from the text so far, without another model; "
            "NGram is used: the same tokens",
        ),
        (
            "scheduler_config: {capacity_scheduler_policy: GUARANTEED_NO_EVICT}",
            "scheduler_config.capacity_scheduler_policy: no effect: a sequence starts when its prompt has room, and is "
            "preempted and continued when blocks run out",
        ),
        ("expert_parallel_size: 1", "expert_parallel_size: taken as moe_expert_parallel_size"),
        ("enable_chunked_prefill: false", "enable_chunked_prefill: no effect: a prompt over max_num_tokens is always"),
        (
            "generation_servers: {router: {type: kv_cache_aware, tokens_per_block: 32}}",
            "generation_servers.router.tokens_per_block: no effect: blocks are as large as the servers say",
        ),
    ],
)
def test_a_key_without_effect_is_told_in_one_line(load: Load, spelling: str, note: str) -> None:
    config = load(f"model: m\n{spelling}\n")
    assert [line for line in config.notes if line.startswith(note)], config.notes


def test_the_keys_of_an_old_sub_section_count(load: Load) -> None:
    config = load("model: m\npytorch_backend_config: {max_batch_size: 8}\n")
    assert config.context.server.max_batch_size == 8


@pytest.mark.parametrize(
    ("text", "quantization", "kv_dtype"),
    [
        ("quant_config: {quant_algo: FP8, kv_cache_quant_algo: FP8}", "fp8", "fp8"),
        ("quant_config: {quant_algo: W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN}", "int8", "auto"),
        ("quant_config: {quant_algo: NO_QUANT, kv_cache_quant_algo: INT8}", "none", "int8"),
        ("quant_config: {quant_algo: null, kv_cache_quant_algo: NO_QUANT, has_zero_point: false}", "none", "auto"),
        ("quant_config: {quant_algo: INT8}\nkv_cache_config: {dtype: half}", "int8", "float16"),
    ],
)
def test_quantisation_is_asked_for_as_in_tensorrt_llm(load: Load, text: str, quantization: str, kv_dtype: str) -> None:
    config = load(f"model: m\n{text}\n")
    for pool in (config.context, config.generation):
        assert (pool.server.quantization, pool.server.kv_cache_config.dtype) == (quantization, kv_dtype)
    assert (config.notes, config.not_built) == ((), ())


@pytest.mark.parametrize("algorithm", ["W4A16_AWQ", "nvfp4", "FP8_BLOCK_SCALES"])
def test_another_quantisation_loads_but_does_not_start(load: Load, algorithm: str) -> None:
    config = load(f"model: m\nquant_config: {{quant_algo: {algorithm}}}\n")
    message = (
        rf"^quant_config\.quant_algo: '{algorithm.upper()}' is not built yet: weights are quantised to INT8 or FP8"
    )
    with pytest.raises(ConfigError, match=message):
        check_can_start(config)


def test_a_top_level_key_holds_for_both_sections(load: Load) -> None:
    config = load("model: m\nmax_num_tokens: 128\ncontext_servers: {max_num_tokens: 128, max_batch_size: 4}\n")
    assert config.context.server.max_num_tokens == config.generation.server.max_num_tokens == 128
    assert (config.context.server.max_batch_size, config.generation.server.max_batch_size) == (4, 64)


def test_sections_of_keys_are_inherited_key_by_key(load: Load) -> None:
    text = "model: m\nkv_cache_config: {tokens_per_block: 16}\ncontext_servers: {kv_cache_config: {max_tokens: 64}}\n"
    config = load(text)
    assert config.context.server.kv_cache_config.tokens_per_block == 16
    assert config.context.server.kv_cache_config.max_tokens == 64
    assert config.generation.server.kv_cache_config.max_tokens is None


def test_a_flat_memory_fraction_gives_way_to_the_one_in_its_section(load: Load) -> None:
    text = (
        "model: m\nfree_gpu_memory_fraction: 0.25\ncontext_servers: {kv_cache_config: {free_gpu_memory_fraction: 0.2}}"
    )
    config = load(text)
    assert config.context.server.kv_cache_config.free_gpu_memory_fraction == 0.2
    assert config.generation.server.kv_cache_config.free_gpu_memory_fraction == 0.25
    note = (
        "free_gpu_memory_fraction: 0.25 has no effect here: context_servers.kv_cache_config.free_gpu_memory_fraction is"
    )
    assert config.notes[0].startswith(note)


def test_named_threads_are_not_dealt_out(load: Load) -> None:
    config = load("model: m\ncontext_servers: {num_threads: 3}\ngeneration_servers: {cpu_affinity: '0,2-3'}\n")
    assert not config.context.spread_threads
    assert not config.generation.spread_threads
    assert config.generation.server.cpu_affinity == (0, 2, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hostnam: x", "hostnam: unknown key; did you mean hostname?"),
        ("zebra: 1", "zebra: unknown key"),
        ("model: m\nnum_instances: 2", "num_instances: unknown key"),
        (
            "generation_servers: {num_instance: 2}",
            "generation_servers.num_instance: unknown key; did you mean num_instances?",
        ),
        (
            "context_servers: {kv_cache_config: {max_token: 2}}",
            "context_servers.kv_cache_config.max_token: unknown key; did you mean max_tokens?",
        ),
        (
            "context_servers: {tokens_per_block: 2}",
            "context_servers.tokens_per_block: unknown key; did you mean kv_cache_config.tokens_per_block?",
        ),
        ("disagg_cluster: {cluster: x}", "disagg_cluster.cluster: unknown key; did you mean cluster_uri?"),
        ("generation_servers: {num_instances: 0}", "generation_servers.num_instances: must be at least 1, is 0"),
        ("generation_servers: {num_instances: -1}", "generation_servers.num_instances: must be at least 0, is -1"),
        (
            "generation_servers: {num_instances: two}",
            "generation_servers.num_instances: must be a whole number, is 'two'",
        ),
        (
            "generation_servers: {num_instances: true}",
            "generation_servers.num_instances: must be a whole number, is true",
        ),
        ("generation_servers: 3", "generation_servers: must be a section of keys, is 3"),
        ("kv_cache_config: [1]", "kv_cache_config: must be a section of keys, is [1]"),
        ("port: 70000", "port: must be between 0 and 65535, is 70000"),
        ("port: '8000'", "port: must be a whole number, is '8000'"),
        ("request_timeout_s: .inf", "request_timeout_s: must be a number, is inf"),
        ("free_gpu_memory_fraction: 1.5", "free_gpu_memory_fraction: must be between 0 and 1, is 1.5"),
        ("enable_chunked_prefill: maybe", "enable_chunked_prefill: must be true or false, is 'maybe'"),
        ("hostname: ''", "hostname: must not be empty"),
        ("model: [a]", "model: must be text, is ['a']"),
        ("log_level: inf", "log_level: must be debug, info, warning or error, is 'inf'; did you mean info?"),
        ("context_servers: {urls: 'a:1'}", "context_servers.urls: must be a list of host:port, is 'a:1'"),
        (
            "context_servers: {urls: [a]}",
            "context_servers.urls: must be host:port with a port from 1 to 65535, is 'a'",
        ),
        ("context_servers: {urls: ['a:1', 'a:1']}", "context_servers.urls: a:1 is named twice"),
        (
            "context_servers: {num_instances: 2, urls: ['a:1']}",
            "context_servers.num_instances: is 2, but urls names 1",
        ),
        (
            "context_servers: {urls: ['a:1']}\ngeneration_servers: {urls: ['a:1']}",
            "generation_servers.urls: a:1 is also in context_servers.urls: a server has one role; "
            "a generation server does both when context_servers.num_instances is 0",
        ),
        (
            "max_batch_size: 8\ngeneration_servers: {max_batch_size: 16}",
            "generation_servers.max_batch_size: is 16, but max_batch_size is 8; name it in one of the two places",
        ),
        (
            "tp_size: 1\ncontext_servers: {tensor_parallel_size: 2}",
            "context_servers.tensor_parallel_size: is 2, but tp_size is 1; name it in one of the two places",
        ),
        (
            "context_servers: {tensor_parallel_size: 1, tp_size: 2}",
            "context_servers.tp_size: is 2, but context_servers.tensor_parallel_size is 1",
        ),
        (
            "context_servers: {model: a}\ngeneration_servers: {model: b}",
            "generation_servers.model: is 'b', but context_servers.model is 'a'; both must serve one model",
        ),
        (
            "port: 1",
            "model: is missing: servers without urls are started here, and must be told what to load",
        ),
        (
            "model: m\nbackend: tensorrt",
            "backend: 'tensorrt' is refused: there is one engine, called pytorch, and no TensorRT engines are run; "
            "leave the key out",
        ),
        (
            "tool_parser: hermes\ngeneration_servers: {tool_parser: mistral}",
            "generation_servers.tool_parser: is 'mistral', but tool_parser is 'hermes'",
        ),
        (
            "quant_config: {quant_algo: int7}",
            "quant_config.quant_algo: must be NO_QUANT, INT8 (or W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN) or FP8 "
            "(or FP8_PER_CHANNEL_PER_TOKEN), is 'int7'; did you mean int8?",
        ),
        (
            "quant_config: {kv_cache_quant_algo: FP8}\nkv_cache_config: {dtype: int8}",
            "kv_cache_config.dtype: is 'int8', but quant_config.kv_cache_quant_algo is 'fp8'",
        ),
        ("cpu_affinity: '1-'", "cpu_affinity: must be a list of cores such as 0,2-5, is '1-'"),
        ("cpu_affinity: [1, 1]", "cpu_affinity: names a core twice, is [1, 1]"),
    ],
)
def test_a_bad_file_gets_one_line_that_names_the_key(load: Load, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(text)
    assert str(caught.value) == f"disagg-config.yml: {message}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("port: 1\nport: 2\n", "disagg-config.yml:2: port is there twice"),
        ("a: [1\n", "disagg-config.yml:2: expected ',' or ']', but got '<stream end>'"),
        ("port: 1\n---\nport: 2\n", "disagg-config.yml: has 2 YAML documents, and a file is one; split it at ---"),
        ("- 1\n", "disagg-config.yml: must be a section of keys, is list"),
        ("1: 2\n", "disagg-config.yml:1: the key 1 is not text"),
        ("model: !!python/object/apply:os.getcwd []\n", "disagg-config.yml:1: could not determine a constructor"),
    ],
)
def test_what_yaml_would_let_through_is_an_error_with_its_line(load: Load, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(text)
    assert str(caught.value).startswith(message)


def test_a_closing_document_mark_is_no_second_document(load: Load) -> None:
    assert load("---\nmodel: m\n---\n").model == "m"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yml: cannot be read: No such file or directory"):
        load_deployment(tmp_path / "nowhere.yml", {})


def test_the_environment_overrides_a_key_and_says_so(load: Load) -> None:
    environ = {"DISAGG__PORT": "9", "DISAGG__GENERATION_SERVERS__KV_CACHE_CONFIG__TOKENS_PER_BLOCK": "64"}
    config = load("model: m\nport: 8000\n", environ)
    assert (config.port, config.generation.server.kv_cache_config.tokens_per_block) == (9, 64)
    assert config.context.server.kv_cache_config.tokens_per_block == 32
    assert "port: set by DISAGG__PORT" in config.notes


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("DISAGG__PORT", "x", "DISAGG__PORT: port: must be a whole number, is 'x'"),
        ("DISAGG__PROT", "1", "DISAGG__PROT: prot: unknown key; did you mean port?"),
        ("DISAGG__CONTEXT_SERVERS", "1", "DISAGG__CONTEXT_SERVERS: context_servers: must be a section of keys, is 1"),
        ("DISAGG__PORT", "[", "DISAGG__PORT: is not a YAML value: '['"),
    ],
)
def test_a_bad_variable_is_named(load: Load, name: str, value: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load("model: m\n", {name: value})
    assert str(caught.value) == message


def test_variables_of_other_servers_scripts_count_and_yield_to_ours(load: Load) -> None:
    environ = {"VLLM_MODEL": "other", "VLLM_GPU_MEMORY_UTIL": "0.4"}
    config = load("model: m\n", environ)
    assert config.model == "other"
    assert config.context.server.kv_cache_config.free_gpu_memory_fraction == 0.4
    assert load("model: m\n", {**environ, "DISAGG__MODEL": "ours"}).model == "ours"


def test_a_variable_without_effect_is_told(load: Load) -> None:
    config = load("model: m\n", {"TLLM_DISABLE_MPI": "1"})
    assert config.notes[0].startswith("TLLM_DISABLE_MPI: no effect")


@pytest.mark.parametrize("name", ["UCX", "NIXL", "MPI"])
def test_a_variable_that_users_of_tensorrt_llm_set_chooses_the_backend(load: Load, name: str) -> None:
    environ = {f"TRTLLM_USE_{name}_KVCACHE": "1"}
    assert load("model: m\n", environ).context.server.cache_transceiver_config.backend == name
    ours = {**environ, "DISAGG__CACHE_TRANSCEIVER_CONFIG__BACKEND": "TCP"}
    assert load("model: m\n", ours).generation.server.cache_transceiver_config.backend == "TCP"
    assert load("model: m\n", {f"TRTLLM_USE_{name}_KVCACHE": "0"}).notes == ()


def test_a_backend_of_another_system_is_told_with_what_does_its_work_here(load: Load) -> None:
    config = load("model: m\ncache_transceiver_config: {backend: Mooncake}\n")
    assert config.not_built == (
        "cache_transceiver_config.backend: 'MOONCAKE' is not built yet: NIXL or UCX use the same networks",
    )


@pytest.mark.parametrize(
    "text",
    [
        "cuda_graph_config: {batch_sizes: [8, 1, 2], max_batch_size: 8, enable_padding: false}",
        "cuda_graph_config: {batch_sizes: [1, 2, 8], padding_enabled: false}\ncuda_graph_max_batch_size: 8",
        "cuda_graph_batch_sizes: [2, 8, 1]\ncuda_graph_max_batch_size: 8\ncuda_graph_padding_enabled: false",
    ],
)
def test_the_sizes_of_cuda_graphs_are_read_in_every_spelling(load: Load, text: str) -> None:
    graphs = load(f"model: m\n{text}").generation.server.cuda_graph_config
    assert graphs == CudaGraphConfig(batch_sizes=(1, 2, 8), max_batch_size=8, enable_padding=False)


def test_cuda_graphs_can_be_switched_off(load: Load) -> None:
    config = load("model: m\nuse_cuda_graph: false")
    assert config.context.server.cuda_graph_config == CudaGraphConfig(is_enabled=False)
