"""UCX and NIXL, by themselves and behind our protocol: both ends are children, since no two libraries share a process.

bare("UCX", layout)      the library as its users drive it: the same chunks, no leases, no control socket, no stop
ours_apart("UCX", layout)    our transport, reads of 64 MiB parts as a pull makes them, without verification
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator, Sequence

from benchmarks.wire.children import Child, child
from disaggregated.kv_layout import KVLayout
from disaggregated.security import membership


@dataclasses.dataclass(frozen=True, slots=True)
class Apart:
    """A source and a destination; commands of both run at once."""

    name: str
    source: Child
    destination: Child

    def pids(self) -> Sequence[int]:
        return [self.source.pid, self.destination.pid]

    async def prepare(self) -> None:
        """Nothing: all blocks may be read, again and again."""

    async def transfer(self) -> float:
        _, took_s = await asyncio.gather(self.source.ask("serve"), self.destination.ask("take"))
        return float(took_s)


@contextlib.asynccontextmanager
async def bare(library: str, layout: KVLayout, environ: dict[str, str] | None = None) -> AsyncIterator[Apart]:
    async with _apart(f"{library} bare", f"{library.lower()}_bare", library, layout, environ) as ends:
        yield ends


@contextlib.asynccontextmanager
async def ours_apart(library: str, layout: KVLayout, environ: dict[str, str] | None = None) -> AsyncIterator[Apart]:
    async with _apart(f"ours, {library}", "ours_bare", library, layout, environ) as ends:
        yield ends


@contextlib.asynccontextmanager
async def _apart(
    name: str, module: str, library: str, layout: KVLayout, environ: dict[str, str] | None
) -> AsyncIterator[Apart]:
    shape = json.dumps(dataclasses.asdict(layout))
    told = {"UCX_NET_DEVICES": "lo", **membership.of_this_process().secret.for_child(), **(environ or {})}
    command = ("-m", f"benchmarks.wire.{module}")
    async with (
        child(*command, "source", library, shape, environ=told) as source,
        child(*command, "destination", library, shape, environ=told) as destination,
    ):
        await destination.ask("connect", await source.ask("describe"))
        await source.ask("connect", await destination.ask("describe"))
        yield Apart(name, source, destination)
