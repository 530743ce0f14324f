"""Requests that ask much of their sampling, on a device that works ahead: the same tokens, and told alike.

The CUDA runner on a CPU, under a real engine.
"""

from __future__ import annotations

from typing import Any, Final

import pytest

from disaggregated.engine.api import EngineRequest, RequestKind, TokensSampled
from disaggregated.engine.cuda.runner import CudaModelRunner
from disaggregated.engine.engine import LLMEngine
from disaggregated.engine.engine_limits import EngineLimits, EngineOptions
from disaggregated.engine.runner import TorchModelRunner
from disaggregated.sampling_params import SamplingParams
from disaggregated.token_logprobs import TokenLogprob
from tests.support.servers import VOCAB_SIZE, random_prompt
from tests.unit.engine.cuda.test_runner import BLOCK_SIZE, NUM_BLOCKS, runner, with_graphs

__all__ = ["runner"]  # A fixture.

ASKED: Final[list[dict[str, Any]]] = [
    {},
    {"repetition_penalty": 1.6, "logprobs": 2},
    {"temperature": 0.9, "presence_penalty": 1.0, "frequency_penalty": 0.5, "logprobs": 0},
    {"temperature": 0.7, "logprobs": 5, "prompt_logprobs": 1},
    {"bad_words": ((3,), (5, 7)), "logit_bias": ((9, 4.0), (11, -100.0)), "min_tokens": 6, "logprobs": 1},
    {"allowed_token_ids": frozenset(range(20, 40)), "temperature": 1.2, "prompt_logprobs": 3},
]
Told = tuple[list[int], list[TokenLogprob], list[TokenLogprob]]


def served(runner: TorchModelRunner, *, overlap: bool, chunk: int) -> list[Told]:
    """What each request was told."""
    engine = LLMEngine(
        runner,
        EngineLimits(
            num_blocks=NUM_BLOCKS,
            block_size=BLOCK_SIZE,
            max_num_tokens=chunk,
            max_batch_size=8,
            max_seq_len=60,
            vocab_size=VOCAB_SIZE,
        ),
        EngineOptions(overlap=overlap),
    )
    told: list[Told] = [([], [], []) for _ in ASKED]
    for number, asked in enumerate(ASKED):
        sampling = SamplingParams(max_tokens=9 + number, seed=number, stop_token_ids=frozenset(range(50, 60)), **asked)
        engine.submit(
            EngineRequest(
                request_id=str(number),
                kind=RequestKind.FULL,
                token_ids=random_prompt(5 + 3 * number, number),
                sampling=sampling,
            )
        )
    while engine.has_work:
        for event in engine.step():
            if isinstance(event, TokensSampled):
                tokens, logprobs, prompt = told[int(event.request_id)]
                tokens += event.token_ids
                logprobs += event.logprobs
                prompt += event.prompt_logprobs
        engine.check_integrity()
    return told


@pytest.mark.parametrize("chunk", [8, 64])
def test_working_ahead_and_graphs_change_nothing_of_what_is_told(runner: CudaModelRunner, chunk: int) -> None:
    expected = served(runner, overlap=False, chunk=chunk)
    ahead = served(with_graphs(runner, 1, 2, 4, 8), overlap=True, chunk=chunk)
    assert ahead == expected
    for asked, (tokens, logprobs, prompt) in zip(ASKED, expected, strict=True):
        assert len(logprobs) == (len(tokens) if "logprobs" in asked else 0)
        assert bool(prompt) is ("prompt_logprobs" in asked)


def test_both_runners_tell_the_same(runner: CudaModelRunner) -> None:
    """But for draws, which the kernel's stand-in here looks up in a sum of its own."""
    torch_runner = TorchModelRunner(runner._model, runner._kv_cache, runner._device)
    greedy = [number for number, asked in enumerate(ASKED) if not asked.get("temperature")]
    expected = served(torch_runner, overlap=False, chunk=64)
    found = served(runner, overlap=False, chunk=64)
    assert [found[number] for number in greedy] == [expected[number] for number in greedy]
