"""Whether more servers fit into this machine's memory: asked before they are started.

Servers take the pages of their KV pools when they start. Where these are not there, processes die of signals, and the
system may choose somebody else's.
"""

from __future__ import annotations

import os
from typing import Final

from disaggregated.config.server import ServerConfig

_GPU_DRIVER: Final = "/dev/nvidiactl"
_GIB: Final = 1 << 30


def why_no_room(role: str, num_new: int, server: ServerConfig, *, available_bytes: int) -> str | None:
    """In words, why `num_new` servers like this one have no room for their KV pools; None when they may have.

    Their weights come on top, and are not known here.
    """
    wanted_bytes = max(num_new, 0) * pool_bytes(server)
    if wanted_bytes <= available_bytes:
        return None
    return (
        f"{role}: {num_new} more would take {wanted_bytes / _GIB:.1f} GiB for their KV pools alone, and "
        f"{available_bytes / _GIB:.1f} GiB are available; "
        "set kv_cache_config.cpu_memory_budget_bytes lower, or start fewer"
    )


def pool_bytes(server: ServerConfig) -> int:
    """Of host memory, for the pool and the host tier of one server; 0 where it is in a GPU, or counted in tokens."""
    cache = server.kv_cache_config
    is_on_gpu = server.device.startswith("cuda") or (server.device == "auto" and os.path.exists(_GPU_DRIVER))
    if is_on_gpu or cache.max_tokens is not None:
        return cache.host_cache_size
    pool = int(cache.cpu_memory_budget_bytes * cache.free_gpu_memory_fraction)
    return cache.host_cache_size + (min(pool, cache.max_gpu_total_bytes) if cache.max_gpu_total_bytes else pool)
