"""A history that grew token by token is the one made of the whole sequence at once."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disaggregated.engine.token_history import TokenHistory, history_of
from disaggregated.sampling_params import BAD_WORD_TOKENS_MAX, SamplingParams

TOKENS = st.lists(st.integers(0, 12), max_size=200)


def as_dict(history: TokenHistory, drafts: list[int]) -> dict[int, float]:
    ids, counts = history.counts(drafts)
    assert len(set(ids.tolist())) == len(ids), "a token stands there twice"
    return dict(zip(ids.tolist(), counts.tolist(), strict=True))


@given(prompt=TOKENS, generated=TOKENS, drafts=st.lists(st.integers(0, 20), max_size=8), steps=st.data())
def test_it_counts_what_was_generated_however_it_grew(
    prompt: list[int], generated: list[int], drafts: list[int], steps: st.DataObject
) -> None:
    history = TokenHistory(num_prompt_tokens=len(prompt), counts_prompt=True)
    position = 0
    while position < len(generated):
        position += steps.draw(st.integers(1, 20))
        history.follow(prompt + generated[:position])
        history.counts(drafts)
    history.follow(prompt + generated)
    wanted = Counter(generated) + Counter(drafts)
    assert as_dict(history, drafts) == {token: float(wanted[token]) for token in {*prompt, *generated, *drafts}}
    assert history.tail == tuple(generated[-BAD_WORD_TOKENS_MAX + 1 :])


@given(prompt=TOKENS, generated=TOKENS)
def test_a_prompt_that_nobody_asks_for_is_left_out(prompt: list[int], generated: list[int]) -> None:
    history = TokenHistory(num_prompt_tokens=len(prompt), counts_prompt=False)
    history.follow(prompt + generated)
    assert as_dict(history, []) == dict(Counter(generated))


@given(prompt=TOKENS, generated=TOKENS, more=TOKENS)
def test_a_server_that_continues_a_sequence_has_the_same_history(
    prompt: list[int], generated: list[int], more: list[int]
) -> None:
    """What came before is told by `num_emitted`: the rest of what it was given is the prompt."""
    sampling = SamplingParams(max_tokens=9, presence_penalty=1.0)
    first = history_of(sampling, len(prompt))
    again = history_of(sampling.after(len(generated)), len(prompt) + len(generated))
    assert first is not None
    assert again is not None
    for history in (first, again):
        history.follow(prompt + generated)
        history.follow(prompt + generated + more)
    assert as_dict(first, []) == as_dict(again, [])
    assert first.tail == again.tail


@pytest.mark.parametrize("params", [{}, {"logit_bias": ((1, 2.0),)}, {"logprobs": 3}, {"allowed_token_ids": {1}}])
def test_there_is_none_where_nothing_looks_at_it(params: dict[str, object]) -> None:
    assert history_of(SamplingParams(max_tokens=1, **params), 3) is None  # type: ignore[arg-type]


def test_a_token_that_is_not_known_cannot_be_counted() -> None:
    history = TokenHistory(num_prompt_tokens=1, counts_prompt=False)
    with pytest.raises(AssertionError, match="not known yet"):
        history.follow([5, -1])
