"""GGUF to Hugging Face layout: transformers loads the result and must find the numbers that went into the GGUF."""

from __future__ import annotations

import concurrent.futures
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import transformers

from disaggregated.errors import ModelUnavailable
from disaggregated.model_files import ModelConfig
from disaggregated.model_files.cache_folder import locked
from disaggregated.model_files.converted import is_converted
from disaggregated.model_files.gguf_convert import convert, undo_rope_permutation
from tests.unit.model_files.gguf_samples import Array, tiny_llama, write_gguf

SHAPE = {
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}
FAMILIES: dict[str, tuple[type[Any], type[Any], gguf.MODEL_ARCH, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, gguf.MODEL_ARCH.LLAMA, {}),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, gguf.MODEL_ARCH.QWEN2, {}),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, gguf.MODEL_ARCH.QWEN3, {"head_dim": 32}),
}


def converted(source: Path, *, weights: bool = True) -> Path:
    target = source.parent / "cache" / "models" / source.stem
    convert(source, target, weights=weights, progress=lambda line: None)
    return target


def llama_cpp_permutation(weights: Array, num_heads: int) -> Array:
    """What llama.cpp's converter does to q and k rows."""
    return (
        weights.reshape(num_heads, 2, weights.shape[0] // num_heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def as_gguf(model: torch.nn.Module, architecture: str, arch: gguf.MODEL_ARCH) -> dict[str, Array]:
    """The model's weights as llama.cpp's converter would write them; names by the gguf package's own table."""
    names = gguf.get_tensor_name_map(arch, SHAPE["num_hidden_layers"])
    tensors = {}
    for name, parameter in model.state_dict().items():
        array = parameter.numpy()
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            array = llama_cpp_permutation(array, 4 if "q_proj" in name else 2)
        tensors[names.get_name(name, try_suffixes=(".weight", ".bias"))] = array
    return tensors


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_converted_model_is_the_model_that_was_written(tmp_path: Path, architecture: str, tied: bool) -> None:
    config_class, model_class, arch, extra = FAMILIES[architecture]
    torch.manual_seed(0)
    original = model_class(config_class(**SHAPE, **extra, tie_word_embeddings=tied))
    for parameter in original.parameters():
        torch.nn.init.normal_(parameter)
    tensors = as_gguf(original, architecture, arch)
    if tied:
        del tensors["output.weight"]
    keys = {f"{architecture}.attention.key_length": extra["head_dim"]} if extra else {}
    source = write_gguf(tmp_path / "tiny.gguf", tensors, architecture=architecture, num_layers=2, keys=keys)

    loaded, problems = model_class.from_pretrained(converted(source), output_loading_info=True)

    assert not any(problems.values()), problems
    theirs, ours = original.state_dict(), loaded.state_dict()
    assert set(theirs) == set(ours)
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    prompt = torch.arange(40)[None]
    assert torch.equal(original.eval()(prompt).logits, loaded.eval()(prompt).logits)


@pytest.mark.parametrize("num_heads", [1, 3, 8])
def test_undoing_the_permutation_gives_the_rows_back(num_heads: int) -> None:
    rows = np.arange(num_heads * 16 * 5).reshape(num_heads * 16, 5)
    assert np.array_equal(undo_rope_permutation(llama_cpp_permutation(rows, num_heads), num_heads), rows)
    assert np.array_equal(undo_rope_permutation(llama_cpp_permutation(rows[:, 0], num_heads), num_heads), rows[:, 0])


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantised_weights_become_the_float32_that_the_gguf_package_reads(tmp_path: Path, kind: str) -> None:
    quantization = gguf.GGMLQuantizationType[kind]
    tensors = tiny_llama()
    target = converted(write_gguf(tmp_path / "tiny.gguf", tensors, quantization=quantization))
    name = "blk.0.ffn_up.weight"
    expected = gguf.quants.dequantize(gguf.quants.quantize(tensors[name], quantization), quantization)
    found = safetensors.numpy.load_file(target / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert found.dtype == np.float32
    assert np.array_equal(found, expected)
    assert ModelConfig.load(target).dtype == "float32"


@pytest.mark.parametrize(("kind", "dtype"), [("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_half_precision_weights_are_kept_bit_by_bit(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    tensors = tiny_llama()
    source = write_gguf(tmp_path / "tiny.gguf", tensors, quantization=gguf.GGMLQuantizationType[kind])
    target = converted(source)
    found = safetensors.torch.load_file(target / "model.safetensors")
    up = found["model.layers.0.mlp.up_proj.weight"]
    assert up.dtype == dtype
    assert torch.equal(up, torch.from_numpy(tensors["blk.0.ffn_up.weight"]).to(dtype))
    assert found["model.norm.weight"].dtype == torch.float32
    assert ModelConfig.load(target).dtype == str(dtype).removeprefix("torch.")


def test_numbers_that_were_rounded_to_float32_are_read_as_they_were_meant(tmp_path: Path) -> None:
    config = ModelConfig.load(converted(write_gguf(tmp_path / "tiny.gguf", tiny_llama()), weights=False))
    assert config.rms_norm_eps == 1e-5
    assert config.rope_theta == 10000.0


def test_linear_rope_scaling_is_carried_over(tmp_path: Path) -> None:
    keys = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    target = converted(write_gguf(tmp_path / "tiny.gguf", tiny_llama(), keys=keys), weights=False)
    assert ModelConfig.load(target).rope_scaling == {"rope_type": "linear", "factor": 4.0}


def llama3_factors(factor: float) -> Array:
    """As transformers computes them: the frequency without scaling over the one with."""
    rope = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = transformers.LlamaConfig(hidden_size=64, num_attention_heads=4, rope_parameters=rope)
    plain = 1.0 / (10000.0 ** (torch.arange(0, 16, 2).float() / 16))
    scaled, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    factors: Array = (plain / scaled).numpy()
    return factors


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3_rope_scaling_is_recognised_by_its_factors(tmp_path: Path, factor: float) -> None:
    tensors = {**tiny_llama(), "rope_freqs.weight": llama3_factors(factor)}
    target = converted(write_gguf(tmp_path / "tiny.gguf", tensors))
    scaling = ModelConfig.load(target).rope_scaling
    assert scaling is not None
    assert (scaling["rope_type"], scaling["factor"]) == ("llama3", factor)
    assert "rope_freqs" not in str(safetensors.numpy.load_file(target / "model.safetensors").keys())


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"architecture": "gemma3"}, "architecture 'gemma3' cannot be served; llama, mistral, qwen2, qwen3 can"),
    ({"keys": {"split.count": 3}}, "llama-gguf-split --merge"),
    ({"keys": {"llama.expert_count": 8}}, "mixture-of-experts"),
    ({"keys": {"llama.rope.scaling.type": "yarn"}}, "rope.scaling.type 'yarn'"),
    ({"cut": "deepseek-llm"}, "tokenizer.ggml.pre is 'deepseek-llm'"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_cannot_be_served_is_refused_in_words(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    source = write_gguf(tmp_path / "tiny.gguf", tiny_llama(), **arguments)
    with pytest.raises(ModelUnavailable, match=message.split(";", maxsplit=1)[0]):
        converted(source)
    assert not list((tmp_path / "cache" / "models").glob("tiny*/"))


def test_rope_factors_of_another_model_are_refused(tmp_path: Path) -> None:
    tensors = {**tiny_llama(), "rope_freqs.weight": np.linspace(1, 9, 8, dtype=np.float32)}
    with pytest.raises(ModelUnavailable, match="not Llama 3's"):
        converted(write_gguf(tmp_path / "tiny.gguf", tensors), weights=False)


def test_an_unknown_tensor_is_named(tmp_path: Path) -> None:
    tensors = {**tiny_llama(), "blk.0.attn_sinks.weight": np.zeros(4, np.float32)}
    with pytest.raises(ModelUnavailable, match=r"blk\.0\.attn_sinks\.weight"):
        converted(write_gguf(tmp_path / "tiny.gguf", tensors))


def test_a_quantisation_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    integers = {**tiny_llama(), "blk.0.ffn_up.weight": np.zeros((96, 64), np.int32)}
    with pytest.raises(ModelUnavailable, match=r"tensor blk\.0\.ffn_up\.weight has quantisation 26"):
        converted(write_gguf(tmp_path / "tiny.gguf", integers))
    assert not list((tmp_path / "cache" / "models" / "tiny").glob("*.safetensors*"))


def test_the_tokenizer_is_made_without_the_weights_and_they_are_added_later(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "tiny.gguf", tiny_llama())
    target = converted(source, weights=False)
    assert sorted(path.name for path in target.iterdir()) == [
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    config_written = (target / "config.json").stat().st_mtime_ns
    assert converted(source) == target
    assert is_converted(target, weights=True)
    assert (target / "config.json").stat().st_mtime_ns == config_written


def test_many_starters_convert_once(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "tiny.gguf", tiny_llama())
    target = tmp_path / "cache" / "tiny"
    lines: list[str] = []
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        for future in [threads.submit(convert, source, target, weights=True, progress=lines.append) for _ in range(8)]:
            future.result()
    assert [line for line in lines if line.startswith("converting")] == ["converting the weights of tiny.gguf"]
    assert sorted(path.name for path in target.parent.iterdir()) == ["tiny", "tiny.lock", "tiny.weights.lock"]
    assert is_converted(target, weights=True)


def test_who_needs_only_the_tokenizer_does_not_wait_for_the_weights(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "tiny.gguf", tiny_llama())
    target = tmp_path / "cache" / "tiny"
    with locked(target.with_name("tiny.weights.lock"), lambda line: None):  # As a process in the midst of it has.
        convert(source, target, weights=False, progress=lambda line: None)
    assert is_converted(target, weights=False)


@pytest.mark.parametrize("damage", ["cut", "gone", "not ours"])
def test_damaged_weights_are_converted_again(tmp_path: Path, damage: str) -> None:
    source = write_gguf(tmp_path / "tiny.gguf", tiny_llama())
    file = converted(source) / "model.safetensors"
    whole = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(whole[:-1] if damage == "cut" else b"\0" * len(whole))
    converted(source)
    assert file.read_bytes() == whole


def test_the_remains_of_a_killed_conversion_are_cleared_away(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "tiny.gguf", tiny_llama())
    remains = tmp_path / "cache" / "models" / "tiny.partial"
    remains.mkdir(parents=True)
    (remains / "config.json").write_text("{")
    target = converted(source)
    assert is_converted(target, weights=True)
    assert not remains.exists()


def test_end_of_turn_ends_a_reply_as_well_as_end_of_text(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "tiny.gguf", tiny_llama(), keys={"tokenizer.ggml.eot_token_id": 263})
    target = converted(source, weights=False)
    assert ModelConfig.load(target).eos_token_ids == (1, 263)
    assert json.loads((target / "generation_config.json").read_text())["eos_token_id"] == [1, 263]
