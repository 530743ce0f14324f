"""Replies that go on from a message, and streams that are counted as they come, by the real model."""

from __future__ import annotations

from typing import Any, Final

import openai
import pytest

from disaggregated.model_files import resolve
from disaggregated.text import Tokenizer

MODEL: Final = "smollm2-135m-instruct"
QUESTION: Final = {"role": "user", "content": "What is the capital of France? Answer in one short sentence."}
OPEN: Final[Any] = [QUESTION, {"role": "assistant", "content": "The capital of France is"}]
GOES_ON: Final = {"continue_final_message": True, "add_generation_prompt": False}

pytestmark = pytest.mark.asyncio(loop_scope="package")


@pytest.mark.parametrize("messages", [OPEN, [{"role": "user", "content": "Hi"}, OPEN[1]]], ids=["long", "short"])
async def test_a_chat_goes_on_as_its_prompt_s_text_does(client: openai.AsyncOpenAI, messages: Any) -> None:
    tokenizer = Tokenizer.load(resolve(MODEL, weights=False).path)
    prompt = tokenizer.render_chat(messages, add_generation_prompt=False, continue_final_message=True)
    assert prompt.endswith("<|im_start|>assistant\nThe capital of France is")
    same: dict[str, Any] = {"model": MODEL, "max_tokens": 8, "temperature": 0}
    text = await client.completions.create(**same, prompt=prompt, extra_body={"add_special_tokens": False})
    chat = await client.chat.completions.create(**same, messages=messages, extra_body=GOES_ON)
    assert chat.choices[0].message.content == text.choices[0].text
    assert chat.choices[0].message.content.startswith(" ")
    assert chat.usage.prompt_tokens == text.usage.prompt_tokens


async def test_an_echoed_chat_reads_as_one_sentence(client: openai.AsyncOpenAI) -> None:
    stream: Any = await client.chat.completions.create(
        model=MODEL, messages=OPEN, max_tokens=4, temperature=0, stream=True, extra_body={**GOES_ON, "echo": True}
    )
    text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert text.startswith("The capital of France is ")


@pytest.mark.parametrize("prompt", [QUESTION["content"], "Hi"], ids=["long", "short"])
async def test_every_event_of_a_stream_is_counted(client: openai.AsyncOpenAI, prompt: str) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    stream = await client.completions.create(
        model=MODEL, prompt=prompt, max_tokens=12, temperature=0, stream=True, stream_options=options
    )
    *usages, last = [chunk.usage async for chunk in stream]
    assert last is not None
    counts = [usage.completion_tokens for usage in usages if usage is not None]
    assert len(counts) == len(usages)
    assert counts == sorted(counts)
    assert counts[-1] == last.completion_tokens
    assert {usage.prompt_tokens for usage in usages if usage is not None} == {last.prompt_tokens}
