"""`disaggregated serve mixed MODEL`: the same API and the same tokens from one server that prefills and decodes."""

from __future__ import annotations

import asyncio
import contextlib
import pathlib
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final

import aiohttp

from disaggregated import LLM, SamplingParams
from disaggregated.text import Tokenizer
from tests.support.completions import complete
from tests.support.deployment import deployed
from tests.support.processes import ServerProcess, spawned

MODEL: Final = "smollm2-135m-instruct"
SIZES: Final = {"max_num_tokens": 64, "max_seq_len": 1024, "num_threads": 1, "kv_cache_config": {"max_tokens": 8192}}
FLAGS: Final = ("--max_num_tokens=64", "--max_seq_len=1024", "--num_threads=1", "--kv_cache_config.max_tokens=8192")
CHAT: Final[dict[str, Any]] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "temperature": 0,
    "max_tokens": 12,
}
SEEDED: Final[dict[str, Any]] = {"temperature": 0.9, "top_p": 0.95, "seed": 2026}
NUM_NEW: Final = 12


@contextlib.asynccontextmanager
async def mixed() -> AsyncIterator[tuple[ServerProcess, str]]:
    """A running `serve mixed` on a free port, and its URL; ended as by Ctrl-C."""
    async with spawned("-m", "orchestrator", "serve", "mixed", MODEL, "--port=0", *FLAGS) as server:
        async with asyncio.timeout(200):
            line = await server.wait_line("^READY orchestrator ")
            await server.wait_line("server_joined role=generation")
        yield server, f"http://{line.split()[2]}"
        server.process.terminate()
        assert await server.wait_exit() == 0


async def tokens_of(session: aiohttp.ClientSession, url: str, prompts: Sequence[list[int]]) -> list[list[int]]:
    """All at once, so that prefill chunks and decode steps of different requests share steps; greedy, then seeded."""
    async with asyncio.TaskGroup() as group:
        running = [
            group.create_task(complete(session, url, prompt, max_tokens=NUM_NEW, **sampling))
            for sampling in ({}, SEEDED)
            for prompt in prompts
        ]
    return [task.result().token_ids for task in running]


def prompts_of(tokenizer: Tokenizer) -> list[list[int]]:
    text = "In one process each long prompt makes every running chat stutter. "
    return [tokenizer.encode(text * repeats) for repeats in (1, 4, 13)]


async def test_one_server_chats_streams_and_counts() -> None:
    async with mixed() as (server, url), aiohttp.ClientSession() as session:
        assert any(f"curl {url}/v1/chat/completions" in line for line in server.stderr)
        async with session.post(f"{url}/v1/chat/completions", json=CHAT) as answer:
            whole = await answer.json()
            assert answer.status == 200, whole
        assert whole["choices"][0]["message"]["content"] == "The capital of France is Paris."
        assert whole["usage"] == {**whole["usage"], "prompt_tokens": 37, "completion_tokens": 8, "total_tokens": 45}
        streamed = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
        async with session.post(f"{url}/v1/chat/completions", json=streamed) as answer:
            events = (await answer.read()).decode().strip().split("\n\n")
        assert events[-1] == "data: [DONE]"
        assert '"prompt_tokens":37' in events[-2]
        assert sum('"delta":{"content":' in event for event in events) == 7


async def test_mixed_disaggregated_and_in_one_program_give_the_same_tokens(tmp_path: pathlib.Path) -> None:
    with LLM(MODEL, dtype="float32", device="cpu", **SIZES) as llm:
        prompts = prompts_of(llm.tokenizer)
        params = [
            SamplingParams(max_tokens=NUM_NEW, ignore_eos=True, **sampling)
            for sampling in ({"temperature": 0}, SEEDED)
            for _ in prompts
        ]
        wanted = [output.outputs[0].token_ids for output in llm.generate([*prompts, *prompts], params)]
    document = {"model": MODEL, "context_servers": SIZES, "generation_servers": SIZES}
    async with aiohttp.ClientSession() as session:
        async with mixed() as (_, url):
            assert await tokens_of(session, url, prompts) == wanted
        async with deployed(tmp_path, document) as deployment:
            assert await tokens_of(session, deployment.url, prompts) == wanted
