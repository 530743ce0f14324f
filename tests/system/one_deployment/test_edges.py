"""Requests that end as soon as they begin: of every API, whole and streamed, wherever the prompt is computed.

A long prompt's first token comes from the context server, which then ends the request by itself.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Final

import openai
import pytest

MODEL: Final = "smollm2-135m-instruct"
END_ID: Final = 2
LONG: Final = "What is the capital of France? I have asked this of everybody, and nobody could tell me for certain."
SHORT: Final = "Hi"
TOOL: Final = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
ENDS_AT_ONCE: Final = {"logit_bias": {str(END_ID): 100}}

pytestmark = pytest.mark.asyncio(loop_scope="package")


@dataclasses.dataclass(frozen=True)
class Answer:
    text: str
    reason: str
    num_tokens: int


class Chats:
    def __init__(self, client: openai.AsyncOpenAI) -> None:
        self._create: Any = client.chat.completions.create

    async def ask(self, prompt: str, *, stream: bool, max_tokens: int, **fields: Any) -> Answer:
        messages = [{"role": "user", "content": prompt}]
        body = {"model": MODEL, "messages": messages, "max_tokens": max_tokens, "temperature": 0, "extra_body": fields}
        return await _of_choices(self._create, body, stream=stream)


class Texts:
    def __init__(self, client: openai.AsyncOpenAI) -> None:
        self._create: Any = client.completions.create

    async def ask(self, prompt: str, *, stream: bool, max_tokens: int, **fields: Any) -> Answer:
        body = {"model": MODEL, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "extra_body": fields}
        return await _of_choices(self._create, body, stream=stream)


class Responses:
    def __init__(self, client: openai.AsyncOpenAI) -> None:
        self._create: Any = client.responses.create

    async def ask(self, prompt: str, *, stream: bool, max_tokens: int, **fields: Any) -> Answer:
        body = {"model": MODEL, "input": prompt, "max_output_tokens": max_tokens, "temperature": 0, "store": False}
        told = await self._create(**body, stream=stream, extra_body=fields)
        deltas = ""
        if stream:
            events = [event async for event in told]
            deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")
            told = events[-1].response
            assert told.output_text == deltas
        reason = {"completed": "stop", "incomplete": "length"}[told.status]
        return Answer(told.output_text, reason, told.usage.output_tokens)


async def _of_choices(create: Any, body: dict[str, Any], *, stream: bool) -> Answer:
    if not stream:
        told = await create(**body)
        (choice,) = told.choices
        text = choice.text if hasattr(choice, "text") else choice.message.content
        return Answer(text or "", choice.finish_reason, told.usage.completion_tokens)
    chunks = [chunk async for chunk in await create(**body, stream=True, stream_options={"include_usage": True})]
    *said, usage = chunks
    assert not usage.choices
    choices = [chunk.choices[0] for chunk in said]
    text = "".join((one.text if hasattr(one, "text") else one.delta.content) or "" for one in choices)
    reasons = [one.finish_reason for one in choices if one.finish_reason]
    assert len(reasons) == 1
    assert choices[-1].finish_reason == reasons[0]
    return Answer(text, reasons[0], usage.usage.completion_tokens)


@pytest.fixture(params=[Chats, Texts, Responses], ids=["chats", "texts", "responses"])
def api(request: pytest.FixtureRequest, client: openai.AsyncOpenAI) -> Any:
    return request.param(client)


@pytest.mark.parametrize("prompt", [LONG, SHORT], ids=["long", "short"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_a_request_that_ends_with_its_first_tokens_says_why(api: Any, prompt: str, stream: bool) -> None:
    async def ask(max_tokens: int, **fields: Any) -> Answer:
        answer: Answer = await api.ask(prompt, stream=stream, max_tokens=max_tokens, **fields)
        return answer

    six = await ask(6)
    assert six.text
    for max_tokens in (1, 2):
        cut = await ask(max_tokens)
        assert (cut.reason, cut.num_tokens) == ("length", max_tokens)
        assert six.text.startswith(cut.text)
    assert await ask(1, **ENDS_AT_ONCE) == Answer("", "stop", 1)
    assert await ask(6, **ENDS_AT_ONCE) == Answer("", "stop", 1)
    assert (await ask(2, **ENDS_AT_ONCE, ignore_eos=True)).reason == "length"
    assert (await ask(2, **ENDS_AT_ONCE, min_tokens=1)).num_tokens == 2
    stopped = await ask(6, stop=[six.text[0]])
    assert (stopped.text, stopped.reason) == ("", "stop")
    assert (await ask(6, stop=[six.text[:3]], include_stop_str_in_output=True)).text == six.text[:3]
    assert (await ask(6, guided_choice=["Y"])).text == "Y"
    assert await ask(6, guided_regex="x?", **ENDS_AT_ONCE) == Answer("", "stop", 1)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_a_stopping_token_that_comes_first_is_not_shown(client: openai.AsyncOpenAI, stream: bool) -> None:
    told: Any = await client.completions.create(
        model=MODEL, prompt=LONG, max_tokens=1, temperature=0, extra_body={"return_token_ids": True}
    )
    (first,) = told.choices[0].token_ids
    answer = await Texts(client).ask(LONG, stream=stream, max_tokens=6, stop_token_ids=[first])
    assert answer == Answer("", "stop", 1)


@pytest.mark.parametrize("max_tokens", [1, 2])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_a_forced_call_that_is_cut_before_its_name_is_an_answer_without_content(
    client: openai.AsyncOpenAI, stream: bool, max_tokens: int
) -> None:
    chat = {"tools": [{"type": "function", "function": TOOL}], "tool_choice": "required"}
    assert await Chats(client).ask(LONG, stream=stream, max_tokens=max_tokens, **chat) == Answer(
        "", "length", max_tokens
    )
    response = {"tools": [{"type": "function", **TOOL}], "tool_choice": "required"}
    answer = await Responses(client).ask(LONG, stream=stream, max_tokens=max_tokens, **response)
    assert answer == Answer("", "length", max_tokens)
