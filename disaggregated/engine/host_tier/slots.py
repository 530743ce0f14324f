"""The books of the host tier: which slot holds which block, and which one makes room for the next.

A block comes here when the pool evicts it, and is found here by its hash as it was there. A copy stays when the block
goes back to the pool, as the first to be overwritten: if the pool evicts it again before, there is nothing to copy.
A swapped-out sequence claims its blocks: those that are here, or come here, stay until it returns.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence

from disaggregated.block_hash import BlockHash
from disaggregated.engine.block_events import BlockEventLog, BlockLabel, Tier


class HostTier:
    """`num_slots` places for a block each; with none, nothing is ever here. Constant time a block, no I/O.

    Invariant: hash and slot are one-to-one; each slot is free, evictable, or holds a claimed block.
    """

    def __init__(self, num_slots: int, events: BlockEventLog) -> None:
        self.num_slots = num_slots
        self._events = events
        self._free = list(range(num_slots - 1, -1, -1))
        self._slot_of: dict[BlockHash, int] = {}
        self._label_of: dict[BlockHash, BlockLabel] = {}
        self._evictable: OrderedDict[BlockHash, None] = OrderedDict()
        self._num_claims: Counter[BlockHash] = Counter()
        """By how many each block is claimed, whether it is here by now or not."""

    @property
    def num_used(self) -> int:
        return self.num_slots - len(self._free)

    @property
    def num_claimed(self) -> int:
        """Slots that are nobody else's until a sequence returns."""
        return self.num_used - len(self._evictable)

    def __contains__(self, block_hash: BlockHash) -> bool:
        return block_hash in self._slot_of

    def slot(self, block_hash: BlockHash) -> int:
        return self._slot_of[block_hash]

    def label(self, block_hash: BlockHash) -> BlockLabel:
        return self._label_of[block_hash]

    def labels(self) -> Iterator[BlockLabel]:
        return iter(self._label_of.values())

    def offload(self, label: BlockLabel) -> int | None:
        """Take in a block that leaves the pool. The slot to copy it to; None: it is here already, or there is no room.

        A block that is taken in is the last to go.
        """
        block_hash = label.block_hash
        if block_hash in self._slot_of:
            if block_hash in self._evictable:
                self._evictable.move_to_end(block_hash)
            return None
        if not self._free:
            if not self._evictable:
                return None
            self._remove(next(iter(self._evictable)))
        slot = self._free.pop()
        self._slot_of[block_hash] = slot
        self._label_of[block_hash] = label
        if not self._num_claims[block_hash]:
            self._evictable[block_hash] = None
        self._events.note(label, Tier.HOST, is_added=True)
        return slot

    def try_claim(self, hashes: Sequence[BlockHash]) -> bool:
        """Claim blocks that may come here. False, and nothing is claimed: there are not slots for all claims."""
        num_new = sum(not self._num_claims[block_hash] for block_hash in hashes)
        if len(self._num_claims) + num_new > self.num_slots:
            return False
        self.claim(hashes)
        return True

    def claim(self, hashes: Iterable[BlockHash]) -> None:
        """What is here of `hashes`, or comes here, stays until it is given up."""
        for block_hash in hashes:
            self._num_claims[block_hash] += 1
            self._evictable.pop(block_hash, None)

    def give_up(self, hashes: Sequence[BlockHash], *, are_in_pool: bool = False) -> None:
        """End a claim. The end of the sequence is the first to go; with `are_in_pool`, before all others that are here.

        A private block that nobody claims any more is gone at once.
        """
        for block_hash in hashes if are_in_pool else reversed(hashes):
            self._num_claims[block_hash] -= 1
            if self._num_claims[block_hash]:
                continue
            del self._num_claims[block_hash]
            if block_hash not in self._slot_of:
                continue
            self._evictable[block_hash] = None
            if self._label_of[block_hash].is_private:
                self._remove(block_hash)
            elif are_in_pool:
                self._evictable.move_to_end(block_hash, last=False)

    def check_integrity(self) -> None:
        slots = set(self._slot_of.values())
        assert len(slots) == len(self._slot_of), "two blocks are in one slot"
        assert slots.isdisjoint(self._free), f"free and used: {sorted(slots & set(self._free))}"
        assert slots | set(self._free) == set(range(self.num_slots)), "a slot is lost"
        assert len(self._free) == len(set(self._free)), "a slot is free twice"
        assert self._slot_of.keys() == self._label_of.keys(), "a slot without a label"
        assert all(count > 0 for count in self._num_claims.values()), f"claimed by nobody: {self._num_claims}"
        evictable = {block_hash for block_hash in self._slot_of if block_hash not in self._num_claims}
        assert evictable == self._evictable.keys(), "a block is evictable and claimed, or neither"

    def check_claims(self, claims: Iterable[BlockHash]) -> None:
        """`claims`: all that there are, as those who made them know."""
        expected = Counter(claims)
        assert expected == self._num_claims, f"claims counted: {self._num_claims}, made: {expected}"
        assert len(expected) <= self.num_slots, f"{len(expected)} blocks claimed, there are {self.num_slots} slots"

    def _remove(self, block_hash: BlockHash) -> None:
        del self._evictable[block_hash]
        self._free.append(self._slot_of.pop(block_hash))
        self._events.note(self._label_of.pop(block_hash), Tier.HOST, is_added=False)
