"""The right distribution, always the same draw for the same (seed, position), and no row touches another."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from disaggregated.engine.philox import philox4x32, uniforms
from disaggregated.engine.sample_row import SampleRow
from disaggregated.engine.sampler import sample
from disaggregated.sampling_params import SamplingParams

VOCAB_SIZE = 1000
KNOWN_ANSWERS = [
    # From Random123's kat_vectors: counter, key, result.
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def row(position: int = 0, *, forbidden: Sequence[int] = (), **params: Any) -> SampleRow:
    return SampleRow(SamplingParams(max_tokens=1, **params), position, frozenset(forbidden))


def random_logits(num_rows: int, vocab_size: int = VOCAB_SIZE, *, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def kept_by_transformers_rules(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """(V) probabilities by the textbook: sort everything, cut one rule after the other."""
    probabilities = (logits.double() / params.temperature).softmax(-1)
    if params.top_k:
        kth = probabilities.sort(descending=True).values[min(params.top_k, len(logits)) - 1]
        probabilities = probabilities.where(probabilities >= kth, 0.0)
        probabilities = probabilities / probabilities.sum()
    if params.top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        probabilities[order[ordered.cumsum(-1) - ordered >= params.top_p]] = 0.0
    probabilities = probabilities.where(probabilities >= params.min_p * probabilities.max(), 0.0)
    return probabilities / probabilities.sum()


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(
    counter: tuple[int, ...], key: tuple[int, ...], result: tuple[int, ...]
) -> None:
    c0, c1, c2, c3, k0, k1 = (np.array([word], dtype=np.uint64) for word in (*counter, *key))
    assert tuple(int(word[0]) for word in philox4x32((c0, c1, c2, c3), (k0, k1))) == result


def test_uniforms_depend_on_every_bit_of_seed_and_position_and_fill_the_unit_interval() -> None:
    base = uniforms([0], [0])[0]
    flipped = [uniforms([1 << bit], [0])[0] for bit in range(64)] + [uniforms([0], [1 << bit])[0] for bit in range(40)]
    assert len({base, *flipped}) == 105
    many = uniforms([7] * 100_000, range(100_000))
    assert many.min() >= 0
    assert many.max() < 1
    counts = np.histogram(many, bins=50, range=(0, 1))[0]
    assert ((counts - 2000) ** 2 / 2000).sum() < 90, "chi-square of 49 degrees of freedom: p = 0.0003"


def test_temperature_zero_takes_the_likeliest_token_and_the_first_of_equals() -> None:
    logits = random_logits(5)
    logits[4, [10, 20]] = 100.0
    assert sample(logits.clone(), [row()] * 5) == [*logits[:4].argmax(-1).tolist(), 10]


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 0.7},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.0, "top_k": 400},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 3.0, "top_p": 0.97},
        {"temperature": 1.0, "min_p": 0.05},
        {"temperature": 1.2, "top_k": 50, "top_p": 0.9, "min_p": 0.02},
        {"temperature": 2.0, "top_k": 5000, "top_p": 0.9},
    ],
    ids=str,
)
def test_tokens_are_drawn_with_their_probability(params: dict[str, Any]) -> None:
    num_draws = 10_000
    logits = random_logits(1, 600)
    rows = [row(position, seed=11, **params) for position in range(num_draws)]
    tokens: list[int] = []
    for start in range(0, num_draws, 2000):
        tokens += sample(logits.expand(2000, -1).clone(), rows[start : start + 2000])
    expected = kept_by_transformers_rules(logits[0], rows[0].sampling) * num_draws
    counts = torch.bincount(torch.tensor(tokens), minlength=600)
    assert counts[expected == 0].sum() == 0, "a token was drawn that the rules had cut"
    common = expected >= 10
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    wanted = torch.cat([expected[common], expected[~common].sum()[None]]).clamp(min=1e-9)
    chi_square = float(((observed - wanted) ** 2 / wanted)[wanted > 5].sum())
    degrees = int((wanted > 5).sum()) - 1
    assert chi_square < degrees + 5 * math.sqrt(2 * max(degrees, 1)) + 5


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.9, 0.999])
def test_a_nucleus_larger_than_what_is_sorted_at_first_is_still_exact(top_p: float) -> None:
    logits = random_logits(50, 5000, scale=0.1)
    rows = [row(i, temperature=1.0, top_p=top_p, seed=3) for i in range(50)]
    for i, token in enumerate(sample(logits.clone(), rows)):
        assert kept_by_transformers_rules(logits[i], rows[i].sampling)[token] > 0


def any_rows(num_rows: int, seed: int) -> list[SampleRow]:
    rng = random.Random(seed)
    return [
        row(
            rng.randrange(10_000),
            forbidden=rng.sample(range(VOCAB_SIZE), rng.choice([0, 0, 3])),
            temperature=rng.choice([0.0, 0.3, 1.0, 2.5]),
            top_p=rng.choice([1.0, 1.0, 0.9, 0.999]),
            top_k=rng.choice([0, 0, 1, 40, 700]),
            min_p=rng.choice([0.0, 0.0, 0.1]),
            seed=rng.randrange(2**64),
        )
        for _ in range(num_rows)
    ]


@pytest.mark.parametrize("seed", range(20))
def test_a_row_draws_the_same_token_in_any_batch(seed: int) -> None:
    logits = random_logits(33, seed=seed, scale=0.5 if seed % 2 else 3.0)
    rows = any_rows(33, seed)
    alone = [sample(logits[i : i + 1].clone(), rows[i : i + 1])[0] for i in range(33)]
    assert sample(logits.clone(), rows) == alone
    order = random.Random(seed).sample(range(33), 20)
    assert sample(logits[order], [rows[i] for i in order]) == [alone[i] for i in order]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_forbidden_tokens_are_never_taken(temperature: float) -> None:
    logits = torch.zeros(200, 10)
    logits[:, :3] = 50.0
    rows = [row(i, forbidden=(0, 1, 2), temperature=temperature, seed=5) for i in range(200)]
    tokens = sample(logits, rows)
    assert min(tokens) >= 3
    assert (len(set(tokens)) > 1) == (temperature > 0)


def test_a_tiny_temperature_is_greedy_and_a_single_candidate_is_taken() -> None:
    logits = random_logits(4)
    best = logits.argmax(-1).tolist()
    assert sample(logits.clone(), [row(temperature=1e-6, seed=1)] * 4) == best
    assert sample(logits.clone(), [row(temperature=5.0, top_k=1, seed=1)] * 4) == best
    assert sample(logits.clone(), [row(temperature=5.0, top_p=1e-9, seed=1)] * 4) == best
    assert sample(logits.clone(), [row(temperature=5.0, min_p=1.0, seed=1)] * 4) == best


def test_bfloat16_logits_with_many_ties_draw_among_all_of_them() -> None:
    logits = torch.zeros(500, 300, dtype=torch.bfloat16)
    tokens = sample(logits, [row(i, temperature=1.0, top_k=5, seed=2) for i in range(500)])
    assert len(set(tokens)) > 150


def test_a_forbidden_id_that_the_model_does_not_have_forbids_nothing() -> None:
    logits = random_logits(1)
    assert sample(logits, [row(forbidden=[VOCAB_SIZE + 1])]) == [int(logits.argmax())]
