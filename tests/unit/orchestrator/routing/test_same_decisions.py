"""The quick way of placing a request decides, and tells, what the plain one does."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disaggregated.block_hash import block_hashes
from disaggregated.v1 import control_pb2
from orchestrator.routing.local_prefill import LocalPrefill
from orchestrator.routing.near_equals import SIDE_MAX, Turns
from orchestrator.routing.placement import STEPS_AHEAD_MAX, Needs, NotYet, Placement, Placer
from orchestrator.server import Server
from tests.unit.orchestrator.routing.plain_costs import PlainCosts, Way, held
from tests.unit.orchestrator.routing.servers import context, generation, holds, share

PROMPT = list(range(200))
HASHES = list(block_hashes(PROMPT, 16))
NUM_BLOCKS = 13


def some_servers(dice: random.Random, *, are_contexts: bool) -> list[Server]:
    """Some of either kind, of any speed, with any load, and with any part of the prompt."""
    made = []
    for number in range(dice.randint(1, SIDE_MAX)):
        links = [
            control_pb2.LinkStatistics(peer_id=f"{kind}{peer}", recent_bytes_per_s=10 ** dice.uniform(4, 9))
            for kind in "cg"
            for peer in range(SIDE_MAX)
            if dice.random() < 0.2
        ]
        beat = {
            "has_step_cost": dice.random() < 0.7,
            "step_fixed_s": dice.choice([0.0, 0.001]),
            "step_token_s": dice.choice([1e-4, 10 ** dice.uniform(-6, -3)]),
            "step_pair_s": dice.choice([0.0, 1e-7]),
            "num_running": dice.randint(0, 2),
            "num_blocks_free": dice.choice([5, 100]),
            "links": links,
        }
        make, name = (context, f"c{number}") if are_contexts else (generation, f"g{number}")
        one = make(name, heartbeat=beat, can_prefill=dice.random() < 0.7)
        one.pulls_back = are_contexts and dice.random() < 0.5
        if dice.random() < 0.6:
            holds(one, HASHES[: dice.randint(0, NUM_BLOCKS - 1)])
        for key in range(dice.choice([0, 0, 1, 3, 4])):
            left = dice.choice([0, 30, 100])
            one.take(key, share(num_tokens=100, num_prefill_tokens=left, is_decoding=dice.random() < 0.5))
        made.append(one)
    return made


def may_be_asked(needs: Needs, contexts: list[Server]) -> list[Server]:
    """Those with room, and those that are worth waiting for."""
    free = [one for one in contexts if one.has_room(num_blocks=NUM_BLOCKS)]
    if not free:
        return contexts
    most = max(held(needs, one) for one in free)
    busy = [one for one in contexts if one not in free and held(needs, one) > most]
    return free + [one for one in busy if one.has_room(num_blocks=NUM_BLOCKS, num_steps=STEPS_AHEAD_MAX)]


@given(seed=st.integers(0, 1_000_000))
def test_the_servers_and_their_story_are_those_of_the_plain_cost_model(seed: int) -> None:
    dice = random.Random(seed)
    contexts, generations = some_servers(dice, are_contexts=True), some_servers(dice, are_contexts=False)
    balances = dice.random() < 0.5
    placer, plain = Placer(None, None, LocalPrefill(balances=balances)), PlainCosts()
    for _ in range(3):  # Whose turn it is is remembered as well.
        needs = Needs(200, dice.choice([2, 5, 50]), block_hashes=dice.choice([HASHES, []]))
        found = placer.place(needs, contexts, generations)
        asked = may_be_asked(needs, contexts)
        roomy = [one for one in generations if one.has_room(num_blocks=NUM_BLOCKS)]
        alone = [one for one in roomy if one.can_prefill and balances]
        is_full = not any(one.has_room(num_blocks=NUM_BLOCKS) for one in contexts)
        if not roomy or (is_full and not alone):
            assert isinstance(found, NotYet)
            return
        expected = plain.choose(needs, asked, roomy, alone)
        if isinstance(found, NotYet):
            assert is_full
            assert expected.context is not None, "waiting for a context server costs less"
            return
        assert_same(found, expected, needs)


def assert_same(found: Placement, expected: Way, needs: Needs) -> None:
    names = tuple(server.instance_id if server else "" for server in (found.context, found.generation))
    assert names == expected.names
    first, *others = found.decision.candidates
    assert (first.context, first.generation) == expected.names
    assert first.num_cached_tokens == expected.num_cached
    assert first.harm_s == pytest.approx(expected.harm_s)
    assert first.queue_s == pytest.approx(expected.queue_s)
    assert first.compute_s == pytest.approx(expected.compute_s)
    assert first.gap_s == pytest.approx(expected.gap_s)
    assert first.score == pytest.approx(expected.score_s)
    assert [each.score for each in others] == sorted(each.score for each in others)
    assert found.decision.ttft_s == pytest.approx(expected.queue_s + expected.compute_s)
    ttft = f"first token in {1000 * (expected.queue_s + expected.compute_s):.1f} ms"
    assert ttft in found.why
    assert found.why.startswith("prefilled there: ") == (expected.context is None)
    assert found.why.endswith(f", {expected.num_cached} tokens cached" if expected.num_cached else " ms")
    prefiller = found.context or found.generation
    assert prefiller is not None
    predicted = held(needs, prefiller) if prefiller.known_blocks.is_followed else None
    assert found.decision.num_cached_tokens == predicted


def test_of_very_many_instances_the_one_that_was_not_taken_for_longest_is_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("orchestrator.routing.near_equals.NAMES_MAX", 3)
    turns = Turns()
    one, two, three, four = (context(f"c{number}") for number in range(4))
    turns.take(one, two)
    turns.take(three, None)
    turns.take(one, four)
    assert list(turns.taken) == ["c0", "c2", "c3"]
    assert turns.taken["c3"] > turns.taken["c0"] > turns.taken["c2"]
