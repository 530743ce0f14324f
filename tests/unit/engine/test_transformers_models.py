"""`model_impl: transformers`: models of that library through the paged pool and the op table, against the library."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from disaggregated.config.server import ServerConfig
from disaggregated.engine.kv_cache import KVCache
from disaggregated.engine.model_loading import load_model, read_model_config
from disaggregated.engine.ops.api import Ops
from disaggregated.engine.ops.native import load as load_native
from disaggregated.engine.ops.reference import ReferenceOps
from disaggregated.engine.ops.torch_attention import WithTorchAttention
from disaggregated.engine.runner import TorchModelRunner
from disaggregated.errors import ConfigError, ModelUnavailable
from disaggregated.kv_layout import KVLayout
from disaggregated.model_files import ModelConfig
from tests.unit.engine.runners import NUM_BLOCKS, Driven, generate, last_logits, random_blocks, random_prompt
from tests.unit.engine.tiny_models import OTHERS, VOCAB_SIZE, TinyModel, write_model

CPU = torch.device("cpu")


def server(path: Path, **changes: Any) -> ServerConfig:
    return ServerConfig(model=str(path), role="context", **{"model_impl": "transformers", **changes})


def runner_of(path: Path, ops: Ops, *, is_dummy: bool = False, **changes: Any) -> TorchModelRunner:
    config = read_model_config(server(path, **changes), path)
    model = load_model(path, config, ops, device=CPU, dtype=torch.float32, num_positions=1024, is_dummy=is_dummy)
    layout = KVLayout(**dataclasses.asdict(config.kv_shape), block_size=16, dtype="float32", num_blocks=NUM_BLOCKS)
    cache = KVCache(layout, device=CPU, allocate=lambda layout: bytearray(b"\xff" * layout.pool_bytes))
    return TorchModelRunner(model, cache, CPU)


@pytest.fixture(scope="module", params=list(OTHERS))
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return write_model(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(params=["torch", "native"])
def ops(request: pytest.FixtureRequest) -> Ops:
    if request.param == "torch":
        return ReferenceOps()
    if (native := load_native(1)) is None:
        pytest.skip("no native kernels on this machine")
    return WithTorchAttention(native)


def test_logits_are_the_librarys_for_any_chunking(tiny: TinyModel, ops: Ops) -> None:
    prompt = random_prompt(260, 1, VOCAB_SIZE)
    runner = runner_of(tiny.path, ops)
    whole, *others = (last_logits(runner, prompt, sizes, seed) for seed, sizes in enumerate(([400], [64], [1, 100, 7])))
    torch.testing.assert_close(whole, tiny.logits(prompt)[-1], rtol=1e-4, atol=1e-4)
    assert all(torch.equal(other, whole) for other in others), "chunking changed bits"


def test_greedy_tokens_are_the_librarys_alone_and_in_a_batch(tiny: TinyModel, ops: Ops) -> None:
    prompts = [random_prompt(length, length, VOCAB_SIZE) for length in (1, 17, 130)]
    expected = [tiny.greedy(prompt, 8) for prompt in prompts]
    runner = runner_of(tiny.path, ops)
    blocks = random_blocks(30, 0)
    together = [Driven(list(prompt), [blocks.pop() for _ in range(10)]) for prompt in prompts]
    assert generate(runner, together, 8, [1, 5, 64]) == expected
    for prompt, tokens in zip(prompts, expected, strict=True):
        assert generate(runner, [Driven(list(prompt), random_blocks(10, 7))], 8, [512]) == [tokens]


def test_a_native_family_can_be_left_to_the_library_too(tmp_path: Path) -> None:
    tiny, prompt = write_model("gemma2", tmp_path), random_prompt(150, 1, VOCAB_SIZE)
    logits = last_logits(runner_of(tmp_path, ReferenceOps()), prompt, [64], 1)
    torch.testing.assert_close(logits, tiny.logits(prompt)[-1], rtol=1e-4, atol=1e-4)


def test_dummy_weights_are_the_same_in_every_process(tmp_path: Path) -> None:
    write_model("phi3", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    first, second = (runner_of(tmp_path, ReferenceOps(), is_dummy=True) for _ in range(2))
    prompt = random_prompt(20, 1, VOCAB_SIZE)
    assert torch.equal(*(last_logits(runner, prompt, [20], 1) for runner in (first, second)))


def test_the_config_tells_the_pools_shape_and_the_number_of_parameters(tiny: TinyModel) -> None:
    config = read_model_config(server(tiny.path), tiny.path)
    assert (config.vocab_size, config.num_layers, config.num_heads) == (VOCAB_SIZE, 3, 4)
    assert config.transformers is not None
    assert config.transformers.num_parameters == sum(weight.numel() for weight in tiny.reference.parameters())
    assert config.transformers.file == json.loads((tiny.path / "config.json").read_text())


def test_without_the_library_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"pip install 'disaggregated\[transformers\]'"):
        read_model_config(server(tmp_path), tmp_path)


def test_an_unknown_model_is_pointed_to_the_library_and_to_the_families(tmp_path: Path) -> None:
    write_model("phi3", tmp_path)
    for model_impl in ("auto", "native"):
        with pytest.raises(ModelUnavailable, match=r"LlamaForCausalLM, .*model_impl: transformers"):
            read_model_config(server(tmp_path, model_impl=model_impl), tmp_path)


def test_an_unknown_implementation_is_refused() -> None:
    with pytest.raises(ConfigError, match="model_impl: must be one of auto, native, transformers, is 'vllm'"):
        read_model_config(server(Path(), model_impl="vllm"), Path())


SMALL: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (transformers.T5Config(d_model=32, num_layers=2), "only decoders can be served|no causal language model"),
        (transformers.MambaConfig(**SMALL), "layer_types: layers of type|max_position_embeddings"),
        (transformers.Qwen3NextConfig(**SMALL), "layer_types: layers of type linear_attention keep something else"),
        (transformers.Qwen2VLConfig(), "no causal language model|_config: only text models"),
        (transformers.LlamaConfig(**SMALL, quantization_config={"quant_method": "awq"}), "quantised checkpoints"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_paged_attention_cannot_do_is_refused_in_words(tmp_path: Path, config: Any, complaint: str) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelUnavailable, match=complaint):
        read_model_config(server(tmp_path), tmp_path)


def test_a_rope_that_depends_on_the_length_is_served_up_to_where_it_does_not(tmp_path: Path) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    config = transformers.Phi3Config(
        **SMALL,
        max_position_embeddings=256,
        original_max_position_embeddings=64,
        eos_token_id=2,
        pad_token_id=0,
        rope_parameters=rope,
    )
    config.save_pretrained(tmp_path)
    for too_long in (65, None):
        with pytest.raises(ModelUnavailable, match="set max_seq_len to 64 or less"):
            read_model_config(server(tmp_path, max_seq_len=too_long), tmp_path)
    assert read_model_config(server(tmp_path, max_seq_len=64), tmp_path).num_layers == 2


@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        ("Bloom", "BloomForCausalLM does not let its attention be replaced"),
        ("GptOss", "GptOssAttention hands s_aux to its attention"),
        ("DeepseekV2", "layer 0 has keys of .*, and the KV pool has"),
        ("Bert", "BertLMHeadModel|BertSelfAttention looks ahead"),
    ],
)
def test_a_model_whose_attention_is_of_another_kind_is_refused_in_words(
    tmp_path: Path, model: str, complaint: str
) -> None:
    experts = {"num_local_experts": 2, "n_routed_experts": 8, "kv_lora_rank": 16, "q_lora_rank": 16}
    config_class = getattr(transformers, f"{model}Config")
    config = config_class(**SMALL, max_position_embeddings=128, intermediate_size=32, num_key_value_heads=2, **experts)
    config.save_pretrained(tmp_path)

    def load_and_run() -> None:
        runner = runner_of(tmp_path, ReferenceOps(), is_dummy=True, max_seq_len=64)
        last_logits(runner, [5, 6, 7], [3], 1)

    with pytest.raises(ModelUnavailable, match=complaint):
        load_and_run()


def test_servers_with_another_config_do_not_exchange_kv(tiny: TinyModel, tmp_path: Path) -> None:
    config = json.loads((tiny.path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "some_scale": 2.0}))
    ours, theirs = (read_model_config(server(path), path) for path in (tiny.path, tmp_path))
    assert ours != theirs


def test_other_models_are_left_alone(tmp_path: Path) -> None:
    """A native model has nothing of the library in its config."""
    write_model("llama", tmp_path)
    assert ModelConfig.load(tmp_path).transformers is None
