"""Each family against transformers: logits within 1e-4, greedy tokens identical, however the prompt is cut."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from disaggregated.config.server import KVCacheConfig, ServerConfig
from disaggregated.engine.models.rope import rope_tables
from disaggregated.engine.ops.api import Ops
from disaggregated.engine.ops.native import load as load_native
from disaggregated.engine.ops.select import VARIABLE, select
from disaggregated.engine.precision import precision_of
from disaggregated.errors import ModelUnavailable
from disaggregated.model_files import ModelConfig
from disaggregated.sampling_params import SamplingParams
from tests.unit.engine.runners import Driven, generate, last_logits, make_runner, random_blocks, random_prompt
from tests.unit.engine.tiny_models import (
    FAMILIES,
    LLAMA3_SCALING,
    VOCAB_SIZE,
    YARN_SCALING,
    TinyModel,
    write_model,
)

CHUNKINGS: Sequence[Sequence[int]] = ([400], [64], [1, 100, 7], [130, 1])


@pytest.fixture(scope="module", params=list(FAMILIES))
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return write_model(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(params=["torch", "native"])
def ops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tiny: TinyModel) -> Ops:
    """What a server would choose for the model."""
    return ops_for(tiny.path, request.param, monkeypatch)


def ops_for(
    path: Path, wanted: str, monkeypatch: pytest.MonkeyPatch, *, dtype: str = "auto", kv_dtype: str = "auto"
) -> Ops:
    if wanted == "native" and load_native(1) is None:
        pytest.skip("no native kernels on this machine")
    monkeypatch.setenv(VARIABLE, wanted)
    cpu, kv = torch.device("cpu"), ModelConfig.load(path).kv_shape
    config = ServerConfig(model=str(path), role="context", dtype=dtype, kv_cache_config=KVCacheConfig(dtype=kv_dtype))
    precision = precision_of(config, cpu)
    return select(cpu, precision, head_dim=kv.head_dim, num_planes=kv.num_planes, num_threads=1)


def test_logits_are_those_of_transformers_for_any_chunking(tiny: TinyModel, ops: Ops) -> None:
    prompt = random_prompt(300, 1, VOCAB_SIZE)
    expected = tiny.logits(prompt)[-1]
    results = [
        last_logits(make_runner(tiny.path, ops=ops), prompt, sizes, seed) for seed, sizes in enumerate(CHUNKINGS)
    ]
    torch.testing.assert_close(results[0], expected, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(result, results[0]) for result in results), "chunking changed bits"


def test_greedy_tokens_are_those_of_transformers_alone_and_in_a_batch(tiny: TinyModel, ops: Ops) -> None:
    prompts = [random_prompt(length, length, VOCAB_SIZE) for length in (1, 17, 60, 140)]
    expected = [tiny.greedy(prompt, 12) for prompt in prompts]
    runner = make_runner(tiny.path, ops=ops)
    blocks = random_blocks(40, 0)
    together = [Driven(list(prompt), [blocks.pop() for _ in range(10)]) for prompt in prompts]
    assert generate(runner, together, 12, [1, 5, 64, 33]) == expected
    for prompt, tokens in zip(prompts, expected, strict=True):
        assert generate(runner, [Driven(list(prompt), random_blocks(10, 7))], 12, [512]) == [tokens]


def test_bfloat16_runs_close_to_float32_and_batch_invariant(tiny: TinyModel) -> None:
    prompt = random_prompt(100, 1, VOCAB_SIZE)
    runner = make_runner(tiny.path, dtype="bfloat16")
    whole, chunked = (last_logits(runner, prompt, sizes, 1) for sizes in ([100], [7, 50, 1]))
    assert torch.equal(whole, chunked)
    expected = tiny.logits(prompt)[-1]
    assert torch.nn.functional.cosine_similarity(whole.float(), expected, dim=0) > 0.97


@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
@pytest.mark.parametrize("family", ["gemma3", "qwen3-moe", "deepseek-v3"])
def test_quantised_weights_and_kv_stay_close_and_batch_invariant(
    tmp_path: Path, family: str, kv_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = write_model(family, tmp_path)
    ops = ops_for(tmp_path, "native", monkeypatch, dtype="int8", kv_dtype=kv_dtype)
    prompt = random_prompt(140, 1, VOCAB_SIZE)
    runner = make_runner(tmp_path, ops=ops, kv_dtype=kv_dtype)
    whole, chunked = (last_logits(runner, prompt, sizes, 1) for sizes in ([140], [7, 50, 1]))
    assert torch.equal(whole, chunked)
    assert torch.nn.functional.cosine_similarity(whole, tiny.logits(prompt)[-1], dim=0) > 0.9


@pytest.mark.parametrize("wanted", ["torch", "native"])
@pytest.mark.parametrize("family", ["llama-tied", "qwen3-moe", "deepseek-v3"])
def test_a_sampled_sequence_is_the_same_in_any_company(
    tmp_path: Path, family: str, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thirty-two sequences of any length and chunking, seeded sampling: each as when it runs alone."""
    path = write_model(family, tmp_path).path
    runner = make_runner(path, ops=ops_for(path, wanted, monkeypatch))
    rng = random.Random(3)
    prompts = [random_prompt(rng.randint(1, 40), i, VOCAB_SIZE) for i in range(32)]
    blocks = random_blocks(128, 1)
    sampling = [sampling_of(i) for i in range(32)]
    together = [
        Driven(list(prompt), [blocks.pop() for _ in range(4)], own)
        for prompt, own in zip(prompts, sampling, strict=True)
    ]
    tokens = generate(runner, together, 16, [rng.randint(1, 40) for _ in prompts])
    for i in rng.sample(range(32), 12):
        prompt, own = prompts[i], sampling[i]
        alone = Driven(list(prompt), random_blocks(4, i), own)
        assert generate(runner, [alone], 16, [rng.randint(1, 40)]) == [tokens[i]]


def sampling_of(i: int) -> SamplingParams:
    return SamplingParams(max_tokens=1, temperature=(0.0, 0.8, 1.5)[i % 3], top_p=(1.0, 0.9)[i % 2], seed=i)


def test_llama3_scaling_keeps_fast_rotations_and_slows_slow_ones() -> None:
    _, plain = rope_tables(theta=5000.0, scaling=None, head_dim=32, num_positions=2)
    _, scaled = rope_tables(theta=5000.0, scaling=LLAMA3_SCALING, head_dim=32, num_positions=2)
    assert scaled[1, 0] == plain[1, 0]
    torch.testing.assert_close(scaled[1, -1] * 4, plain[1, -1])


@pytest.mark.parametrize(
    "changes",
    [{}, {"mscale": None, "mscale_all_dim": None}, {"beta_fast": 16.0, "beta_slow": 2.0}, {"attention_factor": 1.5}],
    ids=str,
)
def test_yarn_tables_are_those_of_transformers(changes: dict[str, Any]) -> None:
    scaling = {**YARN_SCALING, **changes}
    theirs = transformers.LlamaConfig(head_dim=32, max_position_embeddings=1024, rope_parameters=dict(scaling))
    frequencies, length = ROPE_INIT_FUNCTIONS["yarn"](theirs, torch.device("cpu"))
    cos, sin = rope_tables(theta=10000.0, scaling=scaling, head_dim=32, num_positions=300)
    angles = torch.arange(300).float()[:, None] * frequencies
    torch.testing.assert_close(cos, angles.cos() * length)
    torch.testing.assert_close(sin, angles.sin() * length)


def test_an_unknown_rope_scaling_is_refused_by_name() -> None:
    with pytest.raises(ModelUnavailable, match="'dynamic'"):
        rope_tables(theta=1e4, scaling={"rope_type": "dynamic", "factor": 4.0}, head_dim=32, num_positions=4)
