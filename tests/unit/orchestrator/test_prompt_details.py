"""What is told of a prompt, how it is cut, and which special tokens it begins with."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any, Final

import pytest
import pytest_asyncio
from tokenizers import Tokenizer as Backend
from tokenizers import processors

from disaggregated.text import ChatTemplate, Tokenizer
from orchestrator.api.fields import Fields
from orchestrator.api.truncation import Truncation
from orchestrator.parsers.formats import TEXT_ONLY
from orchestrator.served_model import ServedModel
from tests.support.byte_model import TEMPLATE, byte_model, byte_tokenizer
from tests.support.front_door import Door, front_door
from tests.support.read_chat import read_chat

CHAT: Final = "/v1/chat/completions"
TEXT: Final = "/v1/completions"
USER: Final = {"role": "user", "content": "Hi"}
RENDERED: Final = "[user]Hi[assistant]"

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def door() -> AsyncIterator[Door]:
    async with front_door(num_tokens_max=64) as opened:
        yield opened


async def answer_of(door: Door, path: str, **fields: Any) -> Any:
    prompt = {"messages": [USER]} if path == CHAT else {"prompt": "hello"}
    status, answer = await door.post(path, {"model": "fake", "max_tokens": 2, **prompt, **fields})
    assert status == 200, answer
    return answer


async def events_of(door: Door, path: str, **fields: Any) -> list[Any]:
    prompt = {"messages": [USER]} if path == CHAT else {"prompt": "hello"}
    body = {"model": "fake", "max_tokens": 4, "stream": True, **prompt, **fields}
    async with door.http.post(door.url + path, json=body) as answer:
        *lines, _done, _ = (await answer.text()).split("\n\n")
    return [json.loads(line.removeprefix("data: ")) for line in lines]


async def test_a_chat_s_answer_has_its_prompt(door: Door) -> None:
    answer = await answer_of(door, CHAT, return_token_ids=True, return_prompt_text=True, n=2)
    assert answer["prompt_text"] == RENDERED
    assert door.model.tokenizer.decode(answer["prompt_token_ids"]) == RENDERED
    assert [len(choice["token_ids"]) for choice in answer["choices"]] == [2, 2]
    assert not {"prompt_text", "prompt_token_ids"} & (await answer_of(door, CHAT)).keys()


@pytest.mark.parametrize("fields", [{}, {"logprobs": True}, {"stream_options": {"include_usage": True}}], ids=str)
async def test_a_chat_s_stream_has_it_in_the_first_event_only(door: Door, fields: dict[str, Any]) -> None:
    first, *others = await events_of(door, CHAT, return_prompt_text=True, return_token_ids=True, n=2, **fields)
    assert first["prompt_text"].endswith(RENDERED)
    assert len(first["prompt_token_ids"]) == len(first["prompt_text"])
    assert not any({"prompt_text", "prompt_token_ids"} & event.keys() for event in others)
    plain = await events_of(door, CHAT, return_prompt_text=True)
    assert plain[0].keys() - plain[1].keys() == {"prompt_text"}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_text_completion_s_choices_have_theirs(door: Door, stream: bool) -> None:
    fields: dict[str, Any] = {"prompt": ["ab", [1, 2, 3]], "return_token_ids": True, "n": 2}
    if stream:
        choices = [event["choices"][0] for event in await events_of(door, TEXT, **fields)]
    else:
        choices = (await answer_of(door, TEXT, **fields))["choices"]
    told = [(choice["index"], choice["prompt_token_ids"]) for choice in choices if "prompt_token_ids" in choice]
    ab = door.model.tokenizer.encode("ab")
    assert sorted(told) == [(0, ab), (1, ab), (2, [1, 2, 3]), (3, [1, 2, 3])]


async def test_a_prompt_that_was_cut_is_told_as_it_was_cut(door: Door) -> None:
    answer = await answer_of(door, CHAT, return_token_ids=True, truncate_prompt_tokens=5)
    assert door.model.tokenizer.decode(answer["prompt_token_ids"]) == RENDERED[-5:]
    answer = await answer_of(door, CHAT, return_token_ids=True, truncate_prompt_tokens=5, truncation_side="right")
    assert door.model.tokenizer.decode(answer["prompt_token_ids"]) == RENDERED[:5]


@pytest.mark.parametrize(("max_tokens", "num_kept"), [(10, 54), (63, 1), (64, 63), (1000, 63)])
async def test_a_prompt_may_be_cut_to_what_the_model_leaves(door: Door, max_tokens: int, num_kept: int) -> None:
    answer = await answer_of(door, TEXT, prompt="x" * 200, truncate_prompt_tokens=-1, max_tokens=max_tokens)
    assert answer["usage"]["prompt_tokens"] == num_kept


@pytest.mark.parametrize("keeps_beginning", [False, True])
@pytest.mark.parametrize("num_tokens", [-1, 1, 5, 100])
async def test_a_prompt_that_fits_is_not_cut(keeps_beginning: bool, num_tokens: int) -> None:
    prompt = list(range(min(num_tokens, 20) if num_tokens > 0 else 20))
    assert Truncation(num_tokens, keeps_beginning).of(prompt, num_tokens_max=40, max_tokens=8) == prompt


CASES: Final[list[tuple[str, dict[str, Any], str, str]]] = [
    (TEXT, {"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "at least 1, or -1"),
    (TEXT, {"truncate_prompt_tokens": -2}, "truncate_prompt_tokens", "must be at least -1, is -2"),
    (CHAT, {"truncation_side": "middle"}, "truncation_side", "must be left or right, is 'middle'"),
    (CHAT, {"return_prompt_text": 1}, "return_prompt_text", "must be true or false"),
    (CHAT, {"add_special_tokens": "no"}, "add_special_tokens", "must be true or false"),
    (CHAT, {"messages": [{**USER, "prefix": 1}]}, "messages[0].prefix", "must be true or false"),
    (CHAT, {"messages": [{**USER, "prefix": True}]}, "continue_final_message", "must be the assistant's"),
]


@pytest.mark.parametrize(("path", "fields", "param", "message"), CASES, ids=[case[3] for case in CASES])
async def test_a_mistake_is_told_by_field(
    door: Door, path: str, fields: dict[str, Any], param: str, message: str
) -> None:
    body = {"model": "fake", "messages": [USER], "prompt": "x", "max_tokens": 1, **fields}
    status, answer = await door.post(path, body)
    assert (status, answer["error"]["param"]) == (400, param)
    assert message in answer["error"]["message"]


async def test_a_message_that_is_a_prefix_is_gone_on_with(door: Door) -> None:
    turns = [USER, {"role": "assistant", "content": "Roses", "prefix": True}]
    answer = await answer_of(door, CHAT, messages=turns, return_prompt_text=True)
    assert answer["prompt_text"] == "[user]Hi[assistant]Roses"
    answer = await answer_of(door, CHAT, messages=[*turns, USER], return_prompt_text=True)
    assert answer["prompt_text"] == f"[user]Hi[assistant]Roses{RENDERED}"


async def test_special_tokens_are_added_to_a_chat_where_they_are_asked_for() -> None:
    plain = byte_tokenizer()
    backend: Backend = plain._backend
    backend.post_processor = processors.TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", 256)])
    model = byte_model()
    tokenizer = Tokenizer(backend, chat_template=ChatTemplate(TEMPLATE, {}), eos_token_ids=(256,))
    served = ServedModel(
        name=model.name, aliases=(), tokenizer=tokenizer, num_tokens_max=64, sampling_defaults={}, created=0
    )
    first = []
    for adds in (True, False, None):
        body = Fields({"messages": [USER], "add_special_tokens": adds})
        chat = await read_chat(body, served, TEXT_ONLY, grammar=None, allows_template=False)
        first.append(chat.token_ids[0])
    assert first == [256, chat.token_ids[0], chat.token_ids[0]]
    assert chat.token_ids[0] != 256
