from __future__ import annotations

from collections import Counter

import pytest

from disaggregated.block_hash import block_hashes
from disaggregated.config.deployment import RouterConfig
from disaggregated.errors import ConfigError
from orchestrator.routing.candidate import Asked, Policy
from orchestrator.routing.make import make_policy
from orchestrator.routing.policies import LeastLoaded, RoundRobin
from tests.unit.orchestrator.routing.servers import Seen

HASHES = list(block_hashes(range(160), 16))
ASKED = Asked(num_tokens=160, block_hashes=HASHES)
THREE = [Seen("a", 0, 0), Seen("b", 0, 0), Seen("c", 0, 0)]


def choices(policy: Policy, candidates: list[Seen], count: int) -> str:
    return "".join(policy.choose(ASKED, candidates).instance_id for _ in range(count))


def test_round_robin_takes_turns_in_the_order_of_names() -> None:
    assert choices(RoundRobin(), list(reversed(THREE)), 6) == "abcabc"


def test_round_robin_goes_on_where_it_was_when_servers_come_and_go() -> None:
    policy = RoundRobin()
    assert choices(policy, THREE, 2) == "ab"
    assert choices(policy, [THREE[0], THREE[1]], 1) == "a"
    assert choices(policy, [*THREE, Seen("d", 0, 0)], 4) == "bcda"


def test_least_loaded_counts_requests_or_tokens() -> None:
    busy = [Seen("a", 1, 900), Seen("b", 2, 10)]
    assert choices(LeastLoaded(), busy, 1) == "a"
    assert choices(LeastLoaded(use_tokens=True), busy, 1) == "b"


def test_equally_loaded_servers_take_turns() -> None:
    assert Counter(choices(LeastLoaded(), THREE, 9)) == {"a": 3, "b": 3, "c": 3}


@pytest.mark.parametrize("policy", [RoundRobin(), LeastLoaded()])
def test_a_server_to_avoid_is_taken_only_when_there_is_no_other(policy: Policy) -> None:
    candidates = [Seen("a", 0, 0), Seen("b", 9, 9)]
    assert {policy.choose(ASKED, candidates, avoid={"a"}).instance_id for _ in range(4)} == {"b"}
    assert policy.choose(ASKED, candidates[:1], avoid={"a"}).instance_id == "a"


def test_every_choice_says_why() -> None:
    assert LeastLoaded().choose(ASKED, THREE).why == "least loaded of 3: 0 requests"
    assert RoundRobin().choose(ASKED, THREE).why == "its turn among 3"


def test_the_router_of_the_file_names_the_policy() -> None:
    assert make_policy(RouterConfig()) is None, "the cost model"
    assert isinstance(make_policy(RouterConfig(type="round_robin")), RoundRobin)
    by_tokens = make_policy(RouterConfig(type="load_balancing", args={"use_tokens": True}))
    assert by_tokens is not None
    assert choices(by_tokens, [Seen("a", 0, 5), Seen("b", 9, 4)], 1) == "b"
    with pytest.raises(ConfigError, match="no router type 'best'; there are least_ttft, round_robin"):
        make_policy(RouterConfig(type="best"))
    with pytest.raises(ConfigError, match=r"^router\.weights is missing"):
        make_policy(RouterConfig(type="weighted"))


def test_of_equally_loaded_servers_the_one_that_holds_most_of_the_prompt_is_chosen() -> None:
    policy = LeastLoaded()
    idle = [Seen("a", 1, 9), Seen("b", 1, 9, 3, 16), Seen("c", 1, 9, 3, 16), Seen("d", 2, 9, 50, 16)]
    assert choices(policy, idle, 4) == "bcbc"
