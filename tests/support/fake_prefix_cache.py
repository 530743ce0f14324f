"""Which blocks a fake server has cached, told to whoever watches as a real one tells it."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from disaggregated.block_hash import BlockHash, block_hashes
from disaggregated.v1 import control_pb2

BLOCK_SIZE = 16


class FakePrefixCache:
    """Invariant: at most `blocks_max` blocks, the one used last at the end; no block outlives the one before it."""

    def __init__(self, blocks_max: int) -> None:
        self.blocks_max = blocks_max
        self._blocks: OrderedDict[BlockHash, None] = OrderedDict()
        self._readers: dict[asyncio.Queue[Any], int] = {}
        """With the number of events that each has been told."""

    def num_cached_tokens(self, token_ids: Sequence[int]) -> int:
        """The last token is computed in any case."""
        count = 0
        for block_hash in block_hashes(token_ids[:-1], BLOCK_SIZE):
            if block_hash not in self._blocks:
                break
            count += BLOCK_SIZE
        return count

    def computed(self, token_ids: Sequence[int]) -> None:
        """All of these tokens' full blocks are there now; what was not used for longest makes room."""
        if not self.blocks_max:
            return
        hashes = list(block_hashes(token_ids, BLOCK_SIZE))[: self.blocks_max]
        events = [_event(each, control_pb2.BlockEvent.ADDED) for each in hashes if each not in self._blocks]
        for block_hash in reversed(hashes):
            self._blocks[block_hash] = None
            self._blocks.move_to_end(block_hash)
        while len(self._blocks) > self.blocks_max:
            gone, _ = self._blocks.popitem(last=False)
            events.append(_event(gone, control_pb2.BlockEvent.REMOVED))
        for reader, number in self._readers.items():
            reader.put_nowait(control_pb2.BlockEvents(first_number=number, events=events))
            self._readers[reader] = number + len(events)

    def watch(self, reader: asyncio.Queue[Any]) -> None:
        """Everything at once, then each change."""
        events = [_event(each, control_pb2.BlockEvent.ADDED) for each in self._blocks]
        reader.put_nowait(control_pb2.BlockEvents(cleared=True, events=events))
        self._readers[reader] = len(events)

    def unwatch(self, reader: asyncio.Queue[Any]) -> None:
        self._readers.pop(reader, None)


def _event(block_hash: BlockHash, kind: control_pb2.BlockEvent.Kind.ValueType) -> control_pb2.BlockEvent:
    return control_pb2.BlockEvent(kind=kind, block_hash=block_hash.to_bytes(16, "big"))
