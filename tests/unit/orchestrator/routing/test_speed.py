"""What is learnt of a server's speed from what it tells, and what others have there."""

from __future__ import annotations

import pytest

from disaggregated.v1 import control_pb2
from orchestrator.routing.speed import ROW_S, TOKEN_S, PoolSpeed, ServerSpeed
from orchestrator.server import Elsewhere
from tests.unit.orchestrator.routing.servers import context, generation, share


def beat(**fields: float) -> control_pb2.Heartbeat:
    return control_pb2.Heartbeat(epoch=1, **fields)  # type: ignore[arg-type]


def test_a_server_of_which_nothing_is_known_is_as_quick_as_any_other() -> None:
    speed = ServerSpeed()
    assert speed.prompt.step_s(100, 0) == pytest.approx(100 * TOKEN_S)
    assert speed.link_rates == {}


def test_what_a_server_measured_of_its_steps_is_believed() -> None:
    speed = ServerSpeed()
    speed.heard(beat(has_step_cost=True, step_fixed_s=0.002, step_token_s=5e-5, step_pair_s=1e-9), now_s=1.0)
    assert speed.prompt.step_s(100, 1000) == pytest.approx(0.002 + 0.005 + 1e-6)


def test_of_a_server_that_does_not_measure_its_prompts_tell() -> None:
    speed = ServerSpeed()
    for number in range(60):
        num_tokens = 100 + 50 * (number % 7)
        speed.prompt_took(num_tokens=num_tokens, num_cached=40, seconds=0.01 + 3e-4 * (num_tokens - 40))
    speed.heard(beat(), now_s=1.0)
    assert speed.prompt.part_s(0, 300, num_tokens=300, chunk_size=512) == pytest.approx(0.1, rel=0.05)


def test_a_decode_step_is_seconds_over_steps_between_two_heartbeats() -> None:
    speed = ServerSpeed()
    speed.heard(beat(num_running=2, step=10, generation_tokens_total=100), now_s=1.0)
    speed.heard(beat(num_running=2, step=20, generation_tokens_total=120), now_s=1.5)
    assert speed.decode_step_s(2) == pytest.approx(0.05)
    assert speed.decode_step_s(12) == pytest.approx(0.1)


def test_an_interval_in_which_there_was_nothing_to_decode_tells_nothing() -> None:
    speed = ServerSpeed()
    speed.heard(beat(num_running=0, step=10), now_s=1.0)
    speed.heard(beat(num_running=1, step=11, generation_tokens_total=1), now_s=9.0)
    speed.heard(beat(num_running=1, step=11, generation_tokens_total=1), now_s=9.5)
    assert speed.decode_step_s(0) == pytest.approx(8 * ROW_S)


def test_a_link_is_as_fast_as_its_last_transfers() -> None:
    speed = ServerSpeed()
    links = [control_pb2.LinkStatistics(peer_id="c0", recent_bytes_per_s=5e8), control_pb2.LinkStatistics(peer_id="c1")]
    speed.heard(control_pb2.Heartbeat(epoch=1, links=links), now_s=1.0)
    assert speed.link_rates == {"c0": 5e8}


def test_what_was_learnt_is_forgotten_with_the_connection() -> None:
    one = context(heartbeat={"has_step_cost": True, "step_token_s": 1.0})
    assert one.speed.prompt.token_s == 1.0
    one.unreachable("it does not answer")
    assert one.speed.prompt.token_s == pytest.approx(TOKEN_S)


# What one server measured beside what its pool measured.


def measured(token_s: float, step: int) -> control_pb2.Heartbeat:
    return control_pb2.Heartbeat(epoch=1, step=step, has_step_cost=True, step_token_s=token_s)


def test_a_first_step_that_was_slow_is_believed_little() -> None:
    pool = PoolSpeed()
    cold, warm = ServerSpeed(pool), ServerSpeed(pool)
    warm.heard(measured(1e-3, step=40), now_s=0.0)
    cold.heard(measured(2e-3, step=1), now_s=0.0)
    assert cold.prompt.token_s < 1.25 * warm.prompt.token_s


def test_what_a_server_goes_on_measuring_is_believed() -> None:
    pool = PoolSpeed()
    slow, fast = ServerSpeed(pool), ServerSpeed(pool)
    for number in range(1, 40):
        slow.heard(measured(4e-3, step=number), now_s=0.1 * number)
        fast.heard(measured(1e-3, step=4 * number), now_s=0.1 * number)
    assert slow.prompt.token_s > 3.3 * fast.prompt.token_s
    assert fast.prompt.token_s < 1.1e-3


def test_a_server_that_is_idle_comes_back_to_what_its_pool_measures() -> None:
    pool = PoolSpeed()
    slow, fast = ServerSpeed(pool), ServerSpeed(pool)
    slow.heard(measured(4e-3, step=5), now_s=0.0)
    for number in range(1, 40):
        fast.heard(measured(1e-3, step=20 * number), now_s=10.0 * number)
        slow.heard(measured(4e-3, step=5), now_s=10.0 * number)
    assert slow.prompt.token_s == pytest.approx(fast.prompt.token_s, rel=0.05)


def test_a_new_server_is_as_quick_as_its_pool() -> None:
    pool = PoolSpeed()
    ServerSpeed(pool).heard(measured(1e-3, step=50), now_s=0.0)
    new = ServerSpeed(pool)
    new.heard(beat(), now_s=0.0)
    assert new.prompt.token_s == pytest.approx(1e-3)


# Other orchestrators.


def test_what_two_heartbeats_tell_beyond_our_own_belongs_to_others() -> None:
    seen = Elsewhere()
    for running, believed in ((5, 0), (5, 3), (2, 0), (2, 0), (6, 0), (4, 2)):
        seen = seen.heard(beat(num_running=running), num_requests=2, num_prefill_tokens=0)
        assert seen.num_requests == believed


def test_others_prompts_and_sequences_count_as_load() -> None:
    one = generation()
    one.take(1, share(num_tokens=50, num_prefill_tokens=20))
    for now_s in (1.0, 1.25):
        one.heard(beat(num_running=3, num_waiting=1, num_waiting_tokens=120, num_blocks_free=100), now_s=now_s)
    assert one.num_requests == 4
    assert one.num_prefill_tokens == 120
    assert one.num_decoding == 3
    assert one.num_tokens == 150


def test_a_context_server_that_others_keep_busy_takes_nothing_more() -> None:
    one = context()
    one.take(1, share())
    assert one.has_room(num_blocks=1)
    for now_s in (1.0, 1.25):
        one.heard(beat(num_waiting_tokens=128, num_blocks_free=100), now_s=now_s)
    assert not one.has_room(num_blocks=1)
