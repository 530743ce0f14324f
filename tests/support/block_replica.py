"""What a router knows of one server's prefix cache, from its WatchBlocks stream alone."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Set

from disaggregated.v1 import control_pb2
from tests.support.server_client import ServerClient

Place = tuple[bytes, int]
"""Hash and tier."""


class BlockReplica:
    """Every message is checked against what is known: a reader that gets this far never has to guess."""

    def __init__(self) -> None:
        self.blocks: dict[Place, tuple[bytes, int]] = {}
        """Parent and depth of everything that can be found."""
        self.num_events = 0
        self.num_times_cleared = 0

    def apply(self, message: control_pb2.BlockEvents) -> None:
        assert message.first_number == self.num_events, f"{self.num_events} events seen, now {message.first_number}"
        if message.cleared:
            self.blocks.clear()
            self.num_times_cleared += 1
        assert self.num_times_cleared, "changes of something that nobody has told"
        for event in message.events:
            self._apply(event)
        self.num_events += len(message.events)

    def _apply(self, event: control_pb2.BlockEvent) -> None:
        place = (event.block_hash, event.tier)
        assert len(event.block_hash) == 16
        if event.kind == control_pb2.BlockEvent.REMOVED:
            del self.blocks[place]
            return
        assert place not in self.blocks, f"{place} is added twice"
        assert len(event.parent_hash) == (16 if event.depth else 0), f"depth {event.depth}, {event.parent_hash!r}"
        self.blocks[place] = (event.parent_hash, event.depth)

    def check_chains(self) -> None:
        """Every block on the device continues one that is there too."""
        for (_, tier), (parent, depth) in self.blocks.items():
            if tier == control_pb2.BlockEvent.DEVICE and depth:
                assert self.blocks[parent, tier][1] == depth - 1


class Follower:
    """Applies messages as they come; one that contradicts the others fails the test."""

    def __init__(self, client: ServerClient) -> None:
        self.replica = BlockReplica()
        self._client = client
        self._changed = asyncio.Event()

    async def follow(self) -> None:
        async with contextlib.aclosing(self._client.block_events()) as messages:
            async for message in messages:
                self.replica.apply(message)
                self._changed.set()

    async def settle(self, expected: Set[Place]) -> None:
        """Nothing changes on the server any more: wait until just that is known which can be found there."""
        async with asyncio.timeout(20):
            while self.replica.blocks.keys() != expected:
                self._changed.clear()
                await self._changed.wait()


@contextlib.asynccontextmanager
async def following(client: ServerClient) -> AsyncIterator[Follower]:
    follower = Follower(client)
    task = asyncio.create_task(follower.follow())
    try:
        yield follower
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
