"""The yardstick for TCP: the best that was found with raw sockets in Python, without framing, leases or checksums.

    threads-1, threads-2   blocking sockets, one thread on each end of each, vectors of 64 blocks in one system call
    asyncio                one event loop on each end, sockets that are read and written when they are ready

A sender is a process of its own (`python -m benchmarks.wire.sockets '{"layout": …, "way": …}'`).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import json
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Final

from benchmarks.wire import children, shapes
from benchmarks.wire.children import Child
from benchmarks.wire.contender import ourselves
from disaggregated.kv_layout import KVLayout
from kvtransfer import Region

WAYS: Final = {"threads-1": 1, "threads-2": 2, "asyncio": 1}
"""And how many connections each has."""
VECTORS: Final = 64


def views(region: Region, layout: KVLayout, seed: int, num_parts: int) -> list[list[memoryview]]:
    """All blocks, in as many equal parts as there are connections."""
    every = [
        region.buffer[begin : begin + size] for begin, size in shapes.pieces(layout, shapes.scattered(layout, seed))
    ]
    return [every[len(every) * part // num_parts : len(every) * (part + 1) // num_parts] for part in range(num_parts)]


def consume(pending: list[memoryview], num_bytes: int) -> None:
    done = 0
    while done < len(pending) and num_bytes >= len(pending[done]):
        num_bytes -= len(pending[done])
        done += 1
    del pending[:done]
    if num_bytes:
        pending[0] = pending[0][num_bytes:]


def send_all(sock: socket.socket, blocks: Sequence[memoryview]) -> None:
    for begin in range(0, len(blocks), VECTORS):
        pending = list(blocks[begin : begin + VECTORS])
        while pending:
            consume(pending, sock.sendmsg(pending))


def receive_all(sock: socket.socket, blocks: Sequence[memoryview]) -> None:
    for begin in range(0, len(blocks), VECTORS):
        pending = list(blocks[begin : begin + VECTORS])
        while pending:
            received = sock.recvmsg_into(pending, 0, socket.MSG_WAITALL)[0]
            assert received, "the sender has gone"
            consume(pending, received)


async def when_ready(
    sock: socket.socket, blocks: Sequence[memoryview], move: Callable[[list[memoryview]], int], *, is_writer: bool
) -> None:
    """Move all blocks with `move`, each time the event loop finds the socket ready."""
    loop = asyncio.get_running_loop()
    done = loop.create_future()
    left = list(blocks)[::-1]
    pending: list[memoryview] = []

    def step() -> None:
        while len(pending) < VECTORS and left:
            pending.append(left.pop())
        with contextlib.suppress(BlockingIOError):
            consume(pending, move(pending))
        if not pending and not left and not done.done():
            done.set_result(None)

    watch, forget = (loop.add_writer, loop.remove_writer) if is_writer else (loop.add_reader, loop.remove_reader)
    watch(sock, step)
    try:
        await done
    finally:
        forget(sock)


def send(way: str, socks: Sequence[socket.socket], parts: Sequence[Sequence[memoryview]]) -> None:
    if way == "asyncio":
        asyncio.run(when_ready(socks[0], parts[0], socks[0].sendmsg, is_writer=True))
        return
    with concurrent.futures.ThreadPoolExecutor(len(socks)) as threads:
        list(threads.map(send_all, socks, parts))


def receive(way: str, socks: Sequence[socket.socket], parts: Sequence[Sequence[memoryview]]) -> None:
    if way == "asyncio":
        asyncio.run(when_ready(socks[0], parts[0], lambda into: socks[0].recvmsg_into(into)[0], is_writer=False))
        return
    with concurrent.futures.ThreadPoolExecutor(len(socks)) as threads:
        list(threads.map(receive_all, socks, parts))


@dataclasses.dataclass(slots=True)
class RawSockets:
    """Receives in this process."""

    way: str
    sender: Child
    socks: Sequence[socket.socket]
    parts: Sequence[Sequence[memoryview]]

    @property
    def name(self) -> str:
        return f"raw sockets, {self.way}"

    def pids(self) -> Sequence[int]:
        return [ourselves(), self.sender.pid]

    async def prepare(self) -> None:
        """Nothing."""

    async def transfer(self) -> float:
        asked = asyncio.create_task(self.sender.ask("send"))
        begin_s = time.perf_counter()
        await asyncio.sleep(0)  # The command leaves before we wait for what it brings.
        await asyncio.to_thread(receive, self.way, self.socks, self.parts)
        took_s = time.perf_counter() - begin_s
        await asked
        return took_s


@contextlib.asynccontextmanager
async def raw_sockets(way: str, layout: KVLayout, into: Region) -> AsyncIterator[RawSockets]:
    settings = json.dumps({"layout": dataclasses.asdict(layout), "way": way})
    async with contextlib.AsyncExitStack() as stack:
        sender = await stack.enter_async_context(children.child("-m", "benchmarks.wire.sockets", settings))
        port = await sender.answer()
        socks = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(WAYS[way])]
        await sender.answer()
        for sock in socks:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setblocking(way != "asyncio")
        yield RawSockets(way, sender, socks, views(into, layout, shapes.INTO_SEED, len(socks)))


def main(layout: KVLayout, way: str) -> None:
    answers = children.keep_standard_output()
    with Region.allocate(layout.pool_bytes) as region, socket.create_server(("127.0.0.1", 0)) as listening:
        parts = views(shapes.touched(region), layout, shapes.SOURCE_SEED, WAYS[way])
        children.say(answers, listening.getsockname()[1])
        socks = [listening.accept()[0] for _ in range(WAYS[way])]
        for sock in socks:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setblocking(way != "asyncio")
        children.say(answers, "connected")
        children.obey({"send": lambda: send(way, socks, parts)}, answers)


if __name__ == "__main__":
    told = json.loads(sys.argv[1])
    main(KVLayout(**told["layout"]), told["way"])
