"""One end of a transfer as a process that can be killed and frozen, and obeys one JSON line after another.

    python -m tests.support.fault_lab.actor HUB_PORT NAME SETTINGS

It dials the hub, so that it does not matter who started it (mpirun, for example). Commands run side by side; each is
answered by its number. It ends when the hub hangs up.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Any

import psutil

from disaggregated.errors import DisaggregatedError
from disaggregated.kv_layout import KVLayout
from disaggregated.security import membership
from disaggregated.security.tls import TlsFiles
from kvtransfer import Preference, Region, registry
from kvtransfer.deadline import Deadline
from kvtransfer.destination.pending import PendingTransfer
from kvtransfer.transports import mpi_world
from tests.support.kv_pools import SomeTicket, blocks_of, destination, fill, flip_bit, served_source

LINE_BYTES_MAX = 1 << 20
QUIET_WITHIN_S = 5.0
"""For a read that its library cannot stop."""


async def preferred(transport: str) -> Preference:
    """Of a process that is asked for nothing before its MPI world is complete, as servers usually are."""
    if transport != "MPI":
        return Preference(transport)
    if registry.missing(transport) is None:
        await asyncio.to_thread(mpi_world.our_world().join, deadline=Deadline.after(mpi_world.JOIN_TIMEOUT_S))
    return Preference(transport, fallback=True)


class SourceActor:
    """Offers a pool of noise. Its transfers are named by the caller."""

    def __init__(self, stack: Any, settings: dict[str, Any]) -> None:
        self.layout = KVLayout(**settings["layout"])
        self.region = stack.enter_context(Region.allocate(self.layout.pool_bytes))
        fill(self.region, seed=1)

    async def start(self, stack: Any, settings: dict[str, Any]) -> dict[str, Any]:
        preference = await preferred(settings["transport"])
        served = served_source(
            self.region,
            self.layout,
            preference=preference,
            epoch=settings["epoch"],
            port=settings["port"],
            lease_s=settings["lease_s"],
        )
        self.served = await stack.enter_async_context(served)
        return {"address": self.served.address, "pid": os.getpid()}

    async def open(self, transfer_id: str, num_tokens: int) -> None:
        self.served.source.open(transfer_id, num_tokens=num_tokens)

    async def publish(self, transfer_id: str, table: Sequence[int], num_tokens: int) -> bool:
        return bool(self.served.source.publish(transfer_id, table, num_tokens))

    async def finish(self, transfer_id: str, table: Sequence[int], num_tokens: int) -> bool:
        return bool(self.served.source.finish(transfer_id, table, num_tokens, 1))

    async def flip(self, block_id: int) -> None:
        """One bit of what was published, in our own memory; the second call for a block mends it."""
        flip_bit(self.region, self.layout, layer=0, block_id=block_id)

    async def num_live(self) -> int:
        self.served.source.check_integrity()
        return len(self.served.source.ledger())


class DestinationActor:
    """A pool of zeroes, and who owns its blocks: one pull at a time, or somebody else."""

    def __init__(self, stack: Any, settings: dict[str, Any]) -> None:
        self.layout = KVLayout(**settings["layout"])
        self.region = stack.enter_context(Region.allocate(self.layout.pool_bytes))
        self.pending: PendingTransfer | None = None

    async def start(self, stack: Any, settings: dict[str, Any]) -> dict[str, Any]:
        preference = await preferred(settings["transport"])
        self.landing = await stack.enter_async_context(
            destination(
                self.region,
                self.layout,
                preference=preference,
                progress_timeout_s=settings["progress_timeout_s"],
            )
        )
        return {"pid": os.getpid()}

    async def pull(self, ticket: dict[str, Any], into: Sequence[int], deadline_s: float) -> dict[str, Any]:
        begin_s = time.monotonic()
        self.pending = self.landing.start(SomeTicket(**ticket), into, deadline_s=deadline_s)
        try:
            landed = await self.pending.outcome()
        except DisaggregatedError as error:
            return {"outcome": type(error).__name__, "says": str(error), "seconds": time.monotonic() - begin_s}
        return {"outcome": "landed", "says": landed.transport, "seconds": time.monotonic() - begin_s}

    async def num_wrong(self, table: Sequence[int], into: Sequence[int]) -> int:
        """Bytes of ours that are not those of the source's noise."""
        with Region.allocate(self.layout.pool_bytes) as expected:
            fill(expected, seed=1)
            theirs = blocks_of(expected, self.layout, table)
        return int((blocks_of(self.region, self.layout, into) != theirs).sum())

    async def give_away(self, into: Sequence[int]) -> None:
        """The next owner of the blocks gets them when the last transfer is quiet, and writes into them."""
        if self.pending is not None:
            async with asyncio.timeout(QUIET_WITHIN_S):
                await self.pending.ended()
        for block in into:
            self._view(block, bytes([0x5A]))

    async def num_overwritten(self, into: Sequence[int]) -> int:
        """Bytes that the next owner did not write."""
        return int((blocks_of(self.region, self.layout, into) != 0x5A).sum())

    def _view(self, block: int, byte: bytes) -> None:
        for layer in range(self.layout.num_layers):
            begin = self.layout.offset(layer, block)
            self.region.buffer[begin : begin + self.layout.block_bytes] = byte * self.layout.block_bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Held:
    """What this process holds: it must not grow with the number of transfers."""

    descriptors: int
    threads: int
    mapped_bytes: int


def held() -> Held:
    """The largest mappings count: pools, and what peers share; the allocator's own arenas come and go."""
    process = psutil.Process()
    with open("/proc/self/maps", encoding="ascii") as maps:
        shared = [line.split() for line in maps if "memfd:disaggregated-kv" in line]
    spans = [[int(end, 16) for end in line[0].split("-")] for line in shared]
    return Held(process.num_fds(), process.num_threads(), sum(end - begin for begin, end in spans))


async def main() -> None:
    import contextlib

    membership.join_as_told(secret_file="", tls=TlsFiles())
    port, name, settings = int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=LINE_BYTES_MAX)
    async with contextlib.AsyncExitStack() as stack:
        kind = SourceActor if settings["role"] == "source" else DestinationActor
        actor = kind(stack, settings)
        started = await actor.start(stack, settings)
        writer.write(json.dumps({"name": name, **started}).encode() + b"\n")
        running: set[asyncio.Task[None]] = set()

        async def obey(number: int, command: str, arguments: Sequence[Any]) -> None:
            answer, mistake = None, ""
            try:
                answer = dataclasses.asdict(held()) if command == "held" else await getattr(actor, command)(*arguments)
            except Exception:  # noqa: BLE001 - the process's edge: the lab is told, and its test fails with this text
                mistake = traceback.format_exc()
            writer.write(json.dumps([number, answer, mistake]).encode() + b"\n")

        while line := await reader.readline():
            number, command, *arguments = json.loads(line)
            task = asyncio.create_task(obey(number, command, arguments))
            running.add(task)
            task.add_done_callback(running.discard)
        os._exit(0)  # The lab has gone; nobody is left to whom an orderly end would matter.


if __name__ == "__main__":
    asyncio.run(main())
