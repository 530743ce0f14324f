from __future__ import annotations

from typing import Any

import pytest

from disaggregated.block_hash import block_hashes
from disaggregated.errors import ServerLost
from disaggregated.v1 import control_pb2
from orchestrator.load import Share
from orchestrator.routing.local_prefill import LocalPrefill
from orchestrator.routing.placement import Needs, NotYet, Placement, Placer
from orchestrator.routing.policies import RoundRobin
from orchestrator.server import Role, Server
from tests.unit.orchestrator.routing.servers import holds, server, share


def place(
    context: list[Server], generation: list[Server], *, local: LocalPrefill | None = None, **needs: Any
) -> Placement | NotYet:
    wants = Needs(**{"num_prompt_tokens": 32, "num_tokens_left": 10, **needs})
    return Placer(RoundRobin(), RoundRobin(), local).place(wants, context, generation)


def where(placement: Placement | NotYet) -> tuple[str, str]:
    assert isinstance(placement, Placement), placement
    return (
        placement.context.instance_id if placement.context else "",
        placement.generation.instance_id if placement.generation else "",
    )


@pytest.fixture
def context() -> Server:
    return server(Role.CONTEXT, "c0")


@pytest.fixture
def generation() -> Server:
    return server(Role.GENERATION, "g0")


def test_the_rule_is_both_servers(context: Server, generation: Server) -> None:
    assert where(place([context], [generation])) == ("c0", "g0")


def test_one_token_needs_a_context_server_alone(context: Server, generation: Server) -> None:
    assert where(place([context], [generation], num_tokens_left=1)) == ("c0", "")
    assert where(place([context], [], num_tokens_left=1)) == ("c0", "")
    assert where(place([], [generation], num_tokens_left=1)) == ("", "g0")


def test_a_reason_to_prefill_locally_is_followed_where_that_is_possible(context: Server, generation: Server) -> None:
    chosen = place([context], [generation], must_be_local="3 transfers failed")
    assert where(chosen) == ("", "g0")
    assert isinstance(chosen, Placement)
    assert "3 transfers failed" in chosen.why
    cannot = server(Role.GENERATION, "g1", can_prefill=False)
    assert where(place([context], [cannot], must_be_local="3 transfers failed")) == ("c0", "g1")
    assert place([], [cannot]) == NotYet(
        "no context server is ready and no generation server can prefill", is_for_want_of_servers=True
    )


def test_a_prompt_with_little_to_compute_is_prefilled_on_the_generation_server_that_holds_the_rest(
    context: Server,
) -> None:
    two = [server(Role.GENERATION, "g0"), server(Role.GENERATION, "g1")]
    hashes = list(block_hashes(range(64), 16))
    holds(two[1], hashes[:3])
    rule = LocalPrefill(num_uncached_max=20)
    chosen = place([context], two, local=rule, num_prompt_tokens=64, block_hashes=hashes)
    assert where(chosen) == ("", "g1")
    assert isinstance(chosen, Placement)
    assert "prefilled there: 16 uncached tokens" in chosen.why
    assert chosen.decision.num_cached_tokens == 48
    assert where(place([context], two, local=rule, num_prompt_tokens=20))[0] == ""
    assert where(place([context], two, local=rule, num_prompt_tokens=21))[0] == "c0"


def test_without_a_generation_server_a_request_waits(context: Server) -> None:
    assert place([context], []) == NotYet("no generation server is ready", is_for_want_of_servers=True)


def test_a_lost_or_draining_server_takes_nothing(context: Server, generation: Server) -> None:
    context.lost(ServerLost("gone"))
    assert where(place([context], [generation])) == ("", "g0")
    generation.heard(control_pb2.Heartbeat(epoch=1, draining=True, num_blocks_free=100), now_s=1.0)
    assert isinstance(place([context], [generation]), NotYet)


def test_a_full_batch_waits(context: Server, generation: Server) -> None:
    for key in range(4):
        generation.take(key, share())
    assert place([context], [generation]) == NotYet("all 1 generation servers are full")
    generation.give_back(0, makes_room=True)
    assert where(place([context], [generation])) == ("c0", "g0")


def test_a_context_server_holds_only_what_it_is_about_to_run(context: Server, generation: Server) -> None:
    context.take(1, share(num_prefill_tokens=100))
    assert where(place([context], [generation])) == ("c0", "g0")
    context.take(2, share(num_prefill_tokens=40))
    assert place([context], [generation]) == NotYet("all 1 context servers are busy")
    context.shares[1].left_to_prefill(0)
    assert where(place([context], [generation])) == ("c0", "g0")


def test_blocks_promised_since_the_last_heartbeat_are_not_given_twice(generation: Server) -> None:
    generation.heard(control_pb2.Heartbeat(epoch=1, num_blocks_free=5), now_s=0.0)
    generation.take(1, share(num_blocks=3))
    assert isinstance(place([], [generation], num_prompt_tokens=32), NotYet)
    generation.heard(control_pb2.Heartbeat(epoch=1, num_blocks_free=3), now_s=1.0)
    assert where(place([], [generation], num_prompt_tokens=32)) == ("", "g0")


def test_an_idle_server_is_always_tried(generation: Server) -> None:
    generation.heard(control_pb2.Heartbeat(epoch=1, num_blocks_free=0), now_s=0.0)
    assert where(place([], [generation])) == ("", "g0")


def test_a_server_that_refused_is_left_alone_until_something_has_changed_there(generation: Server) -> None:
    generation.take(1, share())
    generation.take(2, share())
    generation.hold_back()
    generation.give_back(1, makes_room=False)
    assert isinstance(place([], [generation]), NotYet)
    generation.give_back(2, makes_room=True)
    assert where(place([], [generation])) == ("", "g0")
    generation.hold_back()
    generation.heard(control_pb2.Heartbeat(epoch=1, num_blocks_free=9), now_s=1.0)
    assert where(place([], [generation])) == ("", "g0")


def test_a_server_that_failed_this_request_stands_behind_the_others(context: Server) -> None:
    two = [server(Role.GENERATION, "g0"), server(Role.GENERATION, "g1")]
    assert {where(place([context], two, avoid={"g0"}))[1] for _ in range(3)} == {"g1"}


def test_everybody_on_a_lost_server_is_told_once(generation: Server) -> None:
    told: list[str] = []
    generation.take(1, Share(1, 0, 1, on_lost=lambda error: told.append(str(error))))
    generation.lost(ServerLost("it crashed"))
    assert told == ["it crashed"]
    assert generation.client is None
    assert not generation.is_ready
