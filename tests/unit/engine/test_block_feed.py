"""From the log of a step to readers of different pace: whoever sees no gap has missed nothing."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from disaggregated.block_hash import BlockHash
from disaggregated.engine.block_events import (
    BlockEvent,
    BlockEventBatch,
    BlockEventLog,
    BlockLabel,
    Tier,
    private_label,
)
from disaggregated.engine.block_feed import BlockFeed, BlockWatcher


def label(number: int) -> BlockLabel:
    return BlockLabel(BlockHash(number), None, 0)


def note(log: BlockEventLog, *numbers: int) -> None:
    for number in numbers:
        log.note(label(number), Tier.DEVICE, is_added=True)


def numbers_of(events: list[BlockEvent] | tuple[BlockEvent, ...]) -> list[int]:
    return [event.label.block_hash for event in events]


def watcher(num_events_max: int = 10) -> BlockWatcher:
    made = BlockWatcher(num_events_max, wake=lambda: None)
    made.collect()
    return made


def batch(first_number: int, *numbers: int) -> BlockEventBatch:
    return BlockEventBatch(first_number, tuple(BlockEvent(label(n), Tier.DEVICE, True) for n in numbers))


# The log of a step.


def test_the_log_gives_what_happened_in_order_and_counts_on() -> None:
    log = BlockEventLog(10)
    note(log, 7, 8)
    assert numbers_of(log.drain().events) == [7, 8]
    note(log, 9)
    drained = log.drain()
    assert (drained.first_number, drained.next_number, numbers_of(drained.events)) == (2, 3, [9])
    assert log.drain() == BlockEventBatch(3, ())


@given(num_events_max=st.integers(1, 5), counts=st.lists(st.integers(0, 12)))
def test_a_full_log_forgets_and_its_numbers_show_it(num_events_max: int, counts: list[int]) -> None:
    log, happened, expected = BlockEventLog(num_events_max), 0, 0
    for count in counts:
        note(log, *range(happened, happened + count))
        happened += count
        drained = log.drain()
        assert len(drained.events) <= num_events_max
        assert numbers_of(drained.events) == list(range(drained.first_number, happened))
        assert (drained.first_number == expected) == (count <= num_events_max)
        expected = drained.next_number


def test_private_blocks_are_no_news() -> None:
    log = BlockEventLog(10)
    log.note(private_label(0, 3), Tier.HOST, is_added=True)
    assert log.drain() == BlockEventBatch(0, ())


def test_a_log_of_no_events_counts_none() -> None:
    log = BlockEventLog(0)
    note(log, 1, 2)
    assert log.drain() == BlockEventBatch(0, ())


# One reader.


def test_a_new_watcher_asks_for_everything_first() -> None:
    fresh = BlockWatcher(10, wake=lambda: None)
    assert fresh.take() is None
    fresh.push(batch(0, 1))
    assert fresh.take() is None


def test_what_the_snapshot_holds_is_not_told_again() -> None:
    reader = watcher()
    reader.push(batch(5, 1, 2))
    reader.push(batch(7, 3))
    reader.skip_to(7)
    reader.push(batch(8, 4))
    assert numbers_of(reader.take() or []) == [3, 4]


def test_a_snapshot_that_is_newer_than_every_change_leaves_none() -> None:
    reader = watcher()
    reader.push(batch(5, 1, 2))
    reader.skip_to(7)
    assert reader.take() == []
    reader.push(batch(7, 3))
    assert numbers_of(reader.take() or []) == [3]


def test_after_a_gap_everything_is_asked_for_anew() -> None:
    reader = watcher()
    reader.skip_to(5)
    reader.push(batch(6, 1))
    assert reader.take() is None


def test_a_reader_that_falls_behind_keeps_a_bounded_number_and_then_begins_again() -> None:
    reader = watcher(num_events_max=3)
    reader.skip_to(0)
    reader.push(batch(0, 1, 2))
    reader.push(batch(2, 3, 4))
    assert reader.take() is None
    reader.collect()
    reader.skip_to(4)
    assert reader.take() == []


def test_more_than_is_kept_while_the_snapshot_is_made_means_another_snapshot() -> None:
    reader = watcher(num_events_max=1)
    reader.push(batch(0, 1, 2))
    reader.skip_to(1)
    assert reader.take() is None


def test_a_step_that_changed_more_than_the_log_keeps_means_another_snapshot() -> None:
    """Its first events are in no batch, and the snapshot before it does not hold them."""
    reader = watcher(num_events_max=4)
    reader.push(batch(9, 1, 2))
    reader.skip_to(7)
    assert reader.take() is None
    reader.collect()
    reader.skip_to(11)
    assert reader.take() == []


def test_a_reader_is_woken_once_until_it_takes() -> None:
    woken: list[bool] = []
    reader = BlockWatcher(10, wake=lambda: woken.append(True))
    reader.collect()
    reader.push(batch(0, 1))
    reader.push(batch(1, 2))
    assert len(woken) == 1
    reader.take()
    reader.push(batch(2, 3))
    assert len(woken) == 2


@given(st.lists(st.sampled_from(["change", "drain", "read"]), max_size=60), st.integers(1, 4), st.integers(1, 6))
def test_a_reader_knows_what_can_be_found_whenever_it_has_read_everything(
    actions: list[str], log_size: int, watcher_size: int
) -> None:
    """Blocks come and go; the reader reads when it likes, and takes a snapshot when it has missed something."""
    log, feed = BlockEventLog(log_size), BlockFeed(watcher_size)
    findable: set[int] = set()
    known: set[int] = set()
    with feed.watching(wake=lambda: None) as reader:
        for turn, action in enumerate([*actions, "drain", "read"]):
            if action == "change":
                number = (turn * 7) % 5
                log.note(label(number), Tier.DEVICE, is_added=number not in findable)
                findable ^= {number}
            elif action == "drain":
                feed.publish(log.drain())
            else:
                events = reader.take()
                if events is None:
                    reader.collect()
                    feed.publish(log.drain())  # As the engine's thread does before each snapshot.
                    known = set(findable)
                    reader.skip_to(log.next_number)
                for event in events or []:
                    assert (event.label.block_hash in known) != event.is_added
                    known ^= {event.label.block_hash}
        if reader.take() == []:
            assert known == findable
