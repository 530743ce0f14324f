"""Reasoning of a bounded length: what has to come once its budget is spent, and what follows it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disaggregated.engine.logit_edits import edits_of
from disaggregated.engine.sample_row import SampleRow
from disaggregated.engine.sampler import sample
from disaggregated.engine.thinking import BEFORE_MAX, Thinking
from disaggregated.engine.token_history import history_of
from disaggregated.sampling_params import SamplingParams
from disaggregated.thinking_budget import ThinkingBudget
from tests.unit.engine.test_logit_edits import VOCAB_SIZE, random_logits

BEGIN, END = (1,), (2, 3)
OPEN = ThinkingBudget(3, begin=BEGIN, end=END, is_open=True)
CLOSED = ThinkingBudget(3, begin=BEGIN, end=END, is_open=False)


def forced_after(budget: ThinkingBudget, token_ids: list[int]) -> int | None:
    thinking = Thinking(budget)
    thinking.follow(token_ids)
    return thinking.forced()


@pytest.mark.parametrize(
    ("budget", "said", "forced"),
    [
        (OPEN, [7, 7], None),
        (OPEN, [7, 7, 7], 2),
        (OPEN, [7, 7, 7, 2], 3),
        (OPEN, [7, 7, 7, 2, 3], None),
        (OPEN, [7, 7, 2], 3),
        (OPEN, [7, 2, 3, 9, 9, 9], None),
        (CLOSED, [7, 7, 7, 7, 7, 7, 7], None),
        (CLOSED, [1, 7, 7], None),
        (CLOSED, [9, 1, 7, 7, 7], 2),
        (ThinkingBudget(0, begin=BEGIN, end=END, is_open=True), [], 2),
        (ThinkingBudget(0, begin=BEGIN, end=END, is_open=False), [1], 2),
        (ThinkingBudget(1, begin=(), end=END, is_open=False), [1, 1, 1, 1], None),
        (ThinkingBudget(2, begin=(4, 5), end=(6,), is_open=False), [4, 4, 5, 8, 8], 6),
    ],
    ids=[
        "within its budget", "spent", "the tag's second token", "the answer", "it had begun its tag itself",
        "it ended by itself", "it never began", "counted from its tag", "blanks before its tag", "no reasoning",
        "no reasoning behind its own tag", "it begins in the prompt or not at all", "a tag of two tokens",
    ],
)  # fmt: skip
def test_the_end_tag_is_all_that_may_come_once_the_budget_is_spent(
    budget: ThinkingBudget, said: list[int], forced: int | None
) -> None:
    assert forced_after(budget, said) == forced


def test_a_tag_in_the_middle_of_an_answer_is_text() -> None:
    answer = [9] * (BEFORE_MAX + 1)
    assert forced_after(CLOSED, [*answer[:-1], *BEGIN, 7, 7, 7]) == END[0]
    assert forced_after(CLOSED, [*answer, *BEGIN, 7, 7, 7]) is None


@given(
    said=st.lists(st.integers(1, 6), max_size=12),
    drafts=st.lists(st.integers(1, 6), max_size=6),
    budget=st.builds(
        ThinkingBudget,
        st.integers(0, 5),
        begin=st.sampled_from([(), (1,), (1, 1, 4)]),
        end=st.sampled_from([(2,), (2, 2, 3), (2, 3)]),
        is_open=st.booleans(),
    ),
)
def test_drafts_are_looked_at_as_if_they_were_said_and_change_nothing(
    said: list[int], drafts: list[int], budget: ThinkingBudget
) -> None:
    thinking = Thinking(budget)
    for token_id in said:
        thinking.follow([token_id])
    now = thinking.forced()
    assert thinking.forced(drafts) == forced_after(budget, said + drafts)
    assert thinking.forced() == now == forced_after(budget, said)


@given(budget=st.integers(0, 9), reasoning=st.lists(st.integers(4, 9), min_size=10, max_size=20))
def test_reasoning_is_never_longer_than_its_budget(budget: int, reasoning: list[int]) -> None:
    thinking, said = Thinking(ThinkingBudget(budget, begin=BEGIN, end=END, is_open=True)), list[int]()
    for wanted in [*reasoning, 8, 8]:
        forced = thinking.forced()
        said.append(wanted if forced is None else forced)
        thinking.follow(said[-1:])
    assert said[: budget + len(END)] == [*reasoning[:budget], *END]
    assert END[0] not in said[budget + len(END) :]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_that_was_asked_of_the_logits_outweighs_it(temperature: float) -> None:
    sampling = SamplingParams(
        max_tokens=9,
        temperature=temperature,
        thinking=OPEN,
        allowed_token_ids=frozenset({50}),
        logit_bias=((2, -100.0),),
        bad_words=((2,),),
        repetition_penalty=1.5,
    )
    history = history_of(sampling, 2)
    assert history is not None
    history.follow([5, 5, 7, 7, 7])
    spent = SampleRow(sampling, 5, frozenset({2}), history)
    free = SampleRow(SamplingParams(max_tokens=9), 5)
    logits = random_logits(2, 4)
    likeliest = int(logits[1].argmax())
    assert sample(logits.clone(), [spent, free]) == [2, likeliest]
    within = SampleRow(sampling, 5, frozenset(), history, drafts=[2, 3])
    assert sample(logits[:1].clone(), [within]) == [50]
    edits = edits_of([spent, free], VOCAB_SIZE)
    assert edits is not None
    assert edits.forced.tolist() == [[0], [2]]
