"""Whole transfers: a real gRPC control plane, both transports, source and destination in one process."""

import asyncio
import contextlib
import dataclasses
import functools
from collections.abc import AsyncIterator

import pytest

from disaggregated.errors import (
    ChecksumMismatch,
    ConfigError,
    FingerprintMismatch,
    LayoutMismatch,
    LeaseExpired,
    PeerLost,
    SourceFailed,
    StaleEpoch,
    TransferError,
    TransferTimeout,
)
from disaggregated.kv_layout import KVLayout
from kvtransfer import Preference, Region, TransferDestination, registry
from kvtransfer.deadline import Deadline
from kvtransfer.source.endpoints import SourceEndpoints
from kvtransfer.transport import Offer
from kvtransfer.transports.tcp import TcpEndpoint
from tests.support.kv_endpoints import GatedEndpoint, make_endpoint
from tests.support.kv_pools import (
    EPOCH,
    LARGE,
    SMALL,
    ServedSource,
    blocks_of,
    destination,
    eventually,
    fill,
    flip_bit,
    has_landed,
    regions,
    served_source,
)

TABLE = [7, 8, 9, 2, 30, 1]
"""The source's block table of a prompt of up to 24 tokens."""
INTO = [20, 3, 4, 5, 11, 10, 17]
"""Ours, one block longer."""


@dataclasses.dataclass
class Both:
    source: ServedSource
    into: Region
    destination: TransferDestination

    def check_landed(self, count: int, *, skip: int = 0) -> None:
        wanted = blocks_of(self.source.region, SMALL, TABLE[skip:count])
        assert (blocks_of(self.into, SMALL, INTO[skip:count]) == wanted).all()
        others = sorted(set(range(SMALL.num_blocks)) - set(INTO[skip:count]))
        assert not blocks_of(self.into, SMALL, others).any()


@contextlib.asynccontextmanager
async def connected(name: str, *, lease_s: float = 30.0) -> AsyncIterator[Both]:
    with regions(SMALL) as (pool, into):
        async with (
            served_source(pool, SMALL, lease_s=lease_s) as source,
            destination(into, SMALL, backend=name) as landing,
        ):
            yield Both(source, into, landing)


@pytest.fixture
async def both(transport_name: str) -> AsyncIterator[Both]:
    async with connected(transport_name) as made:
        yield made


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 5, 23, 24])
async def test_a_prompt_lands_whole_whatever_its_last_block_holds(both: Both, num_tokens: int) -> None:
    ticket = both.source.offer("t", TABLE, num_tokens, first_token=9)
    landed = await both.destination.pull(ticket, INTO, deadline_s=5)
    num_blocks = SMALL.num_blocks_for(num_tokens)
    both.check_landed(num_blocks)
    assert (landed.first_token, landed.num_tokens) == (9, num_tokens)
    assert landed.num_bytes == num_blocks * SMALL.num_layers * SMALL.block_bytes
    await both.source.wait_released("t")


async def test_chunks_are_read_while_later_ones_are_computed(both: Both) -> None:
    source = both.source.source
    source.open("t")
    pulling = asyncio.create_task(both.destination.pull(both.source.ticket("t"), INTO, deadline_s=5))
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
    pull = both.destination.pull(both.source.ticket("t"), INTO, deadline_s=5, overlap=False)
    pulling = asyncio.create_task(pull)
    for num_tokens in (4, 8, 12):
        source.publish("t", TABLE, num_tokens)
    await eventually(lambda: source.num_followers)
    await both.destination.pull(both.source.offer("other", [0], 4), [0], deadline_s=5)  # Long enough for a read.
    assert not blocks_of(both.into, SMALL, INTO).any()
    both.into.buffer[:] = bytes(both.into.nbytes)
    source.finish("t", TABLE, 13, 5)
    await pulling
    both.check_landed(4)


@pytest.mark.parametrize("skip", [0, 1, 3, 5])
async def test_blocks_that_are_here_already_do_not_travel(both: Both, skip: int) -> None:
    landed = await both.destination.pull(both.source.offer("t", TABLE, 20), INTO, deadline_s=5, skip_blocks=skip)
    both.check_landed(5, skip=skip)
    assert landed.num_bytes == (5 - skip) * SMALL.num_layers * SMALL.block_bytes
    if skip == 5:
        assert landed.transfer_s == 0
    await both.source.wait_released("t")


async def test_a_destination_may_follow_before_the_prefill_begins(both: Both) -> None:
    pulling = asyncio.create_task(both.destination.pull(both.source.ticket("t"), INTO, deadline_s=5))
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
            group.create_task(landing.pull(first.offer("t", TABLE, 24), range(6), deadline_s=5))
            group.create_task(landing.pull(theirs, range(10, 16), deadline_s=5))
        assert (blocks_of(into, SMALL, range(6)) == blocks_of(pool, SMALL, TABLE)).all()
        assert (blocks_of(into, SMALL, range(10, 16)) == blocks_of(second_pool, SMALL, TABLE)).all()


@pytest.mark.parametrize("max_tokens", [1, 4, 7, 100])
async def test_any_buffer_size_works(transport_name: str, max_tokens: int) -> None:
    with regions(SMALL) as (pool, into):
        async with (
            served_source(pool, SMALL) as source,
            destination(into, SMALL, backend=transport_name, max_tokens_in_buffer=max_tokens) as landing,
        ):
            await landing.pull(source.offer("t", TABLE, 24), INTO, deadline_s=5)
            Both(source, into, landing).check_landed(6)


# Refused before anything is read.


async def test_another_model_is_refused_in_words(transport_name: str) -> None:
    with regions(SMALL) as (pool, into):
        async with (
            served_source(pool, SMALL) as source,
            destination(into, SMALL, backend=transport_name, fingerprint="b-model") as landing,
        ):
            with pytest.raises(FingerprintMismatch, match="generation-0 serves b-model, context-0 serves a-model"):
                await landing.pull(source.offer("t", TABLE, 24), INTO, deadline_s=5)
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
                await landing.pull(source.offer("t", TABLE, 24), INTO, deadline_s=5)
            await source.wait_released("t")


async def test_pools_of_different_sizes_exchange_blocks(transport_name: str) -> None:
    ours = dataclasses.replace(SMALL, num_blocks=7)
    with regions(SMALL, 1) as (pool,), Region.allocate(ours.pool_bytes) as into:
        async with served_source(pool, SMALL) as source, destination(into, ours, backend=transport_name) as landing:
            await landing.pull(source.offer("t", TABLE, 24), [6, 5, 4, 3, 2, 1], deadline_s=5)
            assert (blocks_of(into, ours, [6, 5, 4, 3, 2, 1]) == blocks_of(pool, SMALL, TABLE)).all()


async def test_a_ticket_of_another_incarnation_is_stale(both: Both) -> None:
    ticket = both.source.offer("t", TABLE, 24)
    for wrong in (dataclasses.replace(ticket, epoch=EPOCH - 1), dataclasses.replace(ticket, instance_id="context-9")):
        with pytest.raises(StaleEpoch):
            await both.destination.pull(wrong, INTO, deadline_s=5)
    await both.destination.pull(ticket, INTO, deadline_s=5)
    with pytest.raises(StaleEpoch):
        await both.destination.pull(dataclasses.replace(ticket, epoch=EPOCH - 1), INTO, deadline_s=5)


async def test_more_blocks_than_were_reserved_are_refused(both: Both) -> None:
    with pytest.raises(TransferError, match="6 blocks were published, 5 are reserved"):
        await both.destination.pull(both.source.offer("t", TABLE, 24), INTO[:5], deadline_s=5)
    assert not any(both.into.buffer)
    await both.source.wait_released("t")


async def test_nobody_at_the_address_is_a_lost_peer(transport_name: str) -> None:
    with regions(SMALL, 1) as (into,):
        async with destination(into, SMALL, backend=transport_name) as landing:
            with pytest.raises(PeerLost):
                await landing.pull(ServedTicket("127.0.0.1:1"), INTO, deadline_s=5)
            assert landing.statistics() == []


@dataclasses.dataclass(frozen=True)
class ServedTicket:
    address: str
    transfer_id: str = "t"
    instance_id: str = "context-0"
    epoch: int = EPOCH


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
    pulling = asyncio.create_task(both.destination.pull(both.source.ticket("t"), INTO, deadline_s=5))
    await eventually(lambda: both.source.source.num_followers)
    both.destination.decline(both.source.ticket("t"))
    await both.destination.pull(both.source.offer("other", [0], 4), [0], deadline_s=5)  # Long enough for a farewell.
    assert both.source.source.finish("t", TABLE, 24, 5)
    await pulling
    await both.source.wait_released("other", "t")


async def test_declining_does_not_disturb_another_that_follows(both: Both) -> None:
    both.source.source.open("t")
    pulling = asyncio.create_task(both.destination.pull(both.source.ticket("t"), INTO, deadline_s=5))
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
    async with asyncio.timeout(5):
        await both.destination.close()


# Failures of the prefill, of time, and of bytes.


@pytest.mark.parametrize("published", [0, 2])
async def test_a_failed_prefill_ends_the_transfer_at_once(both: Both, published: int) -> None:
    source = both.source.source
    source.open("t")
    pulling = asyncio.create_task(both.destination.pull(both.source.ticket("t"), INTO, deadline_s=5))
    source.publish("t", TABLE, 4 * published)
    await eventually(lambda: source.num_followers)
    source.fail("t", "out of memory")
    with pytest.raises(SourceFailed, match="context-0: out of memory"):
        await pulling
    await both.source.wait_released("t")
    assert not source.publish("t", TABLE, 20)
    assert not source.finish("t", TABLE, 20, 1)


async def test_a_prefill_that_failed_before_anybody_followed_is_told_to_who_comes_late(both: Both) -> None:
    both.source.source.fail("t", "refused")
    with pytest.raises(SourceFailed, match="refused"):
        await both.destination.pull(both.source.ticket("t"), INTO, deadline_s=5)


@pytest.mark.parametrize("opened", [False, True])
async def test_a_source_that_never_publishes_times_out(both: Both, opened: bool) -> None:
    if opened:
        both.source.source.open("t")
    with pytest.raises(TransferTimeout, match=r"did not land within 0\.1 s"):
        await both.destination.pull(both.source.ticket("t"), INTO, deadline_s=0.1)
    if opened:
        await both.source.wait_released("t")


async def test_a_lease_nobody_follows_expires_without_any_new_work(transport_name: str) -> None:
    async with connected(transport_name, lease_s=0.1) as both:
        both.source.offer("t", TABLE, 24)
        await both.source.wait_released("t")
        with pytest.raises(LeaseExpired, match=r"no sign of life for 0\.1 s"):
            await both.destination.pull(both.source.ticket("t"), INTO, deadline_s=5)
        both.source.source.fail("t", "late")
        assert both.source.released.empty()


async def test_a_followed_lease_lives_as_long_as_its_destination(transport_name: str) -> None:
    """Of which it has three chances in each lease to say that it lives, also on a machine that does much else."""
    async with connected(transport_name, lease_s=0.6) as both:
        both.source.source.open("t")
        pulling = asyncio.create_task(both.destination.pull(both.source.ticket("t"), INTO, deadline_s=10))
        await asyncio.sleep(1.3)
        both.source.source.finish("t", TABLE, 24, 1)
        await pulling
        both.check_landed(6)


@pytest.mark.parametrize("layer", range(SMALL.num_layers))
async def test_a_bit_that_flipped_in_the_source_is_a_checksum_mismatch(both: Both, layer: int) -> None:
    ticket = both.source.offer("t", TABLE, 24)
    flip_bit(both.source.region, SMALL, layer=layer, block_id=TABLE[4])
    with pytest.raises(ChecksumMismatch, match=f"block {TABLE[4]} of"):
        await both.destination.pull(ticket, INTO, deadline_s=5)
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
            pulling = asyncio.create_task(landing.pull(source.offer("t", TABLE, 24), INTO, deadline_s=5))
            await asyncio.to_thread(gated.asked.wait, 5)
            source.source.fail("t", "cancelled")
            gated.answers.set()
            with pytest.raises((LeaseExpired, SourceFailed)):
                await pulling


async def test_two_destinations_cannot_follow_one_transfer(both: Both) -> None:
    both.source.source.open("t")
    async with destination(both.into, SMALL, instance_id="generation-1") as second:
        first = asyncio.create_task(both.destination.pull(both.source.ticket("t"), INTO, deadline_s=5))
        await eventually(lambda: both.source.source.num_followers)
        with pytest.raises(TransferError, match="followed by another"):
            await second.pull(both.source.ticket("t"), INTO, deadline_s=5)
        both.source.source.finish("t", TABLE, 24, 1)
        await first
        both.check_landed(6)


async def test_a_source_that_closes_tells_its_followers(both: Both) -> None:
    both.source.source.open("t")
    pulling = asyncio.create_task(both.destination.pull(both.source.ticket("t"), INTO, deadline_s=5))
    await eventually(lambda: both.source.source.num_followers)
    await both.source.source.close()
    with pytest.raises(SourceFailed, match="shutting down"):
        await pulling
    await both.source.wait_released("t")


# Negotiation.


async def test_default_uses_shared_memory_on_one_host_and_says_why() -> None:
    async with connected("DEFAULT") as both:
        landed = await both.destination.pull(both.source.offer("t", TABLE, 24), INTO, deadline_s=5)
        assert landed.transport == "SHM"
        statistics = both.destination.statistics()[0]
        assert (statistics.transport, statistics.why, statistics.fallbacks) == ("SHM", "both ends are on one host", 0)
        assert (statistics.transfers_total, statistics.bytes_total) == (1, landed.num_bytes)


async def test_default_falls_to_tcp_with_a_warning_when_shared_memory_breaks(caplog: pytest.LogCaptureFixture) -> None:
    with regions(SMALL) as (pool, into):
        broken = make_endpoint("SHM", pool, SMALL, epoch=EPOCH + 1)
        endpoints = [broken, make_endpoint("TCP", pool, SMALL)]
        async with served_source(pool, SMALL, endpoints=endpoints) as source, destination(into, SMALL) as landing:
            landed = await landing.pull(source.offer("t", TABLE, 24), INTO, deadline_s=5)
            statistics = landing.statistics()[0]
    assert landed.transport == "TCP"
    assert statistics.fallbacks == 1
    assert "SHM failed: this source is epoch 8" in statistics.why
    assert "kv_transport_fell_back" in caplog.messages


@pytest.mark.parametrize(("backend", "offered"), [("SHM", "TCP"), ("TCP", "SHM")])
async def test_a_configured_transport_never_falls_to_another(backend: str, offered: str) -> None:
    with regions(SMALL) as (pool, into):
        async with (
            served_source(pool, SMALL, preference=Preference(offered)) as source,
            destination(into, SMALL, backend=backend) as landing,
        ):
            with pytest.raises(TransferError, match=f"backend {backend}: {backend} is not offered"):
                await landing.pull(source.offer("t", TABLE, 24), INTO, deadline_s=5)


async def test_a_transport_that_is_none_of_ours_is_refused_at_start() -> None:
    with regions(SMALL, 1) as (into,), pytest.raises(ConfigError, match="MOONCAKE is not part of this product"):
        async with destination(into, SMALL, backend="MOONCAKE"):
            pass


async def test_a_source_left_to_decide_listens_on_what_a_configured_destination_asks_for() -> None:
    with regions(SMALL) as (pool, _):
        only_shared_memory = [registry.load("SHM").make_endpoint(pool, SMALL, epoch=EPOCH, host="127.0.0.1")]
        endpoints = SourceEndpoints(
            only_shared_memory,
            gate=NobodyReads(),
            make=lambda name: registry.load(name).make_endpoint(pool, SMALL, epoch=EPOCH, host="127.0.0.1"),
        )
        endpoints.start()
        assert [offer.name for offer in endpoints.offers(["SHM", "TCP"])] == ["SHM"]
        assert [offer.name for offer in endpoints.offers(["TCP"])] == ["TCP"]
        assert [offer.name for offer in endpoints.offers(["SHM", "TCP"])] == ["SHM", "TCP"]
        assert endpoints.statistics().keys() == {"SHM", "TCP"}
        endpoints.close(deadline=Deadline.after(5))
        assert endpoints.offers([]) == []


class NobodyReads:
    def check_read(self, **_: object) -> None:
        raise AssertionError("nobody reads")


class WithoutHost(TcpEndpoint):
    """Says what an endpoint says that listens on every address."""

    def describe(self) -> Offer:
        offer = super().describe()
        return dataclasses.replace(offer, address=offer.address.removeprefix("127.0.0.1"))


async def test_a_source_that_names_no_host_is_reached_where_its_server_was() -> None:
    with regions(SMALL) as (pool, into):
        async with (
            served_source(pool, SMALL, endpoints=[WithoutHost(pool, SMALL, epoch=EPOCH)]) as source,
            destination(into, SMALL, backend="TCP") as landing,
        ):
            await landing.pull(source.offer("t", TABLE, 24), INTO, deadline_s=5)
            Both(source, into, landing).check_landed(6)
