"""The sampler of CUDA devices says what the sampler of CPUs says."""

from __future__ import annotations

import random

import pytest
import torch

from tests.unit.engine.cuda.kernel_device import AS_INTERPRETED, DEVICE  # isort: skip  # It chooses where kernels run.

from disaggregated.engine.cuda.kernels.sampling import sample
from disaggregated.engine.cuda.step_input import sampling_columns
from disaggregated.engine.sample_row import SampleRow
from disaggregated.engine.sampler import sample as sample_in_torch
from disaggregated.engine.upload import to_device
from disaggregated.sampling_params import SamplingParams

pytestmark = AS_INTERPRETED

VOCAB_SIZE = 700


def random_sampling(chance: random.Random) -> SamplingParams:
    return SamplingParams(
        max_tokens=1,
        temperature=chance.choice([0.0, 0.7, 1.5]),
        top_p=chance.choice([1.0, 0.9, 0.3]),
        top_k=chance.choice([0, 40, 5, VOCAB_SIZE + 1]),
        min_p=chance.choice([0.0, 0.05]),
        seed=chance.randrange(2**64),
    )


def rows_of(samplings: list[SamplingParams]) -> list[SampleRow]:
    return [SampleRow(sampling, 7 * i + 1) for i, sampling in enumerate(samplings)]


def sampled(logits_RV: torch.Tensor, rows: list[SampleRow]) -> list[int]:
    device = torch.device(DEVICE)
    out = torch.empty(len(rows), dtype=torch.int64, device=device)
    sample(logits_RV.to(device), to_device(sampling_columns(rows), device), out)
    return [int(token) for token in out]


@pytest.mark.parametrize("seed", range(3 if DEVICE == "cpu" else 100))
def test_every_row_gets_the_token_of_the_torch_sampler(seed: int) -> None:
    chance = random.Random(seed)
    rows = rows_of([random_sampling(chance) for _ in range(8)])
    logits = torch.randn(8, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 3
    logits[3] = logits[3].round()  # Many ties.
    expected = sample_in_torch(logits.clone(), rows)
    found = sampled(logits, rows)
    different = sum(ours != theirs for ours, theirs in zip(found, expected, strict=True))
    assert different <= (DEVICE == "cuda"), "another exp may move a draw across an edge, rarely"


def test_a_row_draws_the_same_alone_and_among_others() -> None:
    chance = random.Random(9)
    rows = rows_of([random_sampling(chance) for _ in range(6)])
    logits = torch.randn(6, VOCAB_SIZE, generator=torch.Generator().manual_seed(9)) * 2
    together = sampled(logits, rows)
    assert together == [sampled(logits[i : i + 1].clone(), rows[i : i + 1])[0] for i in range(6)]


def test_a_nucleus_of_any_size_is_decided() -> None:
    flat = torch.zeros(1, VOCAB_SIZE)
    sampling = SamplingParams(max_tokens=1, temperature=1.0, top_p=0.99, seed=4)
    (token,) = sampled(flat, rows_of([sampling]))
    assert 0 <= token < VOCAB_SIZE


def test_of_equally_likely_tokens_the_first_is_the_greedy_one() -> None:
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, [30, 200, 699]] = 2.0
    assert sampled(logits, rows_of([SamplingParams(max_tokens=1)])) == [30]


def test_what_is_forbidden_is_never_drawn() -> None:
    logits = torch.full((1, VOCAB_SIZE), -torch.inf)
    logits[0, 17] = -3.0
    sampling = SamplingParams(max_tokens=1, temperature=2.0, seed=8)
    assert sampled(logits, rows_of([sampling])) == [17]
