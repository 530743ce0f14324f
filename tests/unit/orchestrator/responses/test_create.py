"""The stock OpenAI client's `responses`, over a real socket, before fake servers that speak the real protocol."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
import pytest_asyncio

from tests.support.fake_cluster import Temper
from tests.support.front_door import Door, front_door

SAY = "Say something."
FIXED: Any = {"model": "fake", "max_output_tokens": 12, "temperature": 0, "extra_body": {"seed": 7}}
pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def door() -> AsyncIterator[Door]:
    async with front_door() as opened:
        yield opened


def expected(door: Door, prompt: str) -> str:
    return door.expected(door.model.tokenizer.encode(prompt), max_tokens=12, seed=7)[0]


async def test_a_text_is_answered_as_a_chat_would_be(door: Door, client: openai.AsyncOpenAI) -> None:
    response = await client.responses.create(input=SAY, **FIXED)
    assert response.output_text == expected(door, f"[user]{SAY}[assistant]")
    assert (response.status, response.model, response.object) == ("incomplete", "house/fake", "response")
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.usage is not None
    assert (response.usage.input_tokens, response.usage.output_tokens, response.usage.total_tokens) == (31, 12, 43)


async def test_instructions_come_first_and_join_what_a_client_put_there_itself(
    door: Door, client: openai.AsyncOpenAI
) -> None:
    items: Any = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "input_text", "text": SAY}]},
    ]
    response = await client.responses.create(input=items, instructions="Be brief.", **FIXED)
    assert response.output_text == expected(door, f"[system]Be brief.\n\nBe kind.[user]{SAY}[assistant]")
    assert response.instructions == "Be brief."


async def test_a_conversation_goes_on_where_it_was_without_its_instructions(
    door: Door, client: openai.AsyncOpenAI
) -> None:
    first = await client.responses.create(input=SAY, instructions="Be brief.", **FIXED)
    second = await client.responses.create(input="More.", previous_response_id=first.id, **FIXED)
    said = f"[user]{SAY}[assistant]{first.output_text}[user]More.[assistant]"
    assert second.output_text == expected(door, said)
    assert second.previous_response_id == first.id
    third = await client.responses.create(input="More.", previous_response_id=second.id, **FIXED)
    assert third.usage is not None
    assert second.usage is not None
    assert third.usage.input_tokens > second.usage.input_tokens


async def test_a_stream_is_the_same_response_in_openai_s_order(client: openai.AsyncOpenAI) -> None:
    whole = await client.responses.create(input=SAY, **FIXED)
    events = [event async for event in await client.responses.create(input=SAY, stream=True, **FIXED)]
    kinds = [event.type for event in events]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert [kind for kind in kinds if kind != "response.output_text.delta"] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(deltas) == whole.output_text
    assert len(deltas) > 1
    last = events[-1]
    assert last.type == "response.incomplete"
    assert last.response.output_text == whole.output_text
    assert last.response.usage is not None
    assert whole.usage is not None
    assert last.response.usage.output_tokens == whole.usage.output_tokens


async def test_the_client_s_own_accumulation_agrees_with_the_end(client: openai.AsyncOpenAI) -> None:
    """`stream()` puts the response together from the events and refuses an order that it does not know."""
    stop = (await client.responses.create(input=SAY, **FIXED)).output_text[6:8]
    fields = {**FIXED, "extra_body": {"seed": 7, "stop": stop}}
    async with client.responses.stream(input=SAY, **fields) as stream:
        async for _ in stream:
            pass
        response = await stream.get_final_response()
    whole = await client.responses.create(input=SAY, **fields)
    assert whole.status == "completed"
    assert response.output_text == whole.output_text


async def test_a_response_can_be_looked_up_listed_and_deleted(client: openai.AsyncOpenAI) -> None:
    made = await client.responses.create(input=SAY, metadata={"a": "b"}, **FIXED)
    found = await client.responses.retrieve(made.id)
    assert found == made
    items = [item async for item in client.responses.input_items.list(made.id)]
    assert [item.type for item in items] == ["message"]
    await client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError, match="there is no response"):
        await client.responses.retrieve(made.id)
    with pytest.raises(openai.BadRequestError, match="there is no response"):
        await client.responses.create(input=SAY, previous_response_id=made.id, **FIXED)


async def test_what_is_not_to_be_stored_is_not(door: Door, client: openai.AsyncOpenAI) -> None:
    made = await client.responses.create(input=SAY, store=False, **FIXED)
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(made.id)


async def test_tokens_are_counted_as_they_would_be_used(client: openai.AsyncOpenAI) -> None:
    used = await client.responses.create(input=SAY, instructions="Be brief.", **FIXED)
    counted = await client.responses.input_tokens.count(model="fake", input=SAY, instructions="Be brief.")
    assert used.usage is not None
    assert counted.input_tokens == used.usage.input_tokens


async def test_a_stream_says_how_it_broke(client: openai.AsyncOpenAI) -> None:
    slow = Temper(latency_s=0.0, step_s=0.2, prefill_token_s=0.0)
    async with front_door(request_timeout_s=1.5, temper=slow) as broken:
        its_client = client.with_options(base_url=f"{broken.url}/v1")
        fields = {**FIXED, "max_output_tokens": 900}
        events = [event async for event in await its_client.responses.create(input=SAY, stream=True, **fields)]
    assert events[-1].type == "response.failed"
    assert events[-1].response.error is not None
    assert "not finished after " in events[-1].response.error.message
