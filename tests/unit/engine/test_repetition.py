"""When a reply goes round in circles: the rule against a textbook, and what it makes of a sequence."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disaggregated.engine.api import EngineRequest, FinishReason, RequestKind
from disaggregated.engine.sequence import Sequence
from disaggregated.repetition_rule import RepetitionRule
from disaggregated.sampling_params import SamplingParams

TWICE = RepetitionRule(1, 3, 2)


def stands_there(tokens: list[int], rule: RepetitionRule) -> bool:
    return any(
        len(tokens) >= size * rule.count_min
        and tokens[len(tokens) - size * rule.count_min :] == tokens[-size:] * rule.count_min
        for size in range(rule.pattern_size_min, rule.pattern_size_max + 1)
    )


@given(
    tokens=st.lists(st.integers(0, 2), max_size=24),
    sizes=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    count=st.integers(2, 5),
)
def test_the_rule_is_met_by_a_pattern_that_stands_at_the_end_so_often(
    tokens: list[int], sizes: tuple[int, int], count: int
) -> None:
    rule = RepetitionRule(min(sizes), max(sizes), count)
    assert rule.is_met_by(tokens) is stands_there(tokens, rule)
    looked_back_on = tokens[max(0, len(tokens) - rule.num_tokens) :]
    assert rule.is_met_by(looked_back_on) is rule.is_met_by(tokens)


def generated(prompt: list[int], tokens: list[int], *, num_emitted: int = 0, **sampling: int) -> list[str | None]:
    """The finish reason after each token."""
    params = SamplingParams(max_tokens=20, repetition=TWICE, num_emitted=num_emitted, **sampling)  # type: ignore[arg-type]
    request = EngineRequest(request_id="r", kind=RequestKind.FULL, token_ids=prompt, sampling=params)
    sequence = Sequence(request, arrival=0, num_tokens_max=99)
    return [sequence.append(token) for token in tokens]


@pytest.mark.parametrize(
    ("prompt", "num_emitted", "tokens", "ends_after"),
    [
        ([1, 2, 3], 0, [4, 5, 6, 4, 5, 6], 6),
        ([5], 0, [5, 6, 7, 7], 4),
        ([9, 5, 6], 2, [5, 6], 2),
        ([9, 4, 5, 6], 3, [4, 5, 6], 3),
    ],
    ids=["a pattern twice", "the prompt is not looked at", "what another server said is", "in the same place"],
)
def test_a_sequence_ends_with_the_token_that_closes_the_circle(
    prompt: list[int], num_emitted: int, tokens: list[int], ends_after: int
) -> None:
    reasons = generated(prompt, tokens, num_emitted=num_emitted)
    assert reasons == [*[None] * (ends_after - 1), FinishReason.REPETITION]


def test_it_goes_on_until_the_least_number_of_tokens() -> None:
    assert generated([1], [7, 7, 7, 7, 7], min_tokens=4) == [None, None, None, FinishReason.REPETITION, "repetition"]
