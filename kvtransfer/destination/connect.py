"""How a destination comes to know a source: who it is, what its pool holds, and which transport both can use."""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Sequence
from typing import Final

import grpc

from disaggregated import logs, rpc
from disaggregated.errors import (
    LayoutMismatch,
    StaleEpoch,
    TransferError,
)
from disaggregated.kv_layout import KVLayout
from disaggregated.kv_shard import KVHolding
from disaggregated.v1 import kv_pb2, kv_pb2_grpc
from kvtransfer import negotiate
from kvtransfer.conversion.planner import refusal
from kvtransfer.deadline import Deadline
from kvtransfer.destination.our_transports import OurTransports
from kvtransfer.destination.peer import Into, PeerStatistics, SourcePeer, Ticket, source_errors
from kvtransfer.off_loop import run_to_end
from kvtransfer.pool_identity import PoolIdentity
from kvtransfer.transport import Offer, PeerLink, SourceIdentity
from kvtransfer.transports.unix_port import host_key

log = logs.get(__name__)

CONNECT_TIMEOUT_S: Final = 5.0
"""For the source's answer; the other pulls from the same address wait meanwhile."""
LEASE_MAX_S: Final = 86_400.0


async def connect(
    ticket: Ticket,
    us: PoolIdentity,
    ours: Into,
    executor: concurrent.futures.Executor,
    *,
    deadline: Deadline,
) -> SourcePeer:
    """Agree with the source of `ticket` on layout, model and transport.

    Raises:
        LayoutMismatch, FingerprintMismatch: the two pools cannot exchange blocks.
        StaleEpoch: another incarnation, or another instance, answers at this address.
        PeerLost, TransferTimeout: nobody answers.
        TransferError: no transport works; names each with its reason.
    """
    channel = rpc.open_channel(ticket.address)
    try:
        call = _Call(
            channel=channel,
            stub=kv_pb2_grpc.KVSourceStub(channel),
            ticket=ticket,
            us=us,
            ours=ours,
            executor=executor,
            deadline=deadline,
        )
        peer = await _by_the_best_way(call)
    except BaseException:
        await channel.close()
        raise
    log.info(
        "kv_source_connected",
        source=peer.identity.instance_id,
        transport=peer.statistics.transport,
        devices=peer.statistics.devices,
        converted=f"{peer.holding.describe()} -> {us.holding.describe()}" if peer.staging else "",
        why=peer.statistics.why,
    )
    return peer


async def _by_the_best_way(call: _Call) -> SourcePeer:
    """From device to device where that can be, or else by the memory of hosts."""
    peer, failed = None, ""
    if call.ours.device is not None:
        peer, failed = await _connect_device(call, call.ours.device)
    if peer is None:
        peer = await _link_up(await _introduce(call, call.ours.pool.names), call)
    if failed:
        peer.statistics.why = f"{peer.statistics.why}; {failed}"
        peer.statistics.fallbacks += 1
    return peer


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """One `connect`."""

    channel: grpc.aio.Channel
    stub: kv_pb2_grpc.KVSourceAsyncStub
    ticket: Ticket
    us: PoolIdentity
    ours: Into
    executor: concurrent.futures.Executor
    deadline: Deadline


async def _connect_device(call: _Call, ours: OurTransports) -> tuple[SourcePeer | None, str]:
    """From pool to pool of a device. None where the source has no such pool for us, or, with the reason, where its
    memory cannot be opened: a GPU that ours cannot read, a container that hides it. By host memory it goes all the
    same."""
    reply = await _introduce(call, ours.names, opens_device_memory=True)
    if not reply.in_device_memory:
        return None, ""
    try:
        return await _link_up(reply, call), ""
    except (StaleEpoch, LayoutMismatch):
        raise
    except TransferError as error:
        way = "SHM from device to device"
        log.warning("kv_transport_fell_back", source=reply.instance_id, failed=way, reason=str(error))
        return None, f"from device to device failed: {error}"


async def _link_up(reply: kv_pb2.ConnectReply, call: _Call) -> SourcePeer:
    us, ours = call.us, call.ours
    identity = SourceIdentity(
        instance_id=reply.instance_id, epoch=reply.epoch, layout=KVLayout.from_proto(reply.layout)
    )
    holding = KVHolding.from_proto(reply.layout, reply.shard if reply.HasField("shard") else None)
    _check(identity, holding, call.ticket, us.holding)
    if not 0.0 < reply.lease_s <= LEASE_MAX_S:  # Also when it is no number at all.
        raise TransferError(f"{reply.instance_id} leases blocks for {reply.lease_s} s")
    staging = ours.foreign.staging_for(holding)
    transports = staging.transports if staging else ours.pool
    if reply.in_device_memory:
        if ours.device is None or staging is not None:
            raise TransferError(f"{reply.instance_id} offers a device's memory, which we cannot read as it is")
        transports = ours.device
    offers = [_to_offer(offer, call.ticket.address) for offer in reply.offers]
    ways = negotiate.candidates(transports.preference, offers, our_host_key=host_key())
    link, statistics = await _first_that_connects(ways, identity, transports, call.executor, call.deadline)
    statistics.devices = _devices(reply.device or "cpu", us.device, is_direct=reply.in_device_memory)
    return SourcePeer(
        address=call.ticket.address,
        our_id=us.instance_id,
        identity=identity,
        holding=holding,
        staging=staging,
        lease_s=reply.lease_s,
        channel=call.channel,
        stub=call.stub,
        link=link,
        statistics=statistics,
        in_device_memory=reply.in_device_memory,
    )


def _devices(theirs: str, ours: str, *, is_direct: bool) -> str:
    """What lies between two devices is told, too: it is where most of the time goes."""
    is_staged = not is_direct and "cpu" not in (theirs, ours)
    return f"{theirs} -> host -> {ours}" if is_staged else f"{theirs} -> {ours}"


async def _introduce(
    call: _Call, transports: Sequence[str], *, opens_device_memory: bool = False
) -> kv_pb2.ConnectReply:
    us = call.us
    request = kv_pb2.ConnectRequest(
        peer_id=us.instance_id,
        peer_epoch=us.epoch,
        fingerprint=us.fingerprint,
        layout=us.holding.layout.to_proto(),
        shard=us.holding.shard.to_proto(),
        transports=transports,
        host_key=host_key(),
        opens_device_memory=opens_device_memory,
    )
    with source_errors(call.ticket.address):
        return await call.stub.Connect(request, timeout=call.deadline.no_later_than(CONNECT_TIMEOUT_S).left_s())


def _check(identity: SourceIdentity, holding: KVHolding, ticket: Ticket, ours: KVHolding) -> None:
    if (identity.instance_id, identity.epoch) != (ticket.instance_id, ticket.epoch):
        raise StaleEpoch(
            f"{ticket.address} is {identity.instance_id} epoch {identity.epoch}, "
            f"the ticket is for {ticket.instance_id} epoch {ticket.epoch}"
        )
    if reason := refusal(holding, ours):
        raise LayoutMismatch(f"destination here, source {identity.instance_id} there: {reason}")


def _to_offer(offer: kv_pb2.TransportOffer, reached_by: str) -> Offer:
    """A source that listens on every address names none: it is where we reached its control channel."""
    host = reached_by.rpartition(":")[0].strip("[]") if offer.address.startswith(":") else ""
    return Offer(name=offer.name, address=host + offer.address, host_key=offer.host_key)


async def _first_that_connects(
    ways: Sequence[negotiate.Candidate],
    identity: SourceIdentity,
    transports: OurTransports,
    executor: concurrent.futures.Executor,
    deadline: Deadline,
) -> tuple[PeerLink, PeerStatistics]:
    """Falls to the next way only when there is one, and never without a word."""
    failed: list[str] = []
    for number, way in enumerate(ways):
        name = way.offer.name
        try:
            link = await _open_link(transports, way.offer, identity, executor, deadline)
        except TransferError as error:
            failed.append(f"{name} failed: {error}")
            if number + 1 == len(ways):
                raise TransferError(f"no transport to {identity.instance_id}: {'; '.join(failed)}") from error
            log.warning("kv_transport_fell_back", source=identity.instance_id, failed=name, reason=str(error))
            continue
        why = "; ".join([way.why, *failed])
        return link, PeerStatistics(identity.instance_id, transport=name, why=why, fallbacks=len(failed))
    raise AssertionError("negotiation left no way to try")


async def _open_link(
    transports: OurTransports,
    offer: Offer,
    identity: SourceIdentity,
    executor: concurrent.futures.Executor,
    deadline: Deadline,
) -> PeerLink:
    """On a thread, which its own deadlines end: a library may have to be loaded first. A link that was made for a
    caller who has gone is closed."""
    made: list[PeerLink] = []

    def dial() -> None:
        made.append(transports.get(offer.name).connect(offer, identity, deadline=deadline))

    try:
        await run_to_end(executor, dial, stop=lambda: None)
    except BaseException:
        for link in made:
            link.close(deadline=Deadline.after(1.0))  # At once: nothing reads through it.
        raise
    return made[0]
