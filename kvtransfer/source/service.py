"""The control plane of a source: who may connect, what is ready, whether a lease still holds."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any, Final, Protocol

from disaggregated import rpc
from disaggregated.block_hash import from_bytes
from disaggregated.errors import (
    DisaggregatedError,
    FingerprintMismatch,
    LayoutMismatch,
    LeaseExpired,
    QueueFull,
    StaleEpoch,
    TransferError,
)
from disaggregated.kv_shard import KVHolding
from disaggregated.peer_input import checked_name
from disaggregated.v1 import kv_pb2, kv_pb2_grpc
from kvtransfer.conversion.planner import refusal
from kvtransfer.machine import SourcePhase
from kvtransfer.pool_identity import PoolIdentity
from kvtransfer.source.endpoints import SourceEndpoints
from kvtransfer.source.lease import Chunk, Ending, LeaseBook, Progress
from kvtransfer.source.options import Lend

FOLLOWERS_MAX: Final = 4096
"""Follow calls at once; one more is refused as QueueFull."""


class LeaveTransfer(Protocol):
    def __call__(
        self, transfer_id: str, reader: str, phase: SourcePhase, reason: str, cause: DisaggregatedError | None = None
    ) -> bool:
        """True when the lease held for this reader until now."""


class KVSourceService(kv_pb2_grpc.KVSourceServicer):
    """Errors leave as exceptions; the gRPC server of `disaggregated.rpc` carries them to the caller."""

    def __init__(
        self,
        book: LeaseBook,
        identity: PoolIdentity,
        endpoints: SourceEndpoints,
        *,
        leave: LeaveTransfer,
        lend: Lend | None = None,
    ) -> None:
        """lend: None: transfers are opened by the server alone, none by the hashes of its blocks."""
        assert book.epoch == identity.epoch, f"leases of epoch {book.epoch}, a pool of epoch {identity.epoch}"
        self._book = book
        self._us = identity
        self._endpoints = endpoints
        self._leave = leave
        self._lend = lend
        self._followers: dict[str, dict[str, asyncio.Event]] = {}
        """By transfer and peer: what wakes it."""
        self._num_followers = 0
        self.cuts: frozenset[int] = frozenset()
        """Layers of ours at which the share of one of our destinations begins or ends."""

    @property
    def num_followers(self) -> int:
        return self._num_followers

    def changed(self, transfer_id: str) -> None:
        """Wake the followers of this transfer, if there are any. On the event loop."""
        for changed in self._followers.get(transfer_id, {}).values():
            changed.set()

    async def Connect(self, request: kv_pb2.ConnectRequest, call: Any) -> kv_pb2.ConnectReply:
        if request.fingerprint != self._us.fingerprint:
            raise FingerprintMismatch(
                f"{request.peer_id} serves {request.fingerprint}, {self._us.instance_id} serves {self._us.fingerprint}"
            )
        theirs = KVHolding.from_proto(request.layout, request.shard if request.HasField("shard") else None)
        if reason := refusal(self._us.holding, theirs):
            raise LayoutMismatch(f"destination {request.peer_id} here, source {self._us.instance_id} there: {reason}")
        self._cut_for(theirs)
        offers = await asyncio.to_thread(self._endpoints.offers, tuple(request.transports))
        return kv_pb2.ConnectReply(
            instance_id=self._us.instance_id,
            epoch=self._book.epoch,
            layout=self._us.holding.layout.to_proto(),
            shard=self._us.holding.shard.to_proto(),
            offers=[kv_pb2.TransportOffer(**dataclasses.asdict(offer)) for offer in offers],
            lease_s=self._book.lease_s,
            device=self._us.device,
        )

    def _cut_for(self, destination: KVHolding) -> None:
        """From now on publications end where its layers do: they are verified as a whole, by who wants all of them."""
        ours, theirs = self._us.holding.layers, destination.layers
        self.cuts |= {layer - ours.start for layer in (theirs.start, theirs.stop) if layer in ours[1:]}

    async def Follow(self, request: kv_pb2.FollowRequest, call: Any) -> AsyncGenerator[kv_pb2.Publication, None]:
        """Ends when the lease does. A stream that breaks before that is a destination that gave up, or has gone."""
        self._check_epoch(request.epoch)
        transfer_id = checked_name(request.transfer_id, "transfer_id")
        with self._following(transfer_id, checked_name(request.peer_id, "peer_id")) as changed:
            if request.block_hashes:
                await self._open_by_content(request)
            self._book.renew(transfer_id, now_s=time.monotonic())
            sent = 0
            told_outcome = False
            while True:
                changed.clear()
                progress = self._book.progress(transfer_id, after=sent, reader=request.peer_id)
                if isinstance(progress, Ending):
                    if failure := _failure(progress):
                        yield kv_pb2.Publication(epoch=self._book.epoch, failure=failure)
                    return
                if progress is not None and not told_outcome:
                    for publication in _publications(progress, self._book.epoch):
                        yield publication
                    sent += len(progress.chunks)
                    told_outcome = progress.outcome is not None
                await changed.wait()

    async def _open_by_content(self, request: kv_pb2.FollowRequest) -> None:
        if self._lend is None:
            raise TransferError(f"{self._us.instance_id} lends no blocks by their hashes")
        try:
            hashes = from_bytes(request.block_hashes)
        except ValueError as error:
            raise TransferError(str(error)) from error
        await self._lend(request.transfer_id, hashes)

    async def Release(self, request: kv_pb2.ReleaseRequest, call: Any) -> kv_pb2.ReleaseReply:
        self._check_epoch(request.epoch)
        checked_name(request.transfer_id, "transfer_id")
        checked_name(request.peer_id, "peer_id")
        if self._is_for_others(request.transfer_id, request.peer_id):
            return kv_pb2.ReleaseReply(lease_was_valid=False)
        if request.landed:
            held = self._leave(request.transfer_id, request.peer_id, SourcePhase.RELEASED, "landed")
        else:
            reason = f"{request.peer_id} does not want it {request.error_message}".rstrip()
            held = self._leave(request.transfer_id, request.peer_id, SourcePhase.GIVEN_UP, reason, _cause(request))
        return kv_pb2.ReleaseReply(lease_was_valid=held)

    def _is_for_others(self, transfer_id: str, peer_id: str) -> bool:
        """As many follow it as will read it, and this is none of them; also while it is only being opened for them."""
        followers = self._followers.get(transfer_id, {})
        return peer_id not in followers and len(followers) >= self._book.num_readers(transfer_id) > 0

    async def Renew(self, request: kv_pb2.RenewRequest, call: Any) -> kv_pb2.RenewReply:
        self._check_epoch(request.epoch)
        if not self._book.renew(request.transfer_id, now_s=time.monotonic()):
            raise LeaseExpired(f"transfer {request.transfer_id} is over")
        return kv_pb2.RenewReply(lease_s=self._book.lease_s)

    async def Ping(self, request: kv_pb2.PingRequest, call: Any) -> kv_pb2.PingReply:
        self._check_epoch(request.epoch)
        return kv_pb2.PingReply()

    @contextlib.contextmanager
    def _following(self, transfer_id: str, peer_id: str) -> Iterator[asyncio.Event]:
        """Whoever goes, or breaks off, has given up; whoever is refused here had nothing to give up."""
        if peer_id in self._followers.get(transfer_id, {}):
            raise TransferError(f"transfer {transfer_id} is followed by another destination")
        if self.num_followers >= FOLLOWERS_MAX:
            raise QueueFull(f"{FOLLOWERS_MAX} transfers are followed already")
        changed = asyncio.Event()
        self._followers.setdefault(transfer_id, {})[peer_id] = changed
        self._num_followers += 1
        is_refused = False
        try:
            yield changed
        except DisaggregatedError:
            is_refused = True
            raise
        finally:
            self._num_followers -= 1
            del self._followers[transfer_id][peer_id]
            if not self._followers[transfer_id]:
                del self._followers[transfer_id]
            if not is_refused and self._book.published(transfer_id) is not None:
                self._leave(transfer_id, peer_id, SourcePhase.GIVEN_UP, "the destination stopped following")

    def _check_epoch(self, epoch: int) -> None:
        if epoch != self._book.epoch:
            raise StaleEpoch(f"{self._us.instance_id} is epoch {self._book.epoch}, {epoch} was asked for")


def _publications(progress: Progress, epoch: int) -> Iterator[kv_pb2.Publication]:
    """What a slow follower has not taken comes as few; the outcome goes with the last, the key with each."""
    chunks = _joined(progress.chunks)
    for chunk in chunks:
        outcome = progress.outcome if chunk is chunks[-1] else None
        yield kv_pb2.Publication(
            epoch=epoch,
            first_block=chunk.first_block,
            block_ids=chunk.block_ids,
            checksums=chunk.checksums,
            num_tokens=chunk.num_tokens,
            first_layer=chunk.layers.start if chunk.layers else 0,
            num_layers=len(chunk.layers) if chunk.layers else 0,
            lease_key=progress.key,
            landing=kv_pb2.Landing(**dataclasses.asdict(outcome)) if outcome else None,
        )


def _joined(chunks: Sequence[Chunk]) -> list[Chunk]:
    """The same blocks in fewer chunks: neighbours that became readable in the same layers are one, in all of them."""
    found: list[Chunk] = []
    for chunk in chunks:
        before = found[-1] if found else None
        if before is not None and before.layers == chunk.layers and chunk.first_block > before.first_block:
            found[-1] = Chunk(
                first_block=before.first_block,
                block_ids=before.block_ids + chunk.block_ids,
                checksums=before.checksums + chunk.checksums,
                num_tokens=chunk.num_tokens,
                layers=chunk.layers,
            )
        else:
            found.append(chunk)
    return found


def _cause(request: kv_pb2.ReleaseRequest) -> DisaggregatedError | None:
    return rpc.rebuild(request.error_kind, request.error_message) if request.error_kind else None


def _failure(ending: Ending) -> str | None:
    """None when the stream just ends: the destination itself has ended the transfer."""
    if ending.phase is SourcePhase.FAILED:
        return ending.reason
    if ending.phase is SourcePhase.EXPIRED:
        raise LeaseExpired(ending.reason)
    return None
