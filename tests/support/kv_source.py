"""A source of transfers as a process of its own, so that tests can kill, freeze and restart it.

    python -m tests.support.kv_source '{"layout": {...}, "epoch": 7, "port": 0, "lease_s": 30}'

It offers a pool of noise (`fill(seed=1)`), prints its address, then obeys one JSON line after another (a call of
TransferSource and its arguments), answered by one JSON line each. The end of its input ends it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from disaggregated.kv_layout import KVLayout
from disaggregated.security.membership import join_as_told
from disaggregated.security.tls import TlsFiles
from kvtransfer import TransferSource
from tests.support.kv_pools import EPOCH, LARGE, SomeTicket, regions, served_source


class RemoteSource:
    """The test's end. Calls are answered in order; each has a deadline."""

    def __init__(self, child: asyncio.subprocess.Process, address: str, epoch: int) -> None:
        self.child = child
        self.address = address
        self.epoch = epoch

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def ticket(self, transfer_id: str) -> SomeTicket:
        return SomeTicket(self.address, transfer_id, epoch=self.epoch)

    async def call(self, name: str, *arguments: Any) -> Any:
        assert self.child.stdin is not None
        self.child.stdin.write(json.dumps([name, *arguments]).encode() + b"\n")
        return await self.answer()

    async def answer(self) -> Any:
        assert self.child.stdout is not None
        async with asyncio.timeout(60):
            return json.loads(await self.child.stdout.readline())

    def freeze(self) -> None:
        self.child.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.child.send_signal(signal.SIGCONT)

    async def kill(self) -> None:
        if self.child.returncode is None:
            self.child.kill()
        await self.child.wait()


@contextlib.asynccontextmanager
async def remote_source(
    layout: KVLayout = LARGE, *, epoch: int = EPOCH, port: int = 0, lease_s: float = 30.0
) -> AsyncIterator[RemoteSource]:
    settings = json.dumps({"layout": dataclasses.asdict(layout), "epoch": epoch, "port": port, "lease_s": lease_s})
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.support.kv_source", settings),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    remote = RemoteSource(child, "", epoch)
    try:
        remote.address = await remote.answer()
        yield remote
    finally:
        await remote.kill()


async def serve(settings: dict[str, Any]) -> None:
    commands: asyncio.Queue[str] = asyncio.Queue(100)
    loop = asyncio.get_running_loop()

    async def read_commands() -> None:
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            await commands.put(line)
        os._exit(0)  # The test has gone.

    layout = KVLayout(**settings.pop("layout"))
    with regions(layout, 1) as (pool,):
        async with served_source(pool, layout, **settings) as served, asyncio.TaskGroup() as group:
            answer(served.address)
            group.create_task(read_commands())
            while True:
                name, *arguments = json.loads(await commands.get())
                if name == "prefill":
                    group.create_task(prefill(served.source, *arguments))
                    answer(None)
                else:
                    answer(getattr(served.source, name)(*arguments))


async def prefill(source: TransferSource, transfer_id: str, table: list[int], pace: tuple[int, int, float]) -> None:
    """Publish a prompt at the pace of a prefill: tokens, tokens a chunk, tokens/s. The time is slept, not computed."""
    num_tokens, chunk, tokens_per_s = pace
    begin_s = time.monotonic()
    for computed in range(chunk, num_tokens, chunk):
        await asyncio.sleep(begin_s + computed / tokens_per_s - time.monotonic())
        source.publish(transfer_id, table, computed)
    await asyncio.sleep(begin_s + num_tokens / tokens_per_s - time.monotonic())
    source.finish(transfer_id, table, num_tokens, 1)


def answer(value: object) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    join_as_told(secret_file="", tls=TlsFiles())
    asyncio.run(serve(json.loads(sys.argv[1])))
