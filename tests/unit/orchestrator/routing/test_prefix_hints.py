"""A hint names who holds more than the context server; nobody else, and never across block sizes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence

import pytest

from disaggregated.block_hash import block_hashes
from disaggregated.errors import InvalidRequest, ServerLost
from disaggregated.v1 import control_pb2, kv_pb2
from orchestrator.routing import block_follower
from orchestrator.routing.block_follower import follow_blocks
from orchestrator.routing.known_blocks import KnownBlocks
from orchestrator.routing.prefix_hints import prefix_hint
from orchestrator.server import Role, Server
from tests.unit.orchestrator.routing.test_known_blocks import event, message

HASHES = list(block_hashes(range(160), 16))


def server(name: str, num_blocks: int, *, block_size: int = 16, role: Role = Role.GENERATION) -> Server:
    made = Server(role, f"127.0.0.1:{len(name)}")
    made.description = control_pb2.ServerDescription(
        instance_id=name, epoch=5, layout=kv_pb2.KVLayout(block_size=block_size)
    )
    made.block_size = block_size
    made.known_blocks.apply(message(0, map(event, HASHES[:num_blocks]), cleared=True))
    return made


def context(num_blocks: int) -> Server:
    return server("c0", num_blocks, role=Role.CONTEXT)


def test_the_generation_server_with_the_longest_beginning_is_named() -> None:
    hint = prefix_hint(HASHES, context(1), [server("g0", 3), server("g1", 7), server("g2", 7)])
    assert hint is not None
    assert (hint.instance_id, hint.epoch, hint.num_tokens) == ("g1", 5, 7 * 16)
    assert hint.address == "127.0.0.1:2"


@pytest.mark.parametrize("num_here", [3, 4, 10])
def test_nobody_is_named_who_holds_no_more_than_the_context_server(num_here: int) -> None:
    assert prefix_hint(HASHES, context(num_here), [server("g0", 3), server("g1", 0)]) is None


def test_blocks_of_another_size_are_no_hint() -> None:
    assert prefix_hint(HASHES, context(0), [server("g0", 9, block_size=32)]) is None


def test_a_prompt_without_a_full_block_has_no_hint() -> None:
    assert prefix_hint([], context(0), [server("g0", 9)]) is None


class Watched:
    """Streams that a server sends, one after the other."""

    def __init__(self, *streams: Sequence[control_pb2.BlockEvents | Exception]) -> None:
        self.streams = list(streams)
        self.all_sent = asyncio.Event()

    async def watch_blocks(self) -> AsyncGenerator[control_pb2.BlockEvents, None]:
        stream = self.streams.pop(0)
        for item in stream:
            if isinstance(item, Exception):
                raise item
            yield item
        if not self.streams:
            self.all_sent.set()
            await asyncio.Event().wait()


async def test_a_broken_stream_is_begun_anew_and_what_it_told_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_follower, "RETRY_S", 0.0)
    known = KnownBlocks()
    whole = message(0, map(event, HASHES[:5]), cleared=True)
    watched = Watched([whole, ServerLost("gone")], [whole, message(9, [])], [message(0, [event(HASHES[0])])])
    following = asyncio.create_task(follow_blocks(watched, known, name="g0"))
    await asyncio.wait_for(watched.all_sent.wait(), 20)
    assert known.num_held(HASHES) == 1
    following.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await following
    assert len(known) == 0


async def test_a_server_that_keeps_no_events_is_not_asked_again() -> None:
    known = KnownBlocks()
    await follow_blocks(Watched([InvalidRequest("no changes are kept")]), known, name="g0")
    assert len(known) == 0
