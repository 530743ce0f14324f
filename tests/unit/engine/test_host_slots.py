"""The books of the host tier: which slot a block gets, and which block is the next to go."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disaggregated.block_hash import BlockHash
from disaggregated.engine.block_events import BlockEventLog, BlockLabel, private_label
from disaggregated.engine.host_tier.slots import HostTier


def label(number: int) -> BlockLabel:
    return BlockLabel(BlockHash(number), None, 0)


def hashes(*numbers: int) -> list[BlockHash]:
    return [BlockHash(number) for number in numbers]


def tier(num_slots: int, *numbers: int) -> HostTier:
    """With the blocks of these numbers in it, the first one being the next to go."""
    made = HostTier(num_slots, BlockEventLog(0))
    for number in numbers:
        assert made.offload(label(number)) is not None
    return made


def content(host: HostTier) -> set[int]:
    host.check_integrity()
    return {found.block_hash for found in host.labels()}


def test_a_block_is_found_in_the_slot_that_it_got() -> None:
    host = tier(2)
    slot = host.offload(label(1))
    assert slot is not None
    assert BlockHash(1) in host
    assert host.slot(BlockHash(1)) == slot
    assert host.label(BlockHash(1)) == label(1)
    assert host.num_used == 1


def test_without_slots_nothing_is_ever_here() -> None:
    host = tier(0)
    assert host.offload(label(1)) is None
    assert not host.try_claim(hashes(1))
    assert content(host) == set()


def test_the_block_that_came_first_makes_room() -> None:
    host = tier(3, 1, 2, 3)
    host.offload(label(4))
    assert content(host) == {2, 3, 4}


def test_a_block_that_is_here_already_is_not_copied_again_but_goes_later() -> None:
    host = tier(3, 1, 2, 3)
    assert host.offload(label(1)) is None
    host.offload(label(4))
    assert content(host) == {1, 3, 4}


def test_a_copy_of_what_is_back_in_the_pool_is_the_first_to_go_its_end_before_its_beginning() -> None:
    host = tier(4, 9, 3, 2, 1)  # 1, 2, 3 are a sequence: its end was evicted first.
    host.claim(hashes(1, 2, 3))
    host.give_up(hashes(1, 2, 3), are_in_pool=True)
    gone: list[int] = []
    for number in range(10, 14):
        before = content(host)
        host.offload(label(number))
        gone += before - content(host)
    assert gone == [3, 2, 1, 9]


def test_a_claimed_block_stays_whatever_comes() -> None:
    host = tier(3, 1, 2, 3)
    assert host.try_claim(hashes(2))
    for number in range(10, 20):
        host.offload(label(number))
        assert 2 in content(host)
    assert host.num_claimed == 1
    host.give_up(hashes(2))
    assert host.num_claimed == 0


def test_a_block_may_be_claimed_before_it_comes() -> None:
    host = tier(2, 1)
    assert host.try_claim(hashes(5))
    assert host.num_claimed == 0
    host.offload(label(5))
    for number in range(10, 14):
        host.offload(label(number))
    assert 5 in content(host)
    assert host.num_claimed == 1


def test_only_as_many_blocks_are_claimed_as_there_are_slots_and_a_shared_one_counts_once() -> None:
    host = tier(3)
    assert host.try_claim(hashes(1, 2))
    assert not host.try_claim(hashes(3, 4))
    assert host.try_claim(hashes(1, 3))
    host.check_claims(hashes(1, 2, 1, 3))


def test_when_every_slot_is_claimed_by_somebody_else_a_block_is_lost() -> None:
    host = tier(1, 1)
    host.claim(hashes(1))
    assert host.offload(label(2)) is None
    assert content(host) == {1}


def test_a_block_that_two_claim_stays_until_both_have_given_it_up() -> None:
    host = tier(1, 1)
    host.claim(hashes(1))
    host.claim(hashes(1))
    host.give_up(hashes(1))
    assert host.offload(label(2)) is None
    host.give_up(hashes(1))
    assert host.offload(label(2)) is not None


def test_a_private_block_goes_with_its_claim() -> None:
    own = private_label(0, 3)
    host = tier(2)
    host.claim([own.block_hash])
    host.offload(own)
    host.give_up([own.block_hash])
    assert content(host) == set()
    assert host.num_used == 0


def test_a_claim_that_nobody_made_is_noticed() -> None:
    host = tier(2)
    host.claim(hashes(1))
    with pytest.raises(AssertionError, match="claims counted"):
        host.check_claims([])


@given(
    st.integers(1, 5),
    st.lists(st.tuples(st.sampled_from(["offload", "claim", "give up"]), st.integers(0, 8)), max_size=80),
)
def test_a_slot_is_handed_out_only_when_nobody_claims_what_it_holds(
    num_slots: int, actions: list[tuple[str, int]]
) -> None:
    host = tier(num_slots)
    in_slot: dict[int, int] = {}
    claims: list[BlockHash] = []
    for action, number in actions:
        if action == "offload":
            slot = host.offload(label(number))
            if slot is not None:
                assert in_slot.get(slot) not in claims
                in_slot[slot] = number
        elif action == "claim":
            if host.try_claim(hashes(number)):
                claims += hashes(number)
        elif BlockHash(number) in claims:
            host.give_up(hashes(number))
            claims.remove(BlockHash(number))
        host.check_integrity()
        host.check_claims(claims)
        for found in host.labels():
            assert in_slot[host.slot(found.block_hash)] == found.block_hash
        assert all(host.slot(claimed) is not None for claimed in claims if claimed in host)
