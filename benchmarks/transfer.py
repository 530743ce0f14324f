"""Moving KV between two processes: GB/s as a share of memcpy, what checksums cost, and what overlap hides.

    python -m benchmarks.transfer

Scattered blocks, 512 MiB, pools that were touched before. Shares compare the best of five with the best of five in the
same run: a shared machine varies by a quarter from minute to minute. The overlap part publishes 1,500 tokens at the
pace of a prefill that is slept, so the copy has a core for itself; `benchmarks.overlap` does it with real prefill.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
import statistics
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Final

from benchmarks import report
from benchmarks.report import Row
from disaggregated import rpc
from disaggregated.kv_layout import KVLayout
from disaggregated.v1 import kv_pb2, kv_pb2_grpc
from kvtransfer import Region, TransferDestination
from kvtransfer.checksum import block_checksums
from kvtransfer.deadline import Deadline
from kvtransfer.region import copy_bytes
from kvtransfer.runs import run_pairs
from kvtransfer.transport import BlockRead, DestinationTransport, Offer, OurEnd, PeerLink, ReadStop, SourceIdentity
from kvtransfer.transports.shm import ShmTransport, host_key
from kvtransfer.transports.tcp import TcpTransport
from tests.support.kv_pools import FINGERPRINT, destination
from tests.support.kv_source import RemoteSource, remote_source

LLAMA_8B: Final = KVLayout(num_layers=32, num_kv_heads=8, head_dim=128, block_size=32, dtype="bfloat16", num_blocks=128)
SMOLLM2: Final = KVLayout(num_layers=30, num_kv_heads=3, head_dim=64, block_size=32, dtype="float32", num_blocks=364)
NUM_RUNS: Final = 5
NUM_TOKENS: Final = 1500
TOKENS_PER_S: Final = 1500.0
PART_BYTES: Final = 16 << 20


@dataclasses.dataclass
class Measured:
    """Seconds for all blocks of the pool, one a run."""

    memcpy: list[float] = dataclasses.field(default_factory=list)
    raw: list[float] = dataclasses.field(default_factory=list)
    verified: list[float] = dataclasses.field(default_factory=list)
    checksums: list[float] = dataclasses.field(default_factory=list)


def scattered(layout: KVLayout, seed: int) -> list[int]:
    return random.Random(seed).sample(range(layout.num_blocks), layout.num_blocks)


def seconds(work: Callable[[], object]) -> float:
    begin_s = time.perf_counter()
    work()
    return time.perf_counter() - begin_s


def copy_within(source: Region, into: Region, layout: KVLayout) -> None:
    """The yardstick: the same scattered copy between two pools of one process."""
    pairs = list(run_pairs(scattered(layout, 1), scattered(layout, 2)))
    for layer in range(layout.num_layers):
        for pair in pairs:
            begin, end = layout.offset(layer, pair.source), layout.offset(layer, pair.into)
            copy_bytes(into.base_address + end, source.base_address + begin, pair.count * layout.block_bytes)


@dataclasses.dataclass(frozen=True)
class RawReader:
    """A transport by itself: no checksum, no waiting for chunks."""

    source: RemoteSource
    stub: kv_pb2_grpc.KVSourceAsyncStub
    link: PeerLink
    layout: KVLayout

    async def read_all(self, transfer_id: str) -> float:
        """Seconds for all blocks of a transfer that is published already."""
        follow = self.stub.Follow(kv_pb2.FollowRequest(transfer_id=transfer_id, epoch=self.source.epoch))
        publication = await anext(aiter(follow))
        into = scattered(self.layout, 2)
        step = max(1, PART_BYTES // (self.layout.block_bytes * self.layout.num_layers))

        def read() -> None:
            for begin in range(0, self.layout.num_blocks, step):
                order = BlockRead(
                    lease_key=publication.lease_key,
                    epoch=self.source.epoch,
                    source=tuple(publication.block_ids[begin : begin + step]),
                    into=tuple(into[begin : begin + step]),
                    layers=range(self.layout.num_layers),
                )
                self.link.read(order, stop=ReadStop(), deadline=Deadline.after(60))

        took_s = await asyncio.to_thread(seconds, read)
        follow.cancel()
        return took_s


@contextlib.asynccontextmanager
async def raw_reader(
    source: RemoteSource, transport: DestinationTransport, layout: KVLayout
) -> AsyncIterator[RawReader]:
    async with rpc.open_channel(source.address) as channel:
        stub = kv_pb2_grpc.KVSourceStub(channel)
        request = kv_pb2.ConnectRequest(
            peer_id="bench", fingerprint=FINGERPRINT, layout=layout.to_proto(), transports=[transport.name]
        )
        reply = await stub.Connect(request)
        offer = Offer(name=transport.name, address=reply.offers[0].address, host_key=host_key())
        identity = SourceIdentity(instance_id=reply.instance_id, epoch=reply.epoch, layout=layout)
        link = await asyncio.to_thread(transport.connect, offer, identity, deadline=Deadline.after(5))
        yield RawReader(source, stub, link, layout)
        await asyncio.to_thread(link.close, deadline=Deadline.after(5))


async def measure(name: str, layout: KVLayout) -> Measured:
    found = Measured()
    async with contextlib.AsyncExitStack() as stack:
        source = await stack.enter_async_context(remote_source(layout))
        here, into = (stack.enter_context(Region.allocate(layout.pool_bytes)) for _ in range(2))
        here.buffer[:] = into.buffer[:] = b"\1" * layout.pool_bytes
        landing = await stack.enter_async_context(destination(into, layout, backend=name, progress_timeout_s=5))
        ours = OurEnd(region=into, layout=layout, peer_id="bench")
        transport: DestinationTransport = ShmTransport(ours) if name == "SHM" else TcpTransport(ours)
        reader = await stack.enter_async_context(raw_reader(source, transport, layout))
        for run in range(NUM_RUNS + 1):
            for kind in ("raw", "verified"):
                await source.call("open", f"{kind}{run}")
                await source.call("finish", f"{kind}{run}", scattered(layout, 1), 32 * layout.num_blocks, 1)
            raw_s = await reader.read_all(f"raw{run}")
            landed = await landing.pull(source.ticket(f"verified{run}"), scattered(layout, 2), deadline_s=60)
            if run == 0:
                continue  # Pages and connections are made in the first.
            found.raw.append(raw_s)
            found.verified.append(landed.transfer_s)
            found.memcpy.append(seconds(lambda: copy_within(here, into, layout)))
            found.checksums.append(seconds(lambda: block_checksums(into.buffer, layout, range(layout.num_blocks))))
    return found


def rows_of(name: str, shape: str, layout: KVLayout, found: Measured) -> list[Row]:
    gigabytes = layout.pool_bytes / 1e9

    def line(what: str, took: Sequence[float]) -> Row:
        best, usual = gigabytes / min(took), gigabytes / statistics.median(took)
        share = min(found.memcpy) / min(took)
        return Row(
            what=f"{shape}, {name}: {what}", seen=f"{best:.2f} GB/s best, {usual:.2f} median; {share:.2f} of memcpy"
        )

    return [
        line("memcpy within one process", found.memcpy),
        line("read", found.raw),
        line("read, verified", found.verified),
        line("checksums alone", found.checksums),
    ]


async def exposed(landing: TransferDestination, source: RemoteSource, name: str, chunk: int, *, overlap: bool) -> float:
    """Seconds from the last publication to the last block verified."""
    await source.call("open", name)
    table, into = scattered(SMOLLM2, 3)[:47], scattered(SMOLLM2, 4)[:47]
    pulling = asyncio.create_task(landing.pull(source.ticket(name), into, deadline_s=30, overlap=overlap))
    await source.call("prefill", name, table, [NUM_TOKENS, chunk, TOKENS_PER_S])
    return (await pulling).exposed_s


async def measure_overlap(backend: str) -> list[Row]:
    rows = []
    async with contextlib.AsyncExitStack() as stack:
        source = await stack.enter_async_context(remote_source(SMOLLM2))
        into = stack.enter_context(Region.allocate(SMOLLM2.pool_bytes))
        into.buffer[:] = b"\1" * SMOLLM2.pool_bytes
        landing = await stack.enter_async_context(destination(into, SMOLLM2, backend=backend, progress_timeout_s=5))
        await exposed(landing, source, "warm", 512, overlap=True)
        for chunk in (64, 256):
            took: dict[bool, list[float]] = {True: [], False: []}
            for run in range(NUM_RUNS):
                for overlap, each in took.items():
                    name = f"{chunk}-{run}-{overlap}"
                    each.append(await exposed(landing, source, name, chunk, overlap=overlap))
            hidden = statistics.median(took[False]) / statistics.median(took[True])
            seen = f"{report.spread(took[True], 'ms', scale=1e3)}; {report.spread(took[False], 'ms', scale=1e3)}"
            what = f"{backend}, {NUM_TOKENS} tokens in chunks of {chunk}: exposed, pulled while computing; after"
            rows.append(Row(what=what, seen=f"{seen}; {hidden:.1f} times less", bar="less", holds=hidden > 1))
    return rows


async def main() -> None:
    rows: list[Row] = []
    for shape, layout in (("Llama-3-8B", LLAMA_8B), ("SmolLM2-135M", SMOLLM2)):
        for name in ("SHM", "TCP"):
            rows += rows_of(name, shape, layout, await measure(name, layout))

    for name in ("TCP", "SHM"):
        rows += await measure_overlap(name)
    report.write("transfer", "KV transfer between two processes", rows)


if __name__ == "__main__":
    asyncio.run(main())
