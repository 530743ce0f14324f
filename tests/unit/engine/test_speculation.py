"""Drafts: where they come from, how long they are, and that they never show in the tokens."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from disaggregated.config.server import SpeculativeConfig
from disaggregated.engine.api import EngineRequest, RequestKind
from disaggregated.engine.sequence import Sequence
from disaggregated.engine.speculation import (
    LOOKBACK_MAX,
    NGRAM_SIZE_MIN,
    PROBE_AFTER,
    Acceptance,
    Speculation,
    StepCost,
    TextSoFar,
    repeated_suffix,
    speculation_of,
)
from disaggregated.sampling_params import SamplingParams

TEXTS = st.lists(st.integers(0, 3), min_size=0, max_size=40)


def array(tokens: list[int]) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.array(tokens, dtype=np.int32)


def new_sequence(
    text: list[int],
    *,
    num_prompt_tokens: int = 1,
    max_tokens: int = 10**6,
    min_tokens: int = 0,
    num_tokens_max: int = 10**6,
) -> Sequence:
    sampling = SamplingParams(max_tokens=max_tokens, min_tokens=min_tokens)
    request = EngineRequest(
        request_id="one", kind=RequestKind.FULL, token_ids=text[:num_prompt_tokens], sampling=sampling
    )
    sequence = Sequence(request, arrival=1, num_tokens_max=num_tokens_max)
    sequence.token_ids.extend(text[num_prompt_tokens:])
    return sequence


def drafts(text: list[int], *, num_max: int = 3, is_use_oldest: bool = False) -> list[int]:
    speculation = Speculation(max_draft_len=3, max_matching_ngram_size=3, is_use_oldest=is_use_oldest)
    return speculation.draft(new_sequence(text), num_max, num_tokens_in_step=1)


# The lookup


def all_matches(text: list[int], size_max: int) -> tuple[int, list[int]]:
    """(size, ends) of the longest suffix that occurs before, by trying every place."""
    for size in range(min(size_max, len(text) - 1), 0, -1):
        suffix = text[-size:]
        ends = [end for end in range(size, len(text)) if text[end - size : end] == suffix]
        if ends:
            return size, ends
    return 0, []


@given(TEXTS, st.integers(1, 6), st.booleans())
def test_the_place_found_is_that_of_the_longest_suffix_that_occurs_before(
    text: list[int], size_max: int, is_oldest: bool
) -> None:
    size, ends = all_matches(text, size_max)
    expected = 0
    if size >= min(NGRAM_SIZE_MIN, size_max):
        expected = ends[0] if is_oldest else ends[-1]
    assert repeated_suffix(array(text), size_max=size_max, is_oldest=is_oldest) == expected


@given(st.lists(TEXTS, max_size=8))
def test_the_text_so_far_is_the_sequences_tokens_however_they_came(parts: list[list[int]]) -> None:
    text = TextSoFar()
    known: list[int] = []
    for part in parts:
        known = [*known, *part]
        assert text.follow(known).tolist() == known


def test_what_followed_the_last_tokens_before_is_guessed_to_follow_them_again() -> None:
    assert drafts([1, 2, 3, 4, 5, 9, 2, 3]) == [4, 5, 9]


def test_the_latest_place_counts_unless_the_oldest_is_asked_for() -> None:
    text = [1, 2, 7, 7, 1, 2, 8, 8, 1, 2]
    assert drafts(text) == [8, 8, 1]
    assert drafts(text, is_use_oldest=True) == [7, 7, 1]


def test_a_repetition_that_reaches_to_the_end_goes_on() -> None:
    assert drafts([5, 1, 2, 1, 2]) == [1, 2, 1]
    assert drafts([4, 4, 4]) == [4, 4, 4]


def test_a_text_that_repeats_nothing_has_no_drafts() -> None:
    assert drafts([1]) == drafts([1, 2]) == drafts([1, 2, 3, 4, 3]) == []


def test_the_search_goes_back_a_bounded_way() -> None:
    far = [1, 2, 3, *range(10, 10 + LOOKBACK_MAX), 1, 2]
    assert drafts(far) == []
    near = [1, 2, 3, *range(10, 10 + LOOKBACK_MAX - 5), 1, 2]
    assert drafts(near) == [3, 10, 11]


@given(st.lists(st.integers(0, 2), min_size=1, max_size=60), st.integers(0, 9))
def test_drafts_are_as_many_as_asked_for_or_none_and_all_of_the_text(text: list[int], num_max: int) -> None:
    found = drafts(text, num_max=num_max)
    assert len(found) in {0, min(3, num_max)}
    assert set(found) <= set(text)


# How many a sequence can use


def test_there_are_no_drafts_for_tokens_that_will_not_be_generated() -> None:
    text = [1, 2, 1, 2, 1, 2]
    speculation = Speculation(max_draft_len=3, max_matching_ngram_size=3)

    def number(**limits: int) -> int:
        return len(speculation.draft(new_sequence(text, **limits), 9, num_tokens_in_step=1))

    assert [number(max_tokens=5 + left) for left in (1, 2, 3, 4, 5)] == [0, 1, 2, 3, 3]
    assert [number(num_tokens_max=6 + left) for left in (1, 2, 3, 4, 5)] == [0, 1, 2, 3, 3]


def test_drafts_end_where_min_tokens_is_reached_since_other_tokens_are_allowed_after_it() -> None:
    text = [1, 2, 1, 2, 1, 2]
    speculation = Speculation(max_draft_len=3, max_matching_ngram_size=3)
    lengths = [
        len(speculation.draft(new_sequence(text, min_tokens=least), 9, num_tokens_in_step=1)) for least in range(4, 10)
    ]
    assert lengths == [3, 3, 0, 1, 2, 3]


# How long drafts are


def test_a_sequence_whose_drafts_are_right_gets_long_ones_and_one_whose_drafts_are_wrong_none() -> None:
    good, bad = Acceptance(), Acceptance()
    for _ in range(20):
        good.verified(4, 4)
        bad.verified(1, 0)
    assert good.probability > 0.95
    assert bad.probability < 0.05
    assert good.num_drafts(8, worth=0.3, position=0) == 8
    assert bad.num_drafts(8, worth=0.3, position=0) == 1, "it may try once"
    assert bad.num_drafts(8, worth=0.3, position=1) == 0


def test_the_last_draft_is_likelier_to_be_right_than_it_costs() -> None:
    acceptance = Acceptance()
    probability = acceptance.probability
    for worth in (0.05, 0.2, 0.3, 0.59):
        number = acceptance.num_drafts(99, worth=worth, position=0)
        assert probability**number >= worth - 1e-9 > probability ** (number + 1)


def test_what_lies_behind_the_first_wrong_draft_says_nothing() -> None:
    early, late = Acceptance(), Acceptance()
    early.verified(8, 0)
    late.verified(1, 0)
    assert early.probability == late.probability


def test_a_sequence_that_never_accepts_is_tried_ever_more_seldom() -> None:
    acceptance = Acceptance()
    for _ in range(10):
        acceptance.verified(1, 0)
    tried = []
    for position in range(3000):
        if acceptance.num_drafts(4, worth=0.5, position=position):
            tried.append(position)
            acceptance.verified(1, 0)
    gaps = [later - earlier for earlier, later in itertools.pairwise(tried)]
    assert gaps[:4] == [PROBE_AFTER, 2 * PROBE_AFTER, 4 * PROBE_AFTER, 8 * PROBE_AFTER]
    assert len(tried) < 12


def test_a_text_that_begins_to_repeat_itself_gets_drafts_again() -> None:
    acceptance = Acceptance()
    for _ in range(10):
        acceptance.verified(1, 0)
    lengths = []
    for position in range(500):
        number = acceptance.num_drafts(4, worth=0.3, position=position)
        lengths.append(number)
        if number:
            acceptance.verified(number, number)
    assert lengths[0] == 1
    assert lengths[-1] == 4


# What they cost


@pytest.mark.parametrize(("fixed", "each"), [(40.0, 4.0), (5.0, 5.0), (10.0, 0.1)])
def test_the_cost_of_a_token_is_learnt_from_the_durations_of_steps(fixed: float, each: float) -> None:
    draw = random.Random(1)
    cost = StepCost()
    for _ in range(200):
        num_tokens = draw.randrange(1, 12)
        cost.took(num_tokens, (fixed + each * num_tokens) * draw.uniform(0.99, 1.01) / 1000)
    assert cost.tokens_for_free == pytest.approx(fixed / each, rel=0.3)


def test_steps_of_one_size_teach_nothing_and_a_clock_that_stands_still_does_no_harm() -> None:
    cost = StepCost(tokens_for_free=7.0)
    for _ in range(100):
        cost.took(4, 0.1)
    assert cost.tokens_for_free == 7.0
    for num_tokens in range(1, 100):
        cost.took(num_tokens % 9 + 1, 0.0)
    assert cost.tokens_for_free > 0


def test_a_draft_is_worth_less_in_a_larger_batch() -> None:
    cost = StepCost(tokens_for_free=10.0)
    assert cost.worth(1) < 0.1 < cost.worth(8) < 0.5 < cost.worth(32)


@given(st.floats(0.1, 100), st.integers(1, 64), st.floats(0.01, 1), st.integers(1, 8))
def test_the_worth_is_where_a_draft_begins_to_raise_the_tokens_a_second(
    free: float, num_tokens: int, probability: float, num_drafts: int
) -> None:
    worth = StepCost(tokens_for_free=free).worth(num_tokens)
    without = num_tokens / (free + num_tokens)
    with_drafts = (num_tokens + probability * num_drafts) / (free + num_tokens + num_drafts)
    if abs(probability - worth) > 1e-6:
        assert (with_drafts > without) == (probability > worth)


# Configuration


def test_there_is_no_speculation_unless_the_configuration_asks_for_it() -> None:
    assert speculation_of(SpeculativeConfig()) is None
    asked = speculation_of(SpeculativeConfig(decoding_type="NGram", max_draft_len=2, max_concurrency=3))
    assert asked is not None
    assert asked.max_concurrency == 3
    assert len(asked.draft(new_sequence([1, 2, 1, 2, 1, 2]), 9, num_tokens_in_step=1)) == 2
