"""The sources that a destination is connected to: one incarnation an address, and none that is known to be dead."""

from __future__ import annotations

import asyncio
import contextlib
import time
import weakref
from collections.abc import AsyncIterator
from typing import Final

import grpc

from disaggregated import logs
from disaggregated.errors import PeerLost, StaleEpoch, TransferError, TransferTimeout
from disaggregated.v1 import kv_pb2
from kvtransfer.deadline import Deadline
from kvtransfer.destination.connect import connect
from kvtransfer.destination.options import IDLE_MAX_S
from kvtransfer.destination.peer import (
    FailPull,
    Into,
    PeerStatistics,
    SourcePeer,
    Ticket,
    close_peer,
    source_errors,
)
from kvtransfer.destination.readers import FairReaders
from kvtransfer.off_loop import cancelled_to_the_end
from kvtransfer.pool_identity import PoolIdentity

log = logs.get(__name__)

_LOST: Final[frozenset[grpc.ChannelConnectivity]] = frozenset(
    {grpc.ChannelConnectivity.IDLE, grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN}
)

PEERS_MAX: Final = 256
"""Connected at once, but for those that are pulled from."""
PINGS_IN_TIMEOUT: Final = 4
LOST_REMEMBERED: Final = 64
"""Sources that are not connected and whose totals are kept, should they come back."""


class SourcePeers:
    """Lives on one event loop; the pulls of one destination share it.

    Invariants: `_current` holds at most one peer an address; every peer that is not closed is in `_open`; a forgotten
    one is closed by the last pull that leaves it.
    """

    def __init__(
        self,
        us: PoolIdentity,
        ours: Into,
        readers: FairReaders,
        *,
        progress_timeout_s: float,
        idle_max_s: float = IDLE_MAX_S,
    ) -> None:
        self._progress_timeout_s = progress_timeout_s
        self._idle_max_s = idle_max_s
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
            await self._make_room()
            peer = await connect(ticket, self._us, self._ours, self._readers.of(ticket.address), deadline=deadline)
            self._count_on(peer)
            self._current[ticket.address] = peer
            self._open.append(peer)
            watcher = asyncio.create_task(self._watch(peer), name=f"kv-watch-{peer.identity.instance_id}")
            self._watchers.add(watcher)
            watcher.add_done_callback(self._watchers.discard)
            return peer

    @contextlib.asynccontextmanager
    async def keeping(self, peer: SourcePeer, fail: FailPull) -> AsyncIterator[None]:
        """`peer` stays open while inside, whatever becomes of it; `fail` is called when it is found to be lost."""
        peer.pulls.add(fail)
        peer.used_s = time.monotonic()
        if peer.pulse is None:
            peer.pulse = asyncio.create_task(self._feel(peer), name=f"kv-pulse-{peer.identity.instance_id}")
        try:
            yield
        finally:
            peer.pulls.discard(fail)
            peer.used_s = time.monotonic()
            try:
                if not peer.pulls and (pulse := peer.pulse) is not None:
                    peer.pulse = None
                    await cancelled_to_the_end(pulse)
            finally:
                if peer.is_forgotten:
                    await self._close_unused(peer)

    def failed(self, peer: SourcePeer, error: TransferError) -> None:
        """A pull from it failed, and by its own fault: it is not used again when it was too slow, or is another."""
        peer.statistics.failures_total += 1
        if isinstance(error, PeerLost | TransferTimeout | StaleEpoch):
            self._forget(peer)

    async def close(self) -> None:
        """Close every connection. The caller has ended its pulls."""
        for watcher in tuple(self._watchers):
            await cancelled_to_the_end(watcher)
        self._current.clear()
        while self._open:
            peer = self._open[-1]
            assert not peer.pulls, f"{len(peer.pulls)} pulls from {peer.identity.instance_id} are running"
            await self._close_unused(peer)

    async def _feel(self, peer: SourcePeer) -> None:
        """A process that was stopped or frozen keeps its sockets: only an answer that does not come tells."""
        request = kv_pb2.PingRequest(epoch=peer.identity.epoch)
        while True:
            await asyncio.sleep(self._progress_timeout_s / PINGS_IN_TIMEOUT)
            try:
                with source_errors(peer.address):
                    await peer.stub.Ping(request, timeout=self._progress_timeout_s)
            except TransferError as error:
                lost = error if isinstance(error, PeerLost | StaleEpoch) else _silent(peer, self._progress_timeout_s)
                log.info("kv_source_lost", source=peer.identity.instance_id, reason=str(lost))
                self._forget(peer)
                for fail in tuple(peer.pulls):
                    fail(lost)
                return

    async def _watch(self, peer: SourcePeer) -> None:
        """A source that dies while idle, or is not used for long, is let go of: its memory is unmapped.

        The next pull connects anew. That a process died shows at its end of the connection, even if nobody ever pulls
        from it again.
        """
        reason = ""
        while not reason and not peer.is_forgotten:
            seen = peer.channel.get_state()
            if seen in _LOST:
                reason = f"its control connection is {seen.name}"
            elif not peer.pulls and time.monotonic() - peer.used_s >= self._idle_max_s:
                reason = f"not used for {self._idle_max_s:g} s"
            else:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._idle_max_s):
                        await peer.channel.wait_for_state_change(seen)
        if not peer.is_forgotten:
            log.info("kv_source_let_go", source=peer.identity.instance_id, reason=reason)
            self._forget(peer)
        await self._close_unused(peer)

    async def _make_room(self) -> None:
        """Sources come and go; connections to those that nobody pulls from are kept up to a number."""
        idle = sorted((peer for peer in self._current.values() if not peer.pulls), key=lambda peer: peer.used_s)
        for peer in idle[: max(0, len(self._current) - PEERS_MAX + 1)]:
            log.info("kv_source_let_go", source=peer.identity.instance_id, reason=f"more than {PEERS_MAX} are known")
            self._forget(peer)
            await self._close_unused(peer)

    def shun(self, address: str, reason: str) -> None:
        """A read from there does not end: nobody reads through those connections again."""
        if (peer := self._current.get(address)) is not None:
            log.warning("kv_source_shunned", source=peer.identity.instance_id, reason=reason)
            self._forget(peer)

    def _count_on(self, peer: SourcePeer) -> None:
        """A source that is connected again goes on counting where it was: totals never fall."""
        name = peer.identity.instance_id
        if (known := self._lost.pop(name, None)) is not None:
            known.reconnected(peer.statistics)
            peer.statistics = known

    def _forget(self, peer: SourcePeer) -> None:
        if peer.is_forgotten:
            return
        peer.is_forgotten = True
        self._lost[peer.identity.instance_id] = peer.statistics
        while len(self._lost) > LOST_REMEMBERED:
            del self._lost[next(iter(self._lost))]
        if self._current.get(peer.address) is peer:
            del self._current[peer.address]

    async def _close_unused(self, peer: SourcePeer) -> None:
        """Closing twice is harmless: whoever comes second finds it done."""
        if peer.pulls:
            return
        try:
            await close_peer(peer)
        except TransferError as error:
            log.warning("kv_link_not_closed", source=peer.identity.instance_id, reason=str(error))
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


def _silent(peer: SourcePeer, timeout_s: float) -> PeerLost:
    return PeerLost(f"{peer.identity.instance_id} has not answered for {timeout_s:g} s")
