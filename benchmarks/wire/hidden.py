"""What pulling while the prompt is still computed hides. The prefill is slept, so the copy has a core for itself;
`benchmarks.overlap` does it with a real one."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
from typing import Final

from benchmarks import report
from benchmarks.report import Row
from benchmarks.wire.ours import PROGRESS_TIMEOUT_S
from benchmarks.wire.shapes import SMOLLM2, scattered, touched
from kvtransfer import Region, TransferDestination
from tests.support.kv_pools import destination
from tests.support.kv_source import RemoteSource, remote_source

NUM_TOKENS: Final = 1500
TOKENS_PER_S: Final = 1500.0


async def exposed(landing: TransferDestination, source: RemoteSource, name: str, chunk: int, *, overlap: bool) -> float:
    """Seconds from the last publication to the last block verified."""
    await source.call("open", name)
    table, into = scattered(SMOLLM2, 3, 47), scattered(SMOLLM2, 4, 47)
    pulling = asyncio.create_task(landing.pull(source.ticket(name), into, deadline_s=30, overlap=overlap))
    await source.call("prefill", name, table, [NUM_TOKENS, chunk, TOKENS_PER_S])
    return (await pulling).exposed_s


async def measure(backend: str, num_rounds: int) -> list[Row]:
    rows = []
    async with contextlib.AsyncExitStack() as stack:
        source = await stack.enter_async_context(remote_source(SMOLLM2))
        into = touched(stack.enter_context(Region.allocate(SMOLLM2.pool_bytes)))
        landing = await stack.enter_async_context(
            destination(into, SMOLLM2, backend=backend, progress_timeout_s=PROGRESS_TIMEOUT_S)
        )
        await exposed(landing, source, "warm", 512, overlap=True)
        for chunk in (64, 256):
            took: dict[bool, list[float]] = {True: [], False: []}
            for run in range(num_rounds):
                for overlap, each in took.items():
                    each.append(await exposed(landing, source, f"{chunk}-{run}-{overlap}", chunk, overlap=overlap))
            hidden = statistics.median(took[False]) / statistics.median(took[True])
            seen = f"{report.spread(took[True], 'ms', scale=1e3)}; {report.spread(took[False], 'ms', scale=1e3)}"
            what = f"{backend}, {NUM_TOKENS} tokens in chunks of {chunk}: exposed, pulled while computing; after"
            rows.append(Row(what=what, seen=f"{seen}; {hidden:.1f} times less", bar="less", holds=hidden > 1))
    return rows
