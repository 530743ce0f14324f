"""Servers for whose pools there is no memory are refused before they are started."""

from __future__ import annotations

import os
from typing import Any

import pytest

from disaggregated.config.server import KVCacheConfig, ServerConfig
from orchestrator.memory_room import pool_bytes, why_no_room

GIB = 1 << 30


def server(device: str = "cpu", **cache: Any) -> ServerConfig:
    return ServerConfig(model="m", role="context", device=device, kv_cache_config=KVCacheConfig(**cache))


def test_a_server_takes_its_budgets_fraction_and_its_host_tier() -> None:
    assert pool_bytes(server(cpu_memory_budget_bytes=10 * GIB, free_gpu_memory_fraction=0.5)) == 5 * GIB
    assert pool_bytes(server(cpu_memory_budget_bytes=10 * GIB, max_gpu_total_bytes=GIB)) == GIB
    tiered = server(cpu_memory_budget_bytes=10 * GIB, free_gpu_memory_fraction=0.5, host_cache_size=GIB)
    assert pool_bytes(tiered) == 6 * GIB


@pytest.mark.parametrize("elsewhere", [server("cuda"), server("cuda:1"), server(max_tokens=100)])
def test_a_pool_in_a_gpu_or_of_so_many_tokens_is_not_judged(elsewhere: ServerConfig) -> None:
    assert pool_bytes(elsewhere) == 0


@pytest.mark.parametrize(("has_gpu", "expected"), [(True, 0), (False, GIB // 2)])
def test_auto_is_a_gpu_where_there_is_one(has_gpu: bool, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "exists", lambda path: has_gpu)
    assert pool_bytes(server("auto", cpu_memory_budget_bytes=GIB, free_gpu_memory_fraction=0.5)) == expected


def test_a_hundred_servers_on_a_small_machine_are_refused_with_both_numbers_and_what_to_do() -> None:
    one = server(cpu_memory_budget_bytes=GIB, free_gpu_memory_fraction=1.0)
    assert why_no_room("context", 20, one, available_bytes=20 * GIB) is None
    assert why_no_room("context", 98, one, available_bytes=20 * GIB) == (
        "context: 98 more would take 98.0 GiB for their KV pools alone, and 20.0 GiB are available; "
        "set kv_cache_config.cpu_memory_budget_bytes lower, or start fewer"
    )


@pytest.mark.parametrize("num_new", [0, -3])
def test_fewer_servers_always_fit(num_new: int) -> None:
    assert why_no_room("context", num_new, server(), available_bytes=0) is None


def test_the_quick_start_fits_into_a_laptop() -> None:
    assert why_no_room("generation", 2, server(), available_bytes=4 * GIB) is None
