"""Every family on CUDA, through the same runner as on CPU, against transformers."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from disaggregated.config.server import KVCacheConfig, ServerConfig
from disaggregated.engine.load import load_engine
from disaggregated.kv_layout import KVLayout
from tests.unit.engine.runners import Driven, generate, make_runner, random_blocks, random_prompt
from tests.unit.engine.tiny_models import FAMILIES, VOCAB_SIZE, TinyModel, write_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(scope="module", params=list(FAMILIES))
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return write_model(request.param, tmp_path_factory.mktemp(request.param))


def test_float32_logits_and_greedy_tokens_are_those_of_transformers(tiny: TinyModel) -> None:
    prompts = [random_prompt(length, length, VOCAB_SIZE) for length in (1, 17, 140)]
    runner = make_runner(tiny.path, device="cuda")
    logits = runner.logits([Driven(prompts[2], random_blocks(9, 3)).take(512)])[0].cpu()
    torch.testing.assert_close(logits, tiny.logits(prompts[2])[-1], rtol=1e-4, atol=1e-3)
    blocks = random_blocks(30, 0)
    together = [Driven(list(prompt), [blocks.pop() for _ in range(10)]) for prompt in prompts]
    assert generate(runner, together, 12, [1, 5, 64]) == [tiny.greedy(prompt, 12) for prompt in prompts]


def test_bfloat16_is_bitwise_the_same_for_any_chunking(tiny: TinyModel) -> None:
    prompt = random_prompt(150, 1, VOCAB_SIZE)
    runner = make_runner(tiny.path, dtype="bfloat16", device="cuda")
    whole = runner.logits([Driven(prompt, random_blocks(10, 1)).take(512)])[0]
    chunked = Driven(prompt, random_blocks(10, 2))
    for size in (1, 64, 20):
        runner.execute([chunked.take(size)])
    assert torch.equal(runner.logits([chunked.take(512)])[0], whole)


def test_an_engine_loads_on_cuda_by_default_in_bfloat16(tiny: TinyModel) -> None:
    config = ServerConfig(model=str(tiny.path), role="generation", kv_cache_config=KVCacheConfig(max_tokens=1024))

    def allocate(layout: KVLayout) -> bytearray:
        raise AssertionError("the pool of a CUDA engine is CUDA memory")

    loaded = load_engine(config, allocate=allocate)
    assert (loaded.device, loaded.dtype) == ("cuda", "bfloat16")
    quarter = KVCacheConfig(free_gpu_memory_fraction=0.25)
    sized = load_engine(dataclasses.replace(config, kv_cache_config=quarter), allocate=allocate)
    free_bytes, _ = torch.cuda.mem_get_info()
    assert sized.layout.pool_bytes < free_bytes
