"""Our own transports between two processes: a source as the tests have it, and this process as the destination."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import statistics
import time
from collections.abc import AsyncIterator, Sequence

from benchmarks.wire import shapes
from benchmarks.wire.contender import ourselves
from disaggregated import rpc
from disaggregated.kv_layout import KVLayout
from disaggregated.v1 import kv_pb2, kv_pb2_grpc
from kvtransfer import Region, TransferDestination, registry
from kvtransfer.checksum import block_sums
from kvtransfer.deadline import Deadline
from kvtransfer.transport import BlockRead, Offer, OurEnd, PeerLink, ReadStop, SourceIdentity
from kvtransfer.transports.unix_port import host_key
from tests.support.kv_pools import FINGERPRINT, destination
from tests.support.kv_source import RemoteSource, remote_source

PROGRESS_TIMEOUT_S = 5.0


@dataclasses.dataclass(slots=True)
class Ours:
    """Everything that a request goes through: publications, leases, parts, and every block verified."""

    name: str
    source: RemoteSource
    landing: TransferDestination
    layout: KVLayout
    number: int = 0
    transfer_id: str = ""

    def pids(self) -> Sequence[int]:
        return [ourselves(), self.source.child.pid]

    async def prepare(self) -> None:
        self.number += 1
        self.transfer_id = f"{self.name}-{self.number}"
        num_tokens = self.layout.block_size * self.layout.num_blocks
        blocks = shapes.scattered(self.layout, shapes.SOURCE_SEED)
        await self.source.call("open", self.transfer_id)
        await self.source.call("finish", self.transfer_id, blocks, num_tokens, 1)

    async def transfer(self) -> float:
        into = shapes.scattered(self.layout, shapes.INTO_SEED)
        landed = await self.landing.pull(self.source.ticket(self.transfer_id), into, deadline_s=60)
        assert landed.num_bytes == self.layout.pool_bytes, f"{landed.num_bytes} bytes travelled"
        return landed.transfer_s


@contextlib.asynccontextmanager
async def ours(transport: str, layout: KVLayout, into: Region) -> AsyncIterator[Ours]:
    async with (
        remote_source(layout) as source,
        destination(into, layout, backend=transport, progress_timeout_s=PROGRESS_TIMEOUT_S) as landing,
    ):
        yield Ours(f"ours, {transport}", source, landing, layout)


async def latencies(transport: str, num_reads: int) -> list[float]:
    """Seconds of each read of one 64 KiB block, verified: from a worker thread's call to its return."""
    layout = shapes.ONE_BLOCK
    async with remote_source(layout) as source, rpc.open_channel(source.address) as channel:
        with Region.allocate(layout.pool_bytes) as into:
            shapes.touched(into)
            stub = kv_pb2_grpc.KVSourceStub(channel)
            await source.call("open", "t")
            await source.call("finish", "t", list(range(layout.num_blocks)), layout.block_size * layout.num_blocks, 1)
            identity, offer = await _connect(stub, layout, transport)
            us = OurEnd(region=into, layout=layout, peer_id="bench", progress_timeout_s=PROGRESS_TIMEOUT_S)
            ways = registry.load(transport).make_transport(us)
            link = await asyncio.to_thread(ways.connect, offer, identity, deadline=Deadline.after(5))
            follow = stub.Follow(kv_pb2.FollowRequest(transfer_id="t", epoch=source.epoch, peer_id="bench"))
            publication = await anext(aiter(follow))
            found = await asyncio.to_thread(_read_one_by_one, link, layout, publication, num_reads)
            follow.cancel()
            await asyncio.to_thread(link.close, deadline=Deadline.after(5))
            return found


async def _connect(
    stub: kv_pb2_grpc.KVSourceAsyncStub, layout: KVLayout, transport: str
) -> tuple[SourceIdentity, Offer]:
    request = kv_pb2.ConnectRequest(
        peer_id="bench", fingerprint=FINGERPRINT, layout=layout.to_proto(), transports=[transport]
    )
    reply = await stub.Connect(request)
    offer = next(offer for offer in reply.offers if offer.name == transport)
    identity = SourceIdentity(instance_id=reply.instance_id, epoch=reply.epoch, layout=layout)
    return identity, Offer(name=transport, address=offer.address, host_key=host_key())


def _read_one_by_one(link: PeerLink, layout: KVLayout, publication: kv_pb2.Publication, num_reads: int) -> list[float]:
    found = []
    for number in range(num_reads + 50):
        block = number % layout.num_blocks
        begin_s = time.perf_counter()
        sums = block_sums(1, layout)
        order = BlockRead(
            lease_key=publication.lease_key,
            epoch=publication.epoch,
            source=(publication.block_ids[block],),
            into=(layout.num_blocks - 1 - block,),
            layers=range(1),
            sums=sums,
        )
        link.read(order, stop=ReadStop(), deadline=Deadline.after(60))
        assert sums.values() == (publication.checksums[block],), "not what was published"
        found.append(time.perf_counter() - begin_s)
    return found[50:]


def median_us(seconds: Sequence[float]) -> float:
    return statistics.median(seconds) * 1e6
