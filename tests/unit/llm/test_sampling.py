"""What a caller may say about sampling, and what the engine is told."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disaggregated.errors import InvalidRequest
from disaggregated.llm import SamplingParams
from tests.support.byte_model import byte_tokenizer

NO_DEFAULTS: dict[str, float] = {}


def for_engine(params: SamplingParams, **changes: Any) -> Any:
    arguments = {"tokenizer": byte_tokenizer(), "vocab_size": 100, "room": 50, **changes}
    return params.for_engine(arguments.pop("defaults", NO_DEFAULTS), **arguments)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("n", 0, "n must be between 1 and 128, is 0"),
        ("n", None, "n must be an integer, is None"),
        ("temperature", -0.5, "temperature must be between 0 and 2, is -0.5"),
        ("temperature", "hot", "temperature must be a number, is 'hot'"),
        ("temperature", float("nan"), "temperature must be a number, is nan"),
        ("top_p", 1.5, "top_p must be between 0 and 1, is 1.5"),
        ("top_k", -2, "top_k must be between -1 and 2147483647, is -2"),
        ("top_k", 1.5, "top_k must be an integer, is 1.5"),
        ("min_p", True, "min_p must be a number, is True"),
        ("seed", 2**64, "seed must be between"),
        ("max_tokens", 0, "max_tokens must be between 1"),
        ("max_tokens", True, "max_tokens must be an integer, is True"),
        ("min_tokens", -1, "min_tokens must be between 0"),
        ("min_tokens", None, "min_tokens must be an integer, is None"),
        ("stop", 3, "stop must be a string or a list of strings, is 3"),
        ("stop", ["a", 3], "stop must be a string or a list of strings"),
        ("stop", ["a", ""], "stop must be without an empty string"),
        ("stop_token_ids", "12", "stop_token_ids must be a list of token ids, is '12'"),
        ("stop_token_ids", [1, -1], "stop_token_ids must be a list of token ids"),
        ("ignore_eos", 1, "ignore_eos must be True or False, is 1"),
        ("skip_special_tokens", None, "skip_special_tokens must be True or False, is None"),
        ("presence_penalty", 2.5, "presence_penalty must be between -2 and 2, is 2.5"),
        ("frequency_penalty", None, "frequency_penalty must be a number, is None"),
        ("repetition_penalty", 0, "repetition_penalty must be between 0.01 and 100, is 0"),
        ("logprobs", 21, "logprobs must be between 0 and 20, is 21"),
        ("prompt_logprobs", True, "prompt_logprobs must be an integer, is True"),
        ("bad_words", ["a", ""], "bad_words must be without an empty string"),
        ("allowed_token_ids", [-1], "allowed_token_ids must be a list of token ids"),
        ("logprob_token_ids", [5], "logprob_token_ids needs logprobs, which is None"),
        ("logprob_token_ids", ["5"], "logprob_token_ids must be a list of token ids"),
        ("logit_bias", {"5": 1.0}, "logit_bias must be a list of token ids"),
        ("logit_bias", {5: 101.0}, "logit_bias must be between -100 and 100, is 101.0"),
    ],
)
def test_a_wrong_value_is_refused_by_its_name(name: str, value: Any, says: str) -> None:
    with pytest.raises(InvalidRequest, match="^" + says.replace("[", r"\[")) as refusal:
        SamplingParams(**{name: value})
    assert refusal.value.param == name
    assert isinstance(refusal.value, ValueError)


def test_an_unknown_parameter_is_named() -> None:
    with pytest.raises(TypeError, match="use_beam_search"):
        SamplingParams(use_beam_search=True)  # type: ignore[call-arg]


def test_sequences_that_would_all_be_the_same_are_not_generated() -> None:
    with pytest.raises(InvalidRequest, match="at temperature 0 all sequences would be the same"):
        SamplingParams(n=2, temperature=0)


def test_what_is_not_said_is_the_model_s_own() -> None:
    [said] = for_engine(SamplingParams(top_k=5), defaults={"temperature": 0.6, "top_p": 0.9, "top_k": 50.0})
    assert (said.temperature, said.top_p, said.top_k, said.min_p) == (0.6, 0.9, 5, 0.0)


def test_a_model_without_defaults_is_sampled_from_as_it_is() -> None:
    [said] = for_engine(SamplingParams())
    assert (said.temperature, said.top_p, said.top_k, said.min_p) == (1.0, 1.0, 0, 0.0)


def test_an_empty_nucleus_is_the_likeliest_token() -> None:
    [said] = for_engine(SamplingParams(top_p=0.0, temperature=1.0))
    assert (said.top_p, said.top_k) == (1.0, 1)


@given(max_tokens=st.none() | st.integers(1, 100), min_tokens=st.integers(0, 100), room=st.integers(1, 60))
def test_max_tokens_never_exceeds_the_room(max_tokens: int | None, min_tokens: int, room: int) -> None:
    [said] = for_engine(SamplingParams(max_tokens=max_tokens, min_tokens=min_tokens), room=room)
    assert said.max_tokens == min(max_tokens or room, room)
    assert 0 <= said.min_tokens <= said.max_tokens


@given(seed=st.integers(-(2**63), 2**64 - 1), n=st.integers(1, 128))
def test_the_sequences_of_a_prompt_have_seeds_of_their_own(seed: int, n: int) -> None:
    seeds = [said.seed for said in for_engine(SamplingParams(seed=seed, n=n, temperature=1.0))]
    assert len(set(seeds)) == n
    assert all(0 <= each < 2**64 for each in seeds)
    assert seeds == [said.seed for said in for_engine(SamplingParams(seed=seed, n=n, temperature=1.0))]


def test_without_a_seed_each_call_has_another() -> None:
    params = SamplingParams(temperature=1.0)
    assert for_engine(params)[0].seed != for_engine(params)[0].seed


def test_the_model_s_end_of_text_stops_unless_it_is_ignored() -> None:
    assert for_engine(SamplingParams(stop_token_ids=[7]))[0].stop_token_ids == {256, 7}
    assert for_engine(SamplingParams(stop_token_ids=[7], ignore_eos=True))[0].stop_token_ids == {7}


def test_a_stop_token_that_the_model_does_not_have_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="stop_token_ids: 100 is not between 0 and 99"):
        for_engine(SamplingParams(stop_token_ids=[7, 100]))


def test_one_stop_string_need_not_be_a_list() -> None:
    assert SamplingParams(stop="end").stop_strings == ("end",)
    assert SamplingParams(stop=["a", "b"]).stop_strings == ("a", "b")
    assert SamplingParams().stop_strings == ()


def test_everything_that_is_asked_of_the_logits_reaches_the_engine() -> None:
    [said] = for_engine(
        SamplingParams(
            presence_penalty=0.5,
            frequency_penalty=-1.0,
            repetition_penalty=1.25,
            logit_bias={9: -2.0, 3: 100},
            allowed_token_ids=[3, 9],
            bad_words=["ab", " c"],
            logprobs=0,
            logprob_token_ids=[9, 3, 9],
            prompt_logprobs=4,
        )
    )
    assert (said.presence_penalty, said.frequency_penalty, said.repetition_penalty) == (0.5, -1.0, 1.25)
    assert said.logit_bias == ((3, 100), (9, -2.0))
    assert said.allowed_token_ids == {3, 9}
    assert (said.logprobs, said.logprob_token_ids, said.prompt_logprobs) == (0, (9, 3), 4)
    encode = byte_tokenizer().encode
    assert said.bad_words == tuple(tuple(encode(word)) for word in ("ab", " ab", " c"))


@pytest.mark.parametrize("name", ["allowed_token_ids", "logit_bias"])
def test_a_token_that_the_model_does_not_have_is_refused_where_it_is_named(name: str) -> None:
    value: Any = {100: 1.0} if name == "logit_bias" else [100]
    with pytest.raises(InvalidRequest, match=f"{name}: 100 is not between 0 and 99"):
        for_engine(SamplingParams(**{name: value}))
