"""What goes wrong in the middle: cancels, damaged and broken links, sources that are killed, frozen and restarted.

Each test ends with the same question: the blocks were given to somebody else when the pull was over; is every byte of
theirs still there?
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from disaggregated.errors import (
    ChecksumMismatch,
    PeerLost,
    RequestCancelled,
    StaleEpoch,
    TransferError,
    TransferTimeout,
)
from disaggregated.v1 import kv_pb2
from kvtransfer import Quarantine, QuarantineLimits, Region, TransferDestination
from kvtransfer.destination import peers
from kvtransfer.destination.landed import Landed
from kvtransfer.machine import CancelResult
from kvtransfer.source.service import KVSourceService
from tests.support.fault_proxy import Fault, proxied
from tests.support.kv_endpoints import PATIENT_S, SLACK_S, GatedEndpoint, make_endpoint, make_transport
from tests.support.kv_pools import (
    EPOCH,
    LARGE,
    ServedSource,
    SomeTicket,
    blocks_of,
    destination,
    eventually,
    has_landed,
    memory_of_others,
    regions,
    served_source,
)
from tests.support.kv_source import RemoteSource, remote_source
from tests.support.stuck_transport import StuckTransport

TABLE = list(range(0, 128, 2))
"""64 blocks, 16 MiB in all: more than every buffer between the two ends."""
INTO = list(range(100, 164))
NUM_TOKENS = 64 * 32
PROGRESS_TIMEOUT_S = 0.5


def give_to_somebody_else(into: Region) -> bytes:
    """What the next owner of the blocks writes."""
    into.buffer[:] = b"\x5a" * into.nbytes
    return bytes(into.buffer)


async def pull_and_check(landing: TransferDestination, into: Region, pool: Region, ticket: SomeTicket) -> Landed:
    landed = await landing.pull(ticket, INTO, deadline_s=20)
    assert (blocks_of(into, LARGE, INTO) == blocks_of(pool, LARGE, TABLE)).all()
    return landed


# Cancelling. `hold` lets the transfer run to a certain point and no further; the pull is cancelled there.


class Held:
    """A transfer that has reached the point and waits there."""

    def __init__(
        self,
        source: ServedSource,
        reached: Callable[[], Awaitable[object]],
        go_on: Callable[[], None],
    ) -> None:
        self.source = source
        self.reached = reached
        self.go_on = go_on


@contextlib.asynccontextmanager
async def before_the_first_publication(name: str, pool: Region) -> AsyncIterator[Held]:
    async with served_source(pool, LARGE) as source:
        source.source.open("t")
        yield Held(source, lambda: eventually(lambda: source.source.num_followers), lambda: None)


@contextlib.asynccontextmanager
async def before_the_first_byte(name: str, pool: Region) -> AsyncIterator[Held]:
    gated = GatedEndpoint(make_endpoint(name, pool, LARGE))
    gated.answers.clear()
    async with served_source(pool, LARGE, endpoints=[gated]) as source:
        source.offer("t", TABLE, NUM_TOKENS)
        yield Held(source, lambda: asyncio.to_thread(gated.asked.wait, 5), gated.answers.set)


@contextlib.asynccontextmanager
async def between_two_chunks(name: str, pool: Region) -> AsyncIterator[Held]:
    async with served_source(pool, LARGE) as source:
        source.source.open("t")
        source.source.publish("t", TABLE, NUM_TOKENS // 2)

        yield Held(source, lambda: eventually(lambda: source.source.statistics()[name].reads_total), lambda: None)


@contextlib.asynccontextmanager
async def before_the_confirmation(name: str, pool: Region) -> AsyncIterator[Held]:
    asked, may_answer = asyncio.Event(), asyncio.Event()
    release = KVSourceService.Release

    async def held_release(self: KVSourceService, request: kv_pb2.ReleaseRequest, call: Any) -> kv_pb2.ReleaseReply:
        asked.set()
        await may_answer.wait()
        return await release(self, request, call)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KVSourceService, "Release", held_release)
        async with served_source(pool, LARGE) as source:
            source.offer("t", TABLE, NUM_TOKENS)
            yield Held(source, asked.wait, may_answer.set)


@contextlib.asynccontextmanager
async def in_the_middle_of_a_block(name: str, pool: Region) -> AsyncIterator[Held]:
    fault = Fault(at=5_000_001, stall=True)
    async with (
        proxied(make_endpoint("TCP", pool, LARGE), fault) as endpoint,
        served_source(pool, LARGE, endpoints=[endpoint]) as source,
    ):
        source.offer("t", TABLE, NUM_TOKENS)
        yield Held(source, fault.reached.wait, fault.may_go_on.set)


POINTS = [before_the_first_publication, before_the_first_byte, between_two_chunks, before_the_confirmation]
CASES = [(name, point) for point in POINTS for name in ("SHM", "TCP")] + [("TCP", in_the_middle_of_a_block)]
Point = Callable[[str, Region], contextlib.AbstractAsyncContextManager[Held]]


@pytest.mark.parametrize(("name", "hold"), CASES, ids=lambda value: getattr(value, "__name__", value))
async def test_a_cancelled_pull_has_ended_for_good(name: str, hold: Point) -> None:
    with regions(LARGE) as (pool, into):
        async with (
            hold(name, pool) as held,
            destination(into, LARGE, backend=name, progress_timeout_s=PATIENT_S) as landing,
        ):
            pulling = asyncio.create_task(landing.pull(held.source.ticket("t"), INTO, deadline_s=2 * PATIENT_S))
            await held.reached()
            begin_s = time.monotonic()
            pulling.cancel()
            with pytest.raises(asyncio.CancelledError):
                await pulling
            assert time.monotonic() - begin_s < SLACK_S
            theirs = give_to_somebody_else(into)
            held.go_on()
            await held.source.wait_released("t")
            assert into.buffer == theirs
            await pull_and_check(landing, into, pool, held.source.offer("next", TABLE, NUM_TOKENS))


@pytest.mark.parametrize("cancelled", [False, True])
async def test_a_pull_that_never_connects_ends_in_time_and_leaves_nothing(cancelled: bool) -> None:
    accepted: asyncio.Queue[asyncio.StreamWriter] = asyncio.Queue()
    server = await asyncio.start_server(lambda _, writer: accepted.put_nowait(writer), "127.0.0.1", 0)
    address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    with regions(LARGE, 1) as (into,):
        async with destination(into, LARGE) as landing:
            pulling = asyncio.create_task(landing.pull(SomeTicket(address, "t"), INTO, deadline_s=0.3))
            writer = await accepted.get()
            if cancelled:
                pulling.cancel()
            with pytest.raises(asyncio.CancelledError if cancelled else (TransferTimeout, PeerLost)):
                await pulling
            assert landing.statistics() == []
    writer.close()
    while not accepted.empty():  # It tells who might be there that it gave up.
        accepted.get_nowait().close()
    server.close()


# A link that damages, breaks or stalls.


@pytest.mark.parametrize("at", [300, 65_536 * 3 + 17, 16 * 1024 * 1024 - 1])
async def test_a_bit_that_flips_on_the_way_never_lands(at: int) -> None:
    fault = Fault(at=at, flip=True)
    with regions(LARGE) as (pool, into):
        async with (
            proxied(make_endpoint("TCP", pool, LARGE), fault) as endpoint,
            served_source(pool, LARGE, endpoints=[endpoint]) as source,
            destination(into, LARGE) as landing,
        ):
            with pytest.raises(ChecksumMismatch):
                await landing.pull(source.offer("t", TABLE, NUM_TOKENS), INTO, deadline_s=20)
            await source.wait_released("t")
            await pull_and_check(landing, into, pool, source.offer("next", TABLE, NUM_TOKENS))


@pytest.mark.parametrize("at", [0, 10, 32, 40, 5_000_001, 16 * 1024 * 1024])
async def test_a_link_that_breaks_is_a_lost_peer_and_is_made_anew(at: int) -> None:
    """At byte 0 the greeting is missing, at 10 and 32 it is torn, at 40 the answer to the read is."""
    with regions(LARGE) as (pool, into):
        async with (
            proxied(make_endpoint("TCP", pool, LARGE), Fault(at=at, cut=True)) as endpoint,
            served_source(pool, LARGE, endpoints=[endpoint]) as source,
            destination(into, LARGE) as landing,
        ):
            with pytest.raises(TransferError):
                await landing.pull(source.offer("t", TABLE, NUM_TOKENS), INTO, deadline_s=20)
            theirs = give_to_somebody_else(into)
            source.source.fail("t", "its destination reported an error")
            await source.wait_released("t")
            assert into.buffer == theirs
            await pull_and_check(landing, into, pool, source.offer("next", TABLE, NUM_TOKENS))


async def test_a_link_that_stalls_is_a_lost_peer_after_the_progress_timeout() -> None:
    fault = Fault(at=5_000_001, stall=True)
    with regions(LARGE) as (pool, into):
        async with (
            proxied(make_endpoint("TCP", pool, LARGE), fault) as endpoint,
            served_source(pool, LARGE, endpoints=[endpoint]) as source,
            destination(into, LARGE, progress_timeout_s=PROGRESS_TIMEOUT_S) as landing,
        ):
            begin_s = time.monotonic()
            with pytest.raises(PeerLost, match="no byte"):
                await landing.pull(source.offer("t", TABLE, NUM_TOKENS), INTO, deadline_s=20)
            assert time.monotonic() - begin_s < PROGRESS_TIMEOUT_S + SLACK_S
            theirs = give_to_somebody_else(into)
            fault.may_go_on.set()
            await source.wait_released("t")
            assert into.buffer == theirs


# A source that is a process of its own: killed, frozen, restarted.


async def nothing_published(source: RemoteSource) -> None:
    await source.call("open", "t")


async def half_published(source: RemoteSource) -> None:
    await source.call("open", "t")
    await source.call("publish", "t", TABLE, NUM_TOKENS // 2)


@pytest.mark.parametrize("fault", ["kill", "freeze"])
@pytest.mark.parametrize("prepare", [nothing_published, half_published])
async def test_a_source_that_dies_or_freezes_is_lost_within_the_progress_timeout(
    transport_name: str, prepare: Callable[[RemoteSource], Awaitable[None]], fault: str
) -> None:
    with regions(LARGE, 1) as (into,):
        into.buffer[:] = bytes(into.nbytes)
        async with (
            remote_source() as source,
            destination(into, LARGE, backend=transport_name, progress_timeout_s=PROGRESS_TIMEOUT_S) as landing,
        ):
            await prepare(source)
            pulling = asyncio.create_task(landing.pull(source.ticket("t"), INTO, deadline_s=20))
            await eventually(landing.statistics)
            if prepare is half_published:
                await eventually(lambda: has_landed(into, LARGE, INTO[31]))
            begin_s = time.monotonic()
            if fault == "kill":
                await source.kill()
            else:
                source.freeze()
            with pytest.raises((PeerLost, TransferTimeout)):
                await pulling
            ping_s = 0.0 if fault == "kill" else PROGRESS_TIMEOUT_S / 4
            assert time.monotonic() - begin_s < ping_s + PROGRESS_TIMEOUT_S + SLACK_S
            theirs = give_to_somebody_else(into)
            if fault == "freeze":
                source.thaw()
                assert await source.call("ledger") is not None  # It runs again, and has sent what it wanted to send.
            assert into.buffer == theirs
            assert landing.statistics() == []


async def test_a_source_that_freezes_before_it_is_asked_is_lost_within_the_progress_timeout(
    transport_name: str,
) -> None:
    """The connection exists and everything is published: only the read itself can find out."""
    with regions(LARGE) as (pool, into):
        async with (
            remote_source() as source,
            destination(into, LARGE, backend=transport_name, progress_timeout_s=PROGRESS_TIMEOUT_S) as landing,
        ):
            await source.call("open", "first")
            await source.call("finish", "first", TABLE, NUM_TOKENS, 1)
            await pull_and_check(landing, into, pool, source.ticket("first"))
            source.freeze()
            begin_s = time.monotonic()
            with pytest.raises((PeerLost, TransferTimeout)):
                await landing.pull(source.ticket("second"), INTO, deadline_s=20)
            assert time.monotonic() - begin_s < 1.0 + PROGRESS_TIMEOUT_S + SLACK_S


async def test_a_restarted_source_is_reconnected_at_the_same_address(transport_name: str) -> None:
    with regions(LARGE) as (pool, into):
        async with destination(into, LARGE, backend=transport_name) as landing:
            async with remote_source() as source:
                await source.call("open", "t")
                await source.call("finish", "t", TABLE, NUM_TOKENS, 1)
                await pull_and_check(landing, into, pool, source.ticket("t"))
                old, port = source.ticket("t"), source.port
                await source.kill()
            into.buffer[:] = bytes(into.nbytes)
            async with remote_source(epoch=EPOCH + 1, port=port) as source:
                with pytest.raises(StaleEpoch):
                    await landing.pull(old, INTO, deadline_s=20)
                await source.call("open", "t")
                await source.call("finish", "t", TABLE, NUM_TOKENS, 1)
                await pull_and_check(landing, into, pool, source.ticket("t"))
                assert landing.statistics()[0].transfers_total == 2  # The first incarnation's is not forgotten.


async def test_an_idle_source_that_dies_is_let_go_of(transport_name: str) -> None:
    with regions(LARGE) as (pool, into):
        async with remote_source() as source, destination(into, LARGE, backend=transport_name) as landing:
            before = memory_of_others()
            await source.call("open", "t")
            await source.call("finish", "t", TABLE, NUM_TOKENS, 1)
            await pull_and_check(landing, into, pool, source.ticket("t"))
            assert len(landing.statistics()) == 1
            await source.kill()
            await eventually(lambda: not landing.statistics(), within_s=20)
            await eventually(
                lambda: memory_of_others() == before, within_s=20
            )  # Its memory is unmapped, its descriptor closed.


async def test_a_destination_that_vanishes_gives_the_blocks_back_at_once(transport_name: str) -> None:
    """It is the Follow call that breaks: no lease has to run out."""
    with regions(LARGE) as (pool, into):
        async with served_source(pool, LARGE) as source:
            source.source.open("t")
            async with destination(into, LARGE, backend=transport_name) as landing:
                pulling = asyncio.create_task(landing.pull(source.ticket("t"), INTO, deadline_s=20))
                await eventually(lambda: source.source.num_followers)
                pulling.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await pulling
            await source.wait_released("t")


async def test_a_source_that_is_back_is_used_at_once_however_often_it_was_missed(transport_name: str) -> None:
    """A channel that was refused waits longer and longer before it tries again; whoever comes back is not made to wait
    for that."""
    with regions(LARGE) as (pool, into):
        async with destination(into, LARGE, backend=transport_name) as landing:
            async with remote_source() as source:
                await source.call("open", "t")
                pulling = asyncio.create_task(landing.pull(source.ticket("t"), INTO, deadline_s=20))
                await eventually(landing.statistics)
                port = source.port
                await source.kill()
                with pytest.raises((PeerLost, TransferTimeout)):
                    await pulling
                for _ in range(8):
                    with pytest.raises((PeerLost, TransferTimeout)):
                        await landing.pull(source.ticket("t"), INTO, deadline_s=20)
            async with remote_source(epoch=EPOCH + 1, port=port) as source:
                await source.call("open", "t")
                await source.call("finish", "t", TABLE, NUM_TOKENS, 1)
                await pull_and_check(landing, into, pool, source.ticket("t"))


async def test_a_source_that_nobody_pulls_from_any_more_is_let_go_of(transport_name: str) -> None:
    with regions(LARGE) as (pool, into):
        async with (
            served_source(pool, LARGE) as source,
            destination(into, LARGE, backend=transport_name, idle_max_s=0.1) as landing,
        ):
            before = memory_of_others()
            await pull_and_check(landing, into, pool, source.offer("t", TABLE, NUM_TOKENS))
            await eventually(lambda: not landing.statistics() and memory_of_others() == before, within_s=20)
            await pull_and_check(landing, into, pool, source.offer("next", TABLE, NUM_TOKENS))


async def test_sources_are_kept_up_to_a_number(transport_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "PEERS_MAX", 1)
    with regions(LARGE) as (pool, into):
        async with (
            served_source(pool, LARGE) as first,
            served_source(pool, LARGE) as second,
            destination(into, LARGE, backend=transport_name) as landing,
        ):
            for number, source in enumerate([first, second, first]):
                await pull_and_check(landing, into, pool, source.offer(str(number), TABLE, NUM_TOKENS))
                assert len(landing.statistics()) == 1


# A backend that does not end what it began: the outcome is told, the blocks are not given back.


@pytest.mark.parametrize("share_max", [0.9, 0.25])
async def test_a_read_that_does_not_end_costs_its_blocks_for_a_while_and_nobody_s_time(share_max: float) -> None:
    with regions(LARGE) as (pool, into):
        stuck = StuckTransport(make_transport("SHM", into, LARGE))
        limits = QuarantineLimits(num_blocks=LARGE.num_blocks, share_max=share_max, stuck_after_s=0.3)
        async with (
            served_source(pool, LARGE) as source,
            destination(into, LARGE, transports=[stuck], limits=limits) as landing,
        ):
            pending = landing.start(source.offer("t", TABLE, NUM_TOKENS), INTO, deadline_s=20)
            await eventually(lambda: stuck.links and stuck.links[0].is_reading.is_set())
            assert landing.cancel("t") is CancelResult.REQUESTED_IN_FLIGHT
            with pytest.raises(RequestCancelled):
                await pending.outcome()
            await source.wait_released("t")  # Nobody waits for the backend, not the source either.
            assert landing.quarantine().num_blocks == len(INTO)
            assert bool(landing.quarantine().unhealthy) is (share_max < len(INTO) / LARGE.num_blocks)
            await eventually(lambda: "has not ended" in landing.quarantine().unhealthy)
            await eventually(lambda: not landing.statistics())  # Nobody reads through that link again.
            stuck.may_return.set()
            await pending.quiet()
            theirs = give_to_somebody_else(into)
            await pending.ended()
            assert landing.quarantine() == Quarantine(num_blocks=0, num_transfers=0, oldest_s=0.0, unhealthy="")
            assert landing.cancel("t") is CancelResult.NOT_FOUND
            assert into.buffer == theirs
            await pull_and_check(landing, into, pool, source.offer("next", TABLE, NUM_TOKENS))
