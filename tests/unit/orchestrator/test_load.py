"""The totals of a server's shares, kept up to date by whatever happens to them."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from orchestrator.load import Load, Share

Event = tuple[str, int, int]

EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["take", "give_back", "left_to_prefill", "grew", "decodes"]),
        st.integers(0, 4),
        st.integers(0, 50),
    ),
    max_size=60,
)


def share(num_tokens: int = 10, num_prefill_tokens: int = 0, *, is_decoding: bool = False) -> Share:
    return Share(num_tokens, num_prefill_tokens, 1, lambda _: None, is_decoding=is_decoding)


def totals(load: Load) -> tuple[int, int, int, int]:
    return len(load.shares), load.num_tokens, load.num_prefill_tokens, load.num_decoding


@given(EVENTS)
def test_totals_are_those_of_the_shares_whatever_happens_in_whatever_order(events: list[Event]) -> None:
    load, shares = Load(), {key: share(10 + key, key) for key in range(5)}
    for what, key, number in events:
        one = shares[key]
        if what == "take" and key not in load.shares:
            load.take(key, one)
        elif what == "give_back" and key in load.shares:
            load.give_back(key)
        elif what == "left_to_prefill":
            one.left_to_prefill(number)
        elif what == "grew":
            one.grew(number)
        elif what == "decodes":
            one.decodes()
        load.check_integrity()
    for key in list(load.shares):
        load.give_back(key)
    assert totals(load) == (0, 0, 0, 0)


def test_a_share_that_was_given_back_counts_nowhere_and_may_still_be_told_of() -> None:
    load, one = Load(), share(100, 60)
    load.take(1, one)
    assert totals(load) == (1, 100, 60, 0)
    load.give_back(1)
    one.left_to_prefill(20)
    one.grew(5)
    one.decodes()
    assert totals(load) == (0, 0, 0, 0)
    load.take(2, one)
    assert totals(load) == (1, 105, 20, 1)


def test_one_attempt_has_one_share_of_a_server() -> None:
    load = Load()
    load.take(1, share())
    with pytest.raises(AssertionError, match="attempt 1 is here already"):
        load.take(1, share())


def test_those_that_prefill_are_known_in_the_order_in_which_they_came() -> None:
    load = Load()
    one, two, three = share(10, 5), share(10, 0), share(10, 7)
    for key, each in enumerate((one, two, three)):
        load.take(key, each)
    assert list(load.prefilling) == [one, three]
    one.left_to_prefill(0)
    assert list(load.prefilling) == [three]
