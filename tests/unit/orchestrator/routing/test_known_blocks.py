"""What is known of a server's blocks is what its stream told, in bounded memory."""

from __future__ import annotations

import random
from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from disaggregated.block_hash import BlockHash, block_hashes
from disaggregated.v1 import control_pb2
from orchestrator.routing.known_blocks import BlockTable, KnownBlocks

ADDED, REMOVED = control_pb2.BlockEvent.ADDED, control_pb2.BlockEvent.REMOVED
DEVICE, HOST = control_pb2.BlockEvent.DEVICE, control_pb2.BlockEvent.HOST
HASHES = list(block_hashes(range(3, 163), 16))


def event(
    block_hash: BlockHash,
    kind: control_pb2.BlockEvent.Kind.ValueType = ADDED,
    tier: control_pb2.BlockEvent.Tier.ValueType = DEVICE,
) -> control_pb2.BlockEvent:
    return control_pb2.BlockEvent(kind=kind, tier=tier, block_hash=block_hash.to_bytes(16, "big"))


def message(number: int, events: Iterable[control_pb2.BlockEvent], *, cleared: bool = False) -> control_pb2.BlockEvents:
    return control_pb2.BlockEvents(first_number=number, cleared=cleared, events=events)


def test_the_longest_beginning_without_a_gap_is_held() -> None:
    known = KnownBlocks()
    held = [*map(event, HASHES[:3]), event(HASHES[3], tier=HOST), *map(event, HASHES[5:])]
    assert known.apply(message(0, held, cleared=True))
    assert known.num_held(HASHES) == 4
    assert known.num_held(HASHES[5:]) == 5
    assert known.num_held([]) == 0


def test_a_block_in_both_tiers_is_gone_when_it_has_left_both() -> None:
    known = KnownBlocks()
    known.apply(message(0, [event(HASHES[0]), event(HASHES[0], tier=HOST)], cleared=True))
    known.apply(message(2, [event(HASHES[0], REMOVED)]))
    assert known.num_held(HASHES) == 1
    known.apply(message(3, [event(HASHES[0], REMOVED, HOST), event(HASHES[1], REMOVED)]))
    assert known.num_held(HASHES) == len(known) == 0


def test_a_snapshot_in_the_midst_of_the_stream_replaces_what_was_known() -> None:
    known = KnownBlocks()
    known.apply(message(0, map(event, HASHES[:3]), cleared=True))
    assert known.apply(message(3, map(event, HASHES[:1]), cleared=True))
    assert known.num_held(HASHES) == 1


def test_after_a_gap_nothing_is_known_until_the_stream_begins_anew() -> None:
    known = KnownBlocks()
    known.apply(message(0, map(event, HASHES[:3]), cleared=True))
    assert not known.apply(message(4, map(event, HASHES[3:5])))
    assert known.num_held(HASHES) == 0
    assert known.apply(message(0, map(event, HASHES[:2]), cleared=True))
    assert known.num_held(HASHES) == 2


def test_memory_stays_within_its_bound_and_what_fits_not_is_counted() -> None:
    known = KnownBlocks(slots_max=64)
    many = list(block_hashes(range(400), 4))
    known.apply(message(0, map(event, many), cleared=True))
    assert known.num_bytes == 64 * 8
    assert len(known) == 42
    assert known.num_dropped == 58
    assert known.num_held(many) == 42
    known.apply(message(100, [event(each, REMOVED) for each in many]))
    assert len(known) == 0
    known.check_integrity()


def test_a_table_grows_with_what_it_holds_and_is_small_when_empty() -> None:
    table = BlockTable()
    assert table.num_bytes == 8192
    dice = random.Random(1)
    keys = [dice.getrandbits(62) << 2 for _ in range(5000)]
    assert all(table.add(key, 0) for key in keys)
    assert table.num_bytes == 8 * 8192
    assert all(key in table for key in keys)
    table.check_integrity()


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 40), st.integers(0, 1)), max_size=200), st.booleans())
def test_a_table_is_a_set_of_places_whatever_comes(steps: list[tuple[bool, int, int]], crowded: bool) -> None:
    """`crowded`: all keys have the same slot, so that every search and every deletion walks over others."""
    table = BlockTable(slots_max=128)
    model: set[tuple[int, int]] = set()
    for is_added, number, tier in steps:
        key = number << (20 if crowded else 2)
        if is_added:
            assert table.add(key, tier)
            model.add((key, tier))
        else:
            table.remove(key, tier)
            model.discard((key, tier))
        table.check_integrity()
    assert len(table) == len({key for key, _ in model})
    for number in range(1, 41):
        key = number << (20 if crowded else 2)
        assert (key in table) == any(known == key for known, _ in model)
