from __future__ import annotations

import pytest

from disaggregated.cores import available_cores
from orchestrator.core_allocation import CoreAllocation


def test_two_servers_on_two_cores_get_one_each() -> None:
    allocation = CoreAllocation((0, 1), num_servers=2)
    assert (allocation.take("a"), allocation.take("b")) == ((0,), (1,))


def test_a_spare_core_is_left_to_the_orchestrator() -> None:
    allocation = CoreAllocation(range(9), num_servers=2)
    assert allocation.take("a") == (0, 1, 2, 3)
    assert allocation.take("b") == (4, 5, 6, 7)


@pytest.mark.parametrize(
    ("num_cores", "num_servers", "share_size"),
    [(1, 1, 1), (2, 1, 2), (3, 1, 3), (4, 1, 3), (4, 2, 2), (5, 2, 2), (8, 2, 3), (64, 1, 63), (64, 0, 63)],
)
def test_a_core_is_spared_only_where_the_servers_hardly_miss_it(
    num_cores: int, num_servers: int, share_size: int
) -> None:
    assert CoreAllocation(range(num_cores), num_servers=num_servers).share_size == share_size


def test_more_servers_than_cores_share_them_evenly() -> None:
    allocation = CoreAllocation((0, 1), num_servers=4)
    assert [allocation.take(name) for name in "abcd"] == [(0,), (1,), (0,), (1,)]


def test_a_server_keeps_its_cores_and_the_ones_given_back_are_dealt_again() -> None:
    allocation = CoreAllocation((4, 5), num_servers=2)
    assert allocation.take("a") == allocation.take("a") == (4,)
    allocation.take("b")
    allocation.give_back("a")
    assert allocation.take("c") == (4,)


def test_one_core_serves_everybody() -> None:
    allocation = CoreAllocation((3,), num_servers=2)
    assert (allocation.take("a"), allocation.take("b")) == ((3,), (3,))


def test_this_machine_has_a_core() -> None:
    assert available_cores()
