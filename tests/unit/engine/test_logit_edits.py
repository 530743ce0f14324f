"""Penalties, biases, allowed and forbidden tokens, masks: each row against the textbook, and apart from its mates."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch

from disaggregated.engine.logit_edits import edits_of
from disaggregated.engine.sample_row import SampleRow
from disaggregated.engine.sampler import sample
from disaggregated.engine.token_history import history_of
from disaggregated.sampling_params import SamplingParams

VOCAB_SIZE = 131  # No multiple of a word's bits.


def mask_of(allowed: Sequence[int]) -> npt.NDArray[np.int32]:
    words = np.zeros(-(-VOCAB_SIZE // 32), dtype=np.uint32)
    for token in allowed:
        words[token // 32] |= np.uint32(1 << token % 32)
    return words.view(np.int32)


class Case:
    """One sequence with everything that a request can ask of its logits."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(seed)
        tokens = range(VOCAB_SIZE + 4)  # A tokenizer may know ids that the model does not.
        self.prompt = rng.choices(range(40), k=rng.randrange(1, 30))
        self.generated = rng.choices(range(40), k=rng.randrange(20))
        self.drafts = rng.choices(range(45), k=rng.choice([0, 0, 3]))
        self.forbidden = frozenset(rng.sample(tokens, rng.choice([0, 2])))
        self.masked = rng.sample(range(VOCAB_SIZE), 90) if rng.random() < 0.4 else None
        before = (self.generated + self.drafts)[-1:]
        self.sampling = SamplingParams(
            max_tokens=1,
            temperature=rng.choice([0.0, 1.0]),
            seed=seed,
            presence_penalty=rng.choice([0.0, 0.0, 1.5, -0.5]),
            frequency_penalty=rng.choice([0.0, 0.0, 0.7, -0.1]),
            repetition_penalty=rng.choice([1.0, 1.0, 1.3, 0.8]),
            logit_bias=tuple((token, rng.uniform(-5, 5)) for token in rng.sample(tokens, rng.choice([0, 5]))),
            allowed_token_ids=frozenset(rng.sample(tokens, 60)) if rng.random() < 0.3 else frozenset(),
            bad_words=rng.choice([(), ((7,), (*before, 9), (1, 2, 3))]),
        )

    def row(self) -> SampleRow:
        history = history_of(self.sampling, len(self.prompt))
        if history is not None:
            history.follow(self.prompt + self.generated)
        mask = None if self.masked is None else mask_of(self.masked)
        return SampleRow(self.sampling, 9, self.forbidden, history, self.drafts, mask)

    def expected(self, logits: list[float]) -> list[float]:
        """By the textbook, in single precision as everywhere."""
        sampling, generated = self.sampling, self.generated + self.drafts
        biases = dict(sampling.logit_bias)
        return [
            -math.inf if self._never(token, generated) else float(self._penalised(token, np.float32(logit), biases))
            for token, logit in enumerate(logits)
        ]

    def _never(self, token: int, generated: list[int]) -> bool:
        sampling = self.sampling
        ends_bad_word = any(
            word[-1] == token and generated[len(generated) - len(word) + 1 :] == list(word[:-1])
            for word in sampling.bad_words
        )
        is_masked = self.masked is not None and token not in self.masked
        is_outside = bool(sampling.allowed_token_ids) and token not in sampling.allowed_token_ids
        return ends_bad_word or is_masked or is_outside or token in self.forbidden

    def _penalised(self, token: int, logit: np.float32, biases: dict[int, float]) -> np.float32:
        sampling, count = self.sampling, (self.generated + self.drafts).count(token)
        logit += np.float32(biases.get(token, 0.0))
        if count or token in self.prompt:
            penalty = np.float32(sampling.repetition_penalty)
            logit = logit / penalty if logit > 0 else logit * penalty
        taken = np.float32(count) * np.float32(sampling.frequency_penalty)
        return logit - (taken + np.float32(count > 0) * np.float32(sampling.presence_penalty))


def edited(logits_RV: torch.Tensor, rows: Sequence[SampleRow]) -> torch.Tensor:
    changed = logits_RV.clone()
    if (edits := edits_of(rows, VOCAB_SIZE)) is not None:
        edits.apply(changed)
    return changed


def random_logits(num_rows: int, seed: int) -> torch.Tensor:
    return torch.randn(num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("seed", range(150))
def test_every_logit_is_what_the_textbook_makes_of_it(seed: int) -> None:
    case, logits = Case(seed), random_logits(1, seed)
    assert edited(logits, [case.row()])[0].tolist() == case.expected(logits[0].tolist())


@pytest.mark.parametrize("seed", range(10))
def test_a_row_is_edited_alike_in_any_company(seed: int) -> None:
    cases, logits = [Case(100 * seed + i) for i in range(24)], random_logits(24, seed)
    together = edited(logits, [case.row() for case in cases])
    assert all(
        torch.equal(together[i : i + 1], edited(logits[i : i + 1], [case.row()])) for i, case in enumerate(cases)
    )
    tokens = sample(logits.clone(), [case.row() for case in cases])
    assert tokens == [sample(logits[i : i + 1].clone(), [case.row()])[0] for i, case in enumerate(cases)]


def test_rows_that_ask_for_nothing_cost_nothing() -> None:
    assert edits_of([SampleRow(SamplingParams(max_tokens=1, temperature=1.0, logprobs=5), 3)] * 4, VOCAB_SIZE) is None


def test_a_bias_of_a_hundred_decides_and_of_minus_a_hundred_forbids() -> None:
    logits = random_logits(1, 0)
    likeliest = int(logits.argmax())
    for token, bias, wins in ((5, 100.0, True), (likeliest, -100.0, False)):
        row = SampleRow(SamplingParams(max_tokens=1, logit_bias=((token, bias),)), 0)
        assert (sample(logits.clone(), [row]) == [token]) is wins


def test_only_allowed_tokens_are_drawn() -> None:
    params = SamplingParams(max_tokens=1, temperature=2.0, allowed_token_ids=frozenset({3, 64, 130}))
    rows = [SampleRow(params, position) for position in range(300)]
    assert set(sample(random_logits(1, 1).expand(300, -1).clone(), rows)) == {3, 64, 130}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_to_which_nothing_is_left_gets_a_token_all_the_same(temperature: float) -> None:
    params = SamplingParams(max_tokens=1, temperature=temperature, allowed_token_ids=frozenset({3}))
    (token,) = sample(random_logits(1, 1), [SampleRow(params, 0, frozenset({3}))])
    assert 0 <= token < VOCAB_SIZE
