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
from typing import Final

from disaggregated.errors import LeaseExpired, PeerLost, SourceFailed, StaleEpoch, TransferError, TransferTimeout
from disaggregated.kv_layout import KVLayout
from disaggregated.kv_shard import KVHolding, KVShard
from kvtransfer.conversion.executor import PoolView
from kvtransfer.deadline import Deadline
from kvtransfer.destination import joint
from kvtransfer.destination.farewell import Farewells
from kvtransfer.destination.foreign import ForeignPools
from kvtransfer.destination.in_flight import InFlight
from kvtransfer.destination.joint import OurShare, Part
from kvtransfer.destination.landed import Landed
from kvtransfer.destination.landing import Lander
from kvtransfer.destination.our_pool import DevicePool, HostPool, OurPool
from kvtransfer.destination.our_transports import OurTransports
from kvtransfer.destination.peer import Destination, Into, PeerStatistics, SourcePeer, Ticket
from kvtransfer.destination.peers import IDLE_MAX_S, SourcePeers
from kvtransfer.destination.pending import PendingTransfer, Strand
from kvtransfer.destination.pull import STALL_TIMEOUT_S, Pull
from kvtransfer.destination.quarantine import Quarantine, QuarantineLimits, judge
from kvtransfer.destination.readers import FairReaders
from kvtransfer.device_pool import DeviceSums, SharedPool
from kvtransfer.machine import CancelResult
from kvtransfer.negotiate import Preference
from kvtransfer.off_loop import together
from kvtransfer.region import Region
from kvtransfer.staging import DeviceCopier, InPlace, LandingPlace, Staged, StagingBlocks
from kvtransfer.transport import PROGRESS_TIMEOUT_S, DestinationTransport, OurEnd
from kvtransfer.transports import cuda_ipc

PART_BYTES: Final = 16 << 20
"""Of one read at most."""
DEVICE_PART_BYTES: Final = 256 << 20
"""Of one read on a device at most: a tenth of a millisecond for its memory, beside which asking for it is dear."""
SOURCE_KNOWS: Final = (PeerLost, StaleEpoch, LeaseExpired, SourceFailed)
"""Errors after which there is nobody to tell that we gave up, or who told us so."""
READERS_MAX: Final = 16
"""Threads. A read beyond waits for one, within its deadline; a dead source holds one for the progress timeout."""
IN_FLIGHT_BYTES: Final = 2 * READERS_MAX * PART_BYTES
"""Of all transfers, unless `max_tokens_in_buffer` says otherwise: no read gets less than a whole part then."""


@dataclasses.dataclass(frozen=True, slots=True)
class _How:
    pending: PendingTransfer
    deadline: Deadline
    deadline_s: float
    """How far away it was."""
    overlap: bool
    block_hashes: bytes


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
        stall_timeout_s: float = STALL_TIMEOUT_S,
        transports: Sequence[DestinationTransport] | None = None,
        copier: DeviceCopier | None = None,
        device_pool: SharedPool | None = None,
        shard: KVShard | None = None,
        limits: QuarantineLimits | None = None,
        idle_max_s: float = IDLE_MAX_S,
    ) -> None:
        """A source that moves no byte and answers nothing for `progress_timeout_s` is lost; a transfer of which nothing
        more is published for `stall_timeout_s`, once something was, has failed. `transports` replaces ours.

        `max_tokens_in_buffer` bounds what is under way at once, of all transfers together; but one block of one layer
        always may be, and one whole block where blocks are staged or converted. None or 0: it slows nobody down.

        With a `copier`, region and layout are of a staging region, and pull() fills blocks of the device's pool.
        `device_pool` is that pool, where sources on this host may be copied from directly, unless `preference` names
        another transport first.
        `limits` are those of a quarantine in that pool; None: `layout` is the pool's, the limits are the usual ones.
        A source that nobody pulls from for `idle_max_s` is let go of.
        `shard` is the part of the model that our pool holds; None: all of it.

        Raises ConfigError when `preference` cannot be honoured.
        """
        self._pool = region.buffer
        self._layout = layout
        self._holding = KVHolding(layout=layout, shard=shard or KVShard.whole(layout))
        us = Destination(
            instance_id=instance_id, epoch=epoch, fingerprint=fingerprint, holding=self._holding, device=device
        )
        ours = OurEnd(region=region, layout=layout, peer_id=instance_id, progress_timeout_s=progress_timeout_s)
        ours_by_name = OurTransports(ours, preference, given=transports or ())
        self._progress_timeout_s = progress_timeout_s
        self._stall_timeout_s = stall_timeout_s
        in_flight_bytes = max_tokens_in_buffer * layout.token_bytes if max_tokens_in_buffer else IN_FLIGHT_BYTES
        self._in_flight = InFlight(in_flight_bytes)
        self._readers = FairReaders(READERS_MAX, thread_name_prefix="kv-pull")
        part_tokens = max_tokens_in_buffer or PART_BYTES // layout.token_bytes
        self._foreign = ForeignPools(self._holding, ours_by_name, part_tokens=part_tokens)
        self._peers = SourcePeers(
            us,
            Into(ours_by_name, self._foreign, self._device_way(ours, preference, device_pool)),
            self._readers,
            progress_timeout_s=progress_timeout_s,
            idle_max_s=idle_max_s,
        )
        self._device_pool = device_pool
        self._place: LandingPlace = InPlace()
        self._ours: OurPool = HostPool(PoolView(self._pool, layout))
        if copier is not None:
            staging = StagingBlocks(layout.num_blocks)
            self._place = Staged(staging, copier)
            self._ours = DevicePool(self._ours.view, staging, copier)
        self._farewells = Farewells(instance_id)
        self._limits = limits or QuarantineLimits(num_blocks=layout.num_blocks)
        self._pending: set[PendingTransfer] = set()
        self._closed = False

    async def pull(
        self,
        tickets: Ticket | Sequence[Ticket],
        into: Sequence[int],
        *,
        deadline_s: float,
        skip_blocks: int = 0,
        overlap: bool = True,
        block_hashes: bytes = b"",
        num_tokens: int | None = None,
    ) -> Landed:
        """Bring the KV of a prompt here, chunk by chunk while it is computed there.

        `into` is our whole block table: block i of the prompt lands in `into[i]`, for i from `skip_blocks` on; the ones
        before are here already and are not touched. `into` may be longer than the prompt. The blocks must be the
        caller's alone until this returns or raises, and can be used or given back at once then.

        Several tickets are those of the ranks that computed the prompt together: it lands when all have brought their
        part, and fails when one fails. Blocks of other ranks, sizes or dtypes are converted; `num_tokens` of the prompt
        must be told where its length decides which rank holds what.

        `block_hashes` asks for content instead of a prompt that is computed there: what the source holds of these
        blocks, from the first on, lands in `into`; how many that are, `num_tokens` of the result tells, maybe 0.

        Raises:
            LayoutMismatch, FingerprintMismatch: refused; nothing was read.
            StaleEpoch: the source of this ticket is no more.
            PeerLost, LeaseExpired, ChecksumMismatch, SourceFailed, TransferError: it did not land.
            TransferTimeout: it did not land within `deadline_s`.
        """
        pending = self.start(
            tickets,
            into,
            deadline_s=deadline_s,
            skip_blocks=skip_blocks,
            overlap=overlap,
            block_hashes=block_hashes,
            num_tokens=num_tokens,
        )
        try:
            return await pending.outcome()
        finally:
            pending.cancel()
            await pending.ended()

    def start(
        self,
        tickets: Ticket | Sequence[Ticket],
        into: Sequence[int],
        *,
        deadline_s: float,
        skip_blocks: int = 0,
        overlap: bool = True,
        block_hashes: bytes = b"",
        num_tokens: int | None = None,
    ) -> PendingTransfer:
        """As `pull`, for who wants to hear the outcome before the blocks are quiet. Returns at once.

        The blocks are lent to it: they come back with an outcome that is `Landed`, or else when it is quiet.
        """
        assert not self._closed, "a pull after close"
        assert len(set(into)) == len(into), "a block is to be filled twice"
        assert 0 <= skip_blocks <= len(into), f"{skip_blocks} blocks of {len(into)} are here"
        ranks = tickets if isinstance(tickets, Sequence) else [tickets]
        ours = self._share(into, skip_blocks, num_tokens)
        pending = PendingTransfer(
            ranks[0].transfer_id,
            into,
            on_decided=lambda decided: self._decided(decided, ranks),
            on_ended=self._pending.discard,
        )
        how = _How(pending, Deadline.after(deadline_s), deadline_s, overlap, block_hashes)
        late = f"{pending.transfer_id} from {ranks[0].instance_id} did not land within {deadline_s} s"
        pending.begin(
            self._pull(ranks, ours, how),
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

        A prefill that still runs for it fails with `why`, so that everybody who asked is told the same.
        """
        if not self._closed:
            self._farewells.say(ticket, why)

    async def _pull(self, tickets: Sequence[Ticket], ours: OurShare, how: _How) -> Landed:
        async with contextlib.AsyncExitStack() as kept:
            sources = await together([self._keep(ticket, how, kept) for ticket in tickets])
            peers = [peer for peer, _ in sources]
            parts = joint.parts(peers, tickets, ours)
            pulls = [self._pull_part(part, strand, how) for part, (_, strand) in zip(parts, sources, strict=True)]
            return joint.joined(await together(pulls), peers)

    async def _keep(self, ticket: Ticket, how: _How, kept: contextlib.AsyncExitStack) -> tuple[SourcePeer, Strand]:
        """Connected, and kept from that very moment: it may die while another one still connects."""
        peer = await self._peers.connected(ticket, deadline=how.deadline)
        strand = how.pending.strand(ticket.transfer_id, source=ticket.address, can_stop=peer.link.can_stop)
        await kept.enter_async_context(self._peers.keeping(peer, strand.lost))
        return peer, strand

    async def _pull_part(self, part: Part, strand: Strand, how: _How) -> Landed:
        try:
            landed = await self._make_pull(part, strand, how).run()
        finally:
            if isinstance(strand.error, TransferError):
                self._peers.failed(part.peer, strand.error)
        self._count(part.peer, landed)
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
        return self._in_flight.high_water_bytes

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

    def _make_pull(self, part: Part, strand: Strand, how: _How) -> Pull:
        return Pull(
            part.peer,
            strand,
            part.published,
            part.lander,
            self._readers.of(part.ticket.address),
            deadline=how.deadline,
            progress_timeout_s=self._progress_timeout_s,
            stall_timeout_s=self._stall_timeout_s,
            overlap=how.overlap,
            block_hashes=how.block_hashes,
        )

    def _share(self, table: Sequence[int], skip_blocks: int, num_tokens: int | None) -> OurShare:
        return OurShare(
            holding=self._holding,
            pool=self._ours,
            make_lander=self._make_lander,
            table=table,
            skip_blocks=skip_blocks,
            num_tokens=num_tokens,
        )

    @staticmethod
    def _device_way(us: OurEnd, preference: Preference, shared: SharedPool | None) -> OurTransports | None:
        if shared is None or preference.order()[0] != cuda_ipc.NAME:
            return None
        return OurTransports(us, preference, given=[cuda_ipc.CudaIpcTransport(us, shared)])

    def _make_lander(self, peer: SourcePeer) -> Lander:
        if peer.in_device_memory:
            assert self._device_pool is not None, "a link into no device"
            pool = self._device_pool.pool
            return Lander(
                link=peer.link,
                pool=None,
                layout=pool.layout,
                part_bytes=DEVICE_PART_BYTES,
                in_flight=self._in_flight,
                make_sums=lambda count, layout, num_layers: DeviceSums(pool, count),
            )
        return Lander(
            link=peer.link,
            pool=self._pool,
            layout=self._layout,
            part_bytes=PART_BYTES,
            in_flight=self._in_flight,
            place=self._place,
        )

    def _count(self, peer: SourcePeer, landed: Landed) -> None:
        peer.statistics.landed(num_bytes=landed.num_bytes, seconds=landed.transfer_s, read=peer.link.statistics())
