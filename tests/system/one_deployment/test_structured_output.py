"""Structured output by a whole deployment and the real model: both halves follow the grammar, streamed or not."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any, Final

import openai
import pytest

MODEL: Final = "smollm2-135m-instruct"
QUESTION: Any = [{"role": "user", "content": "Describe a person named Ann who likes red and blue, as JSON."}]
SEEDED: Final[dict[str, Any]] = {"temperature": 1.0, "seed": 4}
PERSON: Final = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "colours": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 1, "maxItems": 2},
    },
    "required": ["name", "age", "colours"],
    "additionalProperties": False,
}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}

pytestmark = pytest.mark.asyncio(loop_scope="package")


def is_person(text: str) -> bool:
    person = json.loads(text)
    return (
        person.keys() == {"name", "age", "colours"}
        and isinstance(person["name"], str)
        and len(person["name"]) <= 12
        and 0 <= person["age"] <= 120
        and 1 <= len(person["colours"]) <= 2
        and set(person["colours"]) <= {"red", "green", "blue"}
    )


async def test_a_reply_is_json_of_the_schema_whatever_is_sampled(client: openai.AsyncOpenAI) -> None:
    async def ask(seed: int) -> openai.types.chat.ChatCompletion:
        return await client.chat.completions.create(
            model=MODEL, messages=QUESTION, response_format=FORMAT, max_tokens=200, temperature=1.5, seed=seed
        )

    async with asyncio.TaskGroup() as group:
        asked = [group.create_task(ask(seed)) for seed in range(8)]
    for one in asked:
        (choice,) = one.result().choices
        assert choice.finish_reason == "stop"
        assert is_person(choice.message.content or ""), choice.message.content


async def test_a_stream_is_the_same_text_and_others_are_as_without(client: openai.AsyncOpenAI) -> None:
    fields: dict[str, Any] = {"model": MODEL, "messages": QUESTION, **SEEDED, "max_tokens": 120}
    free = await client.chat.completions.create(**fields)
    whole = await client.chat.completions.create(**fields, response_format=FORMAT)
    async with asyncio.TaskGroup() as group:
        beside = group.create_task(client.chat.completions.create(**fields))
        stream = await client.chat.completions.create(**fields, response_format=FORMAT, stream=True)
        pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert "".join(pieces) == whole.choices[0].message.content
    assert beside.result().choices[0].message.content == free.choices[0].message.content


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"response_format": {"type": "json_object"}}, r"\{.*"),
        ({"extra_body": {"guided_choice": ["red", "green"]}}, "red|green"),
        ({"extra_body": {"guided_regex": "[A-Z][a-z]{2,6} is [0-9]{2}"}}, "[A-Z][a-z]{2,6} is [0-9]{2}"),
        ({"extra_body": {"structured_outputs": {"grammar": 'root ::= "a" [b-c]{3} ("!" | "?")'}}}, "a[bc]{3}[!?]"),
        ({"extra_body": {"guided_grammar": 'start: "<" /[a-z]{2,5}/ ">"'}}, "<[a-z]{2,5}>"),
        ({"extra_body": {"guided_decoding": {"json": {"type": "boolean"}}}}, "true|false"),
    ],
)
@pytest.mark.parametrize("prompt", ["Hello", "The man whom I have seen in the house over there has a name, which is"])
async def test_every_kind_of_grammar_is_followed_wherever_the_prompt_is_computed(
    client: openai.AsyncOpenAI, fields: dict[str, Any], pattern: str, prompt: str
) -> None:
    messages: Any = [{"role": "user", "content": prompt}]
    answer = await client.chat.completions.create(model=MODEL, messages=messages, max_tokens=40, **SEEDED, **fields)
    assert re.fullmatch(pattern, answer.choices[0].message.content or "", re.DOTALL)


@pytest.mark.parametrize("max_tokens", [1, 2])
async def test_a_text_that_is_cut_says_length_and_is_the_beginning_of_one(
    client: openai.AsyncOpenAI, max_tokens: int
) -> None:
    answer = await client.chat.completions.create(
        model=MODEL, messages=QUESTION, response_format=FORMAT, max_tokens=max_tokens, **SEEDED
    )
    assert answer.choices[0].finish_reason == "length"
    assert '{"name": "'.startswith(answer.choices[0].message.content or "x")


async def test_several_replies_logprobs_and_penalties_go_with_a_grammar(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        response_format=FORMAT,
        n=2,
        logprobs=True,
        frequency_penalty=1.0,
        max_tokens=200,
        **SEEDED,
    )
    for choice in answer.choices:
        assert is_person(choice.message.content or "")
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert "".join(token.token for token in choice.logprobs.content).startswith(choice.message.content or "x")


async def test_a_grammar_that_cannot_be_compiled_is_the_clients_mistake(client: openai.AsyncOpenAI) -> None:
    format_: Any = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": {"type": "thing"}}}
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(model=MODEL, messages=QUESTION, response_format=format_)
    assert caught.value.param == "response_format"
    assert "cannot be compiled: Invalid type: thing" in str(caught.value)
