from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disaggregated.config.server import KVCacheConfig
from disaggregated.engine.pool_size import FreeMemory, PoolSize, size_pool
from disaggregated.errors import ConfigError, NotEnoughMemory
from disaggregated.kv_layout import KVLayout

SMOLLM2 = KVLayout(num_layers=30, num_kv_heads=3, head_dim=64, block_size=32, dtype="float32", num_blocks=1)
GIB = 1 << 30
LAPTOP = FreeMemory(device=8 * GIB, host=8 * GIB, device_is_host=True)
GPU = FreeMemory(device=80 * GIB, host=200 * GIB, device_is_host=False)


def size(free: FreeMemory = LAPTOP, layout: KVLayout = SMOLLM2, **config: Any) -> PoolSize:
    return size_pool(layout, KVCacheConfig(**config), free, max_seq_len=2048)


def test_the_log_shows_how_the_pool_got_its_size() -> None:
    assert size().arithmetic == (
        "0.90 x 1,073,741,824 bytes of cpu_memory_budget_bytes / 1,474,560 bytes a block "
        "(30 layers x 2 x 3 heads x 32 tokens x 64 x 4 bytes) = 655 blocks = 20,960 tokens "
        "(10.2 sequences of max_seq_len 2,048)"
    )
    assert size().layout == dataclasses.replace(SMOLLM2, num_blocks=655)


def test_on_a_gpu_the_fraction_is_of_what_is_free() -> None:
    sized = size(GPU, free_gpu_memory_fraction=0.5)
    assert sized.arithmetic.startswith("0.50 x 85,899,345,920 bytes free / 1,474,560 bytes a block")
    assert sized.layout.num_blocks == 40 * GIB // SMOLLM2.pool_bytes


def test_a_cpu_with_less_than_the_budget_gives_what_it_has() -> None:
    sized = size(FreeMemory(device=GIB // 2, host=GIB // 2, device_is_host=True))
    assert sized.arithmetic.startswith("0.90 x 536,870,912 bytes free /")


def test_scales_of_a_quantised_pool_are_counted() -> None:
    sized = size(layout=dataclasses.replace(SMOLLM2, dtype="int8"))
    assert (
        "391,680 bytes a block (30 layers x 2 x 3 heads x 32 tokens x (64 x 1 bytes + 4 of scale))" in sized.arithmetic
    )
    assert sized.layout.num_blocks == int(0.9 * GIB) // 391_680


@pytest.mark.parametrize(
    ("config", "num_blocks", "words"),
    [
        ({"max_tokens": 600}, 19, "max_tokens 600 / 32 tokens a block = 19 blocks = 608 tokens"),
        ({"max_tokens": 600, "max_gpu_total_bytes": 10**7}, 6, "max_gpu_total_bytes 10,000,000 / 1,474,560 bytes"),
        ({"max_gpu_total_bytes": 10**12}, 655, "0.90 x 1,073,741,824"),
        ({"max_tokens": 10**9}, 655, "0.90 x 1,073,741,824"),
        ({"max_tokens": 64, "max_gpu_total_bytes": 10**9}, 2, "max_tokens 64"),
    ],
)
def test_of_several_limits_the_smallest_counts(config: dict[str, Any], num_blocks: int, words: str) -> None:
    sized = size(**config)
    assert sized.layout.num_blocks == num_blocks
    assert sized.arithmetic.startswith(words)


def test_limits_that_did_not_count_are_told_too() -> None:
    arithmetic = size(max_tokens=600, max_gpu_total_bytes=10**8).arithmetic
    assert arithmetic.endswith(
        "; 0.90 x 1,073,741,824 bytes of cpu_memory_budget_bytes would be 655, "
        "max_gpu_total_bytes 100,000,000 would be 67"
    )


@given(
    fraction=st.floats(0, 1),
    max_tokens=st.none() | st.integers(1, 10**6),
    max_bytes=st.integers(0, 10**10),
    budget=st.integers(1, 10**10),
    free=st.integers(0, 10**10),
)
def test_no_limit_is_ever_passed(
    fraction: float, max_tokens: int | None, max_bytes: int, budget: int, free: int
) -> None:
    config = KVCacheConfig(
        free_gpu_memory_fraction=fraction,
        max_tokens=max_tokens,
        max_gpu_total_bytes=max_bytes,
        cpu_memory_budget_bytes=budget,
    )
    memory = FreeMemory(device=free, host=free, device_is_host=True)
    try:
        layout = size_pool(SMOLLM2, config, memory, max_seq_len=2048).layout
    except NotEnoughMemory:
        assert min(fraction * min(budget, free), max_bytes or free) < SMOLLM2.pool_bytes
        return
    assert layout.pool_bytes <= fraction * min(budget, free)
    assert not max_bytes or layout.pool_bytes <= max_bytes
    assert max_tokens is None or layout.num_blocks <= SMOLLM2.num_blocks_for(max_tokens)


def test_a_pool_of_no_block_is_refused_with_the_numbers() -> None:
    with pytest.raises(NotEnoughMemory, match=r"0\.90 x 1,000,000 bytes free / 1,474,560 bytes a block .* = 0 blocks"):
        size(FreeMemory(device=10**6, host=10**6, device_is_host=True))


def test_the_host_tier_has_a_slot_for_each_block_that_its_bytes_hold() -> None:
    sized = size(host_cache_size=2 * GIB)
    assert sized.num_host_slots == 2 * GIB // SMOLLM2.pool_bytes
    assert sized.arithmetic.endswith("; host tier: 2,147,483,648 / 1,474,560 bytes = 1,456 blocks = 46,592 tokens")
    assert size().num_host_slots == 0


def test_pool_and_host_tier_share_the_memory_of_a_cpu() -> None:
    with pytest.raises(NotEnoughMemory, match=r"host_cache_size: 8,053,063,680 bytes, 7,624,097,792 are left"):
        size(host_cache_size=8_053_063_680)
    assert size(GPU, host_cache_size=100 * GIB).num_host_slots > 0


def test_a_host_tier_without_room_for_a_block_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"host_cache_size: 1,000 bytes, one block takes 1,474,560"):
        size(host_cache_size=1000)
