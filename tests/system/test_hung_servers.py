"""A server that was stopped and never goes on: its process is replaced, with one orchestrator process and with two."""

from __future__ import annotations

import asyncio
import os
import pathlib
import signal
from typing import Any, Final

import aiohttp
import pytest

from tests.support.completions import complete
from tests.support.deployment import Deployment, deployed
from tests.system.test_failover import pids

SECTION: Final = {"num_instances": 1, "max_seq_len": 512, "kv_cache_config": {"max_tokens": 1024}}


async def other_than(gone: int | None, deployment: Deployment) -> int:
    """The process of the generation server, once it is another one. Each worker learns that by itself, and any of them
    may be asked."""
    async with asyncio.timeout(100):
        while not (found := [pid for pid in await pids(deployment, "generation") if pid != gone]):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    return found[0]


@pytest.mark.parametrize("num_workers", [1, 2])
async def test_a_server_that_hangs_is_replaced(tmp_path: pathlib.Path, num_workers: int) -> None:
    document: dict[str, Any] = {
        "model": "smollm2-135m-instruct",
        "num_workers": num_workers,
        "server_hung_timeout_s": 3.0,
        "context_servers": SECTION,
        "generation_servers": SECTION,
    }
    async with deployed(tmp_path, document) as deployment, aiohttp.ClientSession() as session:
        hung = await other_than(None, deployment)
        os.kill(hung, signal.SIGSTOP)
        await other_than(hung, deployment)
        assert any("server_hung name=generation-0" in line for line in deployment.output)
        completion = await complete(session, deployment.url, range(1000, 1040), max_tokens=4)
        assert len(completion.token_ids) == 4
