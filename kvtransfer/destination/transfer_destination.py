"""Where transfers land: pulls published blocks into our own pool, and keeps one connection to each source.

Only this process writes into this pool, and only through `pull`. When `pull` has returned, raised or been cancelled, no
byte of it can land any more: the blocks are its caller's again, to use or to give back.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Sequence
from typing import Final, Required, TypedDict, Unpack

from disaggregated.errors import LeaseExpired, PeerLost, SourceFailed, StaleEpoch, TransferError, TransferTimeout
from kvtransfer.deadline import Deadline
from kvtransfer.destination import joint
from kvtransfer.destination.farewell import Farewells
from kvtransfer.destination.foreign import ForeignPools
from kvtransfer.destination.in_flight import InFlight
from kvtransfer.destination.joint import OurShare, Part
from kvtransfer.destination.landed import Landed
from kvtransfer.destination.landers import Landers
from kvtransfer.destination.options import READERS_MAX, DestinationOptions
from kvtransfer.destination.our_transports import OurTransports
from kvtransfer.destination.peer import Into, PeerStatistics, SourcePeer, Ticket
from kvtransfer.destination.peers import SourcePeers
from kvtransfer.destination.pending import PendingTransfer, Strand
from kvtransfer.destination.pull import Pull, Terms
from kvtransfer.destination.quarantine import Quarantine, QuarantineLimits, judge
from kvtransfer.destination.readers import FairReaders
from kvtransfer.device_pool import SharedPool
from kvtransfer.machine import CancelResult
from kvtransfer.negotiate import Preference
from kvtransfer.off_loop import together
from kvtransfer.pool_identity import PoolIdentity
from kvtransfer.region import Region
from kvtransfer.staging import DeviceCopier
from kvtransfer.transport import OurEnd
from kvtransfer.transports import cuda_ipc

SOURCE_KNOWS: Final = (PeerLost, StaleEpoch, LeaseExpired, SourceFailed)
"""Errors after which there is nobody to tell that we gave up, or who told us so."""


class PullTerms(TypedDict, total=False):
    """Of one pull, apart from what is to land where; see `TransferDestination.pull`."""

    deadline_s: Required[float]
    skip_blocks: int
    overlap: bool
    block_hashes: bytes
    num_tokens: int | None


@dataclasses.dataclass(frozen=True, slots=True)
class _Transfer:
    pending: PendingTransfer
    tickets: Sequence[Ticket]
    share: OurShare
    terms: Terms


class TransferDestination:
    """Pulls into `region`. Lives on one event loop."""

    def __init__(
        self,
        region: Region,
        identity: PoolIdentity,
        options: DestinationOptions = DestinationOptions(),
        *,
        copier: DeviceCopier | None = None,
        device_pool: SharedPool | None = None,
    ) -> None:
        """With a `copier`, region and identity are of a staging region, and pull() fills blocks of the device's pool.

        `device_pool` is that pool, where sources on this host may be copied from directly, unless another transport is
        preferred. Raises ConfigError when what is preferred cannot be had.
        """
        layout = identity.layout
        self._holding = identity.holding
        self._options = options
        self._limits = options.limits or QuarantineLimits(num_blocks=layout.num_blocks)
        self._landers = Landers(
            region, layout, InFlight(options.in_flight_bytes(layout)), copier=copier, shared=device_pool
        )
        self._readers = FairReaders(READERS_MAX, thread_name_prefix="kv-pull")
        us = OurEnd(
            region=region,
            layout=layout,
            peer_id=identity.instance_id,
            progress_timeout_s=options.progress_timeout_s,
        )
        ours = OurTransports(us, options.preference, given=options.transports)
        self._foreign = ForeignPools(self._holding, ours, part_tokens=options.part_tokens(layout))
        self._peers = SourcePeers(
            identity,
            Into(ours, self._foreign, _device_way(us, options.preference, device_pool)),
            self._readers,
            progress_timeout_s=options.progress_timeout_s,
            idle_max_s=options.idle_max_s,
        )
        self._farewells = Farewells(identity.instance_id)
        self._pending: set[PendingTransfer] = set()
        self._closed = False

    async def pull(self, tickets: Ticket | Sequence[Ticket], into: Sequence[int], **terms: Unpack[PullTerms]) -> Landed:
        """Bring the KV of a prompt here, chunk by chunk while it is computed there.

        `into` is our whole block table: block i of the prompt lands in `into[i]`, for i from `skip_blocks` on; the ones
        before are here already and are not touched. `into` may be longer than the prompt. The blocks must be the
        caller's alone until this returns or raises, and can be used or given back at once then.

        Several tickets are those of the ranks that computed the prompt together: it lands when all have brought their
        part, and fails when one fails. Blocks of other ranks, sizes or dtypes are converted; `num_tokens` of the prompt
        must be told where its length decides which rank holds what.

        `block_hashes` asks for content instead of a prompt that is computed there: what the source holds of these
        blocks, from the first on, lands in `into`; how many that are, `num_tokens` of the result tells, maybe 0.

        `overlap=False` reads nothing before the last publication: only for measuring what overlap hides.

        Raises:
            LayoutMismatch, FingerprintMismatch: refused; nothing was read.
            StaleEpoch: the source of this ticket is no more.
            PeerLost, LeaseExpired, ChecksumMismatch, SourceFailed, TransferError: it did not land.
            TransferTimeout: it did not land within `deadline_s`.
        """
        pending = self.start(tickets, into, **terms)
        try:
            return await pending.outcome()
        finally:
            pending.cancel()
            await pending.ended()

    def start(
        self, tickets: Ticket | Sequence[Ticket], into: Sequence[int], **terms: Unpack[PullTerms]
    ) -> PendingTransfer:
        """As `pull`, for who wants to hear the outcome before the blocks are quiet. Returns at once.

        The blocks are lent to it: they come back with an outcome that is `Landed`, or else when it is quiet.
        """
        assert not self._closed, "a pull after close"
        assert len(set(into)) == len(into), "a block is to be filled twice"
        ranks = tickets if isinstance(tickets, Sequence) else [tickets]
        share = self._share(into, terms.get("skip_blocks", 0), terms.get("num_tokens"))
        pending = PendingTransfer(
            ranks[0].transfer_id,
            into,
            on_decided=lambda decided: self._decided(decided, ranks),
            on_ended=self._pending.discard,
        )
        deadline_s = terms["deadline_s"]
        late = f"{pending.transfer_id} from {ranks[0].instance_id} did not land within {deadline_s} s"
        pending.begin(
            self._pull(_Transfer(pending, ranks, share, self._terms(terms))),
            deadline_s=deadline_s,
            late=lambda: TransferTimeout(f"{late}; story={pending.story}"),
        )
        self._pending.add(pending)
        return pending

    def _decided(self, pending: PendingTransfer, ranks: Sequence[Ticket]) -> None:
        """Its sources need not wait for their leases, and a read that does not end is not the peer's last one."""
        error = pending.error
        if error is None:
            return
        if len(ranks) > 1 or not isinstance(error, SOURCE_KNOWS):
            for ticket in ranks:  # One of several may know; the others do not.
                self.decline(ticket, error)
        asyncio.get_running_loop().call_later(self._limits.stuck_after_s, self._check_ended, pending)

    def _check_ended(self, pending: PendingTransfer) -> None:
        if pending.is_quarantined:
            for address in pending.writing_sources:
                self._peers.shun(address, self.quarantine().unhealthy)

    def decline(self, ticket: Ticket, why: BaseException | None = None) -> None:
        """We shall not pull this one: its source is told, soon, and need not wait for its lease to run out.

        A prefill that still runs for it fails with `why`, so that everybody who asked is told the same. Nothing happens
        to one that is being pulled here: then it was asked for twice, and it is the second time that is refused.
        """
        is_wanted = any(each.transfer_id == ticket.transfer_id and not each.is_decided for each in self._pending)
        if not self._closed and not is_wanted:
            self._farewells.say(ticket, why)

    async def _pull(self, transfer: _Transfer) -> Landed:
        async with contextlib.AsyncExitStack() as kept:
            sources = await together([self._keep(ticket, transfer, kept) for ticket in transfer.tickets])
            peers = [peer for peer, _ in sources]
            parts = joint.parts(peers, transfer.tickets, transfer.share)
            strands = [strand for _, strand in sources]
            pulls = [self._pull_part(*each, transfer.terms) for each in zip(parts, strands, strict=True)]
            return joint.joined(await together(pulls), peers)

    async def _keep(
        self, ticket: Ticket, transfer: _Transfer, kept: contextlib.AsyncExitStack
    ) -> tuple[SourcePeer, Strand]:
        """Connected, and kept from that very moment: it may die while another one still connects."""
        peer = await self._peers.connected(ticket, deadline=transfer.terms.deadline)
        strand = transfer.pending.strand(ticket.transfer_id, source=ticket.address, can_stop=peer.link.can_stop)
        await kept.enter_async_context(self._peers.keeping(peer, strand.lost))
        return peer, strand

    async def _pull_part(self, part: Part, strand: Strand, terms: Terms) -> Landed:
        peer = part.peer
        try:
            landed = await Pull(part, strand, self._readers.of(part.ticket.address), terms).run()
        finally:
            if isinstance(strand.error, TransferError):
                self._peers.failed(peer, strand.error)
        peer.statistics.landed(num_bytes=landed.num_bytes, seconds=landed.transfer_s, read=peer.link.statistics())
        return landed

    @property
    def transports(self) -> tuple[str, ...]:
        """That this process can read with, best first."""
        return self._peers.transports

    def cancel(self, transfer_id: str) -> CancelResult:
        """Of the transfer that was started under this id; NOT_FOUND when all of it has been cleared away."""
        found = [pending.cancel() for pending in self._pending if pending.transfer_id == transfer_id]
        return found[0] if found else CancelResult.NOT_FOUND

    def quarantine(self) -> Quarantine:
        """Blocks of transfers that did not land, and into which bytes may still be written."""
        held = [pending for pending in self._pending if pending.is_quarantined]
        return judge(held, self._limits, now_s=time.monotonic())

    @property
    def high_water_bytes(self) -> int:
        """The most that was under way at once since the start."""
        return self._landers.high_water_bytes

    def statistics(self) -> list[PeerStatistics]:
        """One for each source that we are connected to, with the transport that is really in use, and why."""
        return self._peers.statistics()

    async def close(self) -> None:
        """Close every connection and thread. The caller has ended its pulls. Idempotent."""
        if self._closed:
            return
        self._closed = True
        for pending in tuple(self._pending):
            pending.cancel()
            await pending.ended()
        await self._farewells.close()
        await self._peers.close()
        self._foreign.close()
        await asyncio.to_thread(self._readers.shutdown)

    def _terms(self, asked: PullTerms) -> Terms:
        return Terms(
            deadline=Deadline.after(asked["deadline_s"]),
            progress_timeout_s=self._options.progress_timeout_s,
            stall_timeout_s=self._options.stall_timeout_s,
            overlap=asked.get("overlap", True),
            block_hashes=asked.get("block_hashes", b""),
        )

    def _share(self, table: Sequence[int], skip_blocks: int, num_tokens: int | None) -> OurShare:
        assert 0 <= skip_blocks <= len(table), f"{skip_blocks} blocks of {len(table)} are here"
        return OurShare(
            holding=self._holding,
            pool=self._landers.pool,
            make_lander=self._landers.of,
            table=table,
            skip_blocks=skip_blocks,
            num_tokens=num_tokens,
        )


def _device_way(us: OurEnd, preference: Preference, shared: SharedPool | None) -> OurTransports | None:
    if shared is None or preference.order()[0] != cuda_ipc.NAME:
        return None
    return OurTransports(us, preference, given=[cuda_ipc.CudaIpcTransport(us, shared)])
