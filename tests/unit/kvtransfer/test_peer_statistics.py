"""What is told of a link: totals over all its connections, and how fast bytes moved lately."""

from __future__ import annotations

import pytest

from kvtransfer.destination.peer import PeerStatistics
from kvtransfer.transport import LinkCounters

MIB = 1 << 20


def link() -> PeerStatistics:
    return PeerStatistics("context-0", transport="TCP", why="configured", devices="cpu -> cpu")


def test_the_speed_is_that_of_the_reads_and_not_of_the_prefill_that_they_waited_for() -> None:
    told = link()
    told.landed(num_bytes=8 * MIB, seconds=2.0, read=LinkCounters(bytes_total=8 * MIB, seconds_total=0.004))
    assert told.recent_bytes_per_s == pytest.approx(8 * MIB / 0.004)
    assert (told.transfers_total, told.bytes_total, told.seconds_total) == (1, 8 * MIB, 2.0)


def test_a_link_that_becomes_slow_is_told_so_within_a_few_transfers() -> None:
    told, read = link(), LinkCounters()
    for seconds in [0.001] * 5 + [0.01] * 10:
        read.bytes_total += MIB
        read.seconds_total += seconds
        told.landed(num_bytes=MIB, seconds=seconds, read=read)
    assert MIB / 0.01 < told.recent_bytes_per_s < 2 * MIB / 0.01


def test_transfers_that_bring_almost_nothing_are_put_together_until_they_can_tell() -> None:
    told, read = link(), LinkCounters()
    for number in range(64):
        assert (told.recent_bytes_per_s > 0) == (number >= 64)
        read.bytes_total += 1024
        read.seconds_total += 1e-5
        told.landed(num_bytes=1024, seconds=1.0, read=read)
    assert told.recent_bytes_per_s == pytest.approx(1024 / 1e-5)


def test_a_new_connection_goes_on_with_the_totals_and_starts_its_own_speed_anew() -> None:
    told = link()
    told.landed(num_bytes=MIB, seconds=1.0, read=LinkCounters(bytes_total=MIB, seconds_total=0.01))
    told.reconnected(PeerStatistics("context-0", transport="SHM", why="one host", fallbacks=1, devices="cpu -> cuda:0"))
    assert (told.transport, told.devices, told.fallbacks, told.transfers_total) == ("SHM", "cpu -> cuda:0", 1, 1)
    told.landed(num_bytes=MIB, seconds=1.0, read=LinkCounters(bytes_total=MIB, seconds_total=0.0001))
    assert told.recent_bytes_per_s > MIB / 0.01
