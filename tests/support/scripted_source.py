"""A source and the reads from it, both of which do one thing at a time, when a script says so; in virtual time.

What is real: `Pull`, `PendingTransfer`, the publications' checks, the machine. What is not: gRPC, threads and bytes.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import AsyncIterator, Callable
from typing import Any, cast

from disaggregated.errors import ChecksumMismatch, PeerLost, ServerLost, TransferTimeout
from disaggregated.kv_layout import KVLayout
from disaggregated.kv_shard import KVHolding, KVShard
from disaggregated.v1 import kv_pb2
from kvtransfer.deadline import Deadline
from kvtransfer.destination.joint import Part
from kvtransfer.destination.landing import Lander
from kvtransfer.destination.peer import PeerStatistics, SourcePeer
from kvtransfer.destination.pending import PendingTransfer, Strand
from kvtransfer.destination.published import PublishedBlocks
from kvtransfer.destination.pull import Pull, Terms
from kvtransfer.transport import SourceIdentity

LAYOUT = KVLayout(num_layers=1, num_kv_heads=1, head_dim=8, block_size=4, dtype="float32", num_blocks=8)
NUM_BLOCKS = 2


class ScriptedFollow:
    def __init__(self) -> None:
        self._items: asyncio.Queue[kv_pb2.Publication | Exception | None] = asyncio.Queue()

    async def __aiter__(self) -> AsyncIterator[kv_pb2.Publication]:
        while (item := await self._items.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item

    def send(self, item: kv_pb2.Publication | Exception | None) -> None:
        self._items.put_nowait(item)

    def cancel(self) -> None: ...


class ScriptedSource:
    """Implements the calls of a KVSource stub that a pull makes."""

    def __init__(self) -> None:
        self.follow = ScriptedFollow()
        self.is_alive = True
        self.lease_holds = True
        self.num_published = 0
        self.released: list[bool] = []
        self.may_answer = asyncio.Event()

    def publish(self) -> None:
        """One block more; the last one comes with the outcome."""
        number = self.num_published
        self.num_published += 1
        last = self.num_published == NUM_BLOCKS
        self.follow.send(
            kv_pb2.Publication(
                epoch=1,
                first_block=number,
                block_ids=[number],
                checksums=[number],
                lease_key=b"k" * 16,
                landing=kv_pb2.Landing(num_tokens=8, num_blocks=NUM_BLOCKS, first_token=7) if last else None,
            )
        )

    def Follow(self, request: kv_pb2.FollowRequest, *, timeout: float) -> ScriptedFollow:
        return self.follow

    async def Renew(self, request: kv_pb2.RenewRequest, *, timeout: float) -> kv_pb2.RenewReply:
        return kv_pb2.RenewReply(lease_s=30.0)

    async def Release(self, request: kv_pb2.ReleaseRequest, *, timeout: float) -> kv_pb2.ReleaseReply:
        if request.landed:
            await self.may_answer.wait()
        if not self.is_alive:
            raise ServerLost("it is gone")
        held, self.lease_holds = self.lease_holds, False
        if held:
            self.released.append(request.landed)
            self.follow.send(None)  # The stream ends with its lease, and overtakes the answer.
            for _ in range(5):
                await asyncio.sleep(0)
        return kv_pb2.ReleaseReply(lease_was_valid=held)


class ScriptedReads(concurrent.futures.Executor):
    """Each read runs, and moves nothing, until it is told how it ends; also one that was told to stop."""

    def __init__(self) -> None:
        self.running: concurrent.futures.Future[Any] | None = None
        self.num_begun = 0

    def submit(self, job: Callable[..., Any], /, *args: Any, **options: Any) -> concurrent.futures.Future[Any]:
        assert self.running is None, "two reads of one transfer at once"
        self.running = concurrent.futures.Future()
        self.running.set_running_or_notify_cancel()
        self.num_begun += 1
        return self.running

    def end(self, error: Exception | None = None) -> None:
        ended, self.running = self.running, None
        assert ended is not None, "no read is running"
        if error is None:
            ended.set_result(None)
        else:
            ended.set_exception(error)


class Scene:
    """One transfer that has begun."""

    def __init__(self, *, deadline_s: float = 1000.0, can_stop: bool = True) -> None:
        self.source = ScriptedSource()
        self.reads = ScriptedReads()
        self.num_decided = self.num_ended = 0
        self.pending = PendingTransfer("t", range(NUM_BLOCKS), on_decided=self._on_decided, on_ended=self._on_ended)
        self.strand = self.pending.strand("t", can_stop=can_stop)
        pull = self._pull(self.strand)
        self.pending.begin(pull.run(), deadline_s=deadline_s, late=self.late)

    def _on_decided(self, _: PendingTransfer) -> None:
        self.num_decided += 1

    def _on_ended(self, _: PendingTransfer) -> None:
        self.num_ended += 1

    def _pull(self, strand: Strand) -> Pull:
        peer = SourcePeer(
            address="host:1",
            our_id="destination",
            identity=SourceIdentity(instance_id="source", epoch=1, layout=LAYOUT),
            holding=KVHolding(layout=LAYOUT, shard=KVShard.whole(LAYOUT)),
            staging=None,
            lease_s=30.0,
            channel=cast(Any, None),
            stub=cast(Any, self.source),
            link=cast(Any, type("Link", (), {"transport": "SCRIPT"})()),
            statistics=PeerStatistics("source", transport="SCRIPT", why=""),
        )
        published = PublishedBlocks(epoch=1, source_layout=LAYOUT, into=range(NUM_BLOCKS), skip_blocks=0)
        part = Part(peer, cast(Any, None), published, cast(Lander, None))
        return Pull(part, strand, self.reads, Terms(deadline=Deadline.after(10_000.0), progress_timeout_s=5.0))

    def late(self) -> TransferTimeout:
        return TransferTimeout("late")

    async def settle(self) -> None:
        """Until nothing happens any more without the script."""
        for _ in range(25):
            await asyncio.sleep(0)

    async def close(self) -> None:
        self.pending.cancel()
        self.source.may_answer.set()
        if self.reads.running is not None:
            self.reads.end(PeerLost("the script is over"))
        await self.pending.ended()


DAMAGED = ChecksumMismatch("other bytes")
