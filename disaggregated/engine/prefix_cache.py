"""Which block holds which tokens, so that a prompt with a known beginning is not computed again.

A block becomes findable when it is full and its KV is computed, and stays so until it is evicted. Blocks that nobody
holds wait in the order in which they were given up; the one that waited longest is evicted first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from disaggregated.block_hash import BlockHash


class PrefixCache:
    """Every operation takes constant time a block.

    Invariant: hash and block are one-to-one, and each evictable block is findable.
    """

    def __init__(self) -> None:
        self._block_of: dict[BlockHash, int] = {}
        self._hash_of: dict[int, BlockHash] = {}
        self._evictable: OrderedDict[int, None] = OrderedDict()

    @property
    def num_evictable(self) -> int:
        return len(self._evictable)

    def is_evictable(self, block_id: int) -> bool:
        return block_id in self._evictable

    def find(self, hashes: Iterable[BlockHash]) -> list[int]:
        """The blocks of the longest run of `hashes`, from the first on, that is here."""
        found: list[int] = []
        for block_hash in hashes:
            block_id = self._block_of.get(block_hash)
            if block_id is None:
                break
            found.append(block_id)
        return found

    def add(self, block_id: int, block_hash: BlockHash) -> None:
        """Make a held block findable; of two blocks with the same tokens the first one stays."""
        assert block_id not in self._hash_of, f"block {block_id} already stands for other tokens"
        if block_hash not in self._block_of:
            self._block_of[block_hash] = block_id
            self._hash_of[block_id] = block_hash

    def hold(self, block_id: int) -> None:
        """Somebody holds the block: it can't be evicted."""
        self._evictable.pop(block_id, None)

    def keep(self, block_id: int) -> bool:
        """Nobody holds the block any more. False: its content isn't findable, so there is nothing to keep it for."""
        if block_id not in self._hash_of:
            return False
        assert block_id not in self._evictable, f"block {block_id} is given up twice"
        self._evictable[block_id] = None
        return True

    def evict(self) -> int:
        """Forget the block that nobody has held for longest; it is the caller's now."""
        block_id, _ = self._evictable.popitem(last=False)
        del self._block_of[self._hash_of.pop(block_id)]
        return block_id

    def check_integrity(self) -> None:
        assert len(self._block_of) == len(self._hash_of), f"{len(self._block_of)} hashes, {len(self._hash_of)} blocks"
        for block_id, block_hash in self._hash_of.items():
            assert self._block_of.get(block_hash) == block_id, f"block {block_id} is not found under its own hash"
        assert self._evictable.keys() <= self._hash_of.keys(), "an evictable block is not findable"
