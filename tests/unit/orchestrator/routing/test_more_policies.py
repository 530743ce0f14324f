"""Policies that look at more than counts: caches, conversations, shares of the traffic."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disaggregated.block_hash import BlockHash, block_hashes
from orchestrator.routing.candidate import Asked
from orchestrator.routing.conversation import Conversation
from orchestrator.routing.kv_cache_aware import KvCacheAware
from orchestrator.routing.policies import PowerOfTwo
from orchestrator.routing.rendezvous import rendezvous
from orchestrator.routing.sessions import BeginningTable, SessionTable
from orchestrator.routing.weighted import Weighted
from tests.unit.orchestrator.routing.servers import Seen

ASKED = Asked(num_tokens=160, block_hashes=list(block_hashes(range(160), 16)))


def idle(*names: str) -> list[Seen]:
    return [Seen(name, 0, 0, block_size=16) for name in names]


# power_of_two


def test_of_two_that_are_drawn_the_less_loaded_one_is_taken() -> None:
    policy = PowerOfTwo(dice=random.Random(7))
    loads = [Seen("a", 0, 0), Seen("b", 5, 0), Seen("c", 9, 0)]
    taken = Counter(policy.choose(ASKED, loads).instance_id for _ in range(300))
    assert taken["c"] == 0, "whoever it is drawn with has less"
    assert 150 < taken["a"] < 250
    assert policy.choose(ASKED, loads[:1]).why == "least loaded of 1: 0 requests, drawn from 1"


# kv_cache_aware


def test_a_cached_prompt_outweighs_requests_up_to_a_batch() -> None:
    policy = KvCacheAware(max_batch_size=10)
    cold = Seen("a", 0, 0, block_size=16)
    assert policy.choose(ASKED, [cold, Seen("b", 4, 0, 5, 16)]).instance_id == "b"
    assert policy.choose(ASKED, [cold, Seen("b", 6, 0, 5, 16)]).instance_id == "a"


def test_the_score_is_the_cached_share_less_the_share_of_the_batch() -> None:
    choice = KvCacheAware(max_batch_size=10).choose(ASKED, [Seen("a", 3, 0, 5, 16)])
    assert choice.scores == {"a": pytest.approx(0.5 - 0.3)}
    assert choice.why == "best score of 1: 0.200, 5 blocks cached"
    by_tokens = KvCacheAware(use_tokens=True, max_num_tokens=1000)
    assert by_tokens.choose(ASKED, [Seen("a", 3, 100, 5, 16)]).scores == {"a": pytest.approx(0.5 - 0.1)}


def test_equal_scores_take_turns() -> None:
    policy = KvCacheAware()
    assert [policy.choose(ASKED, idle("a", "b")).instance_id for _ in range(4)] == ["a", "b", "a", "b"]


# weighted


def test_a_new_version_gets_its_share_whatever_the_number_of_its_servers() -> None:
    policy = Weighted({"v1": 90, "v2": 10})
    servers = [Seen(f"old{n}", 0, 0, names=("v1",)) for n in range(2)] + [Seen("new", 0, 0, names=("v2",))]
    taken = Counter(policy.choose(ASKED, servers).instance_id for _ in range(200))
    assert taken == {"old0": 90, "old1": 90, "new": 20}


def test_shares_are_spread_out_evenly() -> None:
    policy = Weighted({"a": 3, "b": 1})
    servers = [Seen("a", 0, 0, names=("a",)), Seen("b", 0, 0, names=("b",))]
    assert "".join(policy.choose(ASKED, servers).instance_id for _ in range(8)) == "abaaabaa"


def test_servers_without_a_weight_are_taken_only_when_no_other_is_there() -> None:
    policy = Weighted({"v1": 1})
    old, odd = Seen("old", 0, 0, names=("v1",)), Seen("odd", 0, 0, names=("v0",))
    assert {policy.choose(ASKED, [old, odd]).instance_id for _ in range(5)} == {"old"}
    assert policy.choose(ASKED, [odd]).instance_id == "odd"
    rest = Weighted({"v1": 1, "*": 1})
    assert Counter(rest.choose(ASKED, [old, odd]).instance_id for _ in range(10)) == {"old": 5, "odd": 5}


@given(weights=st.dictionaries(st.sampled_from("abcd"), st.integers(1, 9), min_size=1), rounds=st.integers(1, 3))
def test_over_whole_rounds_the_counts_are_exact(weights: dict[str, int], rounds: int) -> None:
    policy = Weighted(weights)
    servers = [Seen(name, 0, 0, names=(name,)) for name in weights]
    taken = Counter(policy.choose(ASKED, servers).instance_id for _ in range(rounds * sum(weights.values())))
    assert taken == {name: rounds * weight for name, weight in weights.items()}


# conversation


def asked(session: str = "", tokens: list[int] | None = None, now_s: float = 0.0) -> Asked:
    tokens = tokens or []
    return Asked(
        num_tokens=len(tokens) or 10, session=session, block_hashes=list(block_hashes(tokens, 16)), now_s=now_s
    )


def test_a_session_stays_where_it_is_until_its_time_is_over() -> None:
    policy = Conversation(session_ttl_s=60)
    first = policy.choose(asked("s"), idle("a", "b")).instance_id
    loaded = [Seen(name, 9 if name == first else 0, 900 if name == first else 0) for name in "ab"]
    stays = policy.choose(asked("s", now_s=59), loaded)
    assert (stays.instance_id, stays.why) == (first, "its session is there")
    assert policy.choose(asked("s", now_s=118), loaded).instance_id == first, "each request renews it"
    assert policy.choose(asked("s", now_s=179), loaded).instance_id != first


def test_a_session_whose_server_is_away_moves_and_stays_there() -> None:
    policy = Conversation()
    first = policy.choose(asked("s"), idle("a", "b")).instance_id
    (other,) = {"a", "b"} - {first}
    assert policy.choose(asked("s"), idle(other)).instance_id == other
    assert policy.choose(asked("s"), idle("a", "b")).instance_id == other
    assert policy.choose(asked("s"), idle("a", "b"), avoid={other}).instance_id == first


def test_workers_that_share_no_table_send_a_session_to_the_same_server() -> None:
    """Each turn comes to another worker, and loads look a little different from each of them."""
    workers = [Conversation() for _ in range(4)]
    dice = random.Random(3)
    for number in range(100):
        loads = [Seen(name, dice.randint(0, 2), dice.randint(0, 999)) for name in "abcd"]
        assert len({worker.choose(asked(f"chat-{number}"), loads).instance_id for worker in workers}) == 1


def test_sessions_are_drawn_evenly_and_only_those_of_a_server_that_left_move() -> None:
    before = {f"s{n}": rendezvous(f"s{n}", idle("a", "b", "c", "d")).instance_id for n in range(2000)}
    assert all(420 < count < 580 for count in Counter(before.values()).values()), Counter(before.values())
    after = {session: rendezvous(session, idle("a", "b", "d")).instance_id for session in before}
    assert all(after[session] == name for session, name in before.items() if name != "c")


@given(loads=st.lists(st.integers(0, 200), min_size=1, max_size=8), session=st.text(max_size=20))
def test_a_session_is_never_drawn_to_a_hot_spot(loads: list[int], session: str) -> None:
    candidates = [Seen(f"server-{number}", load, 0) for number, load in enumerate(loads)]
    drawn = rendezvous(session, candidates)
    assert drawn.num_requests <= 1.5 * sum(loads) / len(loads) + 2


def test_a_session_whose_server_is_a_hot_spot_begins_elsewhere_and_stays_there() -> None:
    policy = Conversation()
    drawn = rendezvous("s", idle("a", "b")).instance_id
    crowded = [Seen(name, 40 if name == drawn else 0, 0) for name in "ab"]
    first = policy.choose(asked("s"), crowded).instance_id
    assert first != drawn
    assert policy.choose(asked("s"), idle("a", "b")).instance_id == first


def test_a_prompt_that_begins_as_one_before_goes_where_that_one_went() -> None:
    policy = Conversation()
    chat = list(range(320))
    first = policy.choose(asked(tokens=chat), idle("a", "b")).instance_id
    policy.choose(asked(tokens=list(range(900, 1200))), idle("a", "b"))
    longer = policy.choose(asked(tokens=[*chat, *range(5000, 5096)]), idle("a", "b"))
    assert (longer.instance_id, longer.why) == (first, "20 of its 26 blocks were sent there before")
    much_longer = policy.choose(asked(tokens=[*chat, *range(6000, 6400)]), idle("a", "b"))
    assert much_longer.why.startswith("least loaded"), "20 of 45 blocks are fewer than three quarters"


def test_a_beginning_that_all_conversations_share_tells_nothing() -> None:
    policy = Conversation(hash_skip_count=160)
    system = list(range(160))
    choice = [policy.choose(asked(tokens=[*system, *range(n, n + 32)]), idle("a", "b")).why for n in (1000, 2000)]
    assert all(why.startswith("least loaded") for why in choice)


def test_sessions_are_bounded_and_the_one_used_last_stays() -> None:
    table = SessionTable(sessions_max=3, ttl_s=100.0)
    for number, session in enumerate("abcad"):
        table.bind(session, f"server-{session}", now_s=float(number))
    assert len(table) == 3
    assert [table.find(session, now_s=5.0) for session in "abcd"] == ["server-a", None, "server-c", "server-d"]
    table.bind("e", "server-e", now_s=150.0)
    assert len(table) == 1


@given(seed=st.integers(0, 10_000), blocks_max=st.integers(1, 40))
def test_of_a_bounded_table_the_beginnings_stay_longest(seed: int, blocks_max: int) -> None:
    """What it says of a prompt is always true of its first blocks, and never more than the table holds."""
    dice = random.Random(seed)
    table = BeginningTable(blocks_max=blocks_max)
    chats = [[BlockHash(1000 * chat + block) for block in range(20)] for chat in range(4)]
    for number in range(30):
        chat = dice.choice(chats)[: dice.randint(1, 20)]
        table.sent(chat, f"server-{number}")
        depth, where = table.deepest(chat)
        assert depth == min(len(chat), blocks_max)
        assert where == f"server-{number}"
        assert len(table) <= blocks_max
    for chat in chats:
        depth, _ = table.deepest(chat)
        assert all(table.deepest(chat[:length])[0] == length for length in range(depth + 1))
