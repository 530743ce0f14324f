"""Block pool, prefix cache and host tier together, under whatever comes: hypothesis looks for the order that breaks.

The model keeps what each slot of each block and each place of the host tier really contains, and copies only when the
copies are carried out. So a block handed out too early, a copy in the wrong order or a key that outlives its content
shows as content that is not what the books promise. A second model rebuilds the findable set from the events alone.
"""

from __future__ import annotations

import dataclasses

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from disaggregated.block_hash import BlockHash, block_hashes
from disaggregated.engine.block_events import BlockLabel, Tier
from disaggregated.engine.block_pool import BlockPool, Holding, HoldingKind
from disaggregated.engine.host_tier.copies import Direction
from disaggregated.engine.tiered_cache import CachedRun, TieredCache
from disaggregated.errors import PoolExhausted

BLOCK_SIZE = 2
Content = tuple[int, ...] | None
"""Of a token's slot: the tokens of its sequence up to there, on which its KV depends."""


@dataclasses.dataclass
class Owner:
    """A sequence as its scheduler knows it."""

    name: str
    tokens: list[int]
    holding: Holding | None = None
    num_computed: int = 0
    num_findable: int = 0
    num_when_preempted: int = 0

    @property
    def hashes(self) -> list[BlockHash]:
        return list(block_hashes(self.tokens, BLOCK_SIZE))

    @property
    def num_blocks(self) -> int:
        return -(-len(self.tokens) // BLOCK_SIZE)


class Tiers(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(2, 9),
        num_slots=st.integers(0, 6),
        num_events=st.sampled_from([1, 5, 1000]),
        reuse=st.sampled_from([True, True, True, False]),
    )
    def begin(self, num_blocks: int, num_slots: int, num_events: int, reuse: bool) -> None:
        self.cache = TieredCache(num_host_slots=num_slots, event_buffer_max_size=num_events)
        self.pool = BlockPool(num_blocks, self.cache)
        self.reuse = reuse
        self.on_device: list[Content] = [None] * (num_blocks * BLOCK_SIZE)
        self.on_host: list[list[Content]] = [[None] * BLOCK_SIZE for _ in range(num_slots)]
        self.owners: dict[str, Owner] = {}
        self.num_owners = 0
        self.replica: dict[tuple[BlockHash, Tier], BlockLabel] = {}
        self.next_number = 0

    # What a scheduler does. Copies pile up meanwhile, as within one step.

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=10))
    def arrive(self, tokens: list[int]) -> None:
        self.num_owners += 1
        owner = Owner(f"owner-{self.num_owners}", tokens)
        if self._try_hold(owner):
            self.owners[owner.name] = owner

    @precondition(lambda self: self._holding())
    @rule(draw=st.data())
    def arrive_with_a_prompt_that_is_being_computed(self, draw: st.DataObject) -> None:
        """So that both come to compute the same blocks."""
        self.arrive(list(draw.draw(st.sampled_from(self._holding())).tokens))

    @precondition(lambda self: self._waiting())
    @rule(draw=st.data())
    def return_after_preemption(self, draw: st.DataObject) -> None:
        owner = draw.draw(st.sampled_from(self._waiting()))
        if self._try_hold(owner):
            assert owner.num_computed <= owner.num_when_preempted or self.reuse

    @precondition(lambda self: self._holding())
    @rule(draw=st.data())
    def preempt(self, draw: st.DataObject) -> None:
        owner = draw.draw(st.sampled_from(self._holding()))
        holding = owner.holding
        assert holding is not None
        num_blocks = -(-owner.num_computed // BLOCK_SIZE)
        hashes = owner.hashes[: owner.num_findable]
        self.pool.swap_out(holding, hashes, num_tokens=owner.num_computed, num_blocks=num_blocks, now_s=0.0)
        owner.holding, owner.num_when_preempted = None, owner.num_computed
        owner.num_computed = 0

    @precondition(lambda self: self.owners)
    @rule(draw=st.data())
    def end(self, draw: st.DataObject) -> None:
        owner = self.owners.pop(draw.draw(st.sampled_from(sorted(self.owners))))
        if owner.holding is None:
            self.pool.drop_swap(owner.name)
        else:
            self.pool.give_back(owner.holding)

    @precondition(lambda self: self._holding())
    @rule(draw=st.data(), token=st.integers(0, 1))
    def grow(self, draw: st.DataObject, token: int) -> None:
        owner = draw.draw(st.sampled_from(self._holding()))
        assert owner.holding is not None
        if len(owner.tokens) == len(owner.holding.block_ids) * BLOCK_SIZE:
            if self.pool.num_free == 0:
                return
            self.pool.grow(owner.holding)
        owner.tokens.append(token)

    # What a step does: first the copies, then the writes.

    @precondition(lambda self: self._holding())
    @rule(draw=st.data(), num_tokens=st.integers(1, 6))
    def compute(self, draw: st.DataObject, num_tokens: int) -> None:
        owner = draw.draw(st.sampled_from(self._holding()))
        holding = owner.holding
        assert holding is not None
        self.carry_out_copies()
        until = min(owner.num_computed + num_tokens, len(owner.tokens))
        for position in range(owner.num_computed, until):
            block_id = holding.block_ids[position // BLOCK_SIZE]
            self.on_device[block_id * BLOCK_SIZE + position % BLOCK_SIZE] = tuple(owner.tokens[: position + 1])
        owner.num_computed = until
        if not self.reuse:
            return
        hashes = owner.hashes
        for index in range(owner.num_findable, until // BLOCK_SIZE):
            parent = hashes[index - 1] if index else None
            self.pool.make_findable(holding.block_ids[index], BlockLabel(hashes[index], parent, index))
        owner.num_findable = until // BLOCK_SIZE

    @rule()
    def carry_out_copies(self) -> None:
        for direction, block_id, slot in self.cache.take_copies():
            here = slice(block_id * BLOCK_SIZE, (block_id + 1) * BLOCK_SIZE)
            if direction is Direction.OFFLOAD:
                self.on_host[slot] = self.on_device[here]
            else:
                self.on_device[here] = self.on_host[slot]
        self._check_contents()

    @rule()
    def read_the_events(self) -> None:
        """As a watcher does: changes on top of what it knows; everything once more when some are missing."""
        batch = self.cache.take_events()
        assert len(batch.events) <= self.cache.events.num_events_max
        if batch.first_number != self.next_number:
            snapshot = self.cache.snapshot()
            assert snapshot.next_number == batch.next_number
            self.replica = {(label.block_hash, tier): label for label, tier in snapshot.blocks}
        else:
            for label, tier, is_added in batch.events:
                key = (label.block_hash, tier)
                assert (key in self.replica) != is_added, f"{label} is added twice, or gone before it was there"
                if is_added:
                    self.replica[key] = label
                else:
                    del self.replica[key]
        self.next_number = batch.next_number
        findable = {(label.block_hash, Tier.DEVICE): label for label in self.cache.device.labels()}
        findable |= {(label.block_hash, Tier.HOST): label for label in self.cache.host.labels()}
        assert self.replica == {key: label for key, label in findable.items() if not label.is_private}

    # What must always hold.

    @invariant()
    def the_books_are_right(self) -> None:
        self.pool.check_integrity()
        swapped = [entry for entry in self.pool.ledger(0.0) if entry.kind == "swapped"]
        assert {entry.owner for entry in swapped} <= {owner.name for owner in self._waiting()}
        assert sum(entry.num_blocks for entry in swapped) >= self.cache.host.num_claimed

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        for owner in self.owners.values():
            if owner.holding is None:
                self.pool.drop_swap(owner.name)
            else:
                self.pool.give_back(owner.holding)
        self.pool.check_integrity()
        assert self.pool.num_free == self.pool.num_blocks
        assert self.pool.ledger(0.0) == []
        assert self.cache.host.num_claimed == 0
        self.owners.clear()
        self.carry_out_copies()

    # Parts of the above.

    def _waiting(self) -> list[Owner]:
        return [owner for owner in self.owners.values() if owner.holding is None]

    def _holding(self) -> list[Owner]:
        return [owner for owner in self.owners.values() if owner.holding is not None]

    def _try_hold(self, owner: Owner) -> bool:
        num_known = (len(owner.tokens) - 1) // BLOCK_SIZE if self.reuse else 0
        run = self.pool.find(owner.hashes[:num_known], owner=owner.name)
        num_new = owner.num_blocks - len(run)
        wanted, free = self.pool.num_wanted(run, num_new), self.pool.num_free
        try:
            owner.holding = self.pool.hold(owner.name, HoldingKind.SEQUENCE, cached=run, num_new=num_new, now_s=0.0)
        except PoolExhausted:
            assert wanted > free
            return False
        assert self.pool.num_free == free - wanted
        owner.num_computed = run.num_tokens(BLOCK_SIZE)
        owner.num_findable = run.num_findable
        return True

    def _check_contents(self) -> None:
        for owner in self._holding():
            assert owner.holding is not None
            for position in range(owner.num_computed):
                block_id = owner.holding.block_ids[position // BLOCK_SIZE]
                found = self.on_device[block_id * BLOCK_SIZE + position % BLOCK_SIZE]
                assert found == tuple(owner.tokens[: position + 1]), f"{owner.name} has lost position {position}"
        for label in self.cache.device.labels():
            found_in = self.cache.on_device(label.block_hash)
            assert found_in is not None
            self._check_content(label, self.on_device[found_in * BLOCK_SIZE : (found_in + 1) * BLOCK_SIZE])
        for label in self.cache.host.labels():
            self._check_content(label, self.on_host[self.cache.host.slot(label.block_hash)])

    def _check_content(self, label: BlockLabel, content: list[Content]) -> None:
        if label.is_private:
            return
        tokens = content[-1]
        assert tokens is not None, f"{label} was never computed"
        hashes = list(block_hashes(tokens, BLOCK_SIZE))
        assert hashes[-1] == label.block_hash, f"{label} holds other tokens"
        assert len(hashes) == label.depth + 1
        assert label.parent == (hashes[-2] if label.depth else None)


TestTiers = Tiers.TestCase
TestTiers.settings = settings(max_examples=100, stateful_step_count=50)


def test_a_run_that_nothing_is_known_of_covers_no_tokens() -> None:
    assert CachedRun().num_tokens(BLOCK_SIZE) == 0
