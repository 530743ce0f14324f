"""Every mistake a client can make gets a sentence that names the field and the limit, and the service stays up."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from disaggregated.config.door import DoorConfig
from tests.support.front_door import Door, front_door

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
USER = [{"role": "user", "content": "x"}]
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def door() -> AsyncIterator[Door]:
    async with front_door() as opened:
        yield opened


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "fake", "messages": USER, **fields}


def text(**fields: Any) -> dict[str, Any]:
    return {"model": "fake", "prompt": "x", **fields}


def deep(num_levels: int) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": deep(num_levels - 1)}} if num_levels else {}


Case = tuple[str, Any, int, str | None, str]
"""Path, body; status, param and a part of the message of the answer."""

CASES: list[Case] = [
    (CHAT, b"{", 400, None, "the body is not valid JSON"),
    (CHAT, b"\xff\xfe", 400, None, "the body is not valid JSON"),
    (CHAT, b"", 400, None, "the body is not valid JSON"),
    (CHAT, [1], 400, None, "the body must be a JSON object, is an array"),
    (CHAT, {"messages": USER}, 400, "model", "model is missing"),
    (CHAT, chat(model=5), 400, "model", "model must be a string, is a number"),
    (CHAT, chat(model="gpt-9"), 404, "model", "the model 'gpt-9' does not exist; 'house/fake' is served here"),
    (CHAT, {"model": "fake"}, 400, "messages", "messages is missing"),
    (CHAT, chat(messages=[]), 400, "messages", "messages is empty"),
    (CHAT, chat(messages="hi"), 400, "messages", "messages must be an array of messages, is a string"),
    (CHAT, chat(messages=["hi"]), 400, "messages[0]", "messages[0] must be an object, is a string"),
    (CHAT, chat(messages=[{"role": "king", "content": "x"}]), 400, "messages[0].role", "is 'king'"),
    (CHAT, chat(messages=[{"role": "user"}]), 400, "messages[0].content", "messages[0].content is missing"),
    (CHAT, chat(messages=[*USER, {"role": "user", "content": 5}]), 400, "messages[1].content", "is a number"),
    (
        CHAT,
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        400,
        "messages[0].content[0]",
        "messages[0].content[0] must be text, is 'image_url'",
    ),
    (TEXT, {"model": "fake"}, 400, "prompt", "prompt is missing"),
    (TEXT, text(prompt=""), 400, "prompt", "prompt is empty"),
    (TEXT, text(prompt=[]), 400, "prompt", "prompt is empty"),
    (TEXT, text(prompt=["x", ""]), 400, "prompt[1]", "prompt[1] is empty"),
    (TEXT, text(prompt=[[1], []]), 400, "prompt[1]", "prompt[1] is empty"),
    (TEXT, text(prompt=5), 400, "prompt", "is a number"),
    (TEXT, text(prompt={"a": 1}), 400, "prompt", "is an object"),
    (TEXT, text(prompt=["x", 5]), 400, "prompt[1]", "prompt[1] must be a string or an array of token ids"),
    (TEXT, text(prompt=[1, "x"]), 400, "prompt[1]", "prompt[1] must be a token id (an integer), is a string"),
    (TEXT, text(prompt=[1, True]), 400, "prompt[1]", "is a boolean"),
    (TEXT, text(prompt=[1, 999]), 400, "prompt", "prompt[1] must be between 0 and 256, is 999"),
    (TEXT, text(prompt=[-1]), 400, "prompt", "prompt[0] must be between 0 and 256, is -1"),
    (TEXT, text(prompt=["x"] * 129), 400, "prompt", "prompt has 129 prompts, the limit is 128"),
    (TEXT, text(prompt="x" * 1024), 400, "prompt", "the prompt has 1024 tokens, the limit is 1023"),
    (CHAT, chat(messages=[{"role": "user", "content": "x" * 5000}]), 400, "messages", "the limit is 1023"),
    (CHAT, chat(max_tokens=-1), 400, "max_tokens", "max_tokens must be at least 1, is -1"),
    (CHAT, chat(max_tokens=0), 400, "max_tokens", "max_tokens must be at least 1, is 0"),
    (CHAT, chat(max_tokens="many"), 400, "max_tokens", "max_tokens must be an integer, is a string"),
    (CHAT, chat(messages=[{"content": "x"}]), 400, "messages[0].role", "messages[0].role is missing; it is one of"),
    (CHAT, chat(documents=[{}, "x"]), 400, "documents[1]", "documents[1] must be an object, is a string"),
    (CHAT, chat(reasoning_effort=5), 400, "reasoning_effort", "must be a string, is a number"),
    (CHAT, chat(thinking="on"), 400, "thinking", "must be an object such as"),
    (CHAT, chat(enable_thinking="no"), 400, "enable_thinking", "must be true or false, is a string"),
    (CHAT, chat(max_tokens=1.5), 400, "max_tokens", "max_tokens must be an integer, is 1.5"),
    (CHAT, chat(max_tokens=2**40), 400, "max_tokens", "max_tokens must be at most 2147483647"),
    (CHAT, chat(max_completion_tokens=0), 400, "max_completion_tokens", "must be at least 1, is 0"),
    (CHAT, chat(min_tokens=-1), 400, "min_tokens", "must be at least 0, is -1"),
    (CHAT, chat(temperature=2.1), 400, "temperature", "temperature must be at most 2.0, is 2.1"),
    (CHAT, chat(temperature=-1), 400, "temperature", "temperature must be at least 0.0, is -1"),
    (CHAT, chat(temperature="hot"), 400, "temperature", "temperature must be a number, is a string"),
    (CHAT, chat(temperature=True), 400, "temperature", "temperature must be a number, is a boolean"),
    (CHAT, chat(top_p=1.1), 400, "top_p", "top_p must be at most 1.0, is 1.1"),
    (CHAT, chat(top_k=-2), 400, "top_k", "top_k must be at least -1, is -2"),
    (CHAT, chat(min_p=2), 400, "min_p", "min_p must be at most 1.0, is 2"),
    (CHAT, chat(seed="lucky"), 400, "seed", "seed must be an integer, is a string"),
    (CHAT, chat(stop=5), 400, "stop", "stop must be a string or an array of strings, is a number"),
    (CHAT, chat(stop=["x", 5]), 400, "stop", "stop must be a string or an array of strings"),
    (CHAT, chat(stop=[""]), 400, "stop", "stop: a string in it must not be empty"),
    (CHAT, chat(stop=["x"] * 17), 400, "stop", "stop has 17 strings, the limit is 16"),
    (CHAT, chat(stop_token_ids=["x"]), 400, "stop_token_ids", "must be an array of integers"),
    (CHAT, chat(stop_token_ids=[-1]), 400, "stop_token_ids", "-1 is not between 0 and 256"),
    (CHAT, chat(stream="yes"), 400, "stream", "stream must be true or false, is a string"),
    (CHAT, chat(stream_options={"include_usage": True}), 400, "stream_options", "only allowed when stream is true"),
    (CHAT, chat(stream=True, stream_options=[]), 400, "stream_options", "stream_options must be an object"),
    (
        CHAT,
        chat(stream=True, stream_options={"include_usage": 1}),
        400,
        "stream_options.include_usage",
        "must be true or false",
    ),
    (TEXT, text(suffix="x"), 400, "suffix", "suffix is not supported yet"),
    (CHAT, chat(use_beam_search=True), 400, "use_beam_search", "use_beam_search is not supported yet; only false is"),
    (TEXT, text(no_repeat_ngram_size=3), 400, "no_repeat_ngram_size", "is not supported yet; only 0 is"),
    (TEXT, text(lora_request={"lora_name": "x"}), 400, "lora_request", "lora_request is not supported yet"),
    (CHAT, chat(n=0), 400, "n", "n must be at least 1, is 0"),
    (CHAT, chat(n=129), 400, "n", "n must be at most 128, is 129"),
    (TEXT, text(n=2, prompt=["x"] * 128, best_of=5), 400, "n", "n is 5 for 128 prompts, the limit is 512 replies"),
    (TEXT, text(n=3, best_of=2), 400, "best_of", "best_of is 2, it must be at least n, which is 3"),
    (TEXT, text(best_of=2, stream=True), 400, "best_of", "best_of above n is not possible when stream is true"),
    (CHAT, chat(logprobs=5), 400, "logprobs", "logprobs must be true or false, is a number"),
    (CHAT, chat(top_logprobs=2), 400, "top_logprobs", "only allowed when logprobs is true"),
    (CHAT, chat(logprobs=True, top_logprobs=21), 400, "top_logprobs", "top_logprobs must be at most 20, is 21"),
    (TEXT, text(logprobs=True), 400, "logprobs", "logprobs must be an integer, is a boolean"),
    (TEXT, text(logprobs=21), 400, "logprobs", "logprobs must be at most 20, is 21"),
    (TEXT, text(prompt_logprobs=-1), 400, "prompt_logprobs", "prompt_logprobs must be at least 0, is -1"),
    (TEXT, text(prompt_logprobs=1, stream=True), 400, "prompt_logprobs", "not possible when stream is true"),
    (CHAT, chat(echo=1), 400, "echo", "echo must be true or false, is a number"),
    (TEXT, text(max_tokens=0), 400, "max_tokens", "max_tokens must be at least 1, is 0"),
    (TEXT, text(cache_salt="x" * 257), 400, "cache_salt", "cache_salt has 257 characters, the limit is 256"),
    (TEXT, text(cache_salt=5), 400, "cache_salt", "cache_salt must be a string, is a number"),
    (TEXT, text(skip_special_tokens="no"), 400, "skip_special_tokens", "must be true or false, is a string"),
    (TEXT, text(truncate_prompt_tokens=0), 400, "truncate_prompt_tokens", "must be at least 1, or -1"),
    (CHAT, chat(logit_bias={"x": 1}), 400, "logit_bias", "'x' is not a token id between 0 and 256"),
    (CHAT, chat(logit_bias={"257": 1}), 400, "logit_bias", "'257' is not a token id between 0 and 256"),
    (CHAT, chat(logit_bias={"-1": 1}), 400, "logit_bias", "'-1' is not a token id"),
    (CHAT, chat(logit_bias={"5": 101}), 400, "logit_bias", "logit_bias of token 5 must be between -100 and 100"),
    (CHAT, chat(logit_bias={"5": "x"}), 400, "logit_bias", "numbers, but of token 5, is a string"),
    (CHAT, chat(logit_bias=[]), 400, "logit_bias", "logit_bias must be an object, is an array"),
    (CHAT, chat(logit_bias={str(n): 1 for n in range(1025)}), 400, "logit_bias", "has 1025 entries, the limit is 1024"),
    (CHAT, chat(presence_penalty=2.1), 400, "presence_penalty", "presence_penalty must be at most 2.0, is 2.1"),
    (CHAT, chat(frequency_penalty=-3), 400, "frequency_penalty", "frequency_penalty must be at least -2.0, is -3"),
    (CHAT, chat(repetition_penalty=0), 400, "repetition_penalty", "repetition_penalty must be at least 0.01, is 0"),
    (CHAT, chat(bad_words=[5]), 400, "bad_words", "bad_words must be an array of strings, is an array"),
    (CHAT, chat(bad_words=[" "]), 400, "bad_words", "bad_words: a word in it must not be empty"),
    (CHAT, chat(bad_words=["x" * 90]), 400, "bad_words", "a bad word has 91 tokens, the limit is 64"),
    (CHAT, chat(bad_words=["x"] * 257), 400, "bad_words", "bad_words has 257 strings, the limit is 256"),
    (CHAT, chat(allowed_token_ids=[1, "2"]), 400, "allowed_token_ids", "must be an array of integers"),
    (CHAT, chat(allowed_token_ids=[257]), 400, "allowed_token_ids", "257 is not between 0 and 256"),
    (CHAT, chat(tools={}), 400, "tools", "tools must be an array of tools, is an object"),
    (CHAT, chat(tools=[{"type": "function"}]), 400, "tools[0].function", "must be an object, is null"),
    (
        CHAT,
        chat(tools=[{"type": "web_search"}]),
        400,
        "tools[0].type",
        "'custom', is 'web_search'",
    ),
    (CHAT, chat(tools=[WEATHER, WEATHER]), 400, "tools[1]", "tools[1] is the second one called 'weather'"),
    (CHAT, chat(tools=[WEATHER] * 513), 400, "tools", "tools has 513 tools, the limit is 512"),
    (
        CHAT,
        chat(tools=[{"type": "function", "function": {"name": "a b"}}]),
        400,
        "tools[0].function.name",
        "must be 1 to 128 letters, digits, or _ . : / -; is 'a b'",
    ),
    (
        CHAT,
        chat(tools=[{"type": "function", "function": {"name": "a", "parameters": "x"}}]),
        400,
        "tools[0].function.parameters",
        "must be a JSON schema (an object), is a string",
    ),
    (
        CHAT,
        chat(tools=[{"type": "function", "function": {"name": "a", "parameters": deep(60)}}]),
        400,
        "tools[0].function.parameters",
        "nested deeper than 48 levels",
    ),
    (CHAT, chat(tool_choice="required"), 400, "tool_choice", "there are no tools to call"),
    (CHAT, chat(tools=[WEATHER], tool_choice="maybe"), 400, "tool_choice", "must be none, auto, required or"),
    (CHAT, chat(tools=[WEATHER], tool_choice={}), 400, "tool_choice", "tool_choice must name a function"),
    (
        CHAT,
        chat(tools=[WEATHER], tool_choice={"type": "function", "function": {"name": "time"}}),
        400,
        "tool_choice",
        "tool_choice names 'time', which is not among the tools",
    ),
    (CHAT, chat(tools=[WEATHER], parallel_tool_calls="no"), 400, "parallel_tool_calls", "must be true or false"),
    (CHAT, chat(tools=[WEATHER], functions=[{"name": "f"}]), 400, "functions", "give only one of them"),
    (CHAT, chat(functions={"name": "f"}), 400, "functions", "functions must be an array of functions"),
    (TEXT, text(tools=[WEATHER]), 400, "tools", "only /v1/chat/completions takes them"),
    (
        CHAT,
        chat(messages=[*USER, {"role": "assistant", "tool_calls": [{"id": "x"}]}]),
        400,
        "messages[1].tool_calls[0].function",
        "must be an object, is null",
    ),
    (
        CHAT,
        chat(messages=[*USER, {"role": "tool", "content": "x", "tool_call_id": 5}]),
        400,
        "messages[1].tool_call_id",
        "must be a string, is a number",
    ),
    (CHAT, chat(chat_template="{{ 1 }}"), 400, "chat_template", "templates of requests are not run here"),
    (CHAT, chat(response_format={"type": "xml"}), 400, "response_format", "response_format.type must be text"),
    (TEXT, text(guided_regex="("), 400, "guided_regex", "guided_regex cannot be compiled"),
    (CHAT, chat(guided_json={"type": "x"}), 400, "guided_json", "guided_json cannot be compiled: Invalid type: x"),
    (CHAT, chat(thinking_token_budget=9), 400, "thinking_token_budget", "no tag that ends its reasoning"),
    (CHAT, chat(guided_whitespace_pattern=" "), 400, "guided_whitespace_pattern", "is not supported yet"),
    (CHAT, chat(guided_json={}, guided_choice=["x"]), 400, "guided_choice", "both say what the reply must match"),
    (CHAT, chat(priority=2**31), 400, "priority", "must be at most 2147483647"),
    (CHAT, chat(priority="high"), 400, "priority", "priority must be an integer"),
    ("/v1/embeddings", {}, 404, None, "there is no POST /v1/embeddings"),
    ("/v1/models", {}, 405, None, "/v1/models takes GET, not POST"),
]


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[4][:40]}")
async def test_a_mistake_is_told_by_field_and_limit(door: Door, case: Case) -> None:
    path, body, status, param, message = case
    answered, answer = await door.post(path, body)
    assert answered == status, answer
    assert message in answer["error"]["message"]
    assert answer["error"]["param"] == param
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["type"] == "invalid_request_error"


@pytest.mark.asyncio(loop_scope="module")
async def test_after_all_that_a_request_is_served(door: Door) -> None:
    status, answer = await door.post(TEXT, text(max_tokens=3, temperature=0, seed=1))
    assert status == 200
    assert answer["choices"][0]["text"] == door.expected(door.model.tokenizer.encode("x"), max_tokens=3, seed=1)[0]
    assert door.cluster.of("context")[0].num_prefills == 1, "a mistake reached a server"


@pytest.mark.asyncio(loop_scope="module")
async def test_a_body_that_is_too_large_is_refused_with_the_limit(door: Door) -> None:
    status, answer = await door.post(TEXT, io.BytesIO(b'"' + b"x" * DoorConfig().body_bytes_max + b'"'))
    assert status == 413
    assert str(DoorConfig().body_bytes_max) in answer["error"]["message"]


NEUTRAL: list[dict[str, Any]] = [
    {"n": 1, "logprobs": False, "tools": [], "tool_choice": "auto", "response_format": {"type": "text"}},
    {"presence_penalty": 0.0, "frequency_penalty": 0, "logit_bias": {}, "repetition_penalty": 1.0},
    {"n": None, "tools": None, "stop": None, "max_completion_tokens": None, "seed": None, "temperature": None},
    {"user": "me", "metadata": {"a": "b"}, "store": False, "reasoning_effort": "low", "parallel_tool_calls": True},
    {"stop": [], "seed": -5, "top_k": -1, "top_p": 0, "min_tokens": 0, "priority": -3, "max_completion_tokens": 2.0},
    {"chat_template_kwargs": {"enable_thinking": False}, "stop_token_ids": [3], "ignore_eos": True},
]


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("fields", NEUTRAL)
async def test_what_ordinary_clients_send_is_taken(door: Door, fields: dict[str, Any]) -> None:
    async with door.http.post(door.url + CHAT, json=chat(**{"max_tokens": 2, **fields})) as answer:
        assert answer.status == 200, await answer.text()
        assert "x-disagg-ignored" not in answer.headers


@pytest.mark.asyncio(loop_scope="module")
async def test_a_field_that_means_nothing_here_is_named_in_the_answer(door: Door) -> None:
    async with door.http.post(door.url + CHAT, json=chat(max_token=5, max_tokens=2, wizardry=1)) as answer:
        assert answer.status == 200
        assert answer.headers["x-disagg-ignored"] == "max_token,wizardry"


@pytest.mark.asyncio(loop_scope="module")
async def test_more_tokens_than_fit_are_cut_to_what_fits(door: Door) -> None:
    prompt = [1] * 1018
    status, answer = await door.post(TEXT, text(prompt=prompt, max_tokens=4000, ignore_eos=True))
    assert (status, answer["usage"]["completion_tokens"]) == (200, 6)
    assert answer["choices"][0]["finish_reason"] == "length"
