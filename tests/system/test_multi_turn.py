"""Chats of several turns through a whole deployment: a turn costs what is new in it, wherever the earlier ones lie."""

from __future__ import annotations

import asyncio
import os
import pathlib
import re
import signal
from collections.abc import AsyncIterator
from typing import Any, Final

import aiohttp
import pytest
import pytest_asyncio

from disaggregated.sampling_params import SamplingParams
from tests.support.completions import complete
from tests.support.deployment import Deployment, deployed
from tests.support.oracle import OneProcess

pytestmark = pytest.mark.asyncio(loop_scope="module")

MODEL: Final = "smollm2-135m-instruct"
BLOCK: Final = 32
SEEDED: Final = {"temperature": 0.8, "top_p": 0.95, "seed": 11}
NUM_NEW: Final = 40
"""Tokens of an answer: one block and a bit."""
SAMPLING: Final = SamplingParams(max_tokens=NUM_NEW, temperature=0.8, top_p=0.95, seed=11)
PATIENT: Final = {"pull_back_patience_ms": 60000}
UNHURRIED: Final = {"model": MODEL, "progress_timeout_s": 20.0}
"""A server that gets no core for a second is not lost: its requests would be told in two attempts."""


@pytest.fixture(scope="module")
def oracle() -> OneProcess:
    return OneProcess(MODEL, num_threads=1)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def deployment(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Deployment]:
    """Two context servers that take turns, so that each turn of a chat comes to one that has not seen the last."""
    section: dict[str, Any] = {
        "max_num_tokens": 64,
        "max_seq_len": 2048,
        "num_threads": 1,
        "kv_cache_config": {"max_tokens": 8192, "tokens_per_block": BLOCK},
        "cache_transceiver_config": PATIENT,
    }
    document = {
        **UNHURRIED,
        "context_servers": {**section, "num_instances": 2, "router": {"type": "round_robin"}},
        "generation_servers": {**section, "num_instances": 1},
    }
    async with deployed(tmp_path_factory.mktemp("deployment"), document) as made:
        yield made


async def blocks_known(deployment: Deployment, role: str) -> int:
    info = await deployment.get_json("/cluster_info")
    return sum(worker["blocks_known"] for worker in info["current_workers"][f"{role}_servers"])


async def wait_known(deployment: Deployment, count: int) -> None:
    """Until the orchestrator knows of so many blocks on the generation server; they are told once a step."""
    async with asyncio.timeout(200):
        while await blocks_known(deployment, "generation") < count:  # noqa: ASYNC110  another process decides
            await asyncio.sleep(0.02)


async def metric(deployment: Deployment, name: str) -> float:
    async with aiohttp.ClientSession() as session, session.get(f"{deployment.url}/prometheus/metrics") as answer:
        text = await answer.text()
    return sum(float(value) for value in re.findall(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE))


async def test_each_turn_computes_only_what_no_server_holds(deployment: Deployment, oracle: OneProcess) -> None:
    chat = list(range(1000, 1400))
    num_there = 0
    async with aiohttp.ClientSession() as session:
        for turn in range(3):
            expected = oracle.generate(chat, SAMPLING)
            answer = await complete(session, deployment.url, chat, max_tokens=NUM_NEW, **SEEDED)
            assert answer.token_ids == expected
            story = await deployment.get_json(f"/requests/{answer.request_id}")
            (attempt,) = story["attempts"]
            assert attempt["num_cached_tokens"] == num_there * BLOCK
            assert attempt["saved_bytes"] == num_there * attempt["transfer_bytes"] / (
                -(-len(chat) // BLOCK) - num_there
            )
            if turn:
                assert (attempt["reuse_verdict"], attempt["reuse_from"]) == ("pulled", attempt["generation_instance"])
                assert 0 < attempt["num_pulled_tokens"] <= num_there * BLOCK
                assert 0 < attempt["pull_estimate_s"] < attempt["compute_estimate_s"]
                assert story["ttft_parts"]["prefix_reuse_s"] == attempt["reuse_s"] > 0
            chat = [*chat, *answer.token_ids, *range(5000 + 100 * turn, 5030 + 100 * turn)]
            num_there = (len(chat) - 30 - 1) // BLOCK
            await wait_known(deployment, num_there)
    assert await metric(deployment, "disagg_prompt_pulled_tokens_total") > 300
    assert await metric(deployment, "disagg_kv_pulled_bytes_total") > 0
    assert await metric(deployment, "disagg_kv_saved_bytes_total") > 0
    assert await metric(deployment, 'disagg_prefix_hints_total{verdict="pulled"}') == 2
    ledger = await deployment.wait_idle()
    assert all(not server["entries"] for server in ledger["servers"]), ledger


async def test_chats_that_share_nothing_are_hinted_at_nobody(deployment: Deployment) -> None:
    async with aiohttp.ClientSession() as session:
        answer = await complete(session, deployment.url, list(range(20_000, 20_200)), max_tokens=2)
    story = await deployment.get_json(f"/requests/{answer.request_id}")
    assert story["attempts"][0]["reuse_from"] == story["attempts"][0]["reuse_verdict"] == ""


async def test_the_chat_goes_on_when_the_server_that_held_it_is_gone(
    tmp_path: pathlib.Path, oracle: OneProcess
) -> None:
    """Whether its death is known already, or a hint still leads to it: the prompt is computed."""
    section = {"max_num_tokens": 64, "max_seq_len": 2048, "num_threads": 1, "kv_cache_config": {"max_tokens": 4096}}
    document = {
        **UNHURRIED,
        "context_servers": {**section, "num_instances": 1},
        "generation_servers": {**section, "num_instances": 2},
    }
    async with deployed(tmp_path, document) as deployment, aiohttp.ClientSession() as session:
        chat = list(range(3000, 3200))
        answer = await complete(session, deployment.url, chat, max_tokens=NUM_NEW, **SEEDED)
        chat = [*chat, *answer.token_ids, *range(7000, 7010)]
        await wait_known(deployment, 7)
        workers = (await deployment.get_json("/cluster_info"))["current_workers"]["generation_servers"]
        (holder,) = [worker for worker in workers if worker["blocks_known"]]
        os.kill(holder["pid"], signal.SIGKILL)
        again = await complete(session, deployment.url, chat, max_tokens=NUM_NEW, **SEEDED)
        assert again.token_ids == oracle.generate(chat, SAMPLING)
