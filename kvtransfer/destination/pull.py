"""One transfer, seen from where it lands.

    receiver task    follows the source's publications, notes when each came
    renewing task    tells the source that we are alive
    the pull itself  reads each published chunk on a worker thread while later ones are still computed, verifies,
                     has the lease confirmed

The first that fails stops the others. Our caller gives the blocks back, so the pull ends only after its read has.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Final

import grpc

from disaggregated.errors import ChecksumMismatch, LeaseExpired, PeerLost, SourceFailed, TransferError, TransferTimeout
from disaggregated.v1 import kv_pb2
from kvtransfer.deadline import Deadline
from kvtransfer.destination.joint import Part
from kvtransfer.destination.landed import Landed
from kvtransfer.destination.options import STALL_TIMEOUT_S
from kvtransfer.destination.peer import source_errors
from kvtransfer.destination.pending import Strand
from kvtransfer.destination.published import BlockBatch
from kvtransfer.machine import DestinationPhase
from kvtransfer.off_loop import run_to_end
from kvtransfer.transport import ReadStop

_PUBLICATIONS_MAX: Final = 256
"""Received and not yet read. When full we stop receiving, and gRPC's flow control makes the source wait."""
_RENEWALS_PER_LEASE: Final = 3
_RENEWAL_INTERVAL_MIN_S: Final = 0.02


@dataclasses.dataclass(slots=True)
class _Times:
    first_read_s: float | None = None
    progress_s: float | None = None
    """Of the event loop's clock: when a publication last came, or a read last ended."""
    last_publication_s: float = 0.0
    num_publications: int = 0
    hidden_bytes: int = 0
    verified_s: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """Of one transfer, for each of its sources."""

    deadline: Deadline
    progress_timeout_s: float
    stall_timeout_s: float = STALL_TIMEOUT_S
    """Between two publications, once there was one."""
    overlap: bool = True
    """If not, nothing is read before the last publication."""
    block_hashes: bytes = b""
    """Of a transfer that the source opens for us, of what it holds of these blocks."""


class Pull:
    """Used once. Its owner has checked that what is published and what lands it fit each other."""

    def __init__(self, part: Part, strand: Strand, executor: concurrent.futures.Executor, terms: Terms) -> None:
        self._peer = part.peer
        self._published = part.published
        self._lander = part.lander
        self._strand = strand
        self._transfer = strand.transfer
        self._executor = executor
        self._terms = terms
        self._arrived: asyncio.Queue[kv_pb2.Publication] = asyncio.Queue(_PUBLICATIONS_MAX)
        self._times = _Times()
        self._num_bytes = 0
        self._has_released = False
        """What the source ends after that, it ends because we told it to."""
        self._receiving: asyncio.Task[None] | None = None

    async def run(self) -> Landed:
        """Raises a TransferError when it did not land; then, and when cancelled, nothing can land any more.

        The outcome is decided where a failure is seen, which is before this ends when a read has to be stopped first.
        """
        request = kv_pb2.FollowRequest(
            transfer_id=self._transfer.transfer_id,
            epoch=self._peer.identity.epoch,
            peer_id=self._peer.our_id,
            block_hashes=self._terms.block_hashes,
            in_device_memory=self._peer.in_device_memory,
        )
        self._advance(DestinationPhase.FOLLOWING)
        follow = self._peer.stub.Follow(request, timeout=self._terms.deadline.left_s())
        try:
            async with asyncio.TaskGroup() as group:
                receiving = self._receiving = group.create_task(self._receive(follow))
                renewing = group.create_task(self._renew())
                watching = group.create_task(self._watch_progress())
                await self._land_all()
                watching.cancel()
                renewing.cancel()  # A renewal that comes after the release would be told that the lease is over.
                await self._confirm()
                receiving.cancel()
        except BaseExceptionGroup as group_error:
            with self._deciding_failure():
                raise group_error.exceptions[0] from group_error
        finally:
            follow.cancel()  # Before a release this tells the source that we have given up.
            assert not self._transfer.is_writable, f"a pull ends while it can write: {self._transfer.story}"
        self._advance(DestinationPhase.LANDED)
        return self._landed()

    async def _receive(self, follow: grpc.aio.UnaryStreamCall[kv_pb2.FollowRequest, kv_pb2.Publication]) -> None:
        """Until the last publication; ends the pull when the stream ends before that."""
        with self._listening(), source_errors(self._peer.address):
            async for publication in follow:
                if publication.failure:
                    raise SourceFailed(f"{self._peer.identity.instance_id}: {publication.failure}")
                self._times.last_publication_s = time.monotonic()
                self._times.num_publications += 1
                self._times.hidden_bytes = self._num_bytes
                self._note_progress()
                await self._arrived.put(publication)
                if publication.HasField("landing"):
                    return
            raise PeerLost(f"{self._peer.identity.instance_id} ended the transfer before its last block")

    async def _renew(self) -> None:
        """The source learns that we are alive; and we, that it still holds what it leased."""
        request = kv_pb2.RenewRequest(transfer_id=self._transfer.transfer_id, epoch=self._peer.identity.epoch)
        while not self._has_released:
            await asyncio.sleep(max(self._peer.lease_s / _RENEWALS_PER_LEASE, _RENEWAL_INTERVAL_MIN_S))
            with self._listening(), source_errors(self._peer.address):
                await self._peer.stub.Renew(request, timeout=self._answer_s())

    async def _watch_progress(self) -> None:
        """A source that lives and brings nothing more, once it has begun: its engine hangs, or it has forgotten us.

        How long a prompt may wait for its turn there is for its caller's deadline to say, and a read that is running
        has its own limit on silence.
        """
        now_s = asyncio.get_running_loop().time
        while True:
            since_s = self._times.progress_s
            waits = since_s is None or self._transfer.is_writable
            silent_s = 0.0 if since_s is None or waits else now_s() - since_s
            if silent_s >= self._terms.stall_timeout_s:
                with self._deciding_failure():
                    raise TransferTimeout(
                        f"{self._peer.identity.instance_id} has brought nothing for {silent_s:.1f} s, "
                        f"{self._num_bytes} bytes before"
                    )
            await asyncio.sleep(self._terms.stall_timeout_s - silent_s)

    async def _land_all(self) -> None:
        while self._published.landing is None:
            self._published.add(await self._arrived.get())
            while not self._arrived.empty():
                self._published.add(self._arrived.get_nowait())
            if self._terms.overlap or self._published.landing is not None:
                await self._land(self._published.take())
        self._times.verified_s = time.monotonic()

    async def _land(self, batches: Sequence[BlockBatch]) -> None:
        if not batches:
            return
        if self._times.first_read_s is None:
            self._times.first_read_s = time.monotonic()
        stop = ReadStop()

        def job() -> None:
            for batch in batches:
                self._lander.land(batch, stop=stop, deadline=self._terms.deadline, verified=self._count)

        def decide_and_stop() -> None:
            self._transfer.cancel(now_s=time.monotonic())
            stop.request()

        self._advance(DestinationPhase.READING)
        try:
            await run_to_end(self._executor, job, stop=decide_and_stop)
        except ChecksumMismatch as error:
            self._strand.read_ended()
            await self._explain(error)
            raise
        except LeaseExpired:
            self._strand.read_ended()
            await self._hear_why()
            raise
        except BaseException:
            self._strand.read_ended()
            raise
        self._strand.read_ended()
        self._note_progress()

    def _note_progress(self) -> None:
        self._times.progress_s = asyncio.get_running_loop().time()

    def _count(self, num_bytes: int) -> None:
        """On the reading thread, of which there is one at a time."""
        self._num_bytes += num_bytes

    async def _explain(self, mismatch: ChecksumMismatch) -> None:
        """Blocks that were given back while we read are no damage: raises LeaseExpired when that is what happened."""
        if not await self._release(landed=False):
            raise LeaseExpired("the source gave its blocks back while they were read") from mismatch

    async def _hear_why(self) -> None:
        """A source that ended the lease while we read says why where it publishes, which may come after the refusal
        of the read. What it says ends the pull, and with it this wait."""
        assert self._receiving is not None, "a read before anything was received"
        await asyncio.wait([self._receiving], timeout=self._answer_s())

    async def _confirm(self) -> None:
        self._advance(DestinationPhase.CONFIRMING)
        if not await self._release(landed=True):
            raise LeaseExpired("the lease had ended before the read was confirmed")

    async def _release(self, *, landed: bool) -> bool:
        """True when the lease held until now."""
        request = kv_pb2.ReleaseRequest(
            transfer_id=self._transfer.transfer_id,
            epoch=self._peer.identity.epoch,
            landed=landed,
            peer_id=self._peer.our_id,
        )
        self._has_released = True
        with source_errors(self._peer.address):
            reply = await self._peer.stub.Release(request, timeout=self._answer_s())
        return reply.lease_was_valid

    def _answer_s(self) -> float:
        """How long the source may take for a small answer."""
        return self._terms.deadline.no_later_than(self._terms.progress_timeout_s).left_s()

    @contextlib.contextmanager
    def _deciding_failure(self) -> Iterator[None]:
        """The outcome is decided where the failure is seen; the cancelled read beside it only completes it."""
        try:
            yield
        except TransferError as error:
            self._strand.fail(error)
            raise

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        """Around what the source says of its own accord. That it has ended what we released is no news, and must not
        come before the answer to that release."""
        try:
            yield
        except TransferError as error:
            if not self._has_released:
                self._strand.fail(error)
                raise

    def _advance(self, to: DestinationPhase) -> None:
        self._strand.advance(to)

    def _landed(self) -> Landed:
        landing = self._published.landing
        assert landing is not None, "landed without a landing"
        times = self._times
        return Landed(
            first_token=landing.first_token,
            num_tokens=landing.num_tokens,
            num_bytes=self._num_bytes,
            transfer_s=0.0 if times.first_read_s is None else times.verified_s - times.first_read_s,
            exposed_s=times.verified_s - times.last_publication_s,
            transport=self._peer.link.transport,
            num_publications=times.num_publications,
            hidden_bytes=times.hidden_bytes,
        )
