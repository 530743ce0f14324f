"""What clients may ask to see: logprobs in both of OpenAI's forms, the prompt echoed, several replies, the best."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
import pytest_asyncio

from disaggregated.sampling_params import SamplingParams
from tests.support.fake_cluster import Temper
from tests.support.front_door import Door, front_door
from tests.support.token_hash import oracle, told_of

TEXT = "/v1/completions"
CHAT = "/v1/chat/completions"
LONG = "A prompt that is long enough for others to wait for it. " * 4

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def door() -> AsyncIterator[Door]:
    temper = Temper(latency_s=0.0, step_s=0.001, prefill_token_s=0.0, tokens_a_step_max=3, cache_blocks=1000)
    async with front_door(temper=temper) as opened:
        yield opened


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "fake", "prompt": "hello", "max_tokens": 12, "temperature": 0, "seed": 4, **fields}


async def choice_of(door: Door, path: str = TEXT, **fields: Any) -> Any:
    status, answer = await door.post(path, {**body(), **fields})
    assert status == 200, answer
    return answer["choices"][0]


async def events_of(door: Door, path: str = TEXT, **fields: Any) -> list[Any]:
    async with door.http.post(door.url + path, json={**body(stream=True), **fields}) as answer:
        lines = (await answer.text()).split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""], lines[-2:]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def generated(door: Door, prompt: str = "hello", *, seed: int = 4, num: int = 12) -> tuple[list[int], list[int]]:
    """The prompt's ids and those of an undisturbed run."""
    ids = door.model.tokenizer.encode(prompt)
    params = SamplingParams(max_tokens=num, seed=seed, stop_token_ids=frozenset({256}))
    return ids, oracle(ids, params)[0]


def name(door: Door, token_id: int) -> str:
    spelled = door.model.tokenizer.spelled(token_id)
    try:
        return spelled.decode()
    except UnicodeDecodeError:
        return f"bytes:\\x{spelled[0]:02x}"


def expected_lists(door: Door, tokens: Sequence[int], num_top: int) -> dict[str, Any]:
    told = [told_of(token, num_top) for token in tokens]
    top = [
        {name(door, other): logprob for other, logprob in zip(one.top_token_ids, one.top_logprobs, strict=True)}
        for one in told
    ]
    return {
        "tokens": [name(door, token) for token in tokens],
        "token_logprobs": [one.logprob for one in told],
        "top_logprobs": [
            {**likeliest, name(door, token): one.logprob}
            for token, one, likeliest in zip(tokens, told, top, strict=True)
        ],
    }


@pytest.mark.parametrize("num_top", [0, 1, 5])
async def test_completions_have_them_as_lists_side_by_side(door: Door, num_top: int) -> None:
    choice = await choice_of(door, logprobs=num_top)
    _, tokens = generated(door)
    logprobs = dict(choice["logprobs"])
    offsets = logprobs.pop("text_offset")
    assert logprobs == expected_lists(door, tokens, num_top)
    assert offsets == sorted(offsets)
    assert offsets[0] == 0
    assert all(
        name(door, t).startswith(("bytes", choice["text"][o : o + 1])) for t, o in zip(tokens, offsets, strict=True)
    )


async def test_a_stream_has_the_same_ones_piece_by_piece(door: Door) -> None:
    whole = await choice_of(door, logprobs=2)
    events = [event["choices"][0] for event in await events_of(door, logprobs=2)]
    told = [event["logprobs"] for event in events if event["logprobs"]]
    assert len(told) > 1
    assert {key: [item for one in told for item in one[key]] for key in told[0]} == whole["logprobs"]
    assert "".join(event["text"] for event in events) == whole["text"]


async def test_chats_have_them_as_a_list_of_entries(door: Door) -> None:
    messages = [{"role": "user", "content": "hello"}]
    fields: dict[str, Any] = {"messages": messages, "prompt": None, "logprobs": True, "top_logprobs": 2}
    whole = await choice_of(door, CHAT, **fields)
    _, tokens = generated(door, "[user]hello[assistant]")
    content = whole["logprobs"]["content"]
    assert [entry["logprob"] for entry in content] == [told_of(token, 2).logprob for token in tokens]
    assert [bytes(entry["bytes"]) for entry in content] == [door.model.tokenizer.spelled(token) for token in tokens]
    assert [len(entry["top_logprobs"]) for entry in content] == [2] * len(tokens)
    assert content[0]["top_logprobs"][0]["logprob"] == told_of(tokens[0], 2).top_logprobs[0]
    events = [event["choices"][0] for event in await events_of(door, CHAT, **fields)]
    streamed = [entry for event in events if event["logprobs"] for entry in event["logprobs"]["content"]]
    assert streamed == content
    without = await choice_of(door, CHAT, messages=messages, prompt=None, logprobs=True)
    assert [entry["top_logprobs"] for entry in without["logprobs"]["content"]] == [[]] * len(tokens)


async def test_tokens_asked_for_by_their_ids_stand_where_the_likeliest_would(door: Door) -> None:
    asked = [101, 7, 101, 240]
    _, tokens = generated(door)
    lists = (await choice_of(door, logprobs=3, logprob_token_ids=asked))["logprobs"]
    labels = {name(door, token): -token / 16 for token in asked}
    assert lists["top_logprobs"] == [{**labels, name(door, token): told_of(token, 0).logprob} for token in tokens], (
        "each once, and the token itself"
    )
    chat = {"messages": [{"role": "user", "content": "hi"}], "logprobs": True, "logprob_token_ids": asked}
    for entry in (await choice_of(door, CHAT, **chat))["logprobs"]["content"]:
        assert [(other["token"], other["logprob"]) for other in entry["top_logprobs"]] == list(labels.items())


async def test_nothing_is_told_unasked(door: Door) -> None:
    for fields in ({}, {"logprobs": False}, {"logprobs": None}):
        choice = await choice_of(door, **fields)
        assert choice["logprobs"] is None
        assert "prompt_logprobs" not in choice


async def test_tokens_may_be_told_by_their_ids(door: Door) -> None:
    choice = await choice_of(door, logprobs=0, return_tokens_as_token_ids=True)
    assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in generated(door)[1]]


@pytest.mark.parametrize("max_tokens", [0, 1, 12])
async def test_an_echoed_prompt_comes_first_with_its_logprobs(door: Door, max_tokens: int) -> None:
    """With one token or none, this is how evaluations ask how likely a given text is."""
    ids, tokens = generated(door, num=max(1, max_tokens))
    tokens = tokens[:max_tokens]
    status, answer = await door.post(TEXT, body(echo=True, logprobs=1, max_tokens=max_tokens))
    assert status == 200
    choice = answer["choices"][0]
    assert choice["text"] == "hello" + door.model.tokenizer.decode(tokens)
    logprobs = choice["logprobs"]
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    expected = expected_lists(door, [*ids[1:], *tokens], 1)
    assert logprobs["token_logprobs"][1:] == expected["token_logprobs"]
    assert logprobs["top_logprobs"][1:] == expected["top_logprobs"]
    assert logprobs["tokens"] == ["h", "e", "l", "l", "o", *expected["tokens"][4:]]
    assert logprobs["text_offset"][:5] == [0, 1, 2, 3, 4]
    assert answer["usage"]["completion_tokens"] == max_tokens
    assert choice["finish_reason"] == "length"


async def test_an_echo_works_for_token_ids_lists_and_streams(door: Door) -> None:
    ids = door.model.tokenizer.encode("hello")
    assert (await choice_of(door, echo=True, prompt=ids))["text"].startswith("hello")
    _, answer = await door.post(TEXT, body(echo=True, prompt=["one", "two"]))
    assert [choice["text"][:3] for choice in answer["choices"]] == ["one", "two"]
    events = [event["choices"][0] for event in await events_of(door, echo=True, logprobs=0)]
    assert "".join(event["text"] for event in events) == (await choice_of(door, echo=True))["text"]
    assert events[0]["logprobs"]["token_logprobs"][0] is None


async def test_the_prompt_may_be_told_on_its_own(door: Door) -> None:
    choice = await choice_of(door, prompt_logprobs=1, max_tokens=2)
    ids, _ = generated(door)
    first, *told = choice["prompt_logprobs"]
    assert first is None
    assert choice["logprobs"] is None
    assert len(told) == len(ids) - 1
    for token, entry in zip(ids[1:], told, strict=True):
        one = told_of(token, 1)
        assert entry[str(token)] == {
            "logprob": one.logprob, "rank": one.rank, "decoded_token": name(door, token)
        }  # fmt: skip
        assert entry[str(one.top_token_ids[0])]["rank"] == 1
    short = await choice_of(door, prompt=[7], prompt_logprobs=0, max_tokens=1)
    assert short["prompt_logprobs"] == [None]


async def test_n_replies_differ_in_their_seeds_and_share_their_prompt(door: Door) -> None:
    status, answer = await door.post(TEXT, body(prompt=LONG, n=3), headers={"x-request-id": "three"})
    assert status == 200
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    for choice in answer["choices"]:
        ids, tokens = generated(door, LONG, seed=4 + choice["index"])
        assert choice["text"] == door.model.tokenizer.decode(tokens)
    assert answer["usage"]["prompt_tokens"] == len(ids)
    assert answer["usage"]["completion_tokens"] == 36
    stories = [(await door.get(f"/requests/three.{number}"))[1] for number in range(3)]
    assert stories[0]["attempts"][0]["num_cached_tokens"] == 0
    assert all(story["attempts"][0]["num_cached_tokens"] >= len(ids) - 16 for story in stories[1:])


async def test_replies_are_streamed_side_by_side(door: Door) -> None:
    events = [event["choices"][0] for event in await events_of(door, prompt=["hello", LONG], n=2)]
    for index, (prompt, seed) in enumerate([("hello", 4), ("hello", 5), (LONG, 4), (LONG, 5)]):
        text = "".join(event["text"] for event in events if event["index"] == index)
        assert text == door.model.tokenizer.decode(generated(door, prompt, seed=seed)[1])


async def test_of_several_replies_the_likeliest_are_given(door: Door) -> None:
    def mean(seed: int) -> float:
        tokens = generated(door, seed=seed)[1]
        return sum(told_of(token, 0).logprob for token in tokens) / len(tokens)

    best = sorted(range(4, 10), key=mean, reverse=True)[:2]
    status, answer = await door.post(TEXT, body(n=2, best_of=6))
    assert status == 200
    texts = [choice["text"] for choice in answer["choices"]]
    assert texts == [door.model.tokenizer.decode(generated(door, seed=seed)[1]) for seed in best]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert [choice["logprobs"] for choice in answer["choices"]] == [None, None]
    assert answer["usage"]["completion_tokens"] == 72
    assert answer["usage"]["prompt_tokens"] == 5


async def test_the_text_may_end_with_what_stopped_it(door: Door) -> None:
    text = (await choice_of(door, max_tokens=40))["text"]
    stop = text[10:13]
    start = text.index(stop)
    for includes, end in ((False, start), (True, start + len(stop))):
        choice = await choice_of(door, max_tokens=40, stop=stop, include_stop_str_in_output=includes)
        assert (choice["text"], choice["finish_reason"]) == (text[:end], "stop")
    stop_id = generated(door)[1][5]
    for includes in (False, True):
        choice = await choice_of(door, stop_token_ids=[stop_id], include_stop_str_in_output=includes)
        shown = generated(door)[1][: 5 + includes]
        assert choice["text"] == door.model.tokenizer.decode(shown)


async def test_only_the_end_of_a_long_prompt_counts_where_it_is_to_be_truncated(door: Door) -> None:
    status, answer = await door.post(TEXT, body(prompt="xxxxxhello", truncate_prompt_tokens=5))
    assert status == 200
    assert answer["usage"]["prompt_tokens"] == 5
    assert answer["choices"][0]["text"] == door.model.tokenizer.decode(generated(door)[1])


@pytest.mark.parametrize(("stream", "num", "num_top"), [(True, 800, 4), (True, 401, 9)])
async def test_what_is_told_of_a_prompt_in_a_stream_is_bounded(
    door: Door, stream: bool, num: int, num_top: int
) -> None:
    fields = body(prompt=[5] * num, echo=True, logprobs=num_top, stream=stream, max_tokens=1)
    if num * (num_top + 1) <= 4000:
        assert len(await events_of(door, **fields)) > 0
        return
    status, answer = await door.post(TEXT, fields)
    assert status == 400
    assert answer["error"]["param"] == "prompt"
    assert "more than the limit of 4000 when stream is true" in answer["error"]["message"]


async def test_much_that_is_told_is_put_together_beside_the_event_loop(door: Door) -> None:
    prompt = [token % 250 for token in range(900)]
    choice = await choice_of(door, prompt=prompt, echo=True, logprobs=20, prompt_logprobs=20, max_tokens=100)
    assert len(choice["logprobs"]["tokens"]) == 1000
    assert choice["logprobs"]["token_logprobs"][1:900] == [told_of(token, 20).logprob for token in prompt[1:]]
    assert len(choice["prompt_logprobs"]) == 900


async def test_an_echo_is_streamed_before_the_text(door: Door) -> None:
    events = [event["choices"][0] for event in await events_of(door, echo=True)]
    assert "".join(event["text"] for event in events) == (await choice_of(door, echo=True))["text"]


@pytest.mark.parametrize("max_tokens", [1, 2, 12])
async def test_a_reply_that_its_first_token_ends_is_told_all_the_same(door: Door, max_tokens: int) -> None:
    first = generated(door)[1][0]
    fields: dict[str, Any] = {"stop_token_ids": [first], "logprobs": 1, "max_tokens": max_tokens}
    choice = await choice_of(door, **fields)
    assert (choice["text"], choice["finish_reason"]) == ("", "stop")
    assert choice["logprobs"]["token_logprobs"] == [told_of(first, 1).logprob]
    events = [event["choices"][0] for event in await events_of(door, **fields)]
    assert [event["logprobs"]["tokens"] for event in events if event["logprobs"]] == [[name(door, first)]]
    assert events[-1]["finish_reason"] == "stop"


@pytest.mark.parametrize("max_tokens", [1, 2])
async def test_the_shortest_replies_have_their_logprobs_from_both_servers(door: Door, max_tokens: int) -> None:
    choice = await choice_of(door, logprobs=0, max_tokens=max_tokens)
    tokens = generated(door, num=max_tokens)[1]
    assert choice["logprobs"]["token_logprobs"] == [told_of(token, 0).logprob for token in tokens]
    assert choice["finish_reason"] == "length"
