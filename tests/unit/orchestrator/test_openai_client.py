"""The stock OpenAI client, over a real socket, before fake servers that speak the real protocol."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.support.front_door import front_door

CHAT: Any = [{"role": "user", "content": "Say something."}]
CHAT_PROMPT = "[user]Say something.[assistant]"


def client_of(url: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


async def test_a_chat_is_answered_with_text_and_usage() -> None:
    async with front_door() as door, client_of(door.url) as client:
        answer = await client.chat.completions.create(
            model="fake",
            messages=CHAT,
            max_completion_tokens=12,
            temperature=0,
            seed=7,
        )
        ids = door.model.tokenizer.encode(CHAT_PROMPT)
        text, reason = door.expected(ids, max_tokens=12, seed=7)
        assert answer.object == "chat.completion"
        assert answer.model == "house/fake"
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (text, reason)
        assert answer.usage is not None
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 12)
        assert answer.usage.prompt_tokens_details is not None
        assert answer.usage.prompt_tokens_details.cached_tokens == 0


async def test_a_streamed_chat_is_the_same_text_in_order() -> None:
    async with front_door() as door, client_of(door.url) as client:
        stream: Any = await client.chat.completions.create(
            model="house/fake", messages=CHAT, max_tokens=30, temperature=0, seed=7, stream=True,
            stream_options={"include_usage": True},
        )  # fmt: skip
        chunks = [chunk async for chunk in stream]
        text, reason = door.expected(door.model.tokenizer.encode(CHAT_PROMPT), max_tokens=30, seed=7)
        assert chunks[0].choices[0].delta.role == "assistant"
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
        assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == reason
        assert chunks[-1].choices == []
        assert chunks[-1].usage.completion_tokens == 30
        assert all(chunk.usage is None for chunk in chunks[:-1])
        await door.wait_idle()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["plain text", ["one", "two", "three"], [1, 2, 3], [[1, 2], [3, 4, 5]]])
async def test_a_completion_takes_every_kind_of_prompt(prompt: Any, stream: bool) -> None:
    async with front_door() as door, client_of(door.url) as client:
        answer: Any = await client.completions.create(
            model="fake", prompt=prompt, max_tokens=5, temperature=0, seed=3, stream=stream
        )
        many = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
        ids = [door.model.tokenizer.encode(one) if isinstance(one, str) else one for one in many]
        texts = [""] * len(ids)
        if stream:
            async for chunk in answer:
                texts[chunk.choices[0].index] += chunk.choices[0].text
        else:
            texts = [choice.text for choice in answer.choices]
        assert texts == [door.expected(one, max_tokens=5, seed=3)[0] for one in ids]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_ends_the_answer_and_frees_the_servers(stream: bool) -> None:
    async with front_door() as door, client_of(door.url) as client:
        ids = door.model.tokenizer.encode("stop me")
        text, _ = door.expected(ids, max_tokens=400, seed=1)
        stop = text[20:23]
        answer: Any = await client.completions.create(
            model="fake", prompt="stop me", max_tokens=4000, temperature=0, seed=1, stop=[stop, "never said"],
            stream=stream,
        )  # fmt: skip
        if stream:
            chunks = [chunk.choices[0] async for chunk in answer]
            found, reason = "".join(chunk.text for chunk in chunks), chunks[-1].finish_reason
        else:
            found, reason = answer.choices[0].text, answer.choices[0].finish_reason
        assert (found, reason) == (text[: text.index(stop)], "stop")
        await door.wait_idle()


async def test_without_a_seed_two_answers_differ_and_with_one_they_do_not() -> None:
    async with front_door() as door, client_of(door.url) as client:
        texts = [
            (await client.completions.create(model="fake", prompt="x", max_tokens=20, seed=seed)).choices[0].text
            for seed in (None, None, 5, 5)
        ]
        assert texts[0] != texts[1]
        assert texts[2] == texts[3]


async def test_the_models_are_listed_by_full_name() -> None:
    async with front_door() as door, client_of(door.url) as client:
        models = [model async for model in client.models.list()]
        assert [model.id for model in models] == ["house/fake"]


async def test_errors_come_as_the_clients_own_exceptions() -> None:
    async with front_door() as door, client_of(door.url) as client:
        with pytest.raises(openai.NotFoundError) as unknown:
            await client.completions.create(model="gpt-9", prompt="x")
        assert unknown.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as refused:
            await client.completions.create(model="fake", prompt="x", n=129)
        assert refused.value.param == "n"
