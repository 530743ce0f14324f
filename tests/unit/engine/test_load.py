"""From a ServerConfig to an engine that answers: sizes, refusals, fingerprints."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from disaggregated.config.server import KVCacheConfig, ServerConfig
from disaggregated.engine import load as load_module
from disaggregated.engine.api import EngineRequest, RequestKind, TokensSampled
from disaggregated.engine.fingerprint import NUMERICS_VERSION, numerics_of
from disaggregated.engine.load import LoadedEngine, load_engine
from disaggregated.engine.ops import native
from disaggregated.engine.ops.select import select
from disaggregated.engine.precision import Precision, precision_of
from disaggregated.engine.weight_memory import is_stored_in_half, weight_bytes
from disaggregated.engine.weights import num_parameters
from disaggregated.errors import ConfigError, ModelUnavailable, NotEnoughMemory
from disaggregated.kv_layout import KVLayout
from disaggregated.model_files import ModelConfig, ModelFiles
from disaggregated.sampling_params import SamplingParams
from tests.unit.engine.runners import random_prompt
from tests.unit.engine.tiny_models import VOCAB_SIZE, TinyModel, write_model

CPU = torch.device("cpu")
SMALL_POOL = KVCacheConfig(max_tokens=600, tokens_per_block=16)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return write_model("llama-tied", tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def _torch_ops(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("DISAGG_OPS", "torch")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def allocate(layout: KVLayout) -> bytearray:
    return bytearray(layout.pool_bytes)


def server(tiny: TinyModel, **changes: object) -> ServerConfig:
    config = ServerConfig(
        model=str(tiny.path), role="generation", device="cpu", max_num_tokens=64, kv_cache_config=SMALL_POOL
    )
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def run(loaded: LoadedEngine, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    tokens: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        tokens[str(i)] = []
        loaded.engine.submit(
            EngineRequest(
                request_id=str(i),
                kind=RequestKind.FULL,
                token_ids=prompt,
                sampling=SamplingParams(max_tokens=num_tokens),
            )
        )
    while loaded.engine.has_work:
        for event in loaded.engine.step():
            if isinstance(event, TokensSampled):
                tokens[event.request_id] += event.token_ids
        loaded.engine.check_integrity()
    return list(tokens.values())


def test_a_loaded_engine_answers_as_transformers_does(tiny: TinyModel) -> None:
    loaded = load_engine(server(tiny), allocate=allocate)
    prompts = [random_prompt(length, length, VOCAB_SIZE) for length in (3, 100, 20)]
    assert run(loaded, prompts, 10) == [tiny.greedy(prompt, 10) for prompt in prompts]


def test_what_was_loaded_is_described(tiny: TinyModel) -> None:
    loaded = load_engine(server(tiny, max_seq_len=300), allocate=allocate)
    assert (loaded.device, loaded.dtype, loaded.ops_name) == ("cpu", "float32", "torch")
    assert loaded.max_seq_len == 300
    assert loaded.config.vocab_size == VOCAB_SIZE
    assert loaded.num_parameters == sum(parameter.numel() for parameter in tiny.reference.parameters())


def test_max_tokens_sizes_the_pool_in_whole_blocks(tiny: TinyModel) -> None:
    given: list[KVLayout] = []

    def remember(layout: KVLayout) -> bytearray:
        given.append(layout)
        return allocate(layout)

    loaded = load_engine(server(tiny), allocate=remember)
    assert given == [loaded.layout]
    assert loaded.layout == KVLayout(
        num_layers=3, num_kv_heads=2, head_dim=16, block_size=16, dtype="float32", num_blocks=38
    )


def test_without_max_tokens_a_fraction_of_the_budget_is_taken(tiny: TinyModel) -> None:
    pool = KVCacheConfig(cpu_memory_budget_bytes=10 << 20, free_gpu_memory_fraction=0.5, tokens_per_block=32)
    layout = load_engine(server(tiny, kv_cache_config=pool), allocate=allocate).layout
    assert layout.pool_bytes <= 5 << 20 < layout.pool_bytes + layout.block_bytes * layout.num_layers


def test_a_pool_without_room_for_one_block_is_refused_with_the_numbers(tiny: TinyModel) -> None:
    pool = KVCacheConfig(cpu_memory_budget_bytes=10_000)
    with pytest.raises(NotEnoughMemory, match=r"0\.90 x 10,000 bytes .* / 24,576 bytes a block .* = 0 blocks"):
        load_engine(server(tiny, kv_cache_config=pool), allocate=allocate)


def test_evicted_blocks_and_preempted_sequences_come_back_from_the_host_tier_and_change_no_token(
    tiny: TinyModel,
) -> None:
    """A pool for one sequence and a half, and two of them at once, again and again."""
    prompts = [random_prompt(60, seed, VOCAB_SIZE) for seed in range(2)]
    small = KVCacheConfig(max_tokens=144, tokens_per_block=16, host_cache_size=1 << 20)
    loaded = load_engine(server(tiny, kv_cache_config=small), allocate=allocate)
    for _ in range(2):
        assert run(loaded, prompts, 30) == [tiny.greedy(prompt, 30) for prompt in prompts]
    statistics = loaded.engine.statistics()
    assert statistics.swapped_sequences_total > 0
    assert statistics.offloaded_blocks_total > 0
    assert statistics.onboarded_blocks_total > 0
    assert statistics.num_host_slots == (1 << 20) // (768 * 16)
    assert statistics.num_host_slots_claimed == 0


def test_weights_that_do_not_fit_are_refused_before_they_are_read(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_module, "available_bytes", lambda device: 1 << 10)
    with pytest.raises(NotEnoughMemory, match="the weights, 0 million parameters in float32, take"):
        load_engine(server(tiny), allocate=allocate)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "int3"}, "dtype: must be auto, float32 or bfloat16 on cpu, is 'int3'"),
        ({"quantization": "fp8"}, "quant_config.quant_algo: must be none or int8 on cpu, is 'fp8'"),
        ({"device": "abacus"}, "device: must be auto, cpu, cuda or cuda:N, is 'abacus'"),
        ({"device": "cuda:99"}, "device: cuda:99 is not there"),
        ({"load_format": "pickle"}, "load_format: must be auto or dummy, is 'pickle'"),
        ({"max_seq_len": 1025}, "max_seq_len: must be 1 to 1024, the model's limit, is 1025"),
        ({"kv_cache_config": KVCacheConfig(dtype="fp4")}, "kv_cache_config.dtype: must be auto, float32, bfloat16, fl"),
    ],
)
def test_a_value_that_cannot_be_had_is_named(tiny: TinyModel, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_engine(server(tiny, **changes), allocate=allocate)


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    tiny = write_model("llama", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(ModelUnavailable, match=r"model\.safetensors"):
        load_engine(server(tiny), allocate=allocate)


def test_dummy_weights_need_no_weight_files(tmp_path: Path) -> None:
    tiny = write_model("qwen3", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    first, second = (load_engine(server(tiny, load_format="dummy"), allocate=allocate) for _ in range(2))
    prompts = [random_prompt(30, 1, VOCAB_SIZE)]
    assert run(first, prompts, 5) == run(second, prompts, 5)
    assert first.fingerprint == second.fingerprint


def test_bfloat16_loads_and_answers(tiny: TinyModel) -> None:
    loaded = load_engine(server(tiny, dtype="bfloat16"), allocate=allocate)
    assert loaded.layout.dtype == "bfloat16"
    assert len(run(loaded, [random_prompt(30, 1, VOCAB_SIZE)], 5)[0]) == 5


@pytest.mark.parametrize("kv_dtype", ["auto", "float32", "bfloat16", "float16", "int8", "fp8"])
def test_every_kv_dtype_loads_and_answers_nearly_alike(tiny: TinyModel, kv_dtype: str) -> None:
    pool = dataclasses.replace(SMALL_POOL, dtype=kv_dtype)
    loaded = load_engine(server(tiny, kv_cache_config=pool), allocate=allocate)
    assert loaded.layout.dtype == {"auto": "float32", "fp8": "float8_e4m3fn"}.get(kv_dtype, kv_dtype)
    prompts = [random_prompt(length, length, VOCAB_SIZE) for length in (3, 100, 20)]
    same = [
        ours[0] == theirs[0]
        for ours, theirs in zip(run(loaded, prompts, 2), (tiny.greedy(prompt, 2) for prompt in prompts), strict=True)
    ]
    assert sum(same) >= 2, f"first tokens differ from transformers': {same}"


def test_int8_loads_answers_and_holds_little_memory(tiny: TinyModel) -> None:
    loaded = load_engine(server(tiny, dtype="int8"), allocate=allocate)
    assert (loaded.dtype, loaded.ops_name, loaded.layout.dtype) == ("int8", "torch-int8", "int8")
    prompts = [random_prompt(length, length, VOCAB_SIZE) for length in (3, 100, 20)]
    together = run(loaded, prompts, 10)
    assert together == [run(loaded, [prompt], 10)[0] for prompt in prompts]
    named_in_full = load_engine(server(tiny, dtype="float32", quantization="int8"), allocate=allocate)
    assert named_in_full.fingerprint == loaded.fingerprint


@pytest.mark.parametrize(("family", "name"), [("llama-tied", "int8"), ("llama", "int8"), ("llama", "float32")])
def test_the_weights_take_what_was_reckoned(tmp_path: Path, family: str, name: str) -> None:
    tiny = write_model(family, tmp_path)
    config = server(tiny, dtype=name)
    loaded = load_engine(config, allocate=allocate)
    reckoned = weight_bytes(loaded.config, precision_of(config, torch.device("cpu")))
    held = sum({t.untyped_storage().data_ptr(): t.nbytes for t in tensors_of(loaded.runner)}.values())
    assert reckoned <= held <= reckoned * 1.2


@pytest.mark.skipif(native.load(1) is None, reason="no native kernels on this machine")
def test_a_checkpoint_in_bfloat16_takes_half_the_memory_of_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its linears do, to the same tokens; so it is not refused for want of memory that it does not need."""
    monkeypatch.setenv("DISAGG_OPS", "native")
    tiny = write_model("llama-tied", tmp_path)
    for path in tmp_path.glob("*.safetensors"):
        save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)
    config = server(tiny, dtype="float32")
    loaded = load_engine(config, allocate=allocate)
    assert set(loaded.linear_bytes) == {"bfloat16", "float32"}  # The depth of 176, here alone, is no number of groups.
    reckoned = weight_bytes(loaded.config, precision_of(config, CPU), is_half=True)
    table_bytes = 4 * loaded.config.vocab_size * loaded.config.hidden_size
    assert reckoned == 2 * loaded.num_parameters + table_bytes
    monkeypatch.setenv("DISAGG_DENSE_WEIGHTS", "1")
    dense = load_engine(config, allocate=allocate)
    assert set(dense.linear_bytes) == {"float32"}
    assert sum(loaded.linear_bytes.values()) < 0.8 * sum(dense.linear_bytes.values())
    assert dense.fingerprint == loaded.fingerprint
    prompts = [random_prompt(40, 1, VOCAB_SIZE)]
    assert run(dense, prompts, 12) == run(loaded, prompts, 12)


@pytest.mark.parametrize(("dtype", "is_half"), [(torch.bfloat16, True), (torch.float32, False)])
def test_the_size_of_its_files_tells_how_a_large_checkpoint_is_stored(
    tmp_path: Path, dtype: torch.dtype, is_half: bool
) -> None:
    config = dataclasses.replace(ModelConfig.load(write_model("llama-tied", tmp_path / "tiny").path), vocab_size=40_000)
    files = ModelFiles(name="m", path=tmp_path, weights=True)
    save_file({"w": torch.zeros(num_parameters(config), dtype=dtype)}, tmp_path / "model.safetensors")
    assert is_stored_in_half(files, config) is is_half


def tensors_of(root: object) -> Iterator[torch.Tensor]:
    """Every weight that the model of an engine's runner holds."""
    pending = [root._model._weights]  # type: ignore[attr-defined]
    while pending:
        item = pending.pop()
        if isinstance(item, torch.Tensor):
            yield item
        elif dataclasses.is_dataclass(item):
            pending += [getattr(item, field.name) for field in dataclasses.fields(item) if "PD" not in field.name]
        elif isinstance(item, list | tuple):
            pending += item


def fingerprint_of(model: TinyModel, **changes: Any) -> str:
    return load_engine(server(model, **changes), allocate=allocate).fingerprint


def test_a_fingerprint_says_what_kv_means_and_not_how_it_is_stored(tiny: TinyModel) -> None:
    meaning = fingerprint_of(tiny)
    assert fingerprint_of(tiny, max_batch_size=8) == meaning
    for changes in ({"dtype": "int8"}, {"dtype": "bfloat16"}, {"tokens_per_block": 8}):
        assert fingerprint_of(tiny, kv_cache_config=dataclasses.replace(SMALL_POOL, **changes)) == meaning


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_fingerprint_tells_the_dtype_of_compute(tiny: TinyModel, dtype: str) -> None:
    assert fingerprint_of(tiny, dtype=dtype, kv_cache_config=dataclasses.replace(SMALL_POOL, dtype="float32")) != (
        fingerprint_of(tiny, kv_cache_config=dataclasses.replace(SMALL_POOL, dtype="float32"))
    )


def _retrain(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"] *= 1.01
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _rewrite(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _rewrite_rope(folder: Path, **changes: object) -> None:
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    _rewrite(folder, rope_parameters={**rope, **changes})


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(_retrain, id="weights, as of another revision"),
        pytest.param(lambda folder: _rewrite_rope(folder, rope_theta=5000.0), id="rope"),
        pytest.param(lambda folder: _rewrite_rope(folder, rope_type="linear", factor=2.0), id="rope scaling"),
        pytest.param(lambda folder: _rewrite(folder, rms_norm_eps=1e-3), id="epsilon"),
        pytest.param(lambda folder: (folder / "tokenizer.json").write_text("{}"), id="tokenizer"),
    ],
)
def test_a_fingerprint_tells_models_apart_by(change: Callable[[Path], object], tiny: TinyModel, tmp_path: Path) -> None:
    copy = write_model("llama-tied", tmp_path)
    before = fingerprint_of(copy)
    assert before == fingerprint_of(tiny)
    change(tmp_path)
    assert fingerprint_of(copy) != before


def test_versions_of_the_kernels_refuse_each_others_kv(tiny: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint_of(tiny)
    monkeypatch.setattr("disaggregated.engine.load.NUMERICS_VERSION", NUMERICS_VERSION + 1)
    assert fingerprint_of(tiny) != before


def test_native_tables_that_give_the_same_bits_have_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert numerics_of("native-avx512vnni") == numerics_of("native-avx2") == "native-fma"
    assert numerics_of("native-int8-avx512") == numerics_of("native-int8-avx2vnni") == "native-int8-fma"
    assert numerics_of("native-baseline") == "native-baseline"
    assert numerics_of("torch") == "torch"
    assert numerics_of("native-avx2+torch-attention") == "native-avx2+torch-attention"
    assert numerics_of("torch-int8") == "torch-int8"
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert numerics_of("native-baseline") == "native-fma"


def precision(dtype: str = "auto", kv_dtype: str = "auto") -> Precision:
    kv = KVCacheConfig(dtype=kv_dtype)
    return precision_of(ServerConfig(model="m", role="context", dtype=dtype, kv_cache_config=kv), CPU)


def test_the_environment_chooses_the_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISAGG_OPS", "fast")
    with pytest.raises(ConfigError, match="DISAGG_OPS: must be torch or native, is 'fast'"):
        select(CPU, precision(), head_dim=64, num_threads=1)
    monkeypatch.setenv("DISAGG_OPS", "torch")
    assert select(CPU, precision(), head_dim=64, num_threads=1).name == "torch"
    assert select(CPU, precision("int8"), head_dim=64, num_threads=1).name == "torch-int8"
    monkeypatch.setenv("DISAGG_OPS", "native")
    with pytest.raises(ConfigError, match="not in bfloat16"):
        select(CPU, precision("bfloat16"), head_dim=64, num_threads=1)


def test_attention_that_native_kernels_do_not_know_is_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISAGG_OPS", "native")
    whole = select(CPU, precision(), head_dim=64, num_threads=1)
    assert whole.name.startswith("native-")
    assert "torch" not in whole.name
    for wanted, head_dim, num_planes in (
        (precision(), 24, 2),
        (precision(), 64, 1),
        (precision(kv_dtype="fp8"), 64, 2),
    ):
        mixed = select(CPU, wanted, head_dim=head_dim, num_planes=num_planes, num_threads=1)
        assert mixed.name == f"native+torch-attention-{whole.name.removeprefix('native-')}"
        assert numerics_of(mixed.name) != numerics_of(whole.name)


def test_without_a_native_library_the_reference_steps_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISAGG_OPS")
    monkeypatch.setattr(native, "load", lambda num_threads, *, quantization: None)
    for dtype, name in (("float32", "torch"), ("bfloat16", "torch"), ("int8", "torch-int8")):
        assert select(CPU, precision(dtype), head_dim=64, num_threads=1).name == name
    monkeypatch.setenv("DISAGG_OPS", "native")
    with pytest.raises(ConfigError, match="the log says why"):
        select(CPU, precision(), head_dim=64, num_threads=1)
