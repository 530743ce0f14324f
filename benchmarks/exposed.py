"""What prefill does not hide of a transfer: a 2,000-token prompt over a link of a quarter of its natural speed.

    python -m benchmarks.exposed [int8] [float32] [slept]

Two processes, and a relay between them that limits the link; real prefill of the bundled model on one thread, and one
that is slept, so that the transfer has the cores for itself. Three ways take turns: layers of a chunk as they are
computed, whole chunks, everything after the prefill. Exposed is from the last publication received to the last block
verified; one chunk's worth is the time in which that link carries the bytes of one chunk.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import statistics
import sys
from collections.abc import AsyncIterator
from typing import Final

from benchmarks import report
from benchmarks.exposed_source import CHUNK_SIZE, EPOCH, NUM_TOKENS, SLEPT
from benchmarks.report import Row
from benchmarks.wire.children import Child, child
from disaggregated.config.server import CacheTransceiverConfig
from disaggregated.kv_layout import KVLayout
from disaggregated.v1 import kv_pb2
from kvtransfer import DestinationOptions, Landed, PoolIdentity, Preference, Region, TransferDestination
from tests.support.kv_pools import SomeTicket

KINDS: Final = ("int8", "float32", SLEPT)
NUM_RUNS: Final = 5
SLOWER: Final = 4
DEFAULT_GROUP_BYTES: Final = CacheTransceiverConfig().layer_group_bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Way:
    name: str
    group_bytes: int
    overlap: bool = True


WAYS: Final = (
    Way("groups of layers, while the next is computed", DEFAULT_GROUP_BYTES),
    Way("whole chunks, while the next is computed", 0),
    Way("everything after the prefill", 0, overlap=False),
)


@dataclasses.dataclass(slots=True)
class Link:
    """A source and a destination with a link of some speed between them."""

    source: Child
    address: str
    landing: TransferDestination
    layout: KVLayout
    instance_id: str
    names: itertools.count[int]

    @property
    def table(self) -> list[int]:
        return list(range(self.layout.num_blocks_for(NUM_TOKENS)))

    def ticket(self) -> SomeTicket:
        return SomeTicket(self.address, f"t{next(self.names)}", instance_id=self.instance_id, epoch=EPOCH)

    async def bytes_per_s(self) -> float:
        """Of a prompt that is computed already."""
        ticket = self.ticket()
        await self.source.ask("publish", ticket.transfer_id)
        landed = await self.landing.pull(ticket, self.table, deadline_s=60)
        return landed.num_bytes / landed.transfer_s

    async def stream(self, way: Way, seed: int) -> tuple[Landed, float]:
        """What landed, and the seconds of its prefill."""
        ticket = self.ticket()
        prefill = asyncio.create_task(self.source.ask("prefill", ticket.transfer_id, way.group_bytes, seed))
        landed = await self.landing.pull(ticket, self.table, deadline_s=60, overlap=way.overlap)
        return landed, float(await prefill)


@contextlib.asynccontextmanager
async def linked(
    source: Child, told: dict[str, object], kind: str, names: itertools.count[int], *, bytes_per_s: float | None
) -> AsyncIterator[Link]:
    """None: without a relay."""
    layout = KVLayout.from_proto(kv_pb2.KVLayout.FromString(bytes.fromhex(str(told["layout"]))))
    async with contextlib.AsyncExitStack() as stack:
        port = 0
        if bytes_per_s is not None:
            command = ("-m", "tests.support.slow_link", "127.0.0.1", str(told["port"]), str(bytes_per_s))
            port = await (await stack.enter_async_context(child(*command))).answer()
        await source.ask("offer", port)
        region = stack.enter_context(Region.allocate(layout.pool_bytes, populate=True))
        landing = TransferDestination(
            region,
            PoolIdentity.whole(layout, instance_id=f"benchmark-{port}", epoch=1, fingerprint=kind),
            DestinationOptions(preference=Preference("TCP"), progress_timeout_s=20),
        )
        stack.push_async_callback(landing.close)
        yield Link(source, str(told["address"]), landing, layout, kind, names)


async def exposed_by_way(link: Link) -> dict[Way, list[float]]:
    """Seconds of each run; the ways take turns."""
    seen: dict[Way, list[float]] = {way: [] for way in WAYS}
    for run in range(NUM_RUNS):
        for way, each in seen.items():
            landed, _ = await link.stream(way, run)
            each.append(landed.exposed_s)
    return seen


async def rows_of(kind: str) -> list[Row]:
    rows, names = [], itertools.count()
    async with child("-m", "benchmarks.exposed_source", kind) as source:
        told = await source.answer()
        async with linked(source, told, kind, names, bytes_per_s=None) as direct:
            speeds = [await direct.bytes_per_s() for _ in range(2 + NUM_RUNS)][2:]
            natural = statistics.median(speeds)
            chunk_bytes = CHUNK_SIZE * direct.layout.token_bytes
            _, prefill_s = await direct.stream(WAYS[-1], 99)
            mebibytes = NUM_TOKENS * direct.layout.token_bytes / 2**20
            what = f"{kind}: natural speed of the link; {mebibytes:.0f} MiB; prefill"
            rows.append(Row(what=what, seen=f"{natural / 1e9:.2f} GB/s; {prefill_s:.2f} s"))
            for way, seconds in (await exposed_by_way(direct)).items():
                rows.append(
                    Row(what=f"{kind}, natural speed, {way.name}", seen=report.spread(seconds, "ms", scale=1e3))
                )
        async with linked(source, told, kind, names, bytes_per_s=natural / SLOWER) as slow:
            worth_s = chunk_bytes / (natural / SLOWER)
            rows.append(Row(what=f"{kind}: one chunk's worth at 1/{SLOWER} of that", seen=f"{worth_s * 1e3:.1f} ms"))
            for way, seconds in (await exposed_by_way(slow)).items():
                rows.append(_judged(f"{kind}, 1/{SLOWER} of it", way, seconds, worth_s))
    return rows


def _judged(link: str, way: Way, seconds: list[float], worth_s: float) -> Row:
    """What servers do by default is judged; the others are there to compare it with."""
    found = statistics.median(seconds) / worth_s
    seen, is_ours = f"{report.spread(seconds, 'ms', scale=1e3)}; {found:.2f} chunks' worth", way.group_bytes > 0
    bar, holds = ("at most 1", found <= 1) if is_ours else ("", None)
    return Row(what=f"{link}, {way.name}", seen=seen, bar=bar, holds=holds)


async def main() -> None:
    rows = [row for kind in sys.argv[1:] or KINDS for row in await rows_of(kind)]
    report.write("exposed", f"Exposed transfer time of a {NUM_TOKENS}-token prompt in chunks of {CHUNK_SIZE}", rows)


if __name__ == "__main__":
    asyncio.run(main())
