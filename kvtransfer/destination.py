"""Where transfers land: pulls published blocks into our own pool, and keeps one connection to each source.

Only this process writes into this pool, and only through `pull`. When `pull` has returned, raised or been cancelled, no
byte of it can land any more: the blocks are its caller's again, to use or to give back.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Final

from disaggregated import logs
from disaggregated.errors import PeerLost, StaleEpoch, TransferError, TransferTimeout
from disaggregated.kv_layout import KVLayout
from kvtransfer import negotiate
from kvtransfer.deadline import Deadline
from kvtransfer.landing import Lander, PublishedBlocks
from kvtransfer.machine import DestinationTransfer
from kvtransfer.peer import Destination, PeerStatistics, SourcePeer, Ticket, close_peer, connect
from kvtransfer.pull import Landed, Pull
from kvtransfer.region import Region
from kvtransfer.shm import ShmTransport
from kvtransfer.tcp import TcpTransport
from kvtransfer.transport import DestinationTransport

log = logs.get(__name__)

PART_BYTES: Final = 16 << 20
"""In flight of one transfer, unless `max_tokens_in_buffer` says otherwise."""
READERS_MAX: Final = 16
"""Threads. A read beyond waits for one, within its deadline; a dead source holds one for the progress timeout."""


class TransferDestination:
    """Pulls into `region`. Lives on one event loop.

    Invariant: `_peers` holds one incarnation of a source an address; a forgotten one is closed by its last pull.
    """

    def __init__(
        self,
        region: Region,
        layout: KVLayout,
        *,
        fingerprint: str,
        instance_id: str,
        epoch: int,
        backend: str = negotiate.DEFAULT,
        max_tokens_in_buffer: int | None = None,
        transports: Sequence[DestinationTransport] | None = None,
    ) -> None:
        """`transports` replaces the built-in ones. Raises ConfigError when `backend` cannot be honoured."""
        negotiate.check_backend(backend)
        self._pool = region.buffer
        self._us = Destination(
            instance_id=instance_id, epoch=epoch, fingerprint=fingerprint, layout=layout, backend=backend
        )
        if transports is None:
            transports = (
                ShmTransport(region, layout, peer_id=instance_id),
                TcpTransport(region, layout, peer_id=instance_id),
            )
        usable = negotiate.speakable(backend)
        self._transports = {transport.name: transport for transport in transports if transport.name in usable}
        self._part_bytes = PART_BYTES if max_tokens_in_buffer is None else max_tokens_in_buffer * layout.token_bytes
        self._peers: dict[str, SourcePeer] = {}
        self._connecting: dict[str, asyncio.Lock] = {}
        self._executor = concurrent.futures.ThreadPoolExecutor(READERS_MAX, thread_name_prefix="kv-pull")
        self._closed = False

    async def pull(
        self,
        ticket: Ticket,
        into: Sequence[int],
        *,
        deadline_s: float,
        skip_blocks: int = 0,
        overlap: bool = True,
    ) -> Landed:
        """Bring the KV of a prompt here, chunk by chunk while it is computed there.

        `into` is our whole block table: block i of the prompt lands in `into[i]`, for i from `skip_blocks` on; the ones
        before are here already and are not touched. `into` may be longer than the prompt. The blocks must be the
        caller's alone until this returns or raises, and can be used or given back at once then.

        Raises:
            LayoutMismatch, FingerprintMismatch: refused; nothing was read.
            StaleEpoch: the source of this ticket is no more.
            PeerLost, LeaseExpired, ChecksumMismatch, SourceFailed, TransferError: it did not land.
            TransferTimeout: it did not land within `deadline_s`.
        """
        assert len(set(into)) == len(into), "a block is to be filled twice"
        assert 0 <= skip_blocks <= len(into), f"{skip_blocks} blocks of {len(into)} are here"
        deadline = Deadline.after(deadline_s)
        try:
            async with asyncio.timeout(deadline.left_s()):
                peer = await self._connected(ticket, deadline)
        except TimeoutError as error:
            raise TransferTimeout(f"{ticket.address} was not connected within {deadline_s} s") from error
        async with self._keeping(peer):
            published = PublishedBlocks(
                epoch=ticket.epoch, source_layout=peer.identity.layout, into=into, skip_blocks=skip_blocks
            )
            lander = Lander(link=peer.link, pool=self._pool, layout=self._us.layout, part_bytes=self._part_bytes)
            transfer = DestinationTransfer(ticket.transfer_id)
            pull = Pull(peer, transfer, published, lander, self._executor, deadline=deadline, overlap=overlap)
            try:
                async with asyncio.timeout(deadline.left_s()):
                    landed = await pull.run()
            except TimeoutError as error:
                raise TransferTimeout(
                    f"{ticket.transfer_id} from {ticket.instance_id} did not land within {deadline_s} s; "
                    f"story={transfer.story}"
                ) from error
            self._count(peer, landed)
            return landed

    def statistics(self) -> list[PeerStatistics]:
        """One for each source that we are connected to, with the transport that is really in use, and why."""
        return [peer.statistics for peer in self._peers.values()]

    async def close(self) -> None:
        """Close every connection and thread. The caller has ended its pulls. Idempotent."""
        if self._closed:
            return
        self._closed = True
        peers, self._peers = list(self._peers.values()), {}
        for peer in peers:
            assert peer.num_pulls == 0, f"{peer.num_pulls} pulls from {peer.identity.instance_id} are running"
            await close_peer(peer)
        await asyncio.to_thread(self._executor.shutdown)

    @contextlib.asynccontextmanager
    async def _keeping(self, peer: SourcePeer) -> AsyncIterator[None]:
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
            if peer.is_forgotten and peer.num_pulls == 0:
                await close_peer(peer)

    async def _connected(self, ticket: Ticket, deadline: Deadline) -> SourcePeer:
        assert not self._closed, "a pull after close"
        async with self._connecting.setdefault(ticket.address, asyncio.Lock()):
            peer = self._peers.get(ticket.address)
            if peer is not None:
                known = (peer.identity.instance_id, peer.identity.epoch)
                if known == (ticket.instance_id, ticket.epoch):
                    return peer
                if known[0] == ticket.instance_id and known[1] > ticket.epoch:
                    raise StaleEpoch(f"{known[0]} is epoch {known[1]} by now, the ticket is for {ticket.epoch}")
                self._forget(peer)
                if peer.num_pulls == 0:
                    await close_peer(peer)
            peer = await connect(ticket, self._us, self._transports, self._executor, deadline=deadline)
            self._peers[ticket.address] = peer
            return peer

    def _forget(self, peer: SourcePeer) -> None:
        """The next pull connects anew; this one is closed by whoever leaves it last."""
        peer.is_forgotten = True
        if self._peers.get(peer.address) is peer:
            del self._peers[peer.address]

    def _count(self, peer: SourcePeer, landed: Landed) -> None:
        counters = peer.statistics
        counters.transfers_total += 1
        counters.bytes_total += landed.num_bytes
        counters.seconds_total += landed.transfer_s
