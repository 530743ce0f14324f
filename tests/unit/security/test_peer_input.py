"""Numbers and names of other processes are refused before a timer, a comparison or an allocation gets to see them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import msgspec
import pytest

from disaggregated.errors import InvalidRequest, LayoutMismatch, TransferError
from disaggregated.grammar import Grammar, GrammarKind
from disaggregated.kv_layout import KVLayout
from disaggregated.peer_input import checked_name, checked_seconds
from disaggregated.repetition_rule import RepetitionRule
from disaggregated.sampling_params import SamplingParams
from disaggregated.thinking_budget import ThinkingBudget
from disaggregated.v1 import control_pb2, kv_pb2
from kvtransfer.destination.published import PublishedBlocks

LAYOUT = KVLayout(num_layers=2, num_kv_heads=2, head_dim=8, block_size=4, dtype="float32", num_blocks=8)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.001, 1e9])
def test_a_time_that_no_timer_can_wait_for_is_refused(value: float) -> None:
    with pytest.raises(InvalidRequest, match=r"deadline_s is .* between 0 and 604800 seconds") as caught:
        checked_seconds(value, "deadline_s")
    assert caught.value.param == "deadline_s"


@pytest.mark.parametrize("value", [0.0, 0.5, 604_800.0])
def test_a_time_that_can_be_waited_for_is_taken(value: float) -> None:
    assert checked_seconds(value, "deadline_s") == value


def test_a_name_is_kept_only_when_it_is_short() -> None:
    assert checked_name("x" * 256, "request_id") == "x" * 256
    with pytest.raises(InvalidRequest, match="request_id has 257 characters"):
        checked_name("x" * 257, "request_id")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("temperature", value) for value in (math.nan, math.inf, -0.5)),
        *(("top_p", value) for value in (math.nan, 1.5, -0.1, math.inf)),
        *(("min_p", value) for value in (math.nan, 2.0, -0.1)),
    ],
)
def test_sampling_numbers_out_of_range_are_named(field: str, value: float) -> None:
    message = SamplingParams(max_tokens=4).to_proto()
    setattr(message, field, value)
    with pytest.raises(InvalidRequest, match=f"{field} is") as caught:
        SamplingParams.from_proto(message)
    assert caught.value.param == field


def test_what_an_orchestrator_sends_comes_back_as_it_was() -> None:
    sent = SamplingParams(max_tokens=4, temperature=0.5, top_p=0.25, top_k=3, min_p=0.125, seed=2**64 - 1)
    assert SamplingParams.from_proto(sent.to_proto()) == sent


def test_every_sampling_field_travels() -> None:
    at_rest = SamplingParams(max_tokens=1)
    sent = SamplingParams(
        max_tokens=4,
        min_tokens=2,
        stop_token_ids=frozenset({2, 7}),
        presence_penalty=0.5,
        frequency_penalty=-0.25,
        repetition_penalty=1.25,
        logit_bias=((3, -100.0), (9, 1.5)),
        allowed_token_ids=frozenset({3, 4}),
        bad_words=((5,), (6, 7)),
        logprobs=0,
        prompt_logprobs=3,
        num_emitted=11,
        grammar=Grammar(GrammarKind.REGEX, "a+", starts_after=(1, 2)),
        logprob_token_ids=(8, 3),
        thinking=ThinkingBudget(0, begin=(), end=(1, 2), is_open=True),
        repetition=RepetitionRule(2, 30, 4),
    )
    drawn = {"temperature", "top_p", "top_k", "min_p", "seed"}
    names = {field.name for field in msgspec.structs.fields(sent)} - drawn
    assert {name for name in names if getattr(sent, name) == getattr(at_rest, name)} == set(), "a field is not tried"
    assert SamplingParams.from_proto(sent.to_proto()) == sent
    assert SamplingParams.from_proto(at_rest.to_proto()) == at_rest


def test_what_is_left_after_some_tokens_counts_them_as_emitted() -> None:
    left = SamplingParams(max_tokens=9, min_tokens=2, num_emitted=1, logprobs=2, prompt_logprobs=2).after(3)
    assert left == SamplingParams(max_tokens=6, min_tokens=0, num_emitted=4, logprobs=2)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"presence_penalty": math.nan}, "presence_penalty"),
        ({"frequency_penalty": 101.0}, "frequency_penalty"),
        ({"repetition_penalty": -1.0}, "repetition_penalty"),
        ({"bias_token_ids": [1], "biases": [math.inf]}, "logit_bias"),
        ({"bias_token_ids": [1, 2], "biases": [1.0]}, "logit_bias"),
        ({"bad_words": [control_pb2.TokenSequence()]}, "bad_words"),
        ({"bad_words": [control_pb2.TokenSequence(token_ids=range(65))]}, "bad_words"),
        ({"logprobs": 21}, "logprobs"),
        ({"prompt_logprobs": 2**31}, "prompt_logprobs"),
        ({"logprob_token_ids": range(129)}, "logprob_token_ids"),
        ({"thinking": control_pb2.ThinkingBudget(num_tokens=3)}, "thinking"),
        *(
            (
                {
                    "repetition": control_pb2.RepetitionRule(
                        pattern_size_min=low, pattern_size_max=high, count_min=count
                    )
                },
                "repetition",
            )
            for low, high, count in ((0, 3, 2), (4, 3, 2), (1, 1025, 2), (1, 3, 1), (1, 1024, 17))
        ),
        ({"thinking": control_pb2.ThinkingBudget(end=[1], begin=range(65))}, "thinking"),
    ],
)
def test_what_would_upset_a_sampler_is_refused_by_name(change: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams.from_proto(control_pb2.SamplingParams(max_tokens=4, **change))
    assert caught.value.param == param


def test_a_million_stop_tokens_are_refused() -> None:
    message = control_pb2.SamplingParams(max_tokens=1, stop_token_ids=range(1_000_000))
    with pytest.raises(InvalidRequest, match="1000000 stop_token_ids"):
        SamplingParams.from_proto(message)


@pytest.mark.parametrize("field", ["num_layers", "num_kv_heads", "head_dim", "block_size", "num_blocks", "num_planes"])
@pytest.mark.parametrize("value", [0, 2**32 - 1])
def test_a_layout_that_no_pool_has_is_refused_before_anything_is_computed_with_it(field: str, value: int) -> None:
    message = dataclasses.replace(LAYOUT, **{field: value}).to_proto()  # type: ignore[arg-type]
    with pytest.raises(LayoutMismatch, match=f"{field} is {value}"):
        KVLayout.from_proto(message)


def test_a_layout_of_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(LayoutMismatch, match="dtype 'float3'"):
        KVLayout.from_proto(dataclasses.replace(LAYOUT, dtype="float3").to_proto())
    assert KVLayout.from_proto(LAYOUT.to_proto()) == LAYOUT


def published() -> PublishedBlocks:
    return PublishedBlocks(epoch=1, source_layout=LAYOUT, into=range(4), skip_blocks=0)


@pytest.mark.parametrize(
    "publication",
    [
        kv_pb2.Publication(epoch=1, block_ids=range(5), checksums=range(5), lease_key=b"k" * 16),
        kv_pb2.Publication(epoch=1, block_ids=range(1_000_000), checksums=range(1_000_000), lease_key=b"k" * 16),
        kv_pb2.Publication(epoch=1, block_ids=[8], checksums=[0], lease_key=b"k" * 16),
        kv_pb2.Publication(epoch=1, block_ids=[1], checksums=[], lease_key=b"k" * 16),
        kv_pb2.Publication(epoch=1, block_ids=[1], checksums=[0]),
        kv_pb2.Publication(epoch=1, block_ids=[1], checksums=[0], lease_key=b"k" * 1_000_000),
        kv_pb2.Publication(epoch=1, block_ids=[1], checksums=[0], lease_key=b"k" * 16, first_layer=1, num_layers=9),
        kv_pb2.Publication(epoch=1, first_block=2**32 - 1, block_ids=[1], checksums=[0], lease_key=b"k" * 16),
        kv_pb2.Publication(epoch=2, block_ids=[1], checksums=[0], lease_key=b"k" * 16),
    ],
)
def test_a_publication_that_is_larger_than_our_table_or_contradicts_itself_is_refused(
    publication: kv_pb2.Publication,
) -> None:
    blocks = published()
    with pytest.raises(TransferError):
        blocks.add(publication)
    assert blocks.take() == []
