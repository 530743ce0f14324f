"""Mooncake's transfer engine over TCP, in an environment of its own (`python -m benchmarks.peers --only mooncake`).

Both ends are children that import nothing of ours: this file is run by Mooncake's Python, too. The source writes, in
batches, since the engine refuses too many blocks at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from benchmarks.peers import Mooncake
    from benchmarks.wire.children import Child
    from disaggregated.kv_layout import KVLayout

BATCH_BLOCKS = 512
FILL = 7


class MooncakeTcp:
    """The source drives; the destination's memory is only written."""

    name = "Mooncake over tcp"

    def __init__(self, source: Child, destination: Child) -> None:
        self._source, self._destination = source, destination

    def pids(self) -> Sequence[int]:
        return [self._source.pid, self._destination.pid]

    async def prepare(self) -> None:
        """Nothing."""

    async def transfer(self) -> float:
        return float(await self._source.ask("write"))

    async def check(self) -> None:
        """Raises when the bytes are not there: so that a figure is never of nothing."""
        assert await self._destination.ask("is_filled"), "Mooncake said that it was done, and the bytes are not there"


@contextlib.asynccontextmanager
async def mooncake_tcp(layout: KVLayout, found: Mooncake) -> AsyncIterator[MooncakeTcp]:
    from benchmarks.wire import children, shapes

    def child(role: str) -> contextlib.AbstractAsyncContextManager[Child]:
        environ = {"LD_LIBRARY_PATH": found.libraries, "MC_LOG_LEVEL": "ERROR"}
        return children.child(__file__, role, str(layout.pool_bytes), python=found.python, environ=environ)

    sides = {"source": shapes.SOURCE_SEED, "destination": shapes.INTO_SEED}
    offsets = {
        role: [begin for begin, _ in shapes.pieces(layout, shapes.scattered(layout, seed))]
        for role, seed in sides.items()
    }
    async with child("source") as source, child("destination") as destination:
        await source.answer()
        place = await destination.answer()
        await source.ask("prepare", layout.block_bytes, offsets["source"], place, offsets["destination"])
        made = MooncakeTcp(source, destination)
        await made.transfer()
        await made.check()
        yield made


class End:
    """One process of Mooncake: its memory, registered."""

    def __init__(self, role: str, num_bytes: int) -> None:
        from mooncake.engine import TransferEngine  # type: ignore[import-not-found]

        self.memory = ctypes.create_string_buffer(num_bytes)
        self.base = ctypes.addressof(self.memory)
        ctypes.memset(self.base, FILL if role == "source" else 1, num_bytes)
        self.engine = TransferEngine()
        assert self.engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0, "no transfer engine"
        assert self.engine.register_memory(self.base, num_bytes) == 0, "memory was not registered"

    def place(self) -> list[Any]:
        return [f"127.0.0.1:{self.engine.get_rpc_port()}", self.base]

    def prepare(self, block_bytes: int, ours: list[int], place: list[Any], theirs: list[int]) -> None:
        self.peer, base = place
        self.size = block_bytes
        self.ours = [self.base + offset for offset in ours]
        self.theirs = [base + offset for offset in theirs]

    def write(self) -> float:
        begin_s = time.perf_counter()
        for begin in range(0, len(self.ours), BATCH_BLOCKS):
            ours, theirs = self.ours[begin : begin + BATCH_BLOCKS], self.theirs[begin : begin + BATCH_BLOCKS]
            outcome = self.engine.batch_transfer_sync_write(self.peer, ours, theirs, [self.size] * len(ours))
            assert outcome == 0, f"batch_transfer_sync_write says {outcome}"
        return time.perf_counter() - begin_s

    def is_filled(self) -> bool:
        view = memoryview(self.memory).cast("B")
        return all(view[at] == FILL for at in range(0, len(view), 4096))


def main(role: str, num_bytes: int) -> None:
    answers = os.dup(1)
    os.dup2(2, 1)  # The engine prints; only answers go to standard output.

    def say(value: object) -> None:
        os.write(answers, json.dumps(value).encode() + b"\n")

    end = End(role, num_bytes)
    say(end.place())
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        say(getattr(end, name)(*arguments))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
