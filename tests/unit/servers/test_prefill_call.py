"""What the caller of a Prefill is told, and when."""

from __future__ import annotations

import asyncio
import dataclasses
import time

import pytest

from context_server.prefill_call import PrefillCall
from disaggregated.engine.api import ChunkComputed, FinishReason, TokensSampled
from disaggregated.errors import DeadlineExceeded, InvalidRequest, LeaseExpired
from disaggregated.token_logprobs import TokenLogprob, from_proto
from disaggregated.v1 import control_pb2


def chunk(num_tokens: int, started_s: float = 1.0) -> ChunkComputed:
    return ChunkComputed(
        request_id="r~1", num_computed_tokens=num_tokens, num_cached_tokens=16, block_ids=(), started_s=started_s
    )


def token(token_id: int, finish_reason: FinishReason | None = None) -> TokensSampled:
    return TokensSampled(request_id="r~1", first_position=64, token_ids=(token_id,), finish_reason=finish_reason)


async def told(call: PrefillCall) -> list[control_pb2.PrefillProgress]:
    async with asyncio.timeout(20):
        return [progress async for progress in call.progress()]


async def test_each_chunk_is_told_and_the_outcome_comes_last() -> None:
    call = PrefillCall("r~1", "", deadline_s=20)
    progress = call.progress()
    call.chunk_computed(chunk(32))
    first = await anext(progress)
    assert (first.num_computed_tokens, first.num_cached_tokens, first.HasField("outcome")) == (32, 16, False)
    call.chunk_computed(chunk(64))
    call.first_token_sampled(token(7))
    last = [message async for message in progress]
    assert [(message.num_computed_tokens, message.outcome.first_token) for message in last] == [(64, 7)]
    assert last[0].outcome.finish_reason == ""


async def test_the_outcome_tells_how_likely_its_token_and_the_prompt_were_where_that_is_asked_for() -> None:
    call = PrefillCall("r~1", "", deadline_s=20)
    call.first_token_sampled(
        dataclasses.replace(
            token(7),
            logprobs=[TokenLogprob(-0.5, 2, (9,), (-0.25,))],
            prompt_logprobs=[TokenLogprob(-1.0, 1), TokenLogprob(-2.0, 3)],
        )
    )
    (last,) = await told(call)
    assert from_proto(last.outcome.logprobs) == [TokenLogprob(-0.5, 2, (9,), (-0.25,))]
    assert from_proto(last.outcome.prompt_logprobs) == [TokenLogprob(-1.0, 1), TokenLogprob(-2.0, 3)]
    unasked = PrefillCall("r~2", "", deadline_s=20)
    unasked.first_token_sampled(token(7))
    (last,) = await told(unasked)
    assert not last.outcome.HasField("logprobs")
    assert not last.outcome.HasField("prompt_logprobs")


async def test_a_slow_caller_gets_the_latest_only() -> None:
    call = PrefillCall("r~1", "", deadline_s=20)
    for num_tokens in range(32, 640, 32):
        call.chunk_computed(chunk(num_tokens))
    call.first_token_sampled(token(7, FinishReason.STOP))
    messages = await told(call)
    assert len(messages) == 1
    assert messages[0].num_computed_tokens == 608
    assert messages[0].outcome.finish_reason == "stop"


async def test_the_times_begin_with_the_first_chunk() -> None:
    began_s = time.monotonic()
    call = PrefillCall("r~1", "", deadline_s=20)
    started_s = time.monotonic() + 1.0
    call.chunk_computed(chunk(32, started_s))
    call.chunk_computed(chunk(64, started_s + 1.0))
    call.first_token_sampled(token(7))
    outcome = (await told(call))[-1].outcome
    assert 1.0 <= outcome.queue_s <= started_s - began_s
    assert outcome.queue_s + outcome.compute_s <= time.monotonic() - began_s, "what is not waiting is computing"


async def test_the_first_failure_is_the_one_that_is_told() -> None:
    call = PrefillCall("r~1", "t", deadline_s=20)
    call.fail(InvalidRequest("empty"))
    call.fail(LeaseExpired("and so nobody wants it"))
    with pytest.raises(InvalidRequest):
        await told(call)


async def test_no_outcome_in_time_is_an_error() -> None:
    call = PrefillCall("r~1", "", deadline_s=0.01)
    call.chunk_computed(chunk(32))
    with pytest.raises(DeadlineExceeded, match="32 tokens"):
        await told(call)
