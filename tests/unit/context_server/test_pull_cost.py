"""Bringing is chosen when it is cheaper by more than an estimate may err, and never waited for longer than it saves."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from context_server.pull_cost import (
    ASKING_S,
    BYTE_S,
    GAIN_S_MIN,
    MARGIN,
    MEETING_S,
    PEERS_MAX,
    PULL_S_MAX,
    PullCosts,
    Quote,
)
from disaggregated.compute_cost import StepCost, prior

CPU = StepCost(fixed_s=1e-3, token_s=1e-3, pair_s=1e-7)


def quote(
    step: StepCost = CPU, *, asking_s: float = ASKING_S, byte_s: float = BYTE_S, block_bytes: int = 737_280
) -> Quote:
    """Blocks of 32 tokens, in steps of 512; the bytes are SmolLM2-135M's."""
    return Quote(step=step, asking_s=asking_s, byte_s=byte_s, block_size=32, block_bytes=block_bytes, chunk_size=512)


quotes = st.builds(
    quote,
    st.builds(StepCost, fixed_s=st.floats(0, 0.1), token_s=st.floats(0, 0.01), pair_s=st.floats(0, 1e-5)),
    asking_s=st.floats(0, 1),
    byte_s=st.floats(1e-12, 1e-6),
    block_bytes=st.integers(1, 1 << 26),
)


def test_a_long_conversation_on_a_slow_machine_is_brought() -> None:
    plan = quote().plan(0, 30, num_tokens=1000)
    assert plan.num_blocks == plan.num_considered_blocks == 30
    assert plan.compute_s == pytest.approx(0.96 + 1e-7 * 960 * 959 / 2 + 1e-3)
    assert plan.pull_s == pytest.approx(ASKING_S + 30 * 737_280e-9)


def test_one_block_is_not_worth_asking_for() -> None:
    assert quote(StepCost(0.0, 3e-4, 0.0)).plan(0, 1, num_tokens=1000).num_blocks == 0


def test_where_nothing_was_measured_nobody_waits_for_a_guess() -> None:
    large_gpu = prior(8 * 10**9, device="cuda", num_threads=1)
    assert quote(large_gpu, block_bytes=4 << 20).plan(0, 30, num_tokens=1000).num_blocks == 0
    assert quote(large_gpu, block_bytes=4 << 20, asking_s=MEETING_S).plan(0, 300, num_tokens=10_000).num_blocks == 0


def test_what_is_here_already_is_neither_brought_nor_counted_as_saved() -> None:
    plan = quote().plan(20, 30, num_tokens=1000)
    assert (plan.num_blocks, plan.num_considered_blocks) == (10, 10)
    assert plan.compute_s < quote().plan(0, 30, num_tokens=1000).compute_s / 2
    nothing = quote().plan(30, 30, num_tokens=1000)
    assert (nothing.num_blocks, nothing.num_considered_blocks) == (0, 0)


def test_of_very_much_only_the_beginning_is_brought() -> None:
    plan = quote(byte_s=1e-8).plan(0, 1000, num_tokens=32_001)
    assert 0 < plan.num_blocks < 1000
    assert plan.pull_s <= PULL_S_MAX < quote(byte_s=1e-8).pull_s(plan.num_blocks + 1)


@given(quotes, st.integers(0, 50), st.integers(0, 2000), st.integers(1, 64))
def test_what_is_brought_is_always_worth_it(prices: Quote, num_cached: int, num_offered: int, num_left: int) -> None:
    num_tokens = 32 * max(num_cached, num_offered) + num_left
    plan = prices.plan(num_cached, num_offered, num_tokens=num_tokens)
    assert 0 <= plan.num_blocks <= plan.num_considered_blocks == max(0, num_offered - num_cached)
    if plan.num_blocks:
        assert MARGIN * plan.pull_s <= plan.compute_s
        assert plan.compute_s - plan.pull_s >= GAIN_S_MIN
        assert plan.pull_s <= PULL_S_MAX + 1e-9
        assert plan.pull_s < plan.deadline_s(10.0) < plan.compute_s
        assert plan.deadline_s(0.1) <= max(0.1, 10 * plan.pull_s)


@given(quotes, st.integers(1, 2000), st.floats(1.0, 100.0))
def test_what_is_worth_it_stays_so_when_bringing_gets_cheaper_or_computing_dearer(
    prices: Quote, num_offered: int, factor: float
) -> None:
    num_tokens = 32 * num_offered + 1
    before = prices.plan(0, num_offered, num_tokens=num_tokens)
    cheaper = quote(
        prices.step,
        asking_s=prices.asking_s / factor,
        byte_s=prices.byte_s / factor,
        block_bytes=prices.block_bytes,
    ).plan(0, num_offered, num_tokens=num_tokens)
    assert cheaper.num_blocks >= before.num_blocks or before.num_blocks == 0


@given(quotes, st.integers(2, 500))
def test_no_shorter_beginning_would_have_gained_more(prices: Quote, num_offered: int) -> None:
    """Where a step costs nothing by itself: the last chunk's rounding is all that speaks for fewer blocks."""
    step = StepCost(0.0, prices.step.token_s, prices.step.pair_s)
    smooth = quote(step, asking_s=prices.asking_s, byte_s=prices.byte_s, block_bytes=prices.block_bytes)
    num_tokens = 32 * num_offered + 1
    plan = smooth.plan(0, num_offered, num_tokens=num_tokens)
    if plan.num_blocks:
        gain = plan.compute_s - plan.pull_s
        fewer = range(1, plan.num_blocks, max(1, plan.num_blocks // 7))
        gains = [smooth.compute_s(0, n, num_tokens=num_tokens) - smooth.pull_s(n) for n in fewer]
        assert all(gain >= other - 1e-9 for other in gains)


def test_measured_prices_replace_the_guesses() -> None:
    costs = PullCosts()
    assert costs.prices("g0", is_connected=True, now_s=0.0) == (ASKING_S, BYTE_S)
    assert costs.prices("g0", is_connected=False, now_s=0.0) == (MEETING_S, BYTE_S)
    costs.pulled("g0", was_connected=True, asking_s=0.004, num_bytes=10**8, transfer_s=0.02, now_s=0.0)
    assert costs.prices("g0", is_connected=True, now_s=0.0) == pytest.approx((0.004, 2e-10))
    costs.pulled("g0", was_connected=True, asking_s=0.014, num_bytes=10**8, transfer_s=0.02, now_s=0.0)
    assert costs.prices("g0", is_connected=True, now_s=0.0) == pytest.approx((0.007, 2e-10))
    assert costs.prices("g1", is_connected=True, now_s=0.0) == (ASKING_S, BYTE_S)


def test_a_few_bytes_say_nothing_about_the_rate() -> None:
    costs = PullCosts()
    costs.pulled("g0", was_connected=True, asking_s=0.004, num_bytes=100, transfer_s=0.5, now_s=0.0)
    prices = costs.prices("g0", is_connected=True, now_s=0.0)
    assert prices is not None
    assert prices[1] == BYTE_S


def test_a_slow_moment_fades_and_a_quick_one_stays() -> None:
    costs = PullCosts()
    costs.pulled("slow", was_connected=True, asking_s=2.0, num_bytes=10**6, transfer_s=1.0, now_s=100.0)
    costs.pulled("quick", was_connected=True, asking_s=0.001, num_bytes=10**9, transfer_s=0.1, now_s=100.0)
    slow, quick = (
        costs.prices("slow", is_connected=True, now_s=100.0),
        costs.prices("quick", is_connected=True, now_s=900.0),
    )
    assert slow == pytest.approx((2.0, 1e-6))
    assert quick == pytest.approx((0.001, 1e-10))
    later = costs.prices("slow", is_connected=True, now_s=130.0)
    assert later == pytest.approx(((2.0 + ASKING_S) / 2, (1e-6 + BYTE_S) / 2))


def test_a_peer_that_failed_rests_longer_each_time_until_it_answers() -> None:
    costs = PullCosts()

    def is_asked(now_s: float) -> bool:
        return costs.prices("g0", is_connected=True, now_s=now_s) is not None

    costs.failed("g0", now_s=10.0)
    assert not is_asked(10.9)
    assert is_asked(11.0)
    costs.failed("g0", now_s=11.0)
    assert not is_asked(12.9)
    for _ in range(20):
        costs.failed("g0", now_s=20.0)
    assert not is_asked(79.0)
    assert is_asked(80.0)
    costs.pulled("g0", was_connected=True, asking_s=0.01, num_bytes=0, transfer_s=0.0, now_s=80.0)
    costs.failed("g0", now_s=90.0)
    assert is_asked(91.0)


def test_no_more_peers_than_the_bound_are_known() -> None:
    costs = PullCosts()
    for number in range(PEERS_MAX + 10):
        costs.failed(f"g{number}", now_s=0.0)
    assert costs.prices("g0", is_connected=True, now_s=0.0) is not None
    assert costs.prices(f"g{PEERS_MAX}", is_connected=True, now_s=0.0) is None
