"""Where transfers land: pulls published blocks into our own pool, and keeps one connection to each source.

Only this process writes into this pool, and only through `pull`. When `pull` has returned, raised or been cancelled, no
byte of it can land any more: the blocks are its caller's again, to use or to give back.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Sequence
from typing import Final

from disaggregated.errors import LeaseExpired, PeerLost, SourceFailed, StaleEpoch, TransferTimeout
from disaggregated.kv_layout import KVLayout
from kvtransfer.deadline import Deadline
from kvtransfer.destination.farewell import Farewells
from kvtransfer.destination.landing import Lander
from kvtransfer.destination.our_transports import OurTransports
from kvtransfer.destination.peer import Destination, PeerStatistics, SourcePeer, Ticket
from kvtransfer.destination.peers import SourcePeers
from kvtransfer.destination.published import PublishedBlocks
from kvtransfer.destination.pull import Landed, Pull
from kvtransfer.machine import DestinationTransfer
from kvtransfer.negotiate import Preference
from kvtransfer.region import Region
from kvtransfer.staging import DeviceCopier, InPlace, Staged, StagingBlocks
from kvtransfer.transport import PROGRESS_TIMEOUT_S, DestinationTransport, OurEnd

PART_BYTES: Final = 16 << 20
"""In flight of one transfer, unless `max_tokens_in_buffer` says otherwise."""
SOURCE_KNOWS: Final = (PeerLost, StaleEpoch, LeaseExpired, SourceFailed)
"""Errors after which there is nobody to tell that we gave up, or who told us so."""
READERS_MAX: Final = 16
"""Threads. A read beyond waits for one, within its deadline; a dead source holds one for the progress timeout."""


class TransferDestination:
    """Pulls into `region`. Lives on one event loop."""

    def __init__(
        self,
        region: Region,
        layout: KVLayout,
        *,
        fingerprint: str,
        instance_id: str,
        epoch: int,
        device: str = "cpu",
        preference: Preference = Preference(),
        max_tokens_in_buffer: int | None = None,
        progress_timeout_s: float = PROGRESS_TIMEOUT_S,
        transports: Sequence[DestinationTransport] | None = None,
        copier: DeviceCopier | None = None,
    ) -> None:
        """A source that moves no byte and answers nothing for `progress_timeout_s` is lost. `transports` replaces ours.

        With a `copier`, region and layout are of a staging region, and pull() fills blocks of the device's pool.

        Raises ConfigError when `preference` cannot be honoured.
        """
        self._pool = region.buffer
        self._layout = layout
        us = Destination(instance_id=instance_id, epoch=epoch, fingerprint=fingerprint, layout=layout, device=device)
        ours = OurEnd(region=region, layout=layout, peer_id=instance_id, progress_timeout_s=progress_timeout_s)
        ours_by_name = OurTransports(ours, preference, given=transports or ())
        self._progress_timeout_s = progress_timeout_s
        self._part_bytes = PART_BYTES if max_tokens_in_buffer is None else max_tokens_in_buffer * layout.token_bytes
        self._executor = concurrent.futures.ThreadPoolExecutor(READERS_MAX, thread_name_prefix="kv-pull")
        self._peers = SourcePeers(us, ours_by_name, self._executor)
        self._place = InPlace() if copier is None else Staged(StagingBlocks(layout.num_blocks), copier)
        self._farewells = Farewells(instance_id)
        self._closed = False

    async def pull(
        self,
        ticket: Ticket,
        into: Sequence[int],
        *,
        deadline_s: float,
        skip_blocks: int = 0,
        overlap: bool = True,
        block_hashes: bytes = b"",
    ) -> Landed:
        """Bring the KV of a prompt here, chunk by chunk while it is computed there.

        `into` is our whole block table: block i of the prompt lands in `into[i]`, for i from `skip_blocks` on; the ones
        before are here already and are not touched. `into` may be longer than the prompt. The blocks must be the
        caller's alone until this returns or raises, and can be used or given back at once then.

        `block_hashes` asks for content instead of a prompt that is computed there: what the source holds of these
        blocks, from the first on, lands in `into`; how many that are, `num_tokens` of the result tells, maybe 0.

        Raises:
            LayoutMismatch, FingerprintMismatch: refused; nothing was read.
            StaleEpoch: the source of this ticket is no more.
            PeerLost, LeaseExpired, ChecksumMismatch, SourceFailed, TransferError: it did not land.
            TransferTimeout: it did not land within `deadline_s`.
        """
        assert not self._closed, "a pull after close"
        try:
            return await self._pull(
                ticket,
                into,
                deadline_s=deadline_s,
                skip_blocks=skip_blocks,
                overlap=overlap,
                block_hashes=block_hashes,
            )
        except SOURCE_KNOWS:
            raise
        except BaseException as error:
            self.decline(ticket, error)
            raise

    def decline(self, ticket: Ticket, why: BaseException | None = None) -> None:
        """We shall not pull this one: its source is told, soon, and need not wait for its lease to run out.

        A prefill that still runs for it fails with `why`, so that everybody who asked is told the same.
        """
        if not self._closed:
            self._farewells.say(ticket, why)

    async def _pull(
        self,
        ticket: Ticket,
        into: Sequence[int],
        *,
        deadline_s: float,
        skip_blocks: int,
        overlap: bool,
        block_hashes: bytes,
    ) -> Landed:
        assert len(set(into)) == len(into), "a block is to be filled twice"
        assert 0 <= skip_blocks <= len(into), f"{skip_blocks} blocks of {len(into)} are here"
        deadline = Deadline.after(deadline_s)
        try:
            async with asyncio.timeout(deadline_s):
                peer = await self._peers.connected(ticket, deadline=deadline)
        except TimeoutError as error:
            raise TransferTimeout(f"{ticket.address} was not connected within {deadline_s} s") from error
        async with self._peers.keeping(peer):
            published = PublishedBlocks(
                epoch=ticket.epoch, source_layout=peer.identity.layout, into=into, skip_blocks=skip_blocks
            )
            transfer = DestinationTransfer(ticket.transfer_id)
            pull = self._make_pull(peer, transfer, published, deadline, overlap=overlap, block_hashes=block_hashes)
            try:
                async with asyncio.timeout(deadline.left_s()):
                    landed = await pull.run()
            except TimeoutError as error:
                late = f"{ticket.transfer_id} from {ticket.instance_id} did not land within {deadline_s} s"
                raise TransferTimeout(f"{late}; story={transfer.story}") from error
            self._count(peer, landed)
            return landed

    @property
    def transports(self) -> tuple[str, ...]:
        """That this process can read with, best first."""
        return self._peers.transports

    def statistics(self) -> list[PeerStatistics]:
        """One for each source that we are connected to, with the transport that is really in use, and why."""
        return self._peers.statistics()

    async def close(self) -> None:
        """Close every connection and thread. The caller has ended its pulls. Idempotent."""
        if self._closed:
            return
        self._closed = True
        await self._farewells.close()
        await self._peers.close()
        await asyncio.to_thread(self._executor.shutdown)

    def _make_pull(
        self,
        peer: SourcePeer,
        transfer: DestinationTransfer,
        published: PublishedBlocks,
        deadline: Deadline,
        *,
        overlap: bool,
        block_hashes: bytes,
    ) -> Pull:
        lander = Lander(
            link=peer.link, pool=self._pool, layout=self._layout, part_bytes=self._part_bytes, place=self._place
        )
        return Pull(
            peer,
            transfer,
            published,
            lander,
            self._executor,
            deadline=deadline,
            progress_timeout_s=self._progress_timeout_s,
            overlap=overlap,
            block_hashes=block_hashes,
        )

    def _count(self, peer: SourcePeer, landed: Landed) -> None:
        peer.statistics.landed(num_bytes=landed.num_bytes, seconds=landed.transfer_s, read=peer.link.statistics())
