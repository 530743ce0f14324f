"""The stock OpenAI client and a whole deployment with the real model: what the README promises a client."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any, Final

import aiohttp
import openai
import pytest

from tests.support.completions import complete
from tests.support.deployment import Deployment

MODEL: Final = "smollm2-135m-instruct"
QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]
LONG: Final = "The quick brown fox jumps over the lazy dog. " * 12


def turn(number: int) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": f"Say it for the {number}th time. {LONG}"},
        {"role": "assistant", "content": LONG},
    ]


pytestmark = pytest.mark.asyncio(loop_scope="package")


async def test_a_chat_is_answered_rightly(client: openai.AsyncOpenAI, deployment: Deployment) -> None:
    """Nobody's blocks are its beginning, so that it is too long to be prefilled where it decodes."""
    answer = await client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        temperature=0,
        extra_headers={"x-request-id": "paris"},
        extra_body={"cache_salt": "paris"},
    )
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"
    story = await deployment.get_json("/requests/paris")
    assert story["outcome"] == "finished"
    assert story["attempts"][0]["transport"] == "SHM"
    assert sum(story["ttft_parts"].values()) == pytest.approx(story["ttft_s"])


async def test_a_stream_says_the_same_as_an_answer(client: openai.AsyncOpenAI) -> None:
    fields: dict[str, Any] = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 20}
    whole = await client.chat.completions.create(**fields)
    stream = await client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage.model_copy(
        update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details}
    )


async def test_a_conversation_that_is_too_long_goes_on_without_its_beginning(
    client: openai.AsyncOpenAI,
) -> None:
    fields: dict[str, Any] = {"model": MODEL, "instructions": "Be brief.", "max_output_tokens": 8, "temperature": 0}
    said: Any = [item for number in range(12) for item in turn(number)]
    with pytest.raises(openai.BadRequestError, match="the limit is 1023"):
        await client.responses.create(**fields, input=said)
    first = await client.responses.create(**fields, input=said, truncation="auto")
    told = [*said, {"role": "assistant", "content": first.output_text}, {"role": "user", "content": "Go on."}]
    second = await client.responses.create(**fields, input=told, truncation="auto")
    assert (first.truncation, second.truncation) == ("auto", "auto")
    assert first.usage.input_tokens < second.usage.input_tokens < 1024, "the cut is where it was"
    assert second.usage.input_tokens_details.cached_tokens > 0.8 * first.usage.input_tokens


async def test_a_reply_that_goes_round_in_circles_ends(client: openai.AsyncOpenAI) -> None:
    rule = {"max_pattern_size": 4, "min_count": 3}
    fields: dict[str, Any] = {"model": MODEL, "prompt": "1 2 1 2 1 2 1 2", "temperature": 0, "max_tokens": 60}
    always: dict[str, Any] = {"return_token_ids": True, "ignore_eos": True}
    free = (await client.completions.create(**fields, extra_body=always)).choices[0]
    ended = (await client.completions.create(**fields, extra_body={**always, "repetition_detection": rule})).choices[0]
    assert (free.finish_reason, ended.finish_reason) == ("length", "repetition")
    told: list[int] = ended.token_ids
    assert told == free.token_ids[: len(told)]
    assert any(told[-size:] * 3 == told[-3 * size :] for size in range(1, 5))


async def test_labels_are_scored_by_their_ids(client: openai.AsyncOpenAI) -> None:
    fields: dict[str, Any] = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 6, "logprobs": True}
    by_ids: dict[str, Any] = {"return_tokens_as_token_ids": True}
    likeliest = await client.chat.completions.create(**fields, top_logprobs=3, extra_body=by_ids)
    expected = {one.token: one.logprob for one in likeliest.choices[0].logprobs.content[0].top_logprobs}
    asked = [int(token.removeprefix("token_id:")) for token in reversed(expected)]
    labels = await client.chat.completions.create(**fields, extra_body={**by_ids, "logprob_token_ids": asked})
    content = labels.choices[0].logprobs.content
    assert {one.token: one.logprob for one in content[0].top_logprobs} == pytest.approx(expected)
    told = [[one.token for one in entry.top_logprobs] for entry in content]
    assert told == [[f"token_id:{token}" for token in asked]] * 6, "by both servers, and in this order"


async def test_a_seed_gives_the_same_text_again_and_another_seed_another(client: openai.AsyncOpenAI) -> None:
    async def told(seed: int) -> str:
        answer = await client.completions.create(
            model=MODEL, prompt=LONG, max_tokens=24, temperature=1.0, top_p=0.95, seed=seed
        )
        return answer.choices[0].text

    assert await told(1) == await told(1)
    assert await told(1) != await told(2)


async def test_the_second_time_a_prompt_is_mostly_cached(client: openai.AsyncOpenAI) -> None:
    for is_known in (False, True):
        answer = await client.completions.create(
            model=MODEL, prompt="Once there was. " + LONG, max_tokens=2, temperature=0
        )
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        cached = answer.usage.prompt_tokens_details.cached_tokens
        assert cached == (96 if is_known else 0), answer.usage


async def test_who_could_have_taken_a_request_and_what_was_foreseen_is_told(
    client: openai.AsyncOpenAI, deployment: Deployment
) -> None:
    for request_id in ("first", "again"):
        await client.completions.create(
            model=MODEL,
            prompt=f"Foxes! {LONG}",
            max_tokens=2,
            temperature=0,
            extra_headers={"x-request-id": request_id},
        )
    (attempt,) = (await deployment.get_json("/requests/again"))["attempts"]
    told = attempt["decision"]
    assert told["predicted_cached_tokens"] == attempt["num_cached_tokens"] > 32
    (only,) = told["candidates"]
    assert (only["context"], only["generation"]) == (attempt["context_instance"], attempt["generation_instance"])
    assert only["queue_s"] + only["compute_s"] == told["predicted_ttft_s"] > 0
    assert attempt["why"].startswith("least loaded of 1: 0 requests; least of 1: first token in")
    shown = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "orchestrator", "why", "again", "--url", deployment.url, stdout=asyncio.subprocess.PIPE
    )
    text, _ = await shown.communicate()
    assert shown.returncode == 0
    assert f"predicted: {attempt['num_cached_tokens']}, found: {attempt['num_cached_tokens']}" in text.decode()
    async with aiohttp.ClientSession() as session, session.get(f"{deployment.url}/metrics") as answer:
        assert 'disagg_cached_tokens_predicted_total{verdict="exact"}' in await answer.text()


async def test_stop_strings_token_limits_and_single_tokens(client: openai.AsyncOpenAI) -> None:
    fields: dict[str, Any] = {"model": MODEL, "prompt": LONG, "temperature": 0}
    whole = (await client.completions.create(**fields, max_tokens=20)).choices[0]
    assert whole.finish_reason == "length"
    stop = whole.text[10:14]
    cut = (await client.completions.create(**fields, max_tokens=20, stop=stop)).choices[0]
    assert (cut.text, cut.finish_reason) == (whole.text[: whole.text.index(stop)], "stop")
    one = await client.completions.create(**fields, max_tokens=1)
    assert one.usage is not None
    assert one.usage.completion_tokens == 1
    assert whole.text.startswith(one.choices[0].text)


async def test_a_short_prompt_is_prefilled_where_it_decodes_with_the_same_tokens(
    client: openai.AsyncOpenAI, deployment: Deployment
) -> None:
    short = await client.completions.create(
        model=MODEL, prompt="The sky is", max_tokens=8, temperature=0, extra_headers={"x-request-id": "short"}
    )
    story = await deployment.get_json("/requests/short")
    assert story["attempts"][0]["context_instance"] == ""
    assert story["attempts"][0]["prefill_compute_s"] > 0
    assert sum(story["ttft_parts"].values()) == pytest.approx(story["ttft_s"])
    assert short.choices[0].text.strip()


async def test_logprobs_of_generated_tokens_are_those_of_the_same_tokens_in_a_prompt(
    client: openai.AsyncOpenAI, deployment: Deployment
) -> None:
    """The first comes from the context server, the others from the generation server; then all from one of them."""
    fields: dict[str, Any] = {"model": MODEL, "temperature": 0.8, "seed": 3, "logprobs": 3}
    answer = await client.completions.create(prompt=LONG, max_tokens=12, **fields)
    told = answer.choices[0].logprobs
    assert told is not None
    assert told.token_logprobs is not None
    assert told.tokens is not None
    assert len(told.token_logprobs) == len(told.tokens) == 12
    async with aiohttp.ClientSession() as session:
        ids = await _ids(session, deployment, LONG)
        sampling = {name: fields[name] for name in ("temperature", "seed", "logprobs")}
        done = await complete(session, deployment.url, ids, max_tokens=12, **sampling)
    assert done.logprobs == told.token_logprobs
    echoed = await client.completions.create(prompt=[*ids, *done.token_ids], max_tokens=1, echo=True, **fields)
    of_prompt = echoed.choices[0].logprobs
    assert of_prompt is not None
    assert of_prompt.token_logprobs is not None
    assert of_prompt.token_logprobs[-13:-1] == told.token_logprobs
    assert (of_prompt.top_logprobs or [])[-13:-1] == told.top_logprobs
    assert of_prompt.tokens is not None
    assert "".join(of_prompt.tokens[:-1]) == LONG + "".join(told.tokens)


async def _ids(session: aiohttp.ClientSession, deployment: Deployment, text: str) -> list[int]:
    async with session.post(f"{deployment.url}/tokenize", json={"model": MODEL, "prompt": text}) as answer:
        ids: list[int] = (await answer.json())["tokens"]
        return ids


async def test_several_replies_share_their_prompt_and_the_likeliest_is_found(
    client: openai.AsyncOpenAI, deployment: Deployment
) -> None:
    fields: dict[str, Any] = {"model": MODEL, "prompt": f"Again: {LONG}", "max_tokens": 6, "temperature": 1.0}
    several = await client.completions.create(
        n=3, seed=1, logprobs=0, extra_headers={"x-request-id": "several"}, **fields
    )
    one_by_one = [await client.completions.create(seed=seed, **fields) for seed in (1, 2, 3)]
    assert [choice.text for choice in several.choices] == [answer.choices[0].text for answer in one_by_one]
    assert several.usage is not None
    num_prompt = several.usage.prompt_tokens
    assert num_prompt == one_by_one[0].usage.prompt_tokens
    for number in (1, 2):
        story = await deployment.get_json(f"/requests/several.{number}")
        assert story["attempts"][0]["num_cached_tokens"] >= num_prompt - 33, "its prompt was computed once more"
    best = await client.completions.create(n=1, best_of=3, seed=1, **fields)
    sums = {choice.text: sum(choice.logprobs.token_logprobs or []) for choice in several.choices if choice.logprobs}
    assert best.choices[0].text == max(sums, key=lambda text: sums[text])


async def test_a_salt_keeps_prompts_apart_in_the_caches(client: openai.AsyncOpenAI) -> None:
    async def num_cached(salt: str) -> int:
        answer = await client.completions.create(
            model=MODEL, prompt=f"Salted: {LONG}", max_tokens=2, extra_body={"cache_salt": salt}
        )
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        return answer.usage.prompt_tokens_details.cached_tokens or 0

    assert await num_cached("mine") == 0
    assert await num_cached("yours") == 0
    assert await num_cached("mine") > 60


async def test_several_prompts_are_answered_in_order(client: openai.AsyncOpenAI) -> None:
    prompts = ["One, two, three,", "Monday, Tuesday,", LONG]
    together = await client.completions.create(model=MODEL, prompt=prompts, max_tokens=6, temperature=0)
    alone = [await client.completions.create(model=MODEL, prompt=one, max_tokens=6, temperature=0) for one in prompts]
    assert [choice.text for choice in together.choices] == [answer.choices[0].text for answer in alone]


WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}, "days": {"enum": [1, 3, 7]}},
            "required": ["city", "days"],
        },
    },
}
TIME: Any = {"type": "function", "function": {"name": "time", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
async def test_a_call_that_must_be_made_follows_its_schema_whole_and_streamed(
    client: openai.AsyncOpenAI, choice: Any
) -> None:
    fields: dict[str, Any] = {
        "model": MODEL, "messages": [{"role": "user", "content": "How is the weather in Paris for 3 days?"}],
        "tools": [WEATHER, TIME], "tool_choice": choice, "temperature": 0, "max_tokens": 60,
        "parallel_tool_calls": False,
    }  # fmt: skip
    answer = await client.chat.completions.create(**fields)
    assert answer.choices[0].message.tool_calls is not None
    (call,) = answer.choices[0].message.tool_calls
    assert answer.choices[0].finish_reason == "tool_calls"
    assert call.function.name == "weather"
    arguments = json.loads(call.function.arguments)
    assert set(arguments) == {"city", "days"}
    assert arguments["days"] in (1, 3, 7)
    streamed = ""
    async for chunk in await client.chat.completions.create(**fields, stream=True):
        for delta in chunk.choices[0].delta.tool_calls or ():
            streamed += delta.function.arguments or ""
    assert streamed == call.function.arguments


@pytest.mark.parametrize("max_tokens", [1, 2])
async def test_a_call_that_is_cut_short_is_an_answer(client: openai.AsyncOpenAI, max_tokens: int) -> None:
    answer = await client.chat.completions.create(
        model=MODEL, messages=QUESTION, tools=[WEATHER], tool_choice="required", max_tokens=max_tokens
    )
    assert answer.choices[0].finish_reason == "length"
    assert not answer.choices[0].message.content


async def test_a_result_that_a_tool_gave_is_read(client: openai.AsyncOpenAI) -> None:
    call = {
        "id": "c1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Paris", "days": 1}'},
    }
    messages: Any = [
        *QUESTION, {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "It is raining."},
    ]  # fmt: skip
    answer = await client.chat.completions.create(
        model=MODEL, messages=messages, tools=[WEATHER], temperature=0, max_tokens=16
    )
    assert "raining" in (answer.choices[0].message.content or "")


async def test_a_prompt_beyond_the_limit_is_refused_with_both_numbers(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="the prompt has 1200 tokens, the limit is 1023"):
        await client.completions.create(model=MODEL, prompt=[5] * 1200)
    longest = await client.completions.create(model=MODEL, prompt=[5] * 1023, max_tokens=50, temperature=0)
    assert longest.usage is not None
    assert longest.usage.completion_tokens == 1


async def test_the_model_is_known_by_its_full_name_and_its_basename(client: openai.AsyncOpenAI) -> None:
    (model,) = [model async for model in client.models.list()]
    assert model.id.endswith("/SmolLM2-135M-Instruct")
    for name in (model.id, model.id.rpartition("/")[2]):
        answer = await client.completions.create(model=name, prompt=LONG, max_tokens=1)
        assert answer.model == model.id
    with pytest.raises(openai.NotFoundError):
        await client.completions.create(model="smollm", prompt="x")


async def test_afterwards_nothing_is_held_anywhere(client: openai.AsyncOpenAI) -> None:
    """The fixture of every test here sees to that; these are many at once."""
    async with asyncio.TaskGroup() as group:
        for seed in range(6):
            group.create_task(client.completions.create(model=MODEL, prompt=f"{seed} {LONG}", max_tokens=12, seed=seed))
