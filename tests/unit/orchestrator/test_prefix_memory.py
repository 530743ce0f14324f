from __future__ import annotations

from disaggregated.block_hash import BlockHash, block_hashes
from orchestrator.prefix_memory import LocalPrefillRule, PrefixMemory

BLOCKS = [BlockHash(number) for number in range(10)]


def test_only_an_unbroken_beginning_counts_as_cached() -> None:
    memory = PrefixMemory()
    memory.remember("g0", [*BLOCKS[:3], *BLOCKS[4:]])
    assert memory.num_cached_blocks("g0", BLOCKS) == 3
    assert memory.num_cached_blocks("g1", BLOCKS) == 0
    assert memory.num_cached_blocks("g0", []) == 0


def test_what_was_not_seen_for_longest_is_forgotten_first() -> None:
    memory = PrefixMemory(blocks_max=5)
    memory.remember("g0", BLOCKS[:3])
    memory.remember("g0", BLOCKS[3:5])
    memory.remember("g0", BLOCKS[:3])
    memory.remember("g0", BLOCKS[5:7])
    assert memory.num_cached_blocks("g0", BLOCKS[:3]) == 3
    assert memory.num_cached_blocks("g0", BLOCKS[3:5]) == 0


def test_the_rule_counts_uncached_tokens_and_is_off_at_0() -> None:
    rule = LocalPrefillRule(20)
    prompt = list(range(50))
    hashes = list(block_hashes(prompt, 16))
    assert len(hashes) == 3
    assert rule.num_uncached("g0", 50, hashes, 16) == 50
    rule.sent("g0", hashes)
    assert rule.num_uncached("g0", 50, hashes, 16) == 2
    assert rule.wants_local(20)
    assert not rule.wants_local(21)
    off = LocalPrefillRule(0)
    assert rule.is_on
    assert not off.is_on
    assert not off.wants_local(1)
