"""What a body says about sampling and replies, as the servers and the answer's maker get it."""

from __future__ import annotations

from typing import Any

import pytest

from disaggregated.errors import InvalidRequest
from disaggregated.repetition_rule import RepetitionRule
from disaggregated.sampling_params import SamplingParams
from orchestrator.api.fields import Fields
from orchestrator.api.generation_fields import GenerationFields, read_generation_fields
from tests.support.byte_model import byte_model

MODEL = byte_model()


def read(*, is_chat: bool = True, **fields: Any) -> GenerationFields:
    return read_generation_fields(Fields(fields), MODEL, max_tokens_default=99, is_chat=is_chat)


def test_a_body_that_says_nothing_samples_as_openai_does() -> None:
    fields = read()
    seed = fields.sampling.seed
    assert fields.sampling == SamplingParams(max_tokens=99, temperature=1.0, seed=seed, stop_token_ids=frozenset({256}))
    assert read().sampling.seed != seed, "without a seed each request has another one"
    assert (fields.reply.n, fields.reply.best_of, fields.reply.logprobs) == (1, 1, None)
    assert fields.unknown == ()


def test_everything_that_is_asked_of_the_logits_is_read() -> None:
    encode = MODEL.tokenizer.encode
    sampling = read(
        presence_penalty=1, frequency_penalty=-0.5, repetition_penalty=1.1, logit_bias={"7": 3, "5": -100.0},
        allowed_token_ids=[5, 7, 9], bad_words=["no", " way"], min_tokens=3, max_tokens=12, seed=-1, top_k=-1,
        stop_token_ids=[8], ignore_eos=True,
    ).sampling  # fmt: skip
    assert sampling == SamplingParams(
        max_tokens=12, min_tokens=3, temperature=1.0, seed=2**64 - 1, stop_token_ids=frozenset({8}),
        presence_penalty=1.0, frequency_penalty=-0.5, repetition_penalty=1.1, logit_bias=((5, -100.0), (7, 3.0)),
        allowed_token_ids=frozenset({5, 7, 9}),
        bad_words=tuple(tuple(encode(word)) for word in ("no", " no", " way")),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("is_chat", "fields", "logprobs", "prompt_logprobs"),
    [
        (True, {"logprobs": True}, 0, None),
        (True, {"logprobs": True, "top_logprobs": 4}, 4, None),
        (True, {"logprobs": False, "top_logprobs": 0}, None, None),
        (True, {"prompt_logprobs": 2}, None, 2),
        (False, {"logprobs": 3}, 3, None),
        (False, {"logprobs": 0}, 0, None),
        (False, {"logprobs": False}, None, None),
        (False, {"logprobs": 3, "echo": True}, 3, 3),
        (False, {"logprobs": 3, "echo": True, "prompt_logprobs": 5}, 3, 5),
        (False, {"echo": True}, None, None),
        (False, {"best_of": 3}, 0, None),
        (True, {"logprobs": True, "logprob_token_ids": [3]}, 0, None),
        (False, {"best_of": 3, "logprobs": 2}, 2, None),
        (False, {"n": 3}, None, None),
    ],
)
def test_servers_tell_what_some_field_needs_and_no_more(
    is_chat: bool, fields: dict[str, Any], logprobs: int | None, prompt_logprobs: int | None
) -> None:
    sampling = read(is_chat=is_chat, **fields).sampling
    assert (sampling.logprobs, sampling.prompt_logprobs) == (logprobs, prompt_logprobs)


def test_a_prompt_may_be_asked_about_without_generating() -> None:
    fields = read(is_chat=False, echo=True, max_tokens=0, logprobs=1)
    assert fields.sampling.max_tokens == 1, "its first token comes with it"
    assert fields.reply.drops_tokens


def test_the_newer_name_of_max_tokens_wins() -> None:
    assert read(max_completion_tokens=7, max_tokens=9).sampling.max_tokens == 7
    assert read(max_tokens=9).sampling.max_tokens == 9


def test_a_null_is_the_same_as_nothing() -> None:
    names = (
        "n", "best_of", "echo", "logprobs", "top_logprobs", "prompt_logprobs", "logit_bias", "presence_penalty",
        "frequency_penalty", "repetition_penalty", "bad_words", "allowed_token_ids", "cache_salt", "min_tokens",
        "skip_special_tokens", "include_stop_str_in_output", "truncate_prompt_tokens", "suffix", "use_beam_search",
    )  # fmt: skip
    nulls: dict[str, Any] = dict.fromkeys(names)
    assert read(seed=1, **nulls) == read(seed=1)


@pytest.mark.parametrize(
    ("is_chat", "fields", "message"),
    [
        (True, {"logprob_token_ids": [1]}, "only allowed when logprobs is asked for"),
        (True, {"logprob_token_ids": [1], "logprobs": False}, "only allowed when logprobs is asked for"),
        (False, {"logprob_token_ids": [100_000], "logprobs": 1}, "100000 is not between 0 and"),
        (False, {"logprob_token_ids": [0] * 129, "logprobs": 1}, "has 129 entries, the limit is 128"),
        (False, {"thinking_token_budget": 5}, "is for chats"),
        (True, {"repetition_detection": 5}, "must be an object"),
    ],
)
def test_fields_that_do_not_go_together_are_told_by_name(is_chat: bool, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        read(is_chat=is_chat, **fields)
    assert caught.value.param == next(iter(fields))
    assert read(is_chat=is_chat, thinking_token_budget=-1).unknown == ()


def test_circles_are_read_as_vllm_spells_them() -> None:
    wanted = {"max_pattern_size": 20, "min_pattern_size": 3, "min_count": 4}
    assert read(repetition_detection=wanted).sampling.repetition == RepetitionRule(3, 20, 4)
    assert read(repetition_detection={**wanted, "min_pattern_size": 0}).sampling.repetition == RepetitionRule(1, 20, 4)
    for nothing in ({}, {"max_pattern_size": 0, "min_count": 0}, {"min_count": 3}):
        assert read(repetition_detection=nothing).sampling.repetition is None


@pytest.mark.parametrize(
    ("change", "member"),
    [
        ({"max_pattern_size": 1025}, "max_pattern_size"),
        ({"min_pattern_size": 21}, "min_pattern_size"),
        ({"min_count": 1}, "min_count"),
        ({"min_count": None}, "min_count"),
        ({"min_count": 1000}, "min_count"),
    ],
)
def test_what_is_wrong_with_circles_is_told_by_the_member(change: dict[str, Any], member: str) -> None:
    wanted = {"max_pattern_size": 20, "min_pattern_size": 3, "min_count": 4, **change}
    with pytest.raises(InvalidRequest, match=member) as caught:
        read(repetition_detection=wanted)
    assert caught.value.param == f"repetition_detection.{member}"
