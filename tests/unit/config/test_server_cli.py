"""A server's command line, in every spelling that users bring."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disaggregated.config.server import CacheTransceiverConfig, KVCacheConfig, ServerConfig
from disaggregated.config.server_cli import server_command, to_arguments


def parse(*arguments: str, role: str = "context") -> ServerConfig:
    seen: list[ServerConfig] = []

    def main(config: ServerConfig) -> int:
        seen.append(config)
        return 0

    with pytest.raises(SystemExit) as ended:
        server_command(role, main)(list(arguments))
    assert ended.value.code == 0
    return seen[0]


def mistake(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    def main(_: ServerConfig) -> int:
        raise AssertionError("it was started")

    with pytest.raises(SystemExit) as ended:
        server_command("context", main)(list(arguments))
    assert ended.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    "flags",
    [
        ["--max_batch_size", "8"],
        ["--max-batch-size", "8"],
        ["--max_batch_size=8"],
        ["--max-batch-size=8"],
        ["--max-batch_size=8"],
    ],
)
def test_hyphens_underscores_and_equals_signs_are_the_same(flags: list[str]) -> None:
    assert parse("m", *flags).max_batch_size == 8


def test_a_switch_in_the_environment_chooses_the_backend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "server.yml"
    file.write_text("cache_transceiver_config:\n  backend: SHM\n")
    monkeypatch.setenv("TRTLLM_USE_MPI_KVCACHE", "1")
    assert parse("m").cache_transceiver_config.backend == "MPI"
    assert parse("m", "--config", str(file)).cache_transceiver_config.backend == "MPI"
    assert parse("m", "--cache-transceiver-config.backend=TCP").cache_transceiver_config.backend == "TCP"
    monkeypatch.setenv("TRTLLM_USE_MPI_KVCACHE", "0")
    assert parse("m").cache_transceiver_config.backend == "DEFAULT"


def test_the_flags_of_a_tensorrt_llm_quick_start_are_taken() -> None:
    config = parse(
        "m", "--host", "localhost", "--port", "8001", "--backend", "pytorch", "--max_num_tokens", "16384",
        "--kv_cache_free_gpu_memory_fraction", "0.15", "--tp_size", "1", "--ep_size=1", "--max_beam_width", "1",
        "--tensor-parallel-size", "1", "--dtype", "fp32", "--enable_chunked_prefill", "--log_level", "verbose",
    )  # fmt: skip
    assert (config.host, config.port, config.max_num_tokens, config.dtype) == ("localhost", 8001, 16384, "float32")
    assert config.kv_cache_config.free_gpu_memory_fraction == 0.15
    assert config.log_level == "debug"


@pytest.mark.parametrize(
    "flags",
    [
        ["--quant_config.quant_algo", "INT8", "--kv_cache_config.dtype", "INT8"],
        ["--quantization", "w8a8_sq_per_channel_per_token_plugin", "--kv_cache_dtype", "int8"],
        ["--quant-config.quant-algo=int8", "--kv-cache-config.dtype=int8"],
    ],
)
def test_quantisation_is_asked_for_by_any_of_its_names(flags: list[str]) -> None:
    config = parse("m", *flags)
    assert (config.dtype, config.quantization, config.kv_cache_config.dtype) == ("auto", "int8", "int8")


def test_a_model_may_be_called_by_a_number() -> None:
    assert parse("1234").model == "1234"


def test_a_flag_wins_over_the_file_and_the_file_over_the_default(tmp_path: Path) -> None:
    path = tmp_path / "context_config.yml"
    path.write_text("max_batch_size: 4\nmax_num_tokens: 64\ncache_transceiver_config: {backend: TCP}\n")
    config = parse("m", "--config", str(path), "--max_batch_size", "8")
    assert (config.max_batch_size, config.max_num_tokens, config.max_seq_len) == (8, 64, None)
    assert config.cache_transceiver_config.backend == "TCP"
    assert parse("m", "--extra_llm_api_options", str(path)).max_batch_size == 4


def test_a_flag_wins_over_another_spelling_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.yml"
    path.write_text("kv_cache_config: {free_gpu_memory_fraction: 0.5}\n")
    config = parse("m", "--config", str(path), "--kv_cache_free_gpu_memory_fraction", "0.2")
    assert config.kv_cache_config.free_gpu_memory_fraction == 0.2


def test_what_has_no_effect_is_told_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    parse("m", "--trust_remote_code")
    captured = capsys.readouterr()
    assert captured.err.startswith("context server: note: --trust_remote_code: no effect: ")
    assert captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["m", "--max_batch_size=0"], "--max_batch_size: must be at least 1, is 0"),
        (["m", "--max-batch-size", "many"], "--max_batch_size: must be a whole number, is 'many'"),
        (["m", "--port", "99999"], "--port: must be between 0 and 65535, is 99999"),
        (["m", "--wire-port", "-1"], "--wire_port: must be between 0 and 65535, is -1"),
        (["m", "--tp_size", "2"], "--tensor_parallel_size: 2 is not built yet: a server has one rank"),
        (["m", "--backend", "trt"], "--backend: 'tensorrt' is refused: there is one engine"),
        (["m", "--disagg_cluster_uri", "http://x"], "--disagg_cluster_uri: 'http://x' is refused: servers do not look"),
        (["m", "--dtype", "nvfp4"], "--dtype: 'nvfp4' is not built yet: weights are quantised to int8 or fp8"),
        (["m", "--quantization", "awq"], "--quant_config.quant_algo: must be NO_QUANT, INT8 (or W8A8_SQ_PER_CHANNEL"),
        (["m", "--max_bach_size", "2"], "No such option '--max-bach-size'"),
        (["m", "--config", "/nowhere.yml"], "/nowhere.yml: cannot be read: No such file or directory"),
        ([], "Missing argument 'MODEL'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert mistake(capsys, *arguments).startswith(f"context server: {message}")


def test_a_mistake_in_the_file_names_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.yml"
    path.write_text("max_batch_sizes: 4\n")
    line = mistake(capsys, "m", "--config", str(path))
    assert line == "context server: c.yml: max_batch_sizes: unknown key; did you mean max_batch_size?"


CONFIGS = st.builds(
    ServerConfig,
    model=st.sampled_from(["m", "org/name"]),
    role=st.just("generation"),
    host=st.sampled_from(["127.0.0.1", "::1"]),
    port=st.integers(0, 65535),
    wire_port=st.integers(0, 65535),
    dtype=st.sampled_from(["auto", "float32", "bfloat16", "int8"]),
    quantization=st.sampled_from(["none", "int8", "fp8"]),
    device=st.sampled_from(["auto", "cuda:1"]),
    load_format=st.sampled_from(["auto", "dummy"]),
    max_batch_size=st.integers(1, 4096),
    max_num_tokens=st.integers(1, 1 << 20),
    max_seq_len=st.none() | st.integers(1, 1 << 20),
    num_threads=st.integers(1, 64),
    cpu_affinity=st.lists(st.integers(0, 255), unique=True, max_size=4).map(tuple),
    log_level=st.sampled_from(["debug", "info"]),
    kv_cache_config=st.builds(
        KVCacheConfig,
        enable_block_reuse=st.booleans(),
        max_tokens=st.none() | st.integers(1, 1 << 30),
        free_gpu_memory_fraction=st.floats(0, 1),
        tokens_per_block=st.integers(1, 128),
        dtype=st.sampled_from(["auto", "float16", "int8", "fp8"]),
    ),
    cache_transceiver_config=st.builds(
        CacheTransceiverConfig,
        backend=st.sampled_from(["DEFAULT", "SHM", "TCP"]),
        max_tokens_in_buffer=st.none() | st.integers(1, 1 << 20),
        lease_s=st.floats(0.1, 1e4),
    ),
)


@given(CONFIGS)
def test_a_configuration_survives_its_command_line(config: ServerConfig) -> None:
    assert parse(*to_arguments(config), role="generation") == config


def test_every_field_of_a_server_has_a_flag() -> None:
    changed = dataclasses.replace(
        ServerConfig(model="m", role="context"),
        kv_cache_config=KVCacheConfig(dtype="float32", cpu_memory_budget_bytes=1),
        cache_transceiver_config=CacheTransceiverConfig(kv_transfer_timeout_ms=1),
    )
    assert parse(*to_arguments(changed)) == changed
