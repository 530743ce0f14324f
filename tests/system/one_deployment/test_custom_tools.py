"""Inputs of custom tools, kept to their grammars by both halves of a deployment."""

from __future__ import annotations

import asyncio
import re
from typing import Any, Final

import openai
import pytest
from openai.types.chat import ChatCompletionMessageCustomToolCall

from tests.support.followed import EXPRESSION_GRAMMAR

MODEL: Final = "smollm2-135m-instruct"
QUESTION: Final = "On which date did the Berlin Wall fall? Use the tool, and answer with nothing else, please."
DATE: Final = r"\d{4}-(0[1-9]|1[0-2])-[0-3]\d"
LARK: Final = 'start: YEAR "-" MONTH "-" DAY\nYEAR: /[0-9]{4}/\nMONTH: /0[1-9]|1[0-2]/\nDAY: /[0-3][0-9]/\n'

pytestmark = pytest.mark.asyncio(loop_scope="package")


def tool(syntax: str, definition: str) -> Any:
    grammar = {"type": "grammar", "grammar": {"syntax": syntax, "definition": definition}}
    return {"type": "custom", "custom": {"name": "date", "description": "Takes a date.", "format": grammar}}


@pytest.mark.parametrize(("syntax", "definition"), [("lark", LARK), ("regex", DATE)], ids=["lark", "regex"])
@pytest.mark.parametrize("choice", ["required", {"type": "custom", "custom": {"name": "date"}}], ids=["any", "named"])
async def test_a_call_that_must_be_made_has_an_input_of_the_grammar(
    client: openai.AsyncOpenAI, syntax: str, definition: str, choice: Any
) -> None:
    fields: Any = {"tools": [tool(syntax, definition)], "tool_choice": choice, "parallel_tool_calls": False}
    messages: Any = [{"role": "user", "content": QUESTION}]

    async def ask(seed: int) -> str:
        answer = await client.chat.completions.create(
            model=MODEL, messages=messages, max_tokens=80, temperature=1.5, seed=seed, **fields
        )
        (call,) = answer.choices[0].message.tool_calls or [None]
        assert call is not None
        assert call.type == "custom"
        return str(call.custom.input)

    async with asyncio.TaskGroup() as group:
        asked = [group.create_task(ask(seed)) for seed in range(4)]
    for one in asked:
        assert re.fullmatch(DATE, one.result())


def asked_before(question: str, date: str) -> list[Any]:
    call = {"id": date, "type": "custom", "custom": {"name": "date", "input": date}}
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "tool_calls": [call]},
    ]


async def test_a_call_that_the_model_makes_by_itself_keeps_to_the_grammar(client: openai.AsyncOpenAI) -> None:
    """Its earlier inputs were none of the grammar, and it likes to repeat itself."""
    messages: Any = [
        *asked_before("When did the first man walk on the moon?", "20 July 1969"),
        *asked_before("When did the Titanic sink?", "15 April 1912"),
        *asked_before("When did the first world war end?", "11 November 1918"),
        {"role": "user", "content": "When did the Berlin Wall fall?"},
    ]

    async def ask(seed: int) -> Any:
        return await client.chat.completions.create(
            model=MODEL, messages=messages, tools=[tool("lark", LARK)], max_tokens=60, temperature=0.7, seed=seed
        )

    async with asyncio.TaskGroup() as group:
        asked = [group.create_task(ask(seed)) for seed in range(4)]
    calls = [call for one in asked for call in one.result().choices[0].message.tool_calls or ()]
    assert calls
    for call in calls:
        assert isinstance(call, ChatCompletionMessageCustomToolCall)
        assert re.fullmatch(DATE, call.custom.input), call


async def test_a_recursive_grammar_is_followed_where_the_tool_is_named(client: openai.AsyncOpenAI) -> None:
    calculator: Any = {
        "type": "custom",
        "name": "sum",
        "format": {"type": "grammar", "syntax": "lark", "definition": EXPRESSION_GRAMMAR},
    }
    fields: Any = {"model": MODEL, "input": "What is two times three plus one?", "tools": [calculator], "store": False}
    named: Any = {"type": "custom", "name": "sum"}
    answer = await client.responses.create(**fields, tool_choice=named, max_output_tokens=60, temperature=0.7)
    (item,) = answer.output
    assert item.type == "custom_tool_call"
    assert re.fullmatch(r"[0-9()+*]+", item.input)
    if answer.status == "completed":
        assert item.input.count("(") == item.input.count(")")
    with pytest.raises(openai.BadRequestError, match="expr is recursive"):
        await client.responses.create(**fields, tool_choice="auto")
