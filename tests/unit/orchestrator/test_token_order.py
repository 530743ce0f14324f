from __future__ import annotations

import pytest

from disaggregated.errors import ServerLost
from disaggregated.sampling_params import SamplingParams
from disaggregated.v1 import control_pb2
from orchestrator.token_order import Arrival, TokenOrder, arrival_of


def given(order: TokenOrder, position: int, *token_ids: int, reason: str = "") -> tuple[list[int], str] | None:
    out = order.arrive(Arrival(position, token_ids, reason))
    return None if out is None else (list(out.token_ids), out.finish_reason)


def test_tokens_in_order_pass_straight_through() -> None:
    order = TokenOrder(10)
    assert given(order, 10, 1) == ([1], "")
    assert given(order, 11, 2, 3) == ([2, 3], "")
    assert given(order, 13, 4, reason="stop") == ([4], "stop")
    assert order.position == 14


def test_what_comes_before_the_first_token_waits_for_it() -> None:
    order = TokenOrder(10)
    assert given(order, 11, 2) is None
    assert given(order, 12, 3, 4, reason="length") is None
    assert given(order, 10, 1) == ([1, 2, 3, 4], "length")


def test_an_end_without_a_token_is_an_end() -> None:
    order = TokenOrder(10)
    assert given(order, 10, 1) == ([1], "")
    assert given(order, 11, reason="stop") == ([], "stop")


@pytest.mark.parametrize("position", [10, 9, 0])
def test_a_token_that_was_there_already_condemns_its_sender(position: int) -> None:
    order = TokenOrder(10)
    given(order, 10, 1)
    with pytest.raises(ServerLost, match=f"position 11 was due, and a server sent the one at {position}"):
        given(order, position, 7)


def test_a_gap_among_what_waits_condemns_its_sender() -> None:
    order = TokenOrder(10)
    assert given(order, 11, 2) is None
    with pytest.raises(ServerLost, match="position 12 was due"):
        given(order, 13, 4)


def test_a_gap_behind_the_first_token_is_noticed_when_it_comes() -> None:
    order = TokenOrder(10)
    assert given(order, 12, 3) is None
    with pytest.raises(ServerLost, match="position 11 was due"):
        given(order, 10, 1)


def test_nothing_may_come_after_the_end() -> None:
    order = TokenOrder(10)
    assert given(order, 11, 2, reason="stop") is None
    with pytest.raises(ServerLost):
        given(order, 12, 3)


def test_an_end_that_both_servers_tell_is_one_end_in_either_order() -> None:
    order = TokenOrder(10)
    assert given(order, 11, reason="stop") is None
    assert given(order, 10, 1, reason="stop") == ([1], "stop")


def told_by(*logprobs: float) -> control_pb2.Logprobs:
    return control_pb2.Logprobs(
        logprobs=logprobs,
        ranks=[1] * len(logprobs),
        num_top=1,
        top_token_ids=[7] * len(logprobs),
        top_logprobs=logprobs,
    )


def test_logprobs_stay_with_their_tokens_when_two_servers_tell_them() -> None:
    order = TokenOrder(10, SamplingParams(max_tokens=9, logprobs=1, prompt_logprobs=1))
    assert order.arrive(Arrival(11, [2, 3], "", told_by(-2.0, -3.0))) is None
    assert order.arrive(Arrival(13, [4], "length", told_by(-4.0))) is None
    due = order.arrive(Arrival(10, [1], "", told_by(-1.0), told_by(*range(-9, 0))))
    assert due is not None
    told = due.told()
    assert told is not None
    assert [(token, one.logprob) for token, one in zip(due.token_ids, told.tokens, strict=True)] == [
        (1, -1.0), (2, -2.0), (3, -3.0), (4, -4.0),
    ]  # fmt: skip
    assert [one.logprob for one in told.prompt] == list(range(-9, 0))
    assert all(one.top_token_ids == (7,) and one.top_logprobs == (one.logprob,) for one in told.tokens)


def test_tokens_that_come_without_all_of_their_logprobs_condemn_their_sender() -> None:
    with pytest.raises(ServerLost, match="logprobs of 1 tokens came with 2 tokens"):
        TokenOrder(10).arrive(Arrival(10, [1, 2], "", told_by(-1.0)))
    asked = TokenOrder(3, SamplingParams(max_tokens=9, logprobs=0, prompt_logprobs=0))
    with pytest.raises(ServerLost, match=r"logprobs of 0 tokens came with 1 tokens$"):
        asked.arrive(Arrival(3, [1], "", None, told_by(-1.0, -2.0)))
    with pytest.raises(ServerLost, match="logprobs of 1 tokens came with 2 tokens of the prompt"):
        asked.arrive(Arrival(3, [1], "", told_by(-0.5), told_by(-1.0)))
    assert asked.arrive(Arrival(3, [1], "", told_by(-0.5), told_by(-1.0, -2.0))) is not None
    assert asked.arrive(Arrival(4, [], "stop")) is not None


def test_where_nothing_was_asked_for_nothing_is_told() -> None:
    assert Arrival(10, [1]).told() is None
    assert arrival_of(control_pb2.StreamDelta(first_position=10, token_ids=[1])).told() is None
    asked = arrival_of(control_pb2.StreamDelta(first_position=10, token_ids=[1], logprobs=told_by(-0.5))).told()
    assert asked is not None
    assert asked.prompt == ()


def test_an_order_is_open_but_while_something_is_held() -> None:
    order = TokenOrder(10)
    was_open = [order.is_open]
    for position, token in ((11, 2), (10, 1)):
        given(order, position, token)
        was_open.append(order.is_open)
    assert was_open == [True, False, True]


def test_what_went_straight_through_an_open_order_is_behind_it() -> None:
    order = TokenOrder(10)
    order.position += 2
    assert given(order, 12, 3) == ([3], "")
    with pytest.raises(ServerLost, match="position 13 was due, and a server sent the one at 11"):
        given(order, 11, 7)


@pytest.mark.parametrize("told", [{"logprobs": 1}, {"prompt_logprobs": 0}])
def test_an_order_of_tokens_that_come_with_logprobs_is_never_open(told: dict[str, int]) -> None:
    order = TokenOrder(10, SamplingParams(max_tokens=9, **told))  # type: ignore[arg-type]
    assert not order.is_open
