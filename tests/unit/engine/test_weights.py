"""Weight files that are not what the config says are refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from disaggregated.engine.ops.reference import ReferenceOps
from disaggregated.engine.weights import (
    DummySource,
    SafetensorsSource,
    build_model,
    expected_shapes,
    num_parameters,
)
from disaggregated.errors import ModelUnavailable
from disaggregated.model_files import ModelConfig
from tests.unit.engine.runners import Driven, make_runner, random_prompt
from tests.unit.engine.tiny_models import FAMILIES, VOCAB_SIZE, write_model


def load(path: Path) -> None:
    with SafetensorsSource(path) as source:
        build_model(
            source,
            ModelConfig.load(path),
            ReferenceOps(),
            device=torch.device("cpu"),
            dtype=torch.float32,
            num_positions=64,
        )


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_model("llama", tmp_path)
    return tmp_path


def rewrite(model: Path, added: Mapping[str, torch.Tensor], *, remove: str = "") -> None:
    tensors = load_file(model / "model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if name != remove}
    save_file({**tensors, **added}, model / "model.safetensors")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_tensors_that_are_expected(family: str, tmp_path: Path) -> None:
    tiny = write_model(family, tmp_path)
    config = ModelConfig.load(tmp_path)
    found = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    assert expected_shapes(config) == found
    corrections = sum(buffer.numel() for name, buffer in tiny.reference.named_buffers() if name.endswith("bias"))
    assert num_parameters(config) == sum(parameter.numel() for parameter in tiny.reference.parameters()) + corrections


def test_a_missing_tensor_is_named(model: Path) -> None:
    rewrite(model, {}, remove="model.layers.1.mlp.up_proj.weight")
    with pytest.raises(ModelUnavailable, match=r"missing model\.layers\.1\.mlp\.up_proj\.weight$"):
        load(model)


def test_an_unexpected_tensor_is_named(model: Path) -> None:
    rewrite(model, {"model.layers.0.mlp.experts.weight": torch.zeros(2)})
    with pytest.raises(ModelUnavailable, match=r"unexpected model\.layers\.0\.mlp\.experts\.weight"):
        load(model)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(model: Path) -> None:
    rewrite(model, {"model.norm.weight": torch.zeros(63)})
    with pytest.raises(ModelUnavailable, match=r"model\.norm\.weight is \(63,\), should be \(64,\)"):
        load(model)


def test_tensors_that_follow_from_the_rest_are_ignored(tmp_path: Path) -> None:
    write_model("llama-tied", tmp_path)
    rewrite(
        tmp_path,
        {"lm_head.weight": torch.zeros(1), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)},
    )
    load(tmp_path)


def test_a_damaged_file_is_named(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"not this")
    with pytest.raises(ModelUnavailable, match=r"model\.safetensors: not a readable safetensors file"):
        load(model)


def test_a_directory_without_weights_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match=r"no \*\.safetensors file"):
        SafetensorsSource(tmp_path)


def test_shards_give_the_same_model_as_one_file(tmp_path: Path) -> None:
    prompt = random_prompt(20, 1, VOCAB_SIZE)
    logits = []
    for name, size in (("one", "1GB"), ("shards", "100KB")):
        write_model("llama", tmp_path / name, max_shard_size=size)
        runner = make_runner(tmp_path / name)
        logits.append(runner.logits([Driven(prompt, [0, 1]).take(20)]))
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert torch.equal(*logits)


def test_a_shard_that_is_not_there_is_named(tmp_path: Path) -> None:
    write_model("llama", tmp_path, max_shard_size="100KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelUnavailable, match=shard.name):
        SafetensorsSource(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}'])
def test_a_damaged_index_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelUnavailable, match="not a safetensors index"):
        SafetensorsSource(tmp_path)


def test_dummy_weights_are_the_same_in_every_process_and_differ_by_name(model: Path) -> None:
    config = ModelConfig.load(model)
    first, second = (DummySource(config, torch.device("cpu")) for _ in range(2))
    name, other = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(first.read(name), second.read(name))
    assert not torch.equal(first.read(name), first.read(other))
    assert first.read("model.norm.weight").eq(1.0).all()


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "mixtral", "qwen3-moe", "deepseek-v2", "deepseek-v3"])
def test_dummy_weights_make_a_model_of_every_family(family: str, tmp_path: Path) -> None:
    write_model(family, tmp_path)
    config, ops, cpu = ModelConfig.load(tmp_path), ReferenceOps(), torch.device("cpu")
    model = build_model(DummySource(config, cpu), config, ops, device=cpu, dtype=torch.float32, num_positions=64)
    logits = model.logits(torch.randn(3, config.hidden_size))
    assert logits.shape == (3, VOCAB_SIZE)
    assert bool(logits.isfinite().all())


def test_a_missing_tensor_of_an_expert_is_named(tmp_path: Path) -> None:
    write_model("qwen3-moe", tmp_path)
    rewrite(tmp_path, {}, remove="model.layers.2.mlp.experts.5.up_proj.weight")
    with pytest.raises(
        ModelUnavailable, match=r"Qwen3MoeForCausalLM: missing model\.layers\.2\.mlp\.experts\.5\.up_proj"
    ):
        load(tmp_path)


def test_deepseeks_layer_that_guesses_ahead_is_passed_over(tmp_path: Path) -> None:
    write_model("deepseek-v3", tmp_path)
    rewrite(tmp_path, {"model.layers.3.eh_proj.weight": torch.zeros(2, 2)})
    load(tmp_path)
    rewrite(tmp_path, {"model.layers.4.eh_proj.weight": torch.zeros(2, 2)})
    with pytest.raises(ModelUnavailable, match=r"unexpected model\.layers\.4\.eh_proj\.weight"):
        load(tmp_path)
