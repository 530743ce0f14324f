"""One message a step for everybody, and bounded memory when the reader is slow."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from disaggregated import token_logprobs
from disaggregated.step_batches import deltas_of
from disaggregated.v1 import control_pb2
from generation_server.step_stream import StepStream


def delta(stream_key: int, first_position: int, *token_ids: int, finish_reason: str = "") -> control_pb2.StreamDelta:
    return control_pb2.StreamDelta(
        stream_key=stream_key, first_position=first_position, token_ids=token_ids, finish_reason=finish_reason
    )


def only_of(batch: control_pb2.StepBatch) -> control_pb2.StreamDelta:
    (found,) = deltas_of(batch)
    return found


async def next_batch(batches: AsyncIterator[control_pb2.StepBatch]) -> control_pb2.StepBatch:
    return await asyncio.wait_for(anext(batches), 20)


async def test_one_message_carries_what_a_step_brought_for_all_requests() -> None:
    stream = StepStream()
    stream.put(delta(1, 10, 5))
    stream.put(delta(2, 20, 6))
    stream.send(step=3)
    batch = await next_batch(stream.batches())
    assert batch.step == 3
    assert [(found.stream_key, list(found.token_ids)) for found in deltas_of(batch)] == [(1, [5]), (2, [6])]


async def test_steps_that_nobody_reads_are_joined_into_one_message() -> None:
    stream = StepStream()
    first = delta(1, 10, 100)
    first.times.transport = "SHM"
    stream.put(first)
    for step in range(1, 500):
        stream.put(delta(1, 10 + step, 100 + step, finish_reason="length" if step == 499 else ""))
        stream.send(step)
    batch = await next_batch(stream.batches())
    assert batch.step == 499
    assert only_of(batch).first_position == 10
    assert list(only_of(batch).token_ids) == list(range(100, 600))
    assert only_of(batch).finish_reason == "length"
    assert only_of(batch).times.transport == "SHM"


async def test_logprobs_are_joined_as_their_tokens_are() -> None:
    stream = StepStream()
    for position in range(10, 14):
        told = delta(1, position, 100 + position)
        told.logprobs.MergeFrom(
            control_pb2.Logprobs(
                logprobs=[-position],
                ranks=[position],
                num_top=2,
                top_token_ids=[position, 0],
                top_logprobs=[-1.0, -2.0],
            )
        )
        stream.put(told)
    stream.send(1)
    (joined,) = (await next_batch(stream.batches())).deltas
    assert list(joined.token_ids) == [110, 111, 112, 113]
    found = token_logprobs.from_proto(joined.logprobs)
    assert [one.rank for one in found] == [10, 11, 12, 13]
    assert [one.top_token_ids for one in found] == [(10, 0), (11, 0), (12, 0), (13, 0)]


async def test_an_error_joins_the_tokens_that_came_before_it() -> None:
    stream = StepStream()
    stream.put(delta(1, 10, 100))
    stream.put(control_pb2.StreamDelta(stream_key=1, error=control_pb2.StreamError(kind="PeerLost")))
    stream.send(1)
    batch = await next_batch(stream.batches())
    assert list(only_of(batch).token_ids) == [100]
    assert only_of(batch).error.kind == "PeerLost"


async def test_that_a_request_has_landed_is_joined_with_the_token_that_comes_after_all() -> None:
    stream = StepStream()
    landed, first = delta(1, 8), delta(1, 8, 5)
    landed.times.transport = first.times.transport = "SHM"
    first.times.landed_to_step_s = 2.0
    stream.put(landed)
    stream.put(first)
    stream.send(1)
    (found,) = (await next_batch(stream.batches())).deltas
    assert (found.first_position, list(found.token_ids), found.times.landed_to_step_s) == (8, [5], 2.0)


def test_a_token_that_skips_a_position_is_our_own_mistake() -> None:
    stream = StepStream()
    stream.put(delta(1, 10, 100))
    with pytest.raises(AssertionError, match="position 12, 11 was due"):
        stream.put(delta(1, 12, 102))


async def test_a_request_is_live_until_its_last_token_was_handed_over() -> None:
    sent: list[int] = []
    stream = StepStream()
    stream.put(delta(1, 10, 100, finish_reason="stop"), last_sent=lambda: sent.append(1))
    stream.put(delta(2, 10, 100), last_sent=lambda: sent.append(2))
    stream.send(1)
    batches = stream.batches()
    await next_batch(batches)
    assert sent == []
    stream.end()
    with pytest.raises(StopAsyncIteration):
        await next_batch(batches)
    assert sent == [1]


async def test_a_key_that_is_used_again_while_its_last_delta_leaves_is_not_mistaken_for_its_first_owner() -> None:
    sent: list[str] = []
    stream = StepStream()
    stream.put(delta(1, 10, 100, finish_reason="stop"), last_sent=lambda: sent.append("first"))
    stream.send(1)
    batches = stream.batches()
    await next_batch(batches)
    stream.put(delta(1, 30, 300, finish_reason="stop"), last_sent=lambda: sent.append("second"))
    stream.drop(1)
    stream.end()
    with pytest.raises(StopAsyncIteration):
        await next_batch(batches)
    assert sent == ["first"]


async def test_what_was_dropped_does_not_leave_and_an_ended_stream_gives_what_is_left() -> None:
    stream = StepStream()
    stream.put(delta(1, 10, 100))
    stream.put(delta(2, 10, 200))
    stream.drop(1)
    stream.drop(7)
    stream.send(1)
    stream.end()
    batches = [batch async for batch in stream.batches()]
    assert [[found.stream_key for found in deltas_of(batch)] for batch in batches] == [[2]]
