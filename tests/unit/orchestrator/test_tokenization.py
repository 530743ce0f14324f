"""What /tokenize counts is what serving counts, and /detokenize gives the text back."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tests.support.front_door import Door, front_door

USER = [{"role": "user", "content": "Say something."}]
pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def door() -> AsyncIterator[Door]:
    async with front_door() as opened:
        yield opened


async def test_a_text_becomes_its_ids(door: Door) -> None:
    status, answer = await door.post("/tokenize", {"prompt": "a b"})
    ids = door.model.tokenizer.encode("a b")
    assert (status, answer) == (200, {"count": 3, "max_model_len": 1024, "tokens": ids, "token_strs": None})


async def test_a_chat_has_as_many_tokens_as_when_it_is_served(door: Door) -> None:
    _, counted = await door.post("/tokenize", {"model": "fake", "messages": USER})
    _, served = await door.post("/v1/chat/completions", {"model": "fake", "messages": USER, "max_tokens": 1})
    assert counted["count"] == served["usage"]["prompt_tokens"]
    _, bare = await door.post("/tokenize", {"messages": USER, "add_generation_prompt": False})
    assert counted["count"] - bare["count"] == len("[assistant]")


async def test_ids_become_their_text(door: Door) -> None:
    for text in ("", "grüße, 漢字", "long " * 2000):
        _, tokenized = await door.post("/v1/tokenize", {"prompt": text})
        status, answer = await door.post("/v1/detokenize", {"tokens": tokenized["tokens"]})
        assert (status, answer) == (200, {"prompt": text})


async def test_special_tokens_are_shown_unless_they_are_not_wanted(door: Door) -> None:
    ids = [*door.model.tokenizer.encode("x"), 256]
    assert (await door.post("/detokenize", {"tokens": ids}))[1] == {"prompt": "x<|end|>"}
    assert (await door.post("/detokenize", {"tokens": ids, "skip_special_tokens": True}))[1] == {"prompt": "x"}


async def test_the_vocabulary_s_spelling_comes_on_request(door: Door) -> None:
    _, answer = await door.post("/tokenize", {"prompt": "a b", "return_token_strs": True})
    assert answer["token_strs"] == ["a", "Ġ", "b"]


CASES: list[tuple[str, Any, int, str | None, str]] = [
    ("/tokenize", {}, 400, "prompt", "prompt is missing, and so is messages"),
    ("/tokenize", {"prompt": 5}, 400, "prompt", "prompt must be a string, is a number"),
    ("/tokenize", {"prompt": "x", "messages": USER}, 400, "messages", "give one of them"),
    ("/tokenize", {"messages": []}, 400, "messages", "messages is empty"),
    ("/tokenize", {"prompt": "x", "model": "gpt-9"}, 404, "model", "does not exist"),
    ("/tokenize", {"prompt": "x", "add_special_tokens": 1}, 400, "add_special_tokens", "must be true or false"),
    ("/detokenize", {}, 400, "tokens", "tokens is missing"),
    ("/detokenize", {"tokens": "x"}, 400, "tokens", "tokens must be an array of token ids, is a string"),
    ("/detokenize", {"tokens": [1, "x"]}, 400, "tokens[1]", "is a string"),
    ("/detokenize", {"tokens": [1, 257]}, 400, "tokens", "tokens[1] must be between 0 and 256, is 257"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[4][:40])
async def test_a_mistake_is_told_by_field(door: Door, case: tuple[str, Any, int, str | None, str]) -> None:
    path, body, status, param, message = case
    answered, answer = await door.post(path, body)
    assert (answered, answer["error"]["param"]) == (status, param)
    assert message in answer["error"]["message"]
