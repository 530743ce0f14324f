"""Transfers that end otherwise: declined, failed, too late, damaged, or followed by another."""

import asyncio
import time

import pytest

from disaggregated.errors import (
    ChecksumMismatch,
    LeaseExpired,
    SourceFailed,
    TransferError,
    TransferTimeout,
)
from tests.support.kv_endpoints import GatedEndpoint, make_endpoint
from tests.support.kv_pools import (
    SMALL,
    destination,
    eventually,
    flip_bit,
    regions,
    served_source,
)
from tests.support.kv_transfers import INTO, TABLE, Both, ServedTicket, connected

# Declined: nobody pulls, and the source need not wait for its lease to run out.


async def test_a_declined_transfer_gives_its_blocks_back_at_once(both: Both) -> None:
    both.destination.decline(both.source.offer("t", TABLE, 24))
    await both.source.wait_released("t")
    with pytest.raises(TransferError):
        await both.destination.pull(both.source.ticket("t"), INTO, deadline_s=0.2)


async def test_a_transfer_that_is_declined_before_it_begins_never_does(both: Both) -> None:
    source = both.source.source
    both.destination.decline(both.source.ticket("t"))
    await eventually(lambda: "generation-0 does not want it" in str(source.why_unwanted("t")))
    with pytest.raises(TransferError):
        source.open("t")


async def test_a_request_that_comes_twice_and_is_refused_then_does_not_end_the_first(both: Both) -> None:
    both.source.source.open("t")
    pulling = asyncio.create_task(both.destination.pull(both.source.ticket("t"), INTO, deadline_s=20))
    await eventually(lambda: both.source.source.num_followers)
    both.destination.decline(both.source.ticket("t"))
    await both.destination.pull(both.source.offer("other", [0], 4), [0], deadline_s=20)  # Long enough for a farewell.
    assert both.source.source.finish("t", TABLE, 24, 5)
    await pulling
    await both.source.wait_released("other", "t")


async def test_declining_does_not_disturb_another_that_follows(both: Both) -> None:
    both.source.source.open("t")
    pulling = asyncio.create_task(both.destination.pull(both.source.ticket("t"), INTO, deadline_s=20))
    await eventually(lambda: both.source.source.num_followers)
    async with destination(both.into, SMALL, instance_id="generation-1") as second:
        second.decline(both.source.ticket("t"))  # Said before it closes.
    both.source.source.finish("t", TABLE, 24, 1)
    await pulling
    both.check_landed(6)


async def test_declining_a_source_that_is_gone_is_harmless_and_ends_soon(both: Both) -> None:
    both.destination.decline(ServedTicket("127.0.0.1:1"))
    for number in range(200):  # More than are said at once.
        both.destination.decline(both.source.ticket(str(number)))
    async with asyncio.timeout(20):
        await both.destination.close()


# Failures of the prefill, of time, and of bytes.


@pytest.mark.parametrize("published", [0, 2])
async def test_a_failed_prefill_ends_the_transfer_at_once(both: Both, published: int) -> None:
    source = both.source.source
    source.open("t")
    pulling = asyncio.create_task(both.destination.pull(both.source.ticket("t"), INTO, deadline_s=20))
    source.publish("t", TABLE, 4 * published)
    await eventually(lambda: source.num_followers)
    source.fail("t", "out of memory")
    with pytest.raises(SourceFailed, match="context-0: out of memory"):
        await pulling
    await both.source.wait_released("t")
    assert not source.publish("t", TABLE, 20)
    assert not source.finish("t", TABLE, 20, 1)


async def test_a_read_that_is_refused_as_the_prefill_fails_says_why_it_failed(transport_name: str) -> None:
    with regions(SMALL) as (pool, into):
        gated = GatedEndpoint(make_endpoint(transport_name, pool, SMALL))
        gated.answers.clear()
        async with (
            served_source(pool, SMALL, endpoints=[gated]) as source,
            destination(into, SMALL, backend=transport_name, progress_timeout_s=5) as landing,
        ):
            source.source.open("t")
            pulling = asyncio.create_task(landing.pull(source.ticket("t"), INTO, deadline_s=20))
            source.source.publish("t", TABLE, 8)
            await asyncio.to_thread(gated.asked.wait, 5)
            source.source.fail("t", "out of memory")
            gated.answers.set()
            time.sleep(0.05)  # noqa: ASYNC251  # The reading thread is refused before this loop can send the reason.
            with pytest.raises(SourceFailed, match="context-0: out of memory"):
                await pulling


async def test_a_prefill_that_failed_before_anybody_followed_is_told_to_who_comes_late(both: Both) -> None:
    both.source.source.fail("t", "refused")
    with pytest.raises(SourceFailed, match="refused"):
        await both.destination.pull(both.source.ticket("t"), INTO, deadline_s=20)


@pytest.mark.parametrize("opened", [False, True])
async def test_a_source_that_never_publishes_times_out(both: Both, opened: bool) -> None:
    await both.destination.pull(both.source.offer("first", TABLE, 24), INTO, deadline_s=20)  # They are connected.
    await both.source.wait_released("first")
    if opened:
        both.source.source.open("t")
    with pytest.raises(TransferTimeout, match=r"did not land within 0\.3 s"):
        await both.destination.pull(both.source.ticket("t"), INTO, deadline_s=0.3)
    if opened:
        await both.source.wait_released("t")


async def test_a_lease_nobody_follows_expires_without_any_new_work(transport_name: str) -> None:
    async with connected(transport_name, lease_s=0.1) as both:
        both.source.offer("t", TABLE, 24)
        await both.source.wait_released("t")
        with pytest.raises(LeaseExpired, match=r"no sign of life for 0\.1 s"):
            await both.destination.pull(both.source.ticket("t"), INTO, deadline_s=20)
        both.source.source.fail("t", "late")
        assert both.source.released.empty()


async def test_a_followed_lease_lives_as_long_as_its_destination(transport_name: str) -> None:
    """Of which it has three chances in each lease to say that it lives, also on a machine that does much else."""
    async with connected(transport_name, lease_s=1.5) as both:
        both.source.source.open("t")
        pulling = asyncio.create_task(both.destination.pull(both.source.ticket("t"), INTO, deadline_s=10))
        await asyncio.sleep(2.0)
        both.source.source.finish("t", TABLE, 24, 1)
        await pulling
        both.check_landed(6)


@pytest.mark.parametrize("layer", range(SMALL.num_layers))
async def test_a_bit_that_flipped_in_the_source_is_a_checksum_mismatch(both: Both, layer: int) -> None:
    ticket = both.source.offer("t", TABLE, 24)
    flip_bit(both.source.region, SMALL, layer=layer, block_id=TABLE[4])
    with pytest.raises(ChecksumMismatch, match=f"block {TABLE[4]} of"):
        await both.destination.pull(ticket, INTO, deadline_s=20)
    assert both.destination.statistics()[0].failures_total == 1
    await both.source.wait_released("t")


async def test_blocks_that_went_back_while_they_were_read_are_an_expired_lease(transport_name: str) -> None:
    """And not a damage: the bytes differ because somebody else's are there by now."""
    with regions(SMALL) as (pool, into):
        gated = GatedEndpoint(make_endpoint(transport_name, pool, SMALL))
        gated.answers.clear()
        async with (
            served_source(pool, SMALL, endpoints=[gated]) as source,
            destination(into, SMALL, backend=transport_name, progress_timeout_s=5) as landing,
        ):
            pulling = asyncio.create_task(landing.pull(source.offer("t", TABLE, 24), INTO, deadline_s=20))
            await asyncio.to_thread(gated.asked.wait, 5)
            source.source.fail("t", "cancelled")
            gated.answers.set()
            with pytest.raises((LeaseExpired, SourceFailed)):
                await pulling


async def test_two_destinations_cannot_follow_one_transfer(both: Both) -> None:
    both.source.source.open("t")
    async with destination(both.into, SMALL, instance_id="generation-1") as second:
        first = asyncio.create_task(both.destination.pull(both.source.ticket("t"), INTO, deadline_s=20))
        await eventually(lambda: both.source.source.num_followers)
        with pytest.raises(TransferError, match="followed by another"):
            await second.pull(both.source.ticket("t"), INTO, deadline_s=20)
        both.source.source.finish("t", TABLE, 24, 1)
        await first
        both.check_landed(6)


async def test_a_source_that_closes_tells_its_followers(both: Both) -> None:
    both.source.source.open("t")
    pulling = asyncio.create_task(both.destination.pull(both.source.ticket("t"), INTO, deadline_s=20))
    await eventually(lambda: both.source.source.num_followers)
    await both.source.source.close()
    with pytest.raises(SourceFailed, match="shutting down"):
        await pulling
    await both.source.wait_released("t")
