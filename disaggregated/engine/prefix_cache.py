"""Which block holds which tokens, so that a prompt with a known beginning is not computed again.

A block becomes findable when it is full and its KV is computed, and stays so until it is evicted. Blocks that nobody
holds wait in the order in which they were given up; the one that waited longest is evicted first. Only whole blocks
are shared: a prompt that parts from a known one within a block computes that block itself.

A block without its parent would be found by nobody. So that none is ever kept in vain, two blocks with the same tokens
are known as twins: only one is found, but when it goes the other stands in, and giving either up is a use of both.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

from disaggregated.block_hash import BlockHash
from disaggregated.engine.block_events import BlockEventLog, BlockLabel, Tier


class PrefixCache:
    """Every operation takes constant time a block. It tells `events` what became findable and what is gone.

    Invariant: hash and findable block are one-to-one; each evictable block is findable; a twin is held and not
    findable. The parent of a findable block is findable too, and is evicted later.
    """

    def __init__(self, events: BlockEventLog) -> None:
        self._events = events
        self._block_of: dict[BlockHash, int] = {}
        self._label_of: dict[int, BlockLabel] = {}
        self._evictable: OrderedDict[int, None] = OrderedDict()
        self._twins: dict[BlockHash, dict[int, None]] = {}
        """Held blocks with the tokens of a findable one, in the order in which they came."""
        self._label_of_twin: dict[int, BlockLabel] = {}

    @property
    def num_evictable(self) -> int:
        return len(self._evictable)

    def is_evictable(self, block_id: int) -> bool:
        return block_id in self._evictable

    def find(self, block_hash: BlockHash) -> int | None:
        return self._block_of.get(block_hash)

    def labels(self) -> Iterator[BlockLabel]:
        """Of every findable block."""
        return iter(self._label_of.values())

    def add(self, block_id: int, label: BlockLabel) -> None:
        """Make a held block findable; of two blocks with the same tokens the first one stays."""
        assert block_id not in self._label_of, f"block {block_id} already stands for other tokens"
        assert block_id not in self._label_of_twin, f"block {block_id} already stands for other tokens"
        if label.block_hash in self._block_of:
            self._twins.setdefault(label.block_hash, {})[block_id] = None
            self._label_of_twin[block_id] = label
            return
        self._block_of[label.block_hash] = block_id
        self._label_of[block_id] = label
        self._events.note(label, Tier.DEVICE, is_added=True)

    def hold(self, block_id: int) -> None:
        """Somebody holds the block: it can't be evicted."""
        self._evictable.pop(block_id, None)

    def use(self, hashes: Sequence[BlockHash]) -> None:
        """Somebody will ask for this run of blocks soon: of those that nobody holds, they are evicted last."""
        for block_hash in reversed(hashes):  # The beginning is evicted later than what follows it.
            block_id = self._block_of.get(block_hash)
            if block_id is not None and block_id in self._evictable:
                self._evictable.move_to_end(block_id)

    def keep(self, block_id: int) -> bool:
        """Nobody holds the block any more. False: its content isn't findable, so there is nothing to keep it for."""
        assert block_id not in self._evictable, f"block {block_id} is given up twice"
        if block_id in self._label_of_twin:
            self._part_from(block_id)
            return False
        if block_id not in self._label_of or self._hand_over(block_id):
            return False
        self._evictable[block_id] = None
        return True

    def evict(self) -> tuple[int, BlockLabel | None]:
        """Forget the block that nobody has held for longest; it is the caller's now.

        With it comes what it holds until it is written, or None when another block with the same tokens is found.
        """
        block_id, _ = self._evictable.popitem(last=False)
        return block_id, None if self._hand_over(block_id) else self.forget(block_id)

    def forget(self, block_id: int) -> BlockLabel:
        """Nobody finds the block from here on, nor a twin of it; it is its holder's, or the caller's."""
        label = self._label_of.pop(block_id)
        assert label.block_hash not in self._twins, f"block {block_id} is forgotten before its twin"
        del self._block_of[label.block_hash]
        self._evictable.pop(block_id, None)
        self._events.note(label, Tier.DEVICE, is_added=False)
        return label

    def check_integrity(self) -> None:
        assert len(self._block_of) == len(self._label_of), f"{len(self._block_of)} hashes, {len(self._label_of)} blocks"
        for block_id, label in self._label_of.items():
            assert self._block_of.get(label.block_hash) == block_id, f"block {block_id} is not found under its own hash"
        assert self._evictable.keys() <= self._label_of.keys(), "an evictable block is not findable"
        twins = {block_id: block_hash for block_hash, ids in self._twins.items() for block_id in ids}
        assert twins == {block_id: label.block_hash for block_id, label in self._label_of_twin.items()}, "a lost twin"
        assert twins.keys().isdisjoint(self._label_of), f"findable and a twin: {twins.keys() & self._label_of.keys()}"
        assert all(self._twins.values()), "a hash has an empty set of twins"
        assert self._twins.keys() <= self._block_of.keys(), "a twin of nobody"
        self._check_parents()

    # Twins.

    def _part_from(self, block_id: int) -> None:
        """A twin goes. The block that is found was in use until now as well, and outlives what came after it."""
        block_hash = self._label_of_twin.pop(block_id).block_hash
        self._drop_twin(block_hash, block_id)
        found = self._block_of[block_hash]
        if found in self._evictable:
            self._evictable.move_to_end(found)

    def _hand_over(self, block_id: int) -> bool:
        """Let a twin stand for the tokens of a findable block from here on, if there is one."""
        block_hash = self._label_of[block_id].block_hash
        if block_hash not in self._twins:
            return False
        heir = next(iter(self._twins[block_hash]))
        self._drop_twin(block_hash, heir)
        self._label_of[heir] = self._label_of_twin.pop(heir)
        self._block_of[block_hash] = heir
        del self._label_of[block_id]
        return True

    def _drop_twin(self, block_hash: BlockHash, block_id: int) -> None:
        del self._twins[block_hash][block_id]
        if not self._twins[block_hash]:
            del self._twins[block_hash]

    def _check_parents(self) -> None:
        rank = {block_id: number for number, block_id in enumerate(self._evictable)}
        for block_id, label in self._label_of.items():
            if label.parent is None:
                continue
            parent = self._block_of.get(label.parent)
            assert parent is not None, f"block {block_id} is findable and its parent is not"
            is_safe = parent not in rank or label.parent in self._twins
            assert is_safe or rank.get(block_id, len(rank)) < rank[parent], f"{parent} is evicted before {block_id}"
