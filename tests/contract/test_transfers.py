"""Whole transfers: what lands, and what is refused before anything is read."""

import asyncio
import dataclasses
import functools

import pytest

from disaggregated.errors import (
    FingerprintMismatch,
    LayoutMismatch,
    PeerLost,
    StaleEpoch,
    TransferError,
)
from disaggregated.kv_layout import KVLayout
from kvtransfer import Region
from tests.support.kv_pools import (
    EPOCH,
    LARGE,
    SMALL,
    blocks_of,
    destination,
    eventually,
    fill,
    has_landed,
    regions,
    served_source,
)
from tests.support.kv_transfers import INTO, TABLE, Both, ServedTicket


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 5, 23, 24])
async def test_a_prompt_lands_whole_whatever_its_last_block_holds(both: Both, num_tokens: int) -> None:
    ticket = both.source.offer("t", TABLE, num_tokens, first_token=9)
    landed = await both.destination.pull(ticket, INTO, deadline_s=20)
    num_blocks = SMALL.num_blocks_for(num_tokens)
    both.check_landed(num_blocks)
    assert (landed.first_token, landed.num_tokens) == (9, num_tokens)
    assert landed.num_bytes == num_blocks * SMALL.num_layers * SMALL.block_bytes
    await both.source.wait_released("t")


async def test_chunks_are_read_while_later_ones_are_computed(both: Both) -> None:
    source = both.source.source
    source.open("t")
    pulling = asyncio.create_task(both.destination.pull(both.source.ticket("t"), INTO, deadline_s=20))
    for num_tokens in (3, 6, 8, 15):
        assert source.publish("t", TABLE, num_tokens)
        full = num_tokens // SMALL.block_size
        assert source.ledger()[0][1] == full  # A partial block is not published.
        if full:
            await eventually(functools.partial(has_landed, both.into, SMALL, INTO[full - 1]))
    assert source.finish("t", TABLE, 22, 5)
    landed = await pulling
    both.check_landed(6)
    assert landed.num_tokens == 22
    await both.source.wait_released("t")


async def test_without_overlap_nothing_is_read_before_the_last_publication(both: Both) -> None:
    source = both.source.source
    source.open("t")
    pull = both.destination.pull(both.source.ticket("t"), INTO, deadline_s=20, overlap=False)
    pulling = asyncio.create_task(pull)
    for num_tokens in (4, 8, 12):
        source.publish("t", TABLE, num_tokens)
    await eventually(lambda: source.num_followers)
    await both.destination.pull(both.source.offer("other", [0], 4), [0], deadline_s=20)  # Long enough for a read.
    assert not blocks_of(both.into, SMALL, INTO).any()
    both.into.buffer[:] = bytes(both.into.nbytes)
    source.finish("t", TABLE, 13, 5)
    await pulling
    both.check_landed(4)


@pytest.mark.parametrize("skip", [0, 1, 3, 5])
async def test_blocks_that_are_here_already_do_not_travel(both: Both, skip: int) -> None:
    landed = await both.destination.pull(both.source.offer("t", TABLE, 20), INTO, deadline_s=20, skip_blocks=skip)
    both.check_landed(5, skip=skip)
    assert landed.num_bytes == (5 - skip) * SMALL.num_layers * SMALL.block_bytes
    if skip == 5:
        assert landed.transfer_s == 0
    await both.source.wait_released("t")


async def test_a_destination_may_follow_before_the_prefill_begins(both: Both) -> None:
    pulling = asyncio.create_task(both.destination.pull(both.source.ticket("t"), INTO, deadline_s=20))
    await eventually(lambda: both.source.source.num_followers)
    both.source.offer("t", TABLE, 24)
    await pulling
    both.check_landed(6)


async def test_many_transfers_at_once_land_each_in_its_own_blocks(transport_name: str) -> None:
    with regions(LARGE) as (pool, into):
        async with (
            served_source(pool, LARGE) as source,
            destination(into, LARGE, backend=transport_name) as landing,
            asyncio.TaskGroup() as group,
        ):
            for number in range(8):
                theirs = list(range(number, LARGE.num_blocks, 8))
                ticket = source.offer(str(number), theirs, 32 * len(theirs))
                group.create_task(landing.pull(ticket, theirs, deadline_s=20))
        assert into.buffer == pool.buffer


async def test_two_sources_land_in_one_pool(transport_name: str) -> None:
    with regions(SMALL, 3) as (pool, into, second_pool):
        fill(second_pool, seed=2)
        async with (
            served_source(pool, SMALL) as first,
            served_source(second_pool, SMALL, epoch=99) as second,
            destination(into, SMALL, backend=transport_name) as landing,
            asyncio.TaskGroup() as group,
        ):
            theirs = dataclasses.replace(second.offer("t", TABLE, 24), epoch=99)
            group.create_task(landing.pull(first.offer("t", TABLE, 24), range(6), deadline_s=20))
            group.create_task(landing.pull(theirs, range(10, 16), deadline_s=20))
        assert (blocks_of(into, SMALL, range(6)) == blocks_of(pool, SMALL, TABLE)).all()
        assert (blocks_of(into, SMALL, range(10, 16)) == blocks_of(second_pool, SMALL, TABLE)).all()


@pytest.mark.parametrize("max_tokens", [1, 4, 7, 100])
async def test_any_buffer_size_works(transport_name: str, max_tokens: int) -> None:
    with regions(SMALL) as (pool, into):
        async with (
            served_source(pool, SMALL) as source,
            destination(into, SMALL, backend=transport_name, max_tokens_in_buffer=max_tokens) as landing,
        ):
            await landing.pull(source.offer("t", TABLE, 24), INTO, deadline_s=20)
            Both(source, into, landing).check_landed(6)


# Refused before anything is read.


async def test_another_model_is_refused_in_words(transport_name: str) -> None:
    with regions(SMALL) as (pool, into):
        async with (
            served_source(pool, SMALL) as source,
            destination(into, SMALL, backend=transport_name, fingerprint="b-model") as landing,
        ):
            with pytest.raises(FingerprintMismatch, match="generation-0 serves b-model, context-0 serves a-model"):
                await landing.pull(source.offer("t", TABLE, 24), INTO, deadline_s=20)
            await source.wait_released("t")  # Long before its lease runs out: whoever is refused says so.


@pytest.mark.parametrize(
    ("field", "ours"),
    [
        ("num_layers", dataclasses.replace(SMALL, num_layers=4)),
        ("num_kv_heads", dataclasses.replace(SMALL, num_kv_heads=1)),
        ("head_dim", dataclasses.replace(SMALL, head_dim=16)),
        ("num_planes", dataclasses.replace(SMALL, num_planes=1)),
    ],
)
async def test_another_layout_is_refused_with_the_field_that_differs(
    transport_name: str, field: str, ours: KVLayout
) -> None:
    with regions(SMALL, 1) as (pool,), Region.allocate(ours.pool_bytes) as into:
        async with served_source(pool, SMALL) as source, destination(into, ours, backend=transport_name) as landing:
            with pytest.raises(LayoutMismatch, match=f"{field} is"):
                await landing.pull(source.offer("t", TABLE, 24), INTO, deadline_s=20)
            await source.wait_released("t")


async def test_pools_of_different_sizes_exchange_blocks(transport_name: str) -> None:
    ours = dataclasses.replace(SMALL, num_blocks=7)
    with regions(SMALL, 1) as (pool,), Region.allocate(ours.pool_bytes) as into:
        async with served_source(pool, SMALL) as source, destination(into, ours, backend=transport_name) as landing:
            await landing.pull(source.offer("t", TABLE, 24), [6, 5, 4, 3, 2, 1], deadline_s=20)
            assert (blocks_of(into, ours, [6, 5, 4, 3, 2, 1]) == blocks_of(pool, SMALL, TABLE)).all()


async def test_a_ticket_of_another_incarnation_is_stale(both: Both) -> None:
    ticket = both.source.offer("t", TABLE, 24)
    for wrong in (dataclasses.replace(ticket, epoch=EPOCH - 1), dataclasses.replace(ticket, instance_id="context-9")):
        with pytest.raises(StaleEpoch):
            await both.destination.pull(wrong, INTO, deadline_s=20)
    await both.destination.pull(ticket, INTO, deadline_s=20)
    with pytest.raises(StaleEpoch):
        await both.destination.pull(dataclasses.replace(ticket, epoch=EPOCH - 1), INTO, deadline_s=20)


async def test_more_blocks_than_were_reserved_are_refused(both: Both) -> None:
    with pytest.raises(TransferError, match="6 blocks were published, 5 are reserved"):
        await both.destination.pull(both.source.offer("t", TABLE, 24), INTO[:5], deadline_s=20)
    assert not any(both.into.buffer)
    await both.source.wait_released("t")


async def test_nobody_at_the_address_is_a_lost_peer(transport_name: str) -> None:
    with regions(SMALL, 1) as (into,):
        async with destination(into, SMALL, backend=transport_name) as landing:
            with pytest.raises(PeerLost):
                await landing.pull(ServedTicket("127.0.0.1:1"), INTO, deadline_s=20)
            assert landing.statistics() == []
