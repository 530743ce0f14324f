"""How many blocks a KV pool gets, and why: the arithmetic that a server's log shows.

Each key of the configuration that bounds the pool gives a number of blocks, and the smallest one counts, as in
TensorRT-LLM. Pure arithmetic on what the caller has measured; no torch.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from disaggregated.config.server import KVCacheConfig
from disaggregated.errors import ConfigError, NotEnoughMemory
from disaggregated.kv_layout import DTYPE_BYTES, SCALE_BYTES, KVLayout


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FreeMemory:
    """In bytes, with the weights loaded and the pool not made yet."""

    device: int
    host: int
    device_is_host: bool
    """On CPU pool and host tier share one memory, and `cpu_memory_budget_bytes` bounds the pool."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PoolSize:
    layout: KVLayout
    num_host_slots: int
    """Blocks that the host tier holds."""
    arithmetic: str
    """In words and numbers, for the log."""


class _Limit(NamedTuple):
    num_blocks: int
    words: str


def size_pool(one_block: KVLayout, config: KVCacheConfig, free: FreeMemory, *, max_seq_len: int) -> PoolSize:
    """
    one_block: the layout of a pool of one block.

    Raises:
        NotEnoughMemory: not one block fits, or the host tier does not.
        ConfigError: the host tier is asked for and has no room for one block.
    """
    limits = [_of_fraction(one_block, config, free)]
    if config.max_gpu_total_bytes:
        words = f"max_gpu_total_bytes {config.max_gpu_total_bytes:,}"
        limits.append(_of_bytes(one_block, config.max_gpu_total_bytes, words))
    if config.max_tokens is not None:
        words = f"max_tokens {config.max_tokens:,} / {one_block.block_size} tokens a block"
        limits.append(_Limit(one_block.num_blocks_for(config.max_tokens), words))
    least = min(limits, key=lambda limit: limit.num_blocks)
    if least.num_blocks < 1:
        raise NotEnoughMemory(f"not one KV block fits: {least.words} = 0 blocks")
    layout = dataclasses.replace(one_block, num_blocks=least.num_blocks)
    num_host_slots, host_words = _host_slots(layout, one_block, config, free)
    arithmetic = f"{least.words} = {_in_tokens(layout, max_seq_len)}{_not_used(limits, least)}{host_words}"
    return PoolSize(layout=layout, num_host_slots=num_host_slots, arithmetic=arithmetic)


def _of_fraction(one_block: KVLayout, config: KVCacheConfig, free: FreeMemory) -> _Limit:
    base, name = free.device, "bytes free"
    if free.device_is_host and config.cpu_memory_budget_bytes <= base:
        base, name = config.cpu_memory_budget_bytes, "bytes of cpu_memory_budget_bytes"
    fraction = config.free_gpu_memory_fraction
    return _of_bytes(one_block, int(base * fraction), f"{fraction:.2f} x {base:,} {name}")


def _of_bytes(one_block: KVLayout, num_bytes: int, words: str) -> _Limit:
    block_words = f"{one_block.pool_bytes:,} bytes a block ({_block_in_words(one_block)})"
    return _Limit(num_bytes // one_block.pool_bytes, f"{words} / {block_words}")


def _block_in_words(layout: KVLayout) -> str:
    heads = f"{layout.num_planes} x {layout.num_kv_heads} heads x {layout.block_size} tokens"
    scales = f" + {SCALE_BYTES} of scale" if layout.is_quantised else ""
    per_head = f"{layout.head_dim} x {DTYPE_BYTES[layout.dtype]} bytes{scales}"
    return f"{layout.num_layers} layers x {heads} x {f'({per_head})' if scales else per_head}"


def _in_tokens(layout: KVLayout, max_seq_len: int) -> str:
    num_tokens = layout.num_blocks * layout.block_size
    sequences = f"{num_tokens / max_seq_len:.1f} sequences of max_seq_len {max_seq_len:,}"
    return f"{layout.num_blocks:,} blocks = {num_tokens:,} tokens ({sequences})"


def _not_used(limits: list[_Limit], least: _Limit) -> str:
    others = [f"{limit.words.split(' / ')[0]} would be {limit.num_blocks:,}" for limit in limits if limit is not least]
    return "; " + ", ".join(others) if others else ""


def _host_slots(layout: KVLayout, one_block: KVLayout, config: KVCacheConfig, free: FreeMemory) -> tuple[int, str]:
    wanted = config.host_cache_size
    if not wanted:
        return 0, ""
    block_bytes = one_block.pool_bytes
    num_slots = wanted // block_bytes
    if not num_slots:
        raise ConfigError(f"kv_cache_config.host_cache_size: {wanted:,} bytes, one block takes {block_bytes:,}")
    left = free.host - (layout.pool_bytes if free.device_is_host else 0)
    if num_slots * block_bytes > left:
        raise NotEnoughMemory(f"kv_cache_config.host_cache_size: {wanted:,} bytes, {left:,} are left beside the pool")
    num_tokens = num_slots * one_block.block_size
    return num_slots, f"; host tier: {wanted:,} / {block_bytes:,} bytes = {num_slots:,} blocks = {num_tokens:,} tokens"
