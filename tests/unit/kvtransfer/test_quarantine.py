"""Request failure, quiet memory and a healthy process are three things; this is the third."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.destination.quarantine import QuarantineLimits, judge

LIMITS = QuarantineLimits(num_blocks=100, share_max=0.25, stuck_after_s=5.0)


@dataclasses.dataclass(frozen=True)
class Failed:
    transfer_id: str
    num_blocks: int
    decided_s: float | None


def test_an_empty_quarantine_is_healthy() -> None:
    found = judge([], LIMITS, now_s=10.0)
    assert (found.num_blocks, found.num_transfers, found.oldest_s, found.unhealthy) == (0, 0, 0.0, "")


@pytest.mark.parametrize(("num_blocks", "is_well"), [(1, True), (25, True), (26, False), (100, False)])
def test_more_than_a_share_of_the_pool_is_too_much(num_blocks: int, is_well: bool) -> None:
    found = judge([Failed("a", num_blocks - 1, 9.0), Failed("b", 1, 9.5)], LIMITS, now_s=10.0)
    assert (found.num_blocks, found.num_transfers, found.oldest_s) == (num_blocks, 2, 1.0)
    assert found.unhealthy == ("" if is_well else f"{num_blocks} of 100 blocks are in quarantine")


def test_a_read_that_never_ends_is_named() -> None:
    found = judge([Failed("young", 2, 9.0), Failed("old", 3, 4.0)], LIMITS, now_s=10.0)
    assert found.unhealthy == "a read of transfer old has not ended 6.0 s after it was stopped"


def test_both_reasons_are_told() -> None:
    found = judge([Failed("old", 80, 0.0)], LIMITS, now_s=10.0)
    assert found.unhealthy.startswith("80 of 100 blocks are in quarantine; a read of transfer old")


@given(st.lists(st.tuples(st.integers(1, 60), st.floats(0, 10)), max_size=6))
def test_it_is_unhealthy_exactly_beyond_a_limit(held: list[tuple[int, float]]) -> None:
    found = judge([Failed(str(at), blocks, at) for blocks, at in held], LIMITS, now_s=10.0)
    too_many = sum(blocks for blocks, _ in held) > 25
    too_old = any(10.0 - at > 5.0 for _, at in held)
    assert bool(found.unhealthy) is (too_many or too_old)
