"""A chat whose last message is gone on with, and one whose reply begins with that message."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from typing import Any, Final

import pytest
import pytest_asyncio

from disaggregated.grammar import Grammar, GrammarKind
from orchestrator.api.fields import Fields
from orchestrator.parsers import Content, Reasoning
from orchestrator.parsers.choose import Wanted, plan_reply
from orchestrator.parsers.formats import TOOL_FORMATS, ReplyFormats
from orchestrator.parsers.reasoning import REASONING
from tests.support.byte_model import byte_model
from tests.support.front_door import Door, front_door
from tests.support.read_chat import read_chat
from tests.support.script import says
from tests.unit.parsers.pieces import parsed

CHAT: Final = "/v1/chat/completions"
USER: Final = {"role": "user", "content": "Write a poem."}
OPEN: Final = [USER, {"role": "assistant", "content": "Roses are"}]
RENDERED: Final = "[user]Write a poem.[assistant]Roses are"
TOOL: Final = {"type": "function", "function": {"name": "weather"}}

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def door() -> AsyncIterator[Door]:
    async with front_door(allow_request_chat_template=True) as opened:
        yield opened


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "fake", "messages": OPEN, "max_tokens": 6, "continue_final_message": True, **fields}


async def streamed(door: Door, **fields: Any) -> list[Any]:
    async with door.http.post(door.url + CHAT, json=body(stream=True, **fields)) as answer:
        assert answer.status == 200, await answer.text()
        *lines, done, _ = (await answer.text()).split("\n\n")
    assert done == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def text_of(events: list[Any], index: int = 0) -> str:
    choices = [choice for event in events for choice in event["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


@pytest.mark.parametrize("said", [{}, {"add_generation_prompt": False}, {"add_generation_prompt": None}])
async def test_the_reply_goes_on_from_the_last_message(door: Door, said: dict[str, Any]) -> None:
    fields = {"temperature": 0, "seed": 4, **said}
    text, _ = door.expected(door.model.tokenizer.encode(RENDERED), max_tokens=6, seed=4)
    status, answer = await door.post(CHAT, body(**fields))
    assert (status, answer["choices"][0]["message"]["content"]) == (200, text)
    assert text_of(await streamed(door, **fields)) == text
    _, counted = await door.post("/tokenize", {"messages": OPEN, "continue_final_message": True})
    assert door.model.tokenizer.decode(counted["tokens"]) == RENDERED
    assert counted["count"] == answer["usage"]["prompt_tokens"]


async def test_the_client_s_own_template_is_cut_too(door: Door) -> None:
    fields = {"chat_template": "{% for m in messages %}<{{ m.content }}>{% endfor %}", "continue_final_message": True}
    _, counted = await door.post(CHAT, body(**fields))
    assert counted["usage"]["prompt_tokens"] == len("<Write a poem.><Roses are")


async def test_responses_go_on_too(door: Door) -> None:
    status, answer = await door.post(
        "/v1/responses", {"model": "fake", "input": OPEN, "max_output_tokens": 2, "continue_final_message": True}
    )
    assert (status, answer["usage"]["input_tokens"]) == (200, len(RENDERED))


CASES: Final[list[tuple[dict[str, Any], str, str]]] = [
    ({"add_generation_prompt": True}, "add_generation_prompt", "must be false .* when continue_final_message is true"),
    ({"messages": [USER]}, "continue_final_message", "the last message must be the assistant's, its role is 'user'"),
    ({"messages": [{"role": "assistant"}]}, "continue_final_message", "no content to go on from"),
    ({"continue_final_message": "yes"}, "continue_final_message", "must be true or false, is a string"),
    ({"chat_template": "x"}, "continue_final_message", "the chat template does not show the last message"),
    ({"messages": []}, "messages", "messages is empty"),
]


@pytest.mark.parametrize(("fields", "param", "message"), CASES, ids=[case[2][:30] for case in CASES])
async def test_a_mistake_is_told_by_field(door: Door, fields: dict[str, Any], param: str, message: str) -> None:
    status, answer = await door.post(CHAT, body(**fields))
    assert (status, answer["error"]["param"]) == (400, param)
    assert re.search(message, answer["error"]["message"]), answer


async def test_a_text_completion_has_no_message_to_go_on_from(door: Door) -> None:
    async with door.http.post(
        door.url + "/v1/completions",
        json={"model": "fake", "prompt": "x", "max_tokens": 1, "continue_final_message": True},
    ) as answer:
        assert answer.status == 200
        assert answer.headers["x-disagg-ignored"] == "continue_final_message"


@pytest.mark.parametrize("tools", [{}, {"tools": [TOOL]}], ids=["plain", "tools"])
async def test_an_echo_puts_the_last_message_before_each_reply(door: Door, tools: dict[str, Any]) -> None:
    fields = {"temperature": 0, "seed": 4, "n": 2, **tools}
    _, bare = await door.post(CHAT, body(**fields))
    _, echoed = await door.post(CHAT, body(echo=True, **fields))
    events = await streamed(door, echo=True, **fields)
    for index in (0, 1):
        text = bare["choices"][index]["message"]["content"]
        assert echoed["choices"][index]["message"]["content"] == f"Roses are{text}"
        assert text_of(events, index) == f"Roses are{text}"
    assert echoed["usage"] == bare["usage"]


async def test_an_echo_has_no_part_in_logprobs(door: Door) -> None:
    _, answer = await door.post(CHAT, body(echo=True, logprobs=True, max_tokens=3, ignore_eos=True))
    assert len(answer["choices"][0]["logprobs"]["content"]) == 3


async def test_only_the_assistant_s_own_message_is_echoed(door: Door) -> None:
    fields = {"messages": [USER], "continue_final_message": False, "temperature": 0, "seed": 4}
    _, bare = await door.post(CHAT, body(**fields))
    _, echoed = await door.post(CHAT, body(echo=True, **fields))
    assert echoed["choices"] == bare["choices"]


async def test_a_chat_s_echo_still_wants_a_token(door: Door) -> None:
    status, answer = await door.post(CHAT, body(echo=True, max_tokens=0))
    assert (status, answer["error"]["param"]) == (400, "max_tokens")


async def test_calls_that_follow_the_message_are_calls(door: Door) -> None:
    reply = 'It is sunny.\n<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>'
    messages = [{"role": "user", "content": says(reply)}, {"role": "assistant", "content": "It is"}]
    _, answer = await door.post(CHAT, body(messages=messages, tools=[TOOL], max_tokens=200))
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == " sunny."
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "weather", "arguments": "{}"}


THINKING: Final = ReplyFormats(tools=None, reasoning=REASONING["qwen3"], reasoning_end=(8,))
ALWAYS: Final = ReplyFormats(tools=None, reasoning=REASONING["deepseek_r1"], reasoning_end=(8,))


@pytest.mark.parametrize(
    ("formats", "said", "tail", "is_within"),
    [
        (THINKING, "<think>I wonder", "<think>I wonder", True),
        (THINKING, "<think>I wonder</think> So", "So", False),
        (THINKING, "So", "<think>So", False),
        (THINKING, " ", "<think>\n ", True),
        (THINKING, "", "<think>\n\n</think>\n", False),
        (ALWAYS, "So", "[assistant]So", False),
        (ALWAYS, "", "[assistant]", False),
        (ALWAYS, "<think>", "[assistant]<think>", True),
    ],
)
async def test_reasoning_that_the_message_left_open_goes_on(
    formats: ReplyFormats, said: str, tail: str, is_within: bool
) -> None:
    wanted = Wanted(grammar=Grammar(GrammarKind.JSON_OBJECT))
    plan = plan_reply(wanted, formats, tail, continued=said)
    assert plan.make_parser is not None
    assert plan.grammar is not None
    assert parsed(plan.make_parser(), ["hm"]) == [Reasoning("hm") if is_within else Content("hm")]
    assert plan.grammar.starts_after == ((8,) if is_within else ())


async def test_a_harmony_message_that_goes_on_is_followed_by_the_grammar_at_once() -> None:
    formats = ReplyFormats(tools=TOOL_FORMATS["harmony"], reasoning=None, reasoning_end=(1, 2))
    wanted = Wanted(grammar=Grammar(GrammarKind.JSON_OBJECT))
    begun, fresh = (plan_reply(wanted, formats, "", continued=said) for said in ("", None))
    assert begun.grammar is not None
    assert fresh.grammar is not None
    assert (begun.grammar.starts_after, fresh.grammar.starts_after) == ((), (1, 2))


async def test_what_is_said_is_read_with_its_parts() -> None:
    parts = [{"type": "text", "text": "Roses"}, {"type": "text", "text": "are"}]
    fields = Fields({"messages": [USER, {"role": "assistant", "content": parts}], "continue_final_message": True})
    formats = ReplyFormats(tools=TOOL_FORMATS["hermes"], reasoning=None)
    chat = await read_chat(fields, byte_model(), formats, grammar=None, allows_template=False)
    assert chat.said == "Roses\nare"
    assert byte_model().tokenizer.decode(chat.token_ids).endswith("[assistant]Roses\nare")
