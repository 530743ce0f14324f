"""Both places where a known beginning of a prompt may lie: the pool on the device, and the host tier behind it.

    prompt → find(): a run of blocks, on the device or in the host tier
    the pool needs a block → evict(): its content goes to the host tier
    a sequence starts → onboard(): what lies in the host tier is copied into blocks of the pool
    a sequence is preempted → swap_out(): its blocks may be evicted, and are claimed in the host tier
    it starts again → its run is found, last partial block and all; only what was evicted is copied back

Swapping out copies nothing by itself: a preempted sequence's blocks stay where they are until somebody needs the place.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence

from disaggregated.block_hash import BlockHash
from disaggregated.engine.block_events import BlockEventBatch, BlockEventLog, BlockSnapshot, Tier, private_label
from disaggregated.engine.host_tier.copies import BlockCopy, Direction
from disaggregated.engine.host_tier.slots import HostTier
from disaggregated.engine.prefix_cache import PrefixCache


@dataclasses.dataclass(frozen=True, slots=True)
class CachedRun:
    """Blocks that need not be computed, from the first of a sequence on. Good until the pool is next changed."""

    hashes: Sequence[BlockHash] = ()
    num_tokens_max: int | None = None
    """Set when the last block is not full."""
    num_findable: int = 0
    """Blocks, from the first on, that others find too; the rest are this sequence's own."""

    def __len__(self) -> int:
        return len(self.hashes)

    def num_tokens(self, block_size: int) -> int:
        num_tokens = len(self.hashes) * block_size
        return num_tokens if self.num_tokens_max is None else min(num_tokens, self.num_tokens_max)


@dataclasses.dataclass(frozen=True, slots=True)
class Swap:
    """What a preempted sequence left behind: where its first `num_tokens` tokens are found, while they are there."""

    hashes: Sequence[BlockHash]
    num_findable: int
    num_tokens: int
    since_s: float


class TieredCache:
    """Decides what is copied between the tiers, and notes it in order; take_copies() hands the copies out.

    Invariant: every claim in the host tier is a swap's; a private block is on the device or in the host tier only
    while its swap lasts.
    """

    def __init__(self, *, num_host_slots: int = 0, event_buffer_max_size: int = 0) -> None:
        """event_buffer_max_size: events kept between two steps; 0: none."""
        self.events = BlockEventLog(event_buffer_max_size)
        self.device = PrefixCache(self.events)
        self.host = HostTier(num_host_slots, self.events)
        self.offloaded_blocks_total = 0
        self.onboarded_blocks_total = 0
        self.swapped_sequences_total = 0
        self._swaps: dict[str, Swap] = {}
        self._copies: list[BlockCopy] = []
        self._private_numbers = itertools.count()

    def find(self, hashes: Iterable[BlockHash], owner: str) -> CachedRun:
        """The longest run of `hashes`, from the first on, that is here, or what `owner` left if that is more."""
        found = list(itertools.takewhile(self._is_here, hashes))
        swap = self._swaps.get(owner)
        if swap is not None:
            left = list(itertools.takewhile(self._is_here, swap.hashes))
            if len(left) > len(found):
                return CachedRun(left, swap.num_tokens, min(len(left), swap.num_findable))
        return CachedRun(found, None, len(found))

    def on_device(self, block_hash: BlockHash) -> int | None:
        return self.device.find(block_hash)

    def evict(self) -> int:
        """A block of the pool for the caller. What it held goes to the host tier if that has a slot for it."""
        block_id, label = self.device.evict()
        slot = None if label is None else self.host.offload(label)
        if slot is not None:
            self._copies.append(BlockCopy(Direction.OFFLOAD, block_id, slot))
            self.offloaded_blocks_total += 1
        return block_id

    def onboard(self, block_hash: BlockHash, block_id: int) -> None:
        """Copy a block of the host tier, which the caller has claimed, into a block that the caller holds."""
        self._copies.append(BlockCopy(Direction.ONBOARD, block_id, self.host.slot(block_hash)))
        self.onboarded_blocks_total += 1
        label = self.host.label(block_hash)
        if not label.is_private:
            self.device.add(block_id, label)

    def take_copies(self) -> list[BlockCopy]:
        """What was decided since the last call, in order; to be carried out before the pool is touched again."""
        copies, self._copies = self._copies, []
        return copies

    # Swapped-out sequences.

    def swap_out(
        self, owner: str, hashes: Sequence[BlockHash], own_blocks: Sequence[int], *, num_tokens: int, now_s: float
    ) -> bool:
        """Claim the blocks that `owner`, who is about to give them up, will want again.

        `hashes` are those of its findable blocks, `own_blocks` the held ones after them, which nobody else finds;
        together they hold `num_tokens` tokens. False: the host tier is too small, and nothing is claimed.
        """
        assert owner not in self._swaps, f"{owner} is swapped out already"
        labels = [private_label(next(self._private_numbers), len(hashes) + i) for i in range(len(own_blocks))]
        wanted = [*hashes, *(label.block_hash for label in labels)]
        if not wanted or not self.host.try_claim(wanted):
            return False
        for block_id, label in zip(own_blocks, labels, strict=True):
            self.device.add(block_id, label)
        self._swaps[owner] = Swap(wanted, len(hashes), num_tokens, now_s)
        self.swapped_sequences_total += 1
        return True

    def end_swap(self, owner: str) -> list[int]:
        """The claims of `owner`, if it has any, are over. Blocks of the pool that nobody wants any more come back."""
        swap = self._swaps.pop(owner, None)
        if swap is None:
            return []
        self.host.give_up(swap.hashes)
        unwanted = [
            block_id for key in swap.hashes[swap.num_findable :] if (block_id := self.device.find(key)) is not None
        ]
        for block_id in unwanted:
            self.device.forget(block_id)
        return unwanted

    def num_slots_of_swaps(self) -> Iterator[tuple[str, int, float]]:
        """(owner, slots of the host tier that hold its blocks, since when) of every swapped-out sequence."""
        for owner, swap in self._swaps.items():
            yield owner, sum(block_hash in self.host for block_hash in swap.hashes), swap.since_s

    # For those who follow what can be found here.

    def take_events(self) -> BlockEventBatch:
        return self.events.drain()

    def snapshot(self) -> BlockSnapshot:
        """Everything that can be found. Time and memory are linear in the number of blocks."""
        tiers = ((self.device.labels(), Tier.DEVICE), (self.host.labels(), Tier.HOST))
        blocks = ((label, tier) for labels, tier in tiers for label in labels if not label.is_private)
        return BlockSnapshot(self.events.next_number, tuple(blocks))

    def check_integrity(self) -> None:
        self.device.check_integrity()
        self.host.check_integrity()
        self.host.check_claims(block_hash for swap in self._swaps.values() for block_hash in swap.hashes)
        claimed = {key for swap in self._swaps.values() for key in swap.hashes[swap.num_findable :]}
        for labels in (self.device.labels(), self.host.labels()):
            private = {label.block_hash for label in labels if label.is_private}
            assert private <= claimed, f"private blocks of nobody: {private - claimed}"

    def _is_here(self, block_hash: BlockHash) -> bool:
        return self.device.find(block_hash) is not None or block_hash in self.host
