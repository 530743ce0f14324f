"""The stock OpenAI client, for every module here that has a front door of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator

import openai
import pytest_asyncio

from tests.support.front_door import Door


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def client(door: Door) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{door.url}/v1", api_key="none", max_retries=0) as made:
        yield made
