"""Speculative decoding on real forward passes: the tokens are those of decoding one by one, in fewer steps."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from disaggregated.engine.api import EngineRequest, RequestKind, TokensSampled
from disaggregated.engine.engine import LLMEngine
from disaggregated.engine.engine_limits import EngineLimits, EngineOptions
from disaggregated.engine.ops.native import load as load_native
from disaggregated.engine.runner import TorchModelRunner, accepted
from disaggregated.engine.speculation import Speculation
from disaggregated.model_files import resolve
from disaggregated.sampling_params import SamplingParams
from tests.unit.engine.runners import make_runner, random_prompt
from tests.unit.engine.tiny_models import VOCAB_SIZE, write_model


def run(
    runner: TorchModelRunner, requests: list[EngineRequest], *, speculation: Speculation | None, num_blocks: int = 40
) -> tuple[Mapping[str, list[int]], LLMEngine]:
    """The tokens of each request, all served together."""
    engine = LLMEngine(
        runner,
        EngineLimits(num_blocks=num_blocks, block_size=16, max_num_tokens=48, max_batch_size=8, max_seq_len=600),
        EngineOptions(speculation=speculation),
        clock=lambda: 0.0,
    )
    tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
    for request in requests:
        engine.submit(request)
    while engine.has_work:
        for event in engine.step():
            if isinstance(event, TokensSampled):
                tokens[event.request_id].extend(event.token_ids)
        engine.check_integrity()
    return tokens, engine


def ngrams() -> Speculation:
    return Speculation(max_draft_len=6, max_matching_ngram_size=4)


def request(name: str, prompt: list[int], sampling: SamplingParams) -> EngineRequest:
    return EngineRequest(request_id=name, kind=RequestKind.FULL, token_ids=prompt, sampling=sampling)


def repetitive_requests(seed: int) -> list[EngineRequest]:
    """Prompts that repeat themselves, so that there are drafts; some greedy, some sampled, some that stop."""
    draw = random.Random(seed)
    requests = []
    for number in range(6):
        motif = random_prompt(draw.randrange(3, 9), 100 * seed + number, VOCAB_SIZE)
        sampling = SamplingParams(
            max_tokens=draw.randrange(20, 60),
            min_tokens=draw.choice([0, 12]),
            temperature=draw.choice([0.0, 0.0, 0.2, 1.0]),
            top_k=draw.choice([0, 3]),
            seed=draw.randrange(100),
            stop_token_ids=frozenset(draw.sample(range(VOCAB_SIZE), 6)),
        )
        requests.append(request(f"r{number}", motif * draw.randrange(3, 9), sampling))
    return requests


@pytest.mark.parametrize("family", ["llama", "qwen2-window"])
def test_tokens_with_drafts_are_those_without_in_batches_with_preemption(family: str, tmp_path: Path) -> None:
    runner = make_runner(write_model(family, tmp_path).path)
    num_accepted = num_preempted = 0
    for seed in range(2):
        requests = repetitive_requests(seed)
        expected, _ = run(runner, requests, speculation=None)
        tokens, engine = run(runner, requests, speculation=ngrams(), num_blocks=12)
        assert tokens == expected
        statistics = engine.statistics()
        assert statistics.draft_tokens_total >= statistics.accepted_draft_tokens_total
        num_accepted += statistics.accepted_draft_tokens_total
        num_preempted += statistics.preemptions_total
    assert num_accepted > 0
    assert num_preempted > 0


@pytest.mark.parametrize("temperature", [0.0, 0.3])
def test_the_bundled_model_says_the_same_in_fewer_steps(temperature: float) -> None:
    if (ops := load_native(1)) is None:
        pytest.skip("no native kernels on this machine")
    path = resolve("smollm2-135m-instruct").path
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    text = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10\n" * 2 + "1, 2, 3,"
    prompt = tokenizer.encode(text, add_special_tokens=False).ids
    sampling = SamplingParams(max_tokens=32, temperature=temperature, seed=5)
    runner = make_runner(path, ops=ops)
    expected, slow = run(runner, [request("list", prompt, sampling)], speculation=None)
    tokens, fast = run(runner, [request("list", prompt, sampling)], speculation=ngrams())
    assert tokens == expected
    assert fast.statistics().step < 0.6 * slow.statistics().step
    assert fast.statistics().accepted_draft_tokens_total > 10


@given(st.lists(st.integers(0, 2), max_size=6), st.data())
def test_drafts_are_accepted_up_to_the_first_that_was_not_sampled_in_its_place(
    drafts: list[int], data: st.DataObject
) -> None:
    sampled = data.draw(st.lists(st.integers(0, 2), min_size=len(drafts) + 1, max_size=len(drafts) + 1))
    rest = iter([*sampled, 99])
    tokens = accepted(drafts, rest)
    assert next(rest) == 99, "a row takes what was sampled for it, whatever became of its drafts"
    assert tokens == sampled[: len(tokens)]
    assert tokens[:-1] == drafts[: len(tokens) - 1]
    assert len(tokens) == len(drafts) + 1 or tokens[-1] != drafts[len(tokens) - 1]
