from __future__ import annotations

import pytest

from disaggregated.errors import ServerLost
from orchestrator.token_order import Arrival, TokenOrder


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
