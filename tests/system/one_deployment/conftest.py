"""One deployment of the real model for all tests of this folder, each of which leaves it idle."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Final

import openai
import pytest
import pytest_asyncio

from tests.support.deployment import Deployment, deployed, is_idle

MODEL: Final = "smollm2-135m-instruct"


@pytest_asyncio.fixture(loop_scope="package", scope="package")
async def deployment(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Deployment]:
    """Long prompts are prefilled by the one server and continued by the other; short ones stay with the other. It
    verifies n-grams where it can, which changes no token. A server that gets no core for a second is not lost."""
    section = {"num_instances": 1, "max_num_tokens": 64, "max_seq_len": 1024, "kv_cache_config": {"max_tokens": 4096}}
    drafts = {"decoding_type": "NGram", "max_draft_len": 4}
    generation: dict[str, Any] = {**section, "router": {"type": "load_balancing"}, "speculative_config": drafts}
    document = {
        "model": MODEL,
        "progress_timeout_s": 20.0,
        "conditional_disagg_config": {"max_local_prefill_length": 12},
        "context_servers": section,
        "generation_servers": generation,
    }
    async with deployed(tmp_path_factory.mktemp("deployment"), document) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="package", autouse=True)
async def _nothing_is_held_afterwards(deployment: Deployment) -> AsyncIterator[None]:
    yield
    assert is_idle(left := await deployment.wait_idle()), left


@pytest_asyncio.fixture(loop_scope="package", scope="package")
async def client(deployment: Deployment) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=deployment.api, api_key="none", max_retries=0) as made:
        yield made
