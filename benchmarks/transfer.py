"""Moving KV between two processes of this machine: beside memcpy, raw sockets, NIXL and Mooncake, in turns.

    make bench-transfer          python -m benchmarks.transfer [--quick]

512 MiB in scattered blocks of pools that were touched before. Every figure of ours is of a whole pull: publications,
leases, parts of 64 MiB, every block verified; the others move the bytes, and nothing more. Contenders of one table take
turns, so that a ratio compares minutes that are alike; figures are medians, CPU seconds are of both sides.
NIXL, UCX and Mooncake are measured where they are installed (`python -m benchmarks.peers`).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import importlib.util
import statistics
from collections.abc import Sequence
from typing import Final

from benchmarks import report
from benchmarks.peers import Peers
from benchmarks.report import Row
from benchmarks.wire import hidden, library, shapes, sockets
from benchmarks.wire.contender import Contender, Samples, ourselves, take_turns
from benchmarks.wire.mooncake_tcp import mooncake_tcp
from benchmarks.wire.ours import latencies, ours
from benchmarks.wire.ours_bare import SUMS_UP_VARIABLE
from disaggregated.kv_layout import KVLayout
from kvtransfer import Region
from kvtransfer.checksum import block_checksums

SHM_OF_MEMCPY: Final = {"Llama-3-8B": 0.90, "SmolLM2-135M": 0.85}
SHAPES: Final = {"Llama-3-8B": shapes.LLAMA_8B, "SmolLM2-135M": shapes.SMOLLM2}
TCP_OF_RAW: Final = 1.0
TCP_OF_PEERS: Final = 1.5
OURS_OF_BARE: Final = 0.95
LATENCY_US_MAX: Final = 60.0
CHECKSUM_SHARE_MAX: Final = 0.02
LIBRARIES: Final = {"UCX": "ucxx", "NIXL": "nixl_cu12"}
"""And the module that says that each is installed."""
BESIDE_PEERS: Final = "ours, TCP, beside peers"
OVER_TCP: Final = {"UCX_TLS": "tcp"}


@dataclasses.dataclass(frozen=True, slots=True)
class Memcpy:
    """The same bytes, from one pool of this process to another."""

    source: Region
    into: Region
    layout: KVLayout
    name: str = "memcpy"

    def pids(self) -> Sequence[int]:
        return [ourselves()]

    async def prepare(self) -> None:
        """Nothing."""

    async def transfer(self) -> float:
        return shapes.memcpy(self.source, self.into, self.layout)


@dataclasses.dataclass(frozen=True, slots=True)
class Table:
    """The samples of contenders that took turns over one layout."""

    shape: str
    num_bytes: int
    samples: dict[str, Samples]

    def ratio(self, name: str, of: str) -> float:
        """How many times as fast."""
        return self.samples[of].median_s / self.samples[name].median_s

    def row(self, name: str, *, bar: str = "", holds: bool | None = None, note: str = "") -> Row:
        sampled = self.samples[name]
        speeds = [self.num_bytes / 1e9 / seconds for seconds in sampled.seconds]
        cpu = sampled.cpu_per_gigabyte(self.num_bytes)
        seen = f"{report.spread(speeds, 'GB/s')}; {cpu:.2f} CPU s/GB{note}"
        return Row(what=f"{self.shape}: {name}", seen=seen, bar=bar, holds=holds)

    def rows(self) -> list[Row]:
        return [self.row(name) for name in self.samples]

    def verdict(self, name: str, of: str, at_least: float) -> Row:
        """`name` beside `of`."""
        found = self.ratio(name, of)
        what = f"{self.shape}: {name} ÷ {of}"
        return Row(what=what, seen=f"{found:.2f}", bar=f"≥ {at_least:.2f}", holds=found >= at_least)

    def cpu_verdict(self, name: str, of: str) -> Row:
        ours_s, theirs_s = (self.samples[each].cpu_per_gigabyte(self.num_bytes) for each in (name, of))
        what = f"{self.shape}: CPU s/GB of {name}, both sides; of {of}"
        return Row(what=what, seen=f"{ours_s:.3f}; {theirs_s:.3f}", bar="no higher", holds=ours_s <= theirs_s)


async def shared_memory(shape: str, num_rounds: int) -> list[Row]:
    layout = SHAPES[shape]
    async with contextlib.AsyncExitStack() as stack:
        here, into = (shapes.touched(stack.enter_context(Region.allocate(layout.pool_bytes))) for _ in range(2))
        contenders: list[Contender] = [Memcpy(here, into, layout)]
        contenders.append(await stack.enter_async_context(ours("SHM", layout, into)))
        table = Table(shape, layout.pool_bytes, await take_turns(contenders, num_rounds))
        second_pass = [await asyncio.to_thread(_second_pass, into, layout) for _ in range(num_rounds)]
    share = statistics.median(second_pass) / table.samples["ours, SHM"].median_s
    return [
        *table.rows(),
        table.verdict("ours, SHM", "memcpy", SHM_OF_MEMCPY[shape]),
        table.cpu_verdict("ours, SHM", "memcpy"),
        Row(what=f"{shape}: a second pass of checksums would take, of the transfer", seen=f"{share:.0%}"),
    ]


def _second_pass(pool: Region, layout: KVLayout) -> float:
    """Also what publishing costs a source."""
    return shapes.seconds(lambda: block_checksums(pool.buffer, layout, range(layout.num_blocks)))


async def raw_sockets(num_rounds: int) -> list[Row]:
    shape = "Llama-3-8B"
    layout = SHAPES[shape]
    async with contextlib.AsyncExitStack() as stack:
        into = shapes.touched(stack.enter_context(Region.allocate(layout.pool_bytes)))
        contenders: list[Contender] = [await stack.enter_async_context(ours("TCP", layout, into))]
        raw = [await stack.enter_async_context(sockets.raw_sockets(way, layout, into)) for way in sockets.WAYS]
        table = Table(shape, layout.pool_bytes, await take_turns([*contenders, *raw], num_rounds))
    best = min(raw, key=lambda each: table.samples[each.name].median_s).name
    leanest = min(raw, key=lambda each: table.samples[each.name].cpu_per_gigabyte(layout.pool_bytes)).name
    verdicts = [table.verdict("ours, TCP", best, TCP_OF_RAW), table.cpu_verdict("ours, TCP", leanest)]
    return [*table.rows(), *verdicts]


async def peers_over_tcp(num_rounds: int) -> list[Row]:
    """Beside processes of theirs, some of which never sleep: slower for everybody than a table without them."""
    shape, peers = "Llama-3-8B", Peers.found()
    layout = SHAPES[shape]
    async with contextlib.AsyncExitStack() as stack:
        into = shapes.touched(stack.enter_context(Region.allocate(layout.pool_bytes)))
        others: list[Contender] = []
        if is_installed("NIXL"):
            nixl = await stack.enter_async_context(library.bare("NIXL", layout, OVER_TCP))
            others.append(dataclasses.replace(nixl, name="NIXL over tcp"))
        if peers.mooncake is not None:
            others.append(await stack.enter_async_context(mooncake_tcp(layout, peers.mooncake)))
        our_own = dataclasses.replace(await stack.enter_async_context(ours("TCP", layout, into)), name=BESIDE_PEERS)
        table = Table(shape, layout.pool_bytes, await take_turns([our_own, *others], num_rounds))
    return [*table.rows(), *(table.verdict(BESIDE_PEERS, each.name, TCP_OF_PEERS) for each in others)]


async def checksum_share(transport: str, num_rounds: int) -> list[Row]:
    """The same reads with running checksums and without."""
    shape = "Llama-3-8B"
    layout = SHAPES[shape]
    async with contextlib.AsyncExitStack() as stack:
        without = await stack.enter_async_context(library.ours_apart(transport, layout))
        summed = await stack.enter_async_context(library.ours_apart(transport, layout, {SUMS_UP_VARIABLE: "1"}))
        ways = [
            dataclasses.replace(without, name=f"{transport}, not verified"),
            dataclasses.replace(summed, name=f"{transport}, verified"),
        ]
        table = Table(shape, layout.pool_bytes, await take_turns(ways, num_rounds))
    share = table.ratio(ways[0].name, ways[1].name) - 1
    what = f"{shape}: {transport}, what verifying adds to the time of a transfer"
    bar, holds = f"< {CHECKSUM_SHARE_MAX:.0%}", share < CHECKSUM_SHARE_MAX
    return [*table.rows(), Row(what=what, seen=f"{share:+.1%}", bar=bar, holds=holds)]


async def bare_libraries(name: str, num_rounds: int) -> list[Row]:
    shape = "Llama-3-8B"
    layout = SHAPES[shape]
    async with contextlib.AsyncExitStack() as stack:
        ends = [await stack.enter_async_context(make(name, layout)) for make in (library.bare, library.ours_apart)]
        table = Table(shape, layout.pool_bytes, await take_turns(ends, num_rounds))
    return [*table.rows(), table.verdict(f"ours, {name}", f"{name} bare", OURS_OF_BARE)]


async def one_block(transport: str, num_reads: int, bar_us: float | None) -> Row:
    found = sorted(await latencies(transport, num_reads))
    median_us = statistics.median(found) * 1e6
    seen = f"{median_us:.0f} µs median ({found[0] * 1e6:.0f} best, {found[len(found) * 9 // 10] * 1e6:.0f} p90)"
    what = f"One block of 64 KiB, {transport}, verified"
    if bar_us is None:
        return Row(what=what, seen=seen)
    return Row(what=what, seen=seen, bar=f"< {bar_us:.0f} µs", holds=median_us < bar_us)


def is_installed(name: str) -> bool:
    return importlib.util.find_spec(LIBRARIES[name]) is not None


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two rounds, our own transports and raw sockets only")
    quick = parser.parse_args().quick
    num_rounds = 2 if quick else 7
    rows: list[Row] = []
    for shape in SHAPES:
        rows += await shared_memory(shape, num_rounds)
    rows += await raw_sockets(num_rounds)
    rows += await peers_over_tcp(num_rounds)
    rows += [await one_block("SHM", 500 if quick else 5000, LATENCY_US_MAX)]
    rows += [await one_block("TCP", 500 if quick else 5000, None)]
    if not quick:
        for transport in ("SHM", "TCP"):
            rows += await checksum_share(transport, num_rounds)
        for name in filter(is_installed, LIBRARIES):
            rows += await bare_libraries(name, num_rounds)
        for transport in ("TCP", "SHM"):
            rows += await hidden.measure(transport, num_rounds)
    left_out = [name for name in LIBRARIES if not is_installed(name)]
    notes = f"Not installed here, so not measured: {', '.join(left_out)}." if left_out else ""
    report.write("transfer-quick" if quick else "transfer", "KV transfer between two processes", rows, notes)


if __name__ == "__main__":
    asyncio.run(main())
