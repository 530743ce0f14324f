"""The chats that routers are compared on, and how what was seen becomes a verdict."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import chats
from benchmarks.routing import BLOCK, NUM_CLIENTS, NUM_ROUNDS, Seen, findable_share, rows


@pytest.mark.parametrize("seed", range(10))
def test_chats_are_as_long_as_they_are_said_to_be(seed: int) -> None:
    every = [chat for clients in chats.rounds(seed, num_rounds=30, num_clients=8) for chat in clients]
    half_over = [sum(chat.prompt_lengths) / len(chat.turns) for chat in every]
    assert sum(half_over) / len(every) == pytest.approx(chats.MEAN_LENGTH, rel=0.05)
    assert {len(chat.turns) for chat in every} == {3, 4, 5}


def test_one_seed_is_one_trace() -> None:
    one, same, other = (chats.rounds(seed, num_rounds=2, num_clients=3) for seed in (1, 1, 2))
    assert one == same
    assert one != other
    assert [len(clients) for clients in one] == [3, 3]


def test_what_can_be_found_of_a_chat_are_whole_blocks_of_its_earlier_prompts() -> None:
    turns = [chats.Turn(1.0, [0] * length) for length in (40, 20, 30)]
    chat = chats.Chat(turns)
    assert chat.prompt_lengths == [40, 68, 106]
    assert chat.num_findable(16) == 32 + 64
    assert chats.Chat(turns[:1]).num_findable(16) == 0
    assert findable_share([[chat]]) == 96 / 214
    usual = findable_share(chats.rounds(1, num_rounds=NUM_ROUNDS, num_clients=NUM_CLIENTS))
    assert 0.65 < usual < 0.8, f"{BLOCK} tokens a block"


def story(cached: int, predicted: int | None, elsewhere: int = 0) -> dict[str, Any]:
    candidates = [{"score": 1.0, "num_cached_tokens": cached}, {"score": 2.0, "num_cached_tokens": elsewhere}]
    decision = {"predicted_cached_tokens": predicted, "predicted_ttft_s": 0.5, "candidates": candidates}
    failed = {"first_token_s": None}
    attempt = {"num_cached_tokens": cached, "num_pulled_tokens": 0, "began_s": 1.0, "first_token_s": 2.0}
    return {
        "num_prompt_tokens": 100, "num_cached_tokens": cached, "attempts": [failed, attempt | {"decision": decision}]
    }  # fmt: skip


def seen(cached: int, ttft_s: float, predicted: int | None = None) -> Seen:
    made = Seen()
    for number in range(4):
        made.take(story(cached, predicted), ttft_s)
        made.answers[(number,)] = [7]
    made.round_ttft_s = [ttft_s, 2 * ttft_s]
    return made


def test_what_was_seen_is_held_against_the_bars() -> None:
    good = {row.what: row for row in rows(seen(30, 1.0), seen(60, 0.5, predicted=60), findable=0.7)}
    assert [row.holds for row in good.values() if row.bar] == [True, True, True]
    assert good["the most that any placement could find / round robin"].seen == "70.0% = 1 : 2.33"
    assert good["equal answers"].seen == "4 of 4"
    assert good["the same, of one round"].seen == "50.0 % (50.0 to 50.0, n=2)"
    bad = rows(seen(40, 1.0), seen(60, 0.7, predicted=48), findable=0.7)
    assert [row.holds for row in bad if row.bar] == [False, False, False]


def test_each_deployment_is_the_first_to_play_as_often_as_the_other() -> None:
    assert NUM_ROUNDS % 2 == 0


def test_turns_that_left_their_blocks_are_counted() -> None:
    made = Seen()
    for elsewhere in (0, 64):
        made.take(story(32, 32, elsewhere), 1.0)
    assert (made.num_moved, made.estimate_ratios) == (1, [2.0, 2.0])
