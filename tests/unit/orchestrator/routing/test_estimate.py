"""What a request costs at each pair of servers, and which pair is taken."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disaggregated.block_hash import block_hashes
from disaggregated.v1 import control_pb2
from orchestrator.routing.estimate import HAND_OFF_S, ROWS_TO_COME, Estimator
from orchestrator.routing.least import least_alone, least_of
from orchestrator.routing.local_prefill import LocalPrefill
from orchestrator.routing.placement import Needs, NotYet, Placement, Placer
from orchestrator.routing.policies import RoundRobin
from orchestrator.server import Server
from tests.unit.orchestrator.routing.servers import context, generation, holds, share

PROMPT = list(range(640))
HASHES = list(block_hashes(PROMPT, 16))
FAST = {"has_step_cost": True, "step_fixed_s": 0.001, "step_token_s": 1e-4}
SLOW = {"has_step_cost": True, "step_fixed_s": 0.001, "step_token_s": 3e-4}


def placed(contexts: list[Server], generations: list[Server], *, local: LocalPrefill | None = None) -> Placement:
    found = Placer(None, None, local).place(needs(), contexts, generations)
    assert isinstance(found, Placement), found
    return found


def needs(num_tokens_left: int = 10) -> Needs:
    return Needs(num_prompt_tokens=640, num_tokens_left=num_tokens_left, block_hashes=HASHES)


def where(placement: Placement) -> tuple[str, str]:
    return tuple(one.instance_id if one else "" for one in (placement.context, placement.generation))  # type: ignore[return-value]


class Told(NamedTuple):
    """Of a row."""

    num_cached: int
    queue_s: float
    compute_s: float


def told(one: Server, holders: Sequence[Server] = ()) -> Told:
    (row,) = estimator().prefills([one], holders)
    _, _, _, _, _, _, _, num_cached, queue_s, compute_s = row
    return Told(num_cached, queue_s, compute_s)


def estimator() -> Estimator:
    return Estimator(640, HASHES, 10, turns={})


def test_a_prompt_costs_its_uncached_part_in_whole_steps() -> None:
    one = context(heartbeat=FAST)
    cold = told(one)
    assert (cold.num_cached, cold.queue_s) == (0, 0.0)
    assert cold.compute_s == pytest.approx(10 * 0.001 + 640 * 1e-4)
    holds(one, HASHES[:30])
    warm = told(one)
    assert warm.num_cached == 480
    assert warm.compute_s == pytest.approx(3 * 0.001 + 160 * 1e-4)


def test_the_last_token_is_computed_though_all_of_the_prompt_is_held() -> None:
    one = context(heartbeat=FAST)
    holds(one, HASHES)
    prefill = told(one)
    assert prefill.num_cached == 624


def test_what_waits_there_comes_before_it() -> None:
    one = context(heartbeat=FAST)
    one.take(1, share(num_tokens=128, num_prefill_tokens=64))
    prefill = told(one)
    assert prefill.queue_s == pytest.approx(0.001 + 64 * 1e-4)


def test_blocks_that_a_generation_server_holds_are_brought_where_that_is_quicker() -> None:
    one, holder = context(heartbeat=SLOW), generation()
    holds(holder, HASHES[:39])
    alone = told(one, [holder])
    assert alone.num_cached == 0, "it does not pull back"
    one.pulls_back = True
    brought = told(one, [holder])
    assert brought.num_cached == 624
    assert brought.compute_s < alone.compute_s / 5


def test_the_quicker_the_cached_and_the_idle_server_is_taken() -> None:
    slow, fast = context("c0", heartbeat=SLOW), context("c1", heartbeat=FAST)
    idle, busy = generation("g1"), generation("g0")
    for key in range(3):
        busy.take(key, share(is_decoding=True))
    assert where(placed([slow, fast], [busy, idle])) == ("c1", "g1")
    holds(slow, HASHES[:35])
    assert where(placed([slow, fast], [busy, idle])) == ("c0", "g1")


def test_a_busy_server_is_waited_for_when_it_holds_enough_of_the_prompt() -> None:
    busy, idle = context("c0", heartbeat=FAST), context("c1", heartbeat=FAST)
    busy.take(1, share(num_tokens=200, num_prefill_tokens=200))
    assert not busy.has_room(num_blocks=41)
    assert where(placed([busy, idle], [generation()]))[0] == "c1"
    holds(busy, HASHES[:39])
    assert where(placed([busy, idle], [generation()]))[0] == "c0"
    busy.take(2, share(num_tokens=900, num_prefill_tokens=900))
    assert where(placed([busy, idle], [generation()]))[0] == "c1", "waiting would take longer than computing"


def test_servers_that_cost_the_same_take_turns_in_both_pools() -> None:
    contexts = [context("c0", heartbeat=FAST), context("c1", heartbeat=FAST | {"step_token_s": 1.02e-4})]
    generations = [generation("g0"), generation("g1")]
    placer = Placer(None, None)
    seen = []
    for _ in range(4):
        found = placer.place(needs(), contexts, generations)
        assert isinstance(found, Placement)
        seen.append(where(found))
    assert [first for first, _ in seen] == ["c0", "c1", "c0", "c1"]
    assert [second for _, second in seen] == ["g0", "g1", "g0", "g1"]


def test_all_servers_of_large_pools_have_their_turn() -> None:
    """Only a few of a side are made pairs of, and these are not always the same."""
    contexts = [context(f"c{number}", heartbeat=FAST) for number in range(10)]
    generations = [generation(f"g{number}") for number in range(12)]
    placer = Placer(None, None)
    seen = [placer.place(needs(), contexts, generations) for _ in range(60)]
    firsts, seconds = zip(*(where(found) for found in seen if isinstance(found, Placement)), strict=True)
    assert set(Counter(firsts).values()) == {6}
    assert set(Counter(seconds).values()) == {5}


def test_of_many_the_one_that_holds_the_prompt_is_found() -> None:
    contexts = [context(f"c{number}", heartbeat=FAST) for number in range(10)]
    holds(contexts[9], HASHES[:20])
    assert where(placed(contexts, [generation()]))[0] == "c9"


def test_of_equals_the_one_with_the_emptiest_cache_is_taken() -> None:
    full, empty = context("c0", heartbeat=FAST), context("c1", heartbeat=FAST)
    holds(full, list(block_hashes(range(5000, 5160), 16)))
    assert {where(placed([full, empty], [generation()]))[0] for _ in range(3)} == {"c1"}


def test_a_link_that_is_slow_is_avoided_when_a_transfer_would_not_be_hidden() -> None:
    fast = {"has_step_cost": True, "step_token_s": 1e-6}
    link = control_pb2.LinkStatistics(peer_id="c0", recent_bytes_per_s=1e5)
    near, far = generation("g0", heartbeat={"links": [link]}), generation("g1")
    assert where(placed([context("c0", heartbeat=fast)], [near, far])) == ("c0", "g1")


def test_one_hop_may_have_a_policy_and_the_other_one_the_cost_model() -> None:
    slow, fast = context("c0", heartbeat=SLOW), context("c1", heartbeat=FAST)
    placer = Placer(RoundRobin(), None)
    found = [placer.place(needs(), [slow, fast], [generation()]) for _ in range(4)]
    assert [where(each)[0] for each in found if isinstance(each, Placement)] == ["c0", "c1", "c0", "c1"]
    assert isinstance(found[0], Placement)
    assert found[0].why.startswith("its turn among 2; least of 1: first token in")


def test_one_token_is_wanted_of_the_context_server_that_is_quickest() -> None:
    slow, fast = context("c0", heartbeat=SLOW), context("c1", heartbeat=FAST)
    found = Placer(None, None).place(needs(num_tokens_left=1), [slow, fast], [generation()])
    assert isinstance(found, Placement)
    assert (where(found), found.why[:20]) == (("c1", ""), "one token is wanted;")


def test_a_server_that_failed_the_request_stands_behind_the_others() -> None:
    slow, fast = context("c0", heartbeat=SLOW), context("c1", heartbeat=FAST)
    wants = Needs(num_prompt_tokens=640, num_tokens_left=10, avoid={"c1", "g0"})
    found = Placer(None, None).place(wants, [slow, fast], [generation("g0"), generation("g1")])
    assert isinstance(found, Placement)
    assert where(found) == ("c0", "g1")


# Conditional disaggregation.

BALANCED = LocalPrefill(balances=True)


def test_alone_nothing_travels_and_those_who_decode_there_pay() -> None:
    one = generation()
    one.take(1, share(is_decoding=True))
    one.take(2, share(is_decoding=True))
    (alone,) = least_alone(estimator(), [one])[-1].scored()
    (pair,) = least_of(estimator(), [context()], [one], holders=[one])[-1].scored()
    assert alone.harm_s == pytest.approx(2 * (alone.compute_s or 0.0))
    assert (pair.gap_s or 0.0) - (alone.gap_s or 0.0) == pytest.approx(HAND_OFF_S)
    (idle,) = least_alone(estimator(), [generation()])[-1].scored()
    assert idle.harm_s == pytest.approx(ROWS_TO_COME * (idle.compute_s or 0.0))


def test_a_long_prompt_goes_to_a_context_server_and_one_of_a_burst_to_an_idle_generation_server() -> None:
    one, two = context(heartbeat=FAST), generation(heartbeat=FAST)
    assert where(placed([one], [two], local=BALANCED)) == ("c0", "g0")
    one.take(1, share(num_tokens=640, num_prefill_tokens=100))
    assert where(placed([one], [two], local=LocalPrefill())) == ("c0", "g0")
    one.take(2, share(num_tokens=640, num_prefill_tokens=640))
    assert where(placed([one], [two], local=BALANCED)) == ("", "g0")


def test_a_prompt_that_is_cached_where_it_decodes_is_prefilled_there() -> None:
    one, two = context(heartbeat=FAST), generation(heartbeat=FAST)
    holds(two, HASHES[:38])
    found = placed([one], [two], local=BALANCED)
    assert where(found) == ("", "g0")
    assert "prefilled there: least of 2: first token in" in found.why
    assert "608 tokens cached" in found.why
    two.take(1, share(is_decoding=True))
    two.take(2, share(is_decoding=True))
    two.take(3, share(is_decoding=True))
    holds(two, HASHES[:10])
    assert where(placed([one], [two], local=BALANCED)) == ("c0", "g0"), "three would wait for 480 tokens"


def test_waiting_for_a_context_server_may_cost_less_than_disturbing_a_batch() -> None:
    one, two = context(heartbeat=FAST), generation(heartbeat=FAST)
    for key in range(3):
        two.take(key, share(is_decoding=True))
    one.take(1, share(num_tokens=128, num_prefill_tokens=128))
    found = Placer(None, None, BALANCED).place(needs(), [one], [two])
    assert found == NotYet("all 1 context servers are busy")


@given(queued=st.integers(0, 127), held=st.integers(0, 40), rows=st.integers(0, 3))
def test_more_waiting_at_the_context_server_never_speaks_against_a_local_prefill(
    queued: int, held: int, rows: int
) -> None:
    one, two = context(heartbeat=FAST), generation(heartbeat=FAST)
    holds(two, HASHES[:held])
    for key in range(rows):
        two.take(key, share(is_decoding=True))
    one.take(9, share(num_tokens=640, num_prefill_tokens=queued))
    before = placed([one], [two], local=BALANCED)
    one.shares[9].left_to_prefill(queued + 1)
    after = Placer(None, None, BALANCED).place(needs(), [one], [two])
    if before.context is None:
        assert isinstance(after, Placement)
        assert after.context is None


# What is recorded.


def test_a_decision_keeps_the_best_candidates_the_chosen_one_first() -> None:
    contexts = [context(f"c{number}", heartbeat=FAST) for number in range(5)]
    generations = [generation(f"g{number}") for number in range(5)]
    holds(contexts[3], HASHES[:20])
    found = placed(contexts, generations)
    decision = found.decision.as_json()
    assert len(decision["candidates"]) == 8
    first, *others = decision["candidates"]
    assert (first["context"], first["num_cached_tokens"]) == ("c3", 320.0)
    assert decision["predicted_cached_tokens"] == 320
    assert decision["predicted_ttft_s"] == pytest.approx(first["queue_s"] + first["compute_s"])
    parts = ("queue_s", "compute_s", "gap_s", "harm_s")
    assert all(each["score"] == pytest.approx(sum(each[name] for name in parts)) for each in decision["candidates"])
    assert [each["score"] for each in others] == sorted(each["score"] for each in others)


def test_a_decision_keeps_names_and_not_the_servers_with_all_that_they_hold() -> None:
    found = placed([context()], [generation()])
    assert found.decision.weighed is not None
    assert not [value for value in flat(found.decision.weighed) if isinstance(value, Server)]


def flat(kept: object) -> Iterator[object]:
    if isinstance(kept, list | tuple):
        for each in kept:
            yield from flat(each)
    else:
        yield kept


def test_nothing_is_predicted_of_a_server_that_does_not_tell_its_blocks() -> None:
    assert placed([context()], [generation()]).decision.num_cached_tokens is None
    one = context()
    holds(one, [])
    assert placed([one], [generation()]).decision.num_cached_tokens == 0
