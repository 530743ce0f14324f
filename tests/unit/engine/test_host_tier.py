"""An engine with a host tier: what is evicted comes back, who is preempted goes on, and no token changes."""

from __future__ import annotations

import pytest

from disaggregated.engine.api import RequestKind
from tests.unit.engine.engine_driver import EngineDriver


def swapping(num_host_slots: int, *, enable_block_reuse: bool = True) -> EngineDriver:
    """Room for six blocks of two tokens, and two sequences that want five each."""
    driver = EngineDriver(
        num_blocks=6,
        block_size=2,
        max_num_tokens=8,
        num_host_slots=num_host_slots,
        enable_block_reuse=enable_block_reuse,
    )
    driver.submit("old", [1, 2], max_tokens=9)
    driver.submit("young", [3, 4], max_tokens=9)
    return driver


def until_preempted(driver: EngineDriver) -> None:
    while driver.engine.statistics().preemptions_total == 0:
        driver.step()


def rows_of(driver: EngineDriver, request_id: str) -> list[tuple[int, int]]:
    """(first position, number of tokens) of each of its rows so far."""
    return [row[1:] for batch in driver.runner.batches for row in batch if row[0] == request_id]


def fill(driver: EngineDriver, name: str) -> None:
    """Other prompts, until everything in the pool was handed out once."""
    for number in range(driver.engine.statistics().num_blocks):
        driver.submit(f"{name}-{number}", [50 + number, 1, 2, 3], max_tokens=1)
        driver.run()


# Prefixes.


def test_a_prefix_that_the_pool_has_evicted_comes_back_and_is_not_computed_again() -> None:
    driver = EngineDriver(num_blocks=4, num_host_slots=20)
    driver.submit("one", range(13), max_tokens=2)
    driver.run()
    fill(driver, "other")
    driver.submit("again", range(13), max_tokens=2)
    driver.run()
    assert driver.chunks["again"][0].num_cached_tokens == 12
    assert rows_of(driver, "again")[0] == (12, 1)
    assert driver.tokens["again"] == driver.alone("again")
    assert driver.engine.statistics().onboarded_blocks_total == 3


def test_only_what_is_not_in_the_pool_is_copied_back() -> None:
    driver = EngineDriver(num_blocks=4, num_host_slots=20)
    driver.submit("one", range(13), max_tokens=1)
    driver.run()
    driver.submit("other", [90, 91], max_tokens=1)  # Takes the fourth block, of which nobody knew the content.
    driver.run()
    driver.submit("third", range(60, 68), max_tokens=1)  # Takes two: the end of the sequence goes first.
    driver.run()
    driver.submit("again", range(13), max_tokens=1)
    driver.run()
    assert driver.chunks["again"][0].num_cached_tokens == 12
    assert driver.engine.statistics().onboarded_blocks_total < 3
    assert driver.tokens["again"] == driver.alone("again")


def test_a_block_that_goes_and_comes_again_and_again_is_copied_out_once() -> None:
    driver = EngineDriver(num_blocks=4, num_host_slots=100)
    for turn in range(4):
        driver.submit(f"one-{turn}", range(13), max_tokens=1)
        driver.run()
        fill(driver, f"other-{turn}")
    statistics = driver.engine.statistics()
    assert statistics.offloaded_blocks_total == statistics.num_host_slots_used
    assert statistics.onboarded_blocks_total >= 3 * 3


def test_a_reservation_counts_what_comes_back_as_cached_and_is_told_only_when_it_is_there() -> None:
    driver = EngineDriver(num_blocks=4, num_host_slots=20)
    driver.submit("one", range(12), max_tokens=1)
    driver.run()
    fill(driver, "other")
    assert driver.copier.num_waits == 0
    reservation = driver.reserve("remote", range(14))
    assert reservation.num_cached_blocks == 3
    assert driver.copier.num_waits == 1
    driver.land(reservation)
    driver.run()
    assert driver.tokens["remote"] == driver.alone("remote")


def test_what_a_reservation_evicts_is_saved_before_a_transfer_can_write() -> None:
    driver = EngineDriver(num_blocks=4, num_host_slots=20)
    driver.submit("one", range(13), max_tokens=1)
    driver.run()
    reservation = driver.reserve("remote", range(40, 56))
    driver.runner.spoil(reservation.block_ids)
    driver.engine.release("remote")
    driver.submit("again", range(13), max_tokens=3)
    driver.run()
    assert driver.chunks["again"][0].num_cached_tokens == 12
    assert driver.tokens["again"] == driver.alone("again")


def test_a_context_server_publishes_what_came_back_as_any_other_block() -> None:
    driver = EngineDriver(num_blocks=4, num_host_slots=20)
    driver.submit("one", range(13), kind=RequestKind.PREFILL_ONLY)
    driver.run()
    kv = driver.runner.read(driver.chunks["one"][-1].block_ids, 13)
    driver.engine.release("one")
    fill(driver, "other")
    driver.submit("again", range(13), kind=RequestKind.PREFILL_ONLY)
    driver.run()
    assert driver.runner.read(driver.chunks["again"][-1].block_ids, 13) == kv
    driver.engine.release("again")


# Preemption.


@pytest.mark.parametrize("enable_block_reuse", [True, False])
def test_a_preempted_sequence_goes_on_where_it_was(enable_block_reuse: bool) -> None:
    driver = swapping(20, enable_block_reuse=enable_block_reuse)
    driver.run()
    statistics = driver.engine.statistics()
    assert statistics.preemptions_total == statistics.swapped_sequences_total == 1
    for name in ("old", "young"):
        assert rows_of(driver, name) == [(0, 2), *((position, 1) for position in range(2, 10))]
        assert driver.tokens[name] == driver.alone(name)


def test_without_room_in_the_host_tier_it_is_computed_again() -> None:
    driver = swapping(2, enable_block_reuse=False)
    driver.run()
    statistics = driver.engine.statistics()
    assert (statistics.preemptions_total, statistics.swapped_sequences_total) == (1, 0)
    assert [first for first, _ in rows_of(driver, "young")].count(0) == 2
    assert driver.tokens["young"] == driver.alone("young")


def test_swapping_out_copies_nothing_until_somebody_needs_the_place() -> None:
    driver = swapping(20)
    until_preempted(driver)
    assert driver.engine.statistics().offloaded_blocks_total == 1  # One block was wanted.
    driver.run()
    assert driver.engine.statistics().onboarded_blocks_total == 2  # Of its four: the others were still in the pool.


def test_the_ledger_names_the_slots_that_are_kept_for_a_preempted_sequence() -> None:
    driver = swapping(20)
    until_preempted(driver)
    swapped = [entry for entry in driver.engine.ledger() if entry.kind == "swapped"]
    assert [(entry.owner, entry.num_blocks) for entry in swapped] == [("young", 1)]
    assert driver.engine.statistics().num_host_slots_claimed == 1
    driver.run()
    assert driver.engine.ledger() == []
    statistics = driver.engine.statistics()
    assert statistics.num_host_slots_claimed == 0
    assert statistics.num_host_slots_used > 0  # Cached, which is nobody's holding.


@pytest.mark.parametrize("enable_block_reuse", [True, False])
def test_a_preempted_sequence_that_is_cancelled_leaves_nothing_behind(enable_block_reuse: bool) -> None:
    driver = swapping(20, enable_block_reuse=enable_block_reuse)
    until_preempted(driver)
    driver.engine.cancel("young")
    driver.engine.check_integrity()
    assert driver.engine.statistics().num_host_slots_claimed == 0
    driver.run()
    assert driver.num_free == 6
    assert driver.engine.ledger() == []
    if not enable_block_reuse:
        assert driver.engine.statistics().num_host_slots_used == 0
