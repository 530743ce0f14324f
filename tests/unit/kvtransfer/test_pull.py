"""One pull against a source of three calls, in virtual time."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import AsyncIterator
from typing import Any, cast

from disaggregated.errors import LeaseExpired, TransferTimeout
from disaggregated.kv_layout import KVLayout
from disaggregated.kv_shard import KVHolding, KVShard
from disaggregated.v1 import kv_pb2
from kvtransfer.deadline import Deadline
from kvtransfer.destination.in_flight import InFlight
from kvtransfer.destination.joint import Part
from kvtransfer.destination.landing import Lander
from kvtransfer.destination.peer import PeerStatistics, SourcePeer
from kvtransfer.destination.pending import PendingTransfer
from kvtransfer.destination.published import PublishedBlocks
from kvtransfer.destination.pull import Pull, Terms
from kvtransfer.machine import DestinationPhase
from kvtransfer.transport import SourceIdentity
from tests.support.virtual_time import run_in_virtual_time

LAYOUT = KVLayout(num_layers=1, num_kv_heads=1, head_dim=8, block_size=4, dtype="float32", num_blocks=2)


class OnePublication:
    """All of an empty prompt: nothing has to be read."""

    async def __aiter__(self) -> AsyncIterator[kv_pb2.Publication]:
        yield kv_pb2.Publication(epoch=1, landing=kv_pb2.Landing(first_token=7))

    def cancel(self) -> None: ...


class SlowSource:
    """Its answer to a release takes longer than the next renewal."""

    def __init__(self) -> None:
        self.is_released = False

    def Follow(self, request: kv_pb2.FollowRequest, *, timeout: float) -> OnePublication:
        return OnePublication()

    async def Renew(self, request: kv_pb2.RenewRequest, *, timeout: float) -> None:
        if self.is_released:
            raise LeaseExpired("transfer t is over")

    async def Release(self, request: kv_pb2.ReleaseRequest, *, timeout: float) -> kv_pb2.ReleaseReply:
        self.is_released = True
        await asyncio.sleep(1.5)
        return kv_pb2.ReleaseReply(lease_was_valid=True)


def test_a_release_is_not_undone_by_a_renewal_that_comes_after_it() -> None:
    async def play() -> None:
        peer = SourcePeer(
            address="host:1",
            our_id="destination",
            identity=SourceIdentity(instance_id="source", epoch=1, layout=LAYOUT),
            holding=KVHolding(layout=LAYOUT, shard=KVShard.whole(LAYOUT)),
            staging=None,
            lease_s=30.0,
            channel=cast(Any, None),
            stub=cast(Any, SlowSource()),
            link=cast(Any, type("Link", (), {"transport": "NONE"})()),
            statistics=PeerStatistics("source", transport="NONE", why=""),
        )
        pending = PendingTransfer("t", [0], on_decided=lambda _: None, on_ended=lambda _: None)
        strand = pending.strand("t")
        with concurrent.futures.ThreadPoolExecutor(1) as executor:
            published = PublishedBlocks(epoch=1, source_layout=LAYOUT, into=[0], skip_blocks=0)
            lander = Lander(link=peer.link, pool=memoryview(b""), layout=LAYOUT, part_bytes=1, in_flight=InFlight(1))
            part = Part(peer, cast(Any, None), published, lander)
            pull = Pull(part, strand, executor, Terms(deadline=Deadline.after(60.0), progress_timeout_s=5.0))
            pending.begin(pull.run(), deadline_s=60.0, late=lambda: TransferTimeout("late"))
            landed = await pending.outcome()
            await pending.ended()
        assert (landed.first_token, strand.transfer.phase) == (7, DestinationPhase.LANDED)
        assert pending.is_quiet

    run_in_virtual_time(play())
