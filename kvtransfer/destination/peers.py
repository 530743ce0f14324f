"""The sources that a destination is connected to: one incarnation an address, and none that is known to be dead."""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import AsyncIterator
from typing import Final

import grpc

from disaggregated import logs
from disaggregated.errors import PeerLost, StaleEpoch, TransferError, TransferTimeout
from kvtransfer.deadline import Deadline
from kvtransfer.destination.peer import Destination, Into, PeerStatistics, SourcePeer, Ticket, close_peer, connect
from kvtransfer.destination.readers import FairReaders

log = logs.get(__name__)

_LOST: Final[frozenset[grpc.ChannelConnectivity]] = frozenset(
    {grpc.ChannelConnectivity.IDLE, grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN}
)

LOST_REMEMBERED: Final = 64
"""Sources that are not connected and whose totals are kept, should they come back."""


class SourcePeers:
    """Lives on one event loop; the pulls of one destination share it.

    Invariants: `_current` holds at most one peer an address; every peer that is not closed is in `_open`; a forgotten
    one is closed by the last pull that leaves it.
    """

    def __init__(
        self,
        us: Destination,
        ours: Into,
        readers: FairReaders,
    ) -> None:
        self._us = us
        self._ours = ours
        self._readers = readers
        self._current: dict[str, SourcePeer] = {}
        self._open: list[SourcePeer] = []
        self._lost: dict[str, PeerStatistics] = {}
        self._connecting: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        self._watchers: set[asyncio.Task[None]] = set()

    @property
    def transports(self) -> tuple[str, ...]:
        return self._ours.pool.names

    def statistics(self) -> list[PeerStatistics]:
        return [peer.statistics for peer in self._current.values()]

    async def connected(self, ticket: Ticket, *, deadline: Deadline) -> SourcePeer:
        """The source of `ticket`: the one we know, or a new connection. Raises what `connect` raises."""
        async with self._connecting.setdefault(ticket.address, asyncio.Lock()):
            peer = self._current.get(ticket.address)
            if peer is not None and _is_meant(peer, ticket):
                return peer
            if peer is not None:
                self._forget(peer)
                await self._close_unused(peer)
            peer = await connect(ticket, self._us, self._ours, self._readers.of(ticket.address), deadline=deadline)
            self._count_on(peer)
            self._current[ticket.address] = peer
            self._open.append(peer)
            watcher = asyncio.create_task(self._watch(peer), name=f"kv-watch-{peer.identity.instance_id}")
            self._watchers.add(watcher)
            watcher.add_done_callback(self._watchers.discard)
            return peer

    @contextlib.asynccontextmanager
    async def keeping(self, peer: SourcePeer) -> AsyncIterator[None]:
        """`peer` stays open while inside, whatever becomes of it. One that failed us is not used again."""
        peer.num_pulls += 1
        try:
            yield
        except TransferError as error:
            peer.statistics.failures_total += 1
            if isinstance(error, PeerLost | TransferTimeout | StaleEpoch):
                self._forget(peer)
            raise
        finally:
            peer.num_pulls -= 1
            if peer.is_forgotten:
                await self._close_unused(peer)

    async def close(self) -> None:
        """Close every connection. The caller has ended its pulls."""
        for watcher in tuple(self._watchers):
            watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watcher
        self._current.clear()
        while self._open:
            peer = self._open[-1]
            assert peer.num_pulls == 0, f"{peer.num_pulls} pulls from {peer.identity.instance_id} are running"
            await self._close_unused(peer)

    async def _watch(self, peer: SourcePeer) -> None:
        """A source that dies while idle is let go of: its memory is unmapped, and the next pull connects anew."""
        while (seen := peer.channel.get_state()) not in _LOST:
            await peer.channel.wait_for_state_change(seen)
        if not peer.is_forgotten:
            log.info("kv_source_lost", source=peer.identity.instance_id, channel=seen.name)
            self._forget(peer)
        await self._close_unused(peer)

    def _count_on(self, peer: SourcePeer) -> None:
        """A source that is connected again goes on counting where it was: totals never fall."""
        name = peer.identity.instance_id
        if (known := self._lost.pop(name, None)) is not None:
            known.reconnected(peer.statistics)
            peer.statistics = known

    def _forget(self, peer: SourcePeer) -> None:
        peer.is_forgotten = True
        self._lost[peer.identity.instance_id] = peer.statistics
        while len(self._lost) > LOST_REMEMBERED:
            del self._lost[next(iter(self._lost))]
        if self._current.get(peer.address) is peer:
            del self._current[peer.address]

    async def _close_unused(self, peer: SourcePeer) -> None:
        """Closing twice is harmless: whoever comes second finds it done."""
        if peer.num_pulls == 0:
            await close_peer(peer)
            if peer in self._open:
                self._open.remove(peer)


def _is_meant(peer: SourcePeer, ticket: Ticket) -> bool:
    """False when this peer has to make way for a newer one. Raises StaleEpoch when the ticket is the older one."""
    known = peer.identity
    if known.instance_id != ticket.instance_id:
        return False
    if known.epoch > ticket.epoch:
        raise StaleEpoch(f"{known.instance_id} is epoch {known.epoch} by now, the ticket is for {ticket.epoch}")
    return known.epoch == ticket.epoch
