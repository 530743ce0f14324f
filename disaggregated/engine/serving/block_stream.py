"""One WatchBlocks call: everything that can be found here, then each change.

A reader that falls behind costs nothing but its own place: when it has missed changes it gets everything once more,
which is marked, so that at every moment what it knows was true at some moment.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Final

from disaggregated.engine.block_events import BlockEvent, BlockSnapshot
from disaggregated.engine.block_feed import BlockWatcher
from disaggregated.engine.thread import EngineThread
from disaggregated.errors import DeadlineExceeded
from disaggregated.v1 import control_pb2

SNAPSHOT_TIMEOUT_S: Final = 10.0
"""The engine answers between two steps, and a step on a slow machine takes seconds."""
SNAPSHOT_INTERVAL_S: Final = 0.2
"""A reader for whom changes always come too fast costs the engine this many lists of its blocks at most."""
_EVENTS_IN_MESSAGE: Final = 1024
"""A snapshot of a large pool goes in parts, between which other calls get their turn."""


async def block_messages(engine: EngineThread, ending: asyncio.Event) -> AsyncGenerator[control_pb2.BlockEvents, None]:
    """Until `ending`, or until the reader leaves.

    Raises:
        InvalidRequest, AdmissionError: nobody, or nobody more, may watch.
        DeadlineExceeded, ServerLost, Draining: the engine does not answer.
    """
    loop = asyncio.get_running_loop()
    news = asyncio.Event()

    def wake() -> None:
        with contextlib.suppress(RuntimeError):  # The loop is closed: nobody is there to be woken.
            loop.call_soon_threadsafe(news.set)

    number, snapshot_due_s = 0, 0.0
    with engine.block_feed.watching(wake) as watcher:
        while not ending.is_set():
            news.clear()
            events = watcher.take()
            is_anew = events is None
            if events is None:
                await _until(snapshot_due_s, ending)
                events = _as_events(await _snapshot(engine, watcher))
                snapshot_due_s = loop.time() + SNAPSHOT_INTERVAL_S
            for message in _messages(events, number, is_anew=is_anew):
                number += len(message.events)
                yield message
            if not events and not is_anew:
                await _first_of(news, ending)


async def _snapshot(engine: EngineThread, watcher: BlockWatcher) -> BlockSnapshot:
    """What can be found; the watcher goes on from there."""
    watcher.collect()
    try:
        async with asyncio.timeout(SNAPSHOT_TIMEOUT_S):
            snapshot = await asyncio.wrap_future(engine.block_snapshot())
    except TimeoutError as error:
        raise DeadlineExceeded(f"the engine did not list its blocks within {SNAPSHOT_TIMEOUT_S} s") from error
    watcher.skip_to(snapshot.next_number)
    return snapshot


def _as_events(snapshot: BlockSnapshot) -> list[BlockEvent]:
    return [BlockEvent(label, tier, is_added=True) for label, tier in snapshot.blocks]


def _messages(events: Sequence[BlockEvent], number: int, *, is_anew: bool) -> Iterator[control_pb2.BlockEvents]:
    """None for no news; one at least for a snapshot, which may be empty."""
    for begin in range(0, max(len(events), int(is_anew)), _EVENTS_IN_MESSAGE):
        part = events[begin : begin + _EVENTS_IN_MESSAGE]
        yield control_pb2.BlockEvents(
            first_number=number + begin, cleared=is_anew and begin == 0, events=map(_to_proto, part)
        )


def _to_proto(event: BlockEvent) -> control_pb2.BlockEvent:
    (block_hash, parent, depth), tier, is_added = event
    message = control_pb2.BlockEvent(
        kind=control_pb2.BlockEvent.ADDED if is_added else control_pb2.BlockEvent.REMOVED,
        tier=control_pb2.BlockEvent.HOST if tier else control_pb2.BlockEvent.DEVICE,
        block_hash=block_hash.to_bytes(16, "big"),
    )
    if is_added:
        message.parent_hash = b"" if parent is None else parent.to_bytes(16, "big")
        message.depth = depth
    return message


async def _until(due_s: float, ending: asyncio.Event) -> None:
    """Wait for a moment of the loop's clock, unless the end comes first."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout_at(due_s):
            await ending.wait()


async def _first_of(*events: asyncio.Event) -> None:
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
