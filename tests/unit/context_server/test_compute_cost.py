"""The fit finds what steps really cost, is never negative, and is not thrown off by a step that was held up."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from context_server.step_meter import StepMeter
from disaggregated.compute_cost import ComputeCost, MeasuredStep, StepCost, num_pairs, prior
from disaggregated.engine.api import ChunkComputed, EngineEvent, TokensSampled

GUESS = prior(135 * 10**6, device="cpu", num_threads=1)
TRUE = StepCost(fixed_s=2e-3, token_s=1e-3, pair_s=2e-7)


def a_step(dice: random.Random, true: StepCost = TRUE, *, noise: float = 0.0) -> MeasuredStep:
    num_tokens, before = dice.choice([1, 16, 64, 256, 512]), dice.randrange(4000)
    pairs = num_pairs(before, before + num_tokens)
    return MeasuredStep(num_tokens, pairs, true.step_s(num_tokens, pairs) * (1 + noise * dice.random()))


def test_a_token_makes_a_pair_with_each_token_before_it() -> None:
    assert num_pairs(0, 4) == 0 + 1 + 2 + 3
    assert num_pairs(2, 4) == 2 + 3
    assert num_pairs(5, 5) == 0


def test_before_the_first_step_computing_is_believed_to_be_quick() -> None:
    assert ComputeCost(GUESS).fit() == GUESS
    assert 0 < GUESS.token_s < TRUE.token_s
    assert prior(8 * 10**9, device="cuda:1", num_threads=1).token_s == pytest.approx(16e-6)
    assert prior(135 * 10**6, device="cpu", num_threads=4).token_s == pytest.approx(135e-6)


def test_the_first_step_replaces_the_guess() -> None:
    cost = ComputeCost(GUESS)
    cost.observe(MeasuredStep(512, num_pairs(0, 512), 0.5))
    assert cost.fit().step_s(512, num_pairs(0, 512)) == pytest.approx(0.5, rel=0.01)
    assert cost.fit().step_s(256, num_pairs(0, 256)) == pytest.approx(0.25, rel=0.2)


def test_many_steps_tell_what_each_part_costs() -> None:
    dice, cost = random.Random(1), ComputeCost(GUESS)
    for _ in range(300):
        cost.observe(a_step(dice))
        cost.fit()
    fitted = cost.fit()
    assert fitted.token_s == pytest.approx(TRUE.token_s, rel=0.05)
    assert fitted.pair_s == pytest.approx(TRUE.pair_s, rel=0.1)
    assert fitted.fixed_s == pytest.approx(TRUE.fixed_s, rel=0.2)


def test_a_step_that_was_held_up_changes_little() -> None:
    dice, cost = random.Random(2), ComputeCost(GUESS)
    for _ in range(100):
        cost.observe(a_step(dice))
    before = cost.fit().step_s(512, 10**6)
    cost.observe(MeasuredStep(512, 10**6, 20.0))
    assert cost.fit().step_s(512, 10**6) == pytest.approx(before, rel=0.05)


def test_a_machine_that_got_slower_is_noticed_within_a_few_hundred_steps() -> None:
    dice, cost = random.Random(3), ComputeCost(GUESS)
    for slowness in (1.0, 3.0):
        for _ in range(300):
            cost.observe(a_step(dice, StepCost(TRUE.fixed_s, TRUE.token_s * slowness, TRUE.pair_s)))
            cost.fit()
    assert cost.fit().token_s == pytest.approx(3 * TRUE.token_s, rel=0.3)


@given(
    st.lists(
        st.builds(
            MeasuredStep,
            num_tokens=st.integers(0, 8192),
            num_pairs=st.integers(0, 10**9),
            seconds=st.floats(0, 60, allow_nan=False),
        ),
        max_size=30,
    )
)
def test_no_steps_make_a_negative_or_endless_price(steps: list[MeasuredStep]) -> None:
    cost = ComputeCost(GUESS)
    for step in steps:
        cost.observe(step)
        fitted = cost.fit()
        assert min(fitted.fixed_s, fitted.token_s, fitted.pair_s) >= 0.0
        assert fitted.step_s(10**5, 10**9) < 1e12


def test_what_a_cached_beginning_saves_is_what_computing_it_would_have_added() -> None:
    """In whole steps: a prompt of 1000 tokens in chunks of 256 is four steps, with 512 of them there it is two."""
    whole = sum(TRUE.step_s(end - begin, num_pairs(begin, end)) for begin, end in chunks(0, 1000, 256))
    rest = sum(TRUE.step_s(end - begin, num_pairs(begin, end)) for begin, end in chunks(512, 1000, 256))
    assert TRUE.part_s(0, 512, num_tokens=1000, chunk_size=256) == pytest.approx(whole - rest)


def chunks(begin: int, end: int, size: int) -> list[tuple[int, int]]:
    return [(at, min(at + size, end)) for at in range(begin, end, size)]


def chunk(request_id: str, end: int, count: int, *, started_s: float, finished_s: float) -> ChunkComputed:
    return ChunkComputed(
        request_id=request_id,
        num_computed_tokens=end,
        num_cached_tokens=0,
        block_ids=(),
        num_chunk_tokens=count,
        started_s=started_s,
        finished_s=finished_s,
    )


def test_chunks_of_several_prompts_are_one_step() -> None:
    events: list[EngineEvent] = [
        chunk("a", 64, 64, started_s=1.0, finished_s=1.5),
        chunk("b", 100, 20, started_s=1.0, finished_s=1.5),
        TokensSampled(request_id="b", first_position=100, token_ids=(1,)),
    ]
    assert list(StepMeter().measure(events)) == [MeasuredStep(84, num_pairs(0, 64) + num_pairs(80, 100), 0.5)]


def test_a_step_that_was_launched_ahead_begins_when_the_one_before_ends() -> None:
    meter = StepMeter()
    events = [
        chunk("a", 128, 64, started_s=1.1, finished_s=2.0),
        chunk("a", 64, 64, started_s=1.0, finished_s=1.5),
    ]
    assert [step.seconds for step in meter.measure(events)] == [0.5, 0.5]
    assert [step.seconds for step in meter.measure([chunk("a", 1, 1, started_s=5.0, finished_s=5.25)])] == [0.25]
