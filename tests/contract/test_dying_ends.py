"""kill -9 and SIGSTOP of either end in the middle of a read, in processes of their own: whoever is left is unharmed."""

import concurrent.futures
import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator

import pytest

from disaggregated.errors import PeerLost
from kvtransfer.deadline import Deadline
from kvtransfer.region import Region
from kvtransfer.transport import DestinationTransport, Offer, PeerLink
from tests.support.kv_endpoints import PATIENT_S, PROGRESS_TIMEOUT_S, SLACK_S, make_transport
from tests.support.kv_ends import IDENTITY, End, end, read, scattered, serving
from tests.support.kv_pools import LARGE, blocks_of, regions

LIBRARIES = ("UCX", "NIXL")
LANES: dict[str, dict[str, str]] = {"best": {}, "tcp": {"UCX_TLS": "tcp"}}
"""What a library chooses on one host, and what it is left with between two hosts without RDMA."""
EVERY = list(range(LARGE.num_blocks))


@pytest.fixture
def pools() -> Iterator[list[Region]]:
    """What the sources hold, and our own pool."""
    with regions(LARGE) as made:
        yield made


@contextlib.contextmanager
def linked(transport: DestinationTransport, offer: Offer) -> Iterator[PeerLink]:
    link = transport.connect(offer, IDENTITY, deadline=Deadline.after(10))
    try:
        yield link
    finally:
        link.close(deadline=Deadline.after(20))


def fails_when(disturb: Callable[[], None], link: PeerLink, into: Region) -> float:
    """Reads the whole pool until that fails, because of `disturb`. Returns how long the failure took to show."""
    reading = True

    def read_on() -> None:
        while reading:
            read(link, scattered())

    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        failing = threads.submit(read_on)
        while not into.buffer[-1] and not failing.done():  # The first bytes of it tell that it is under way.
            pass
        disturb()
        begin_s = time.monotonic()
        try:
            with pytest.raises(PeerLost):
                failing.result(PATIENT_S + SLACK_S)
        finally:
            reading = False
        return time.monotonic() - begin_s


def test_a_source_that_is_killed_in_a_read_is_lost_at_once_and_the_next_one_serves(
    transport_name: str, pools: list[Region]
) -> None:
    expected, into = pools
    transport = make_transport(transport_name, into, LARGE, progress_timeout_s=PATIENT_S)
    with serving(transport_name) as (source, offer), linked(transport, offer) as link:
        assert fails_when(source.kill, link, into) < SLACK_S
        into.buffer[:] = bytes(into.nbytes)
    with serving(transport_name) as (_, offer), linked(transport, offer) as link:
        read(link, EVERY)
    assert into.buffer == expected.buffer


def test_a_source_that_is_frozen_in_a_read_is_lost_in_time_and_writes_nothing_when_it_thaws(
    transport_name: str, pools: list[Region]
) -> None:
    expected, into = pools
    transport = make_transport(transport_name, into, LARGE)
    if transport_name == "SHM":
        pytest.skip("a copy out of shared memory does not need its source, and ends well")
    with serving(transport_name) as (source, offer):
        with linked(transport, offer) as link:
            took_s = fails_when(source.freeze, link, into)
            assert took_s < 2 * PROGRESS_TIMEOUT_S + SLACK_S
            into.buffer[:] = b"\x55" * into.nbytes  # Somebody else's blocks by now.
            source.thaw()
            for _ in range(3):  # By then it has seen what became of its connection, and served another.
                read(link, [7])
        others = [block for block in EVERY if block != 7]
        assert (blocks_of(into, LARGE, others) == 0x55).all()
        assert (blocks_of(into, LARGE, [7]) == blocks_of(expected, LARGE, [7])).all()


@pytest.mark.parametrize("lanes", ["best", "tcp"])
def test_a_destination_that_dies_in_a_read_leaves_its_source_unharmed(transport_name: str, lanes: str) -> None:
    if lanes == "tcp" and transport_name not in LIBRARIES:
        pytest.skip("it has no lanes to choose from")
    with serving(transport_name, LANES[lanes]) as (source, offer):
        kill_in_a_read(transport_name, offer, LANES[lanes], after_freezing=lanes == "tcp")
        assert_still_served(source, transport_name, offer, LANES[lanes])


@pytest.mark.soak
@pytest.mark.parametrize("after_freezing", [False, True], ids=["killed", "frozen, then killed"])
def test_destinations_that_die_in_reads_leave_their_source_unharmed_for_long(
    transport_name: str, after_freezing: bool
) -> None:
    with serving(transport_name, LANES["tcp"]) as (source, offer):
        for _ in range(100):
            kill_in_a_read(transport_name, offer, LANES["tcp"], after_freezing=after_freezing)
            assert source.child.poll() is None
        assert_still_served(source, transport_name, offer, LANES["tcp"])


def kill_in_a_read(name: str, offer: Offer, environ: dict[str, str], *, after_freezing: bool) -> None:
    with end("destination", name, environ) as destination:
        destination.told(dataclasses.asdict(offer))
        assert [destination.said(), destination.said()] == ["begins", "read"]
        if after_freezing:
            destination.freeze()
        destination.kill()


def assert_still_served(source: End, name: str, offer: Offer, environ: dict[str, str]) -> None:
    with end("destination", name, environ) as destination:
        destination.told(dataclasses.asdict(offer))
        assert [destination.said(), destination.said()] == ["begins", "read"]
    assert source.child.poll() is None, "the source died of its destination's death"
