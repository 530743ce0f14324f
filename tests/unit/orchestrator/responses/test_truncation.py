"""A conversation that is longer than the model can read: what is left out of it, and what is left."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.api.responses.input_items import Message
from orchestrator.api.responses.truncation import BYTES_A_TOKEN, STRIDES, cuts, fitted
from tests.support.front_door import Door, front_door

PATH = "/v1/responses"
WORDS = 80
TURN = WORDS + len("[user][assistant]") + 2


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def door() -> AsyncIterator[Door]:
    async with front_door(num_tokens_max=512) as opened:
        yield opened


def spelled(roles: str) -> list[Message]:
    """From their first letters; each has its own text, so that they can be told apart."""
    names = {"s": "system", "d": "developer", "u": "user", "a": "assistant", "t": "tool"}
    return [{"role": names[letter], "content": f"{letter}{index}"} for index, letter in enumerate(roles)]


def left(messages: Sequence[Message]) -> list[str]:
    return ["".join(message["content"][0] for message in cut.kept(messages)) for cut in cuts(messages)]


@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        ("uauau", ["uau", "u"]),
        ("suaua", ["sua"]),
        ("sduuu", ["sduu", "sdu"]),
        ("u", []),
        ("su", []),
        ("uatatat", ["uatat", "uat"]),
        ("sauatatu", ["suatatu", "su"]),
        ("uauatat", ["uatat", "uat"]),
        ("aaa", ["aa", "a"]),
        ("", []),
    ],
)
def test_whole_turns_are_left_out_and_then_the_last_one_s_earliest_steps(roles: str, expected: list[str]) -> None:
    assert left(spelled(roles)) == expected


@given(roles=st.text("suat", max_size=14))
def test_what_is_left_is_in_order_and_begins_with_all_instructions(roles: str) -> None:
    messages = spelled(roles)
    leading = messages[: len(roles) - len(roles.lstrip("s"))]
    fewest = len(messages)
    for cut in cuts(messages):
        kept = cut.kept(messages)
        assert kept[: len(leading)] == leading
        places = [messages.index(message) for message in kept]
        assert places == sorted(places)
        assert kept[-1] == messages[-1]
        assert len(kept) < fewest, "each leaves out more than the one before"
        fewest = len(kept)
        if "u" in roles:
            assert {"role": "user", "content": f"u{roles.rindex('u')}"} in kept
        for place, before in zip(places[1:], places, strict=False):
            assert place == before + 1 or messages[place]["role"] != "tool", "a result came without its call"


def units(messages: Sequence[Message]) -> int:
    """Ten tokens a message, and what a template writes once."""
    return 10 * len(messages) + 5


async def cut_to(messages: Sequence[Message], num_tokens_max: int, *, wanted: int = 1, guess: int = 10) -> Any:
    async def num_tokens_of(kept: Sequence[Message]) -> int:
        return units(kept)

    return await fitted(
        messages, lambda _: guess, num_tokens_of, num_tokens_max=num_tokens_max, num_tokens_wanted=wanted
    )


async def test_what_fits_is_left_alone_and_what_does_not_is_cut_until_it_does() -> None:
    messages = spelled("s" + "ua" * 40 + "u")
    assert await cut_to(messages, units(messages)) is messages
    for num_tokens_max in range(60, units(messages), 7):
        for guess in (6, 10, 14):
            kept = await cut_to(messages, num_tokens_max, wanted=1000, guess=guess)
            assert units(kept) <= num_tokens_max - num_tokens_max // STRIDES
            assert (kept[0], kept[-1]) == (messages[0], messages[-1])


async def test_what_cannot_be_cut_is_left_for_the_limit_to_refuse() -> None:
    assert await cut_to(spelled("u"), 10) == spelled("u")
    assert len(await cut_to(spelled("uatat"), units(spelled("uata")), guess=1)) == 3, "the last cut is always tried"
    assert len(await cut_to(spelled("sua"), 10)) == 3


async def test_the_cut_stays_where_it_is_for_several_turns() -> None:
    """So that what is left begins as it did before."""
    conversation, beginnings = spelled("ua" * 100 + "u"), list[str]()
    for num_turns in range(50, 100):
        kept = await cut_to(conversation[: 2 * num_turns + 1], 400)
        beginnings.append(kept[0]["content"])
    assert len(beginnings) > 2 * len(set(beginnings))


def turns(num: int) -> list[dict[str, Any]]:
    """Items of turns that can be told apart, and a last question."""
    said = [
        item
        for number in range(num)
        for item in (
            {"role": "user", "content": f"{number:02}{'x' * WORDS}"},
            {"role": "assistant", "content": [{"type": "output_text", "text": f"{number:02}"}]},
        )
    ]
    return [*said, {"role": "user", "content": "and now?"}]


@pytest.mark.asyncio(loop_scope="module")
async def test_a_long_conversation_is_answered_and_counted_as_far_as_the_model_reads(door: Door) -> None:
    fields = {"model": "fake", "instructions": "Be brief.", "max_output_tokens": 20, "temperature": 0, "seed": 3}
    body = {**fields, "input": turns(12)}
    status, refused = await door.post(PATH, body)
    assert (status, refused["error"]["param"]) == (400, "input")
    status, response = await door.post(PATH, {**body, "truncation": "auto"})
    assert (status, response["truncation"]) == (200, "auto")
    num_left = response["usage"]["input_tokens"]
    stride = BYTES_A_TOKEN * (511 // STRIDES)  # A token is a byte here.
    assert 511 - 20 - stride - TURN <= num_left <= 511 - 20
    short = turns(12)[-2 * (num_left // TURN) - 1 :]
    same, expected = await door.post(PATH, {**fields, "input": short})
    assert same == 200
    assert response["output"][0]["content"] == expected["output"][0]["content"]
    status, counted = await door.post(f"{PATH}/input_tokens", {**body, "truncation": "auto"})
    assert (status, counted["input_tokens"]) == (200, num_left)


@pytest.mark.asyncio(loop_scope="module")
async def test_what_is_a_thousand_times_too_long_is_cut_as_well(door: Door) -> None:
    endless = {"role": "user", "content": "x" * 900_000}
    body = {"model": "fake", "max_output_tokens": 4, "truncation": "auto", "input": [endless, *turns(1)]}
    status, response = await door.post(PATH, body)
    assert status == 200
    assert response["usage"]["input_tokens"] <= TURN + len("[user]and now?[assistant]")
    status, refused = await door.post(PATH, {**body, "input": [endless]})
    assert (status, refused["error"]["code"]) == (400, "context_length_exceeded")


@pytest.mark.asyncio(loop_scope="module")
async def test_what_is_kept_is_the_whole_conversation(door: Door) -> None:
    fields = {"model": "fake", "max_output_tokens": 4, "truncation": "auto"}
    _, first = await door.post(PATH, {**fields, "input": turns(12)})
    status, second = await door.post(PATH, {**fields, "input": "Go on.", "previous_response_id": first["id"]})
    assert status == 200
    assert second["usage"]["input_tokens"] <= 511 - 4
    _, answer = await door.get(f"{PATH}/{first['id']}/input_items")
    assert len(answer["data"]) == 25
